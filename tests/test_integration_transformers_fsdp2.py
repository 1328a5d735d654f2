"""Hugging Face's Trainer that shards its model (FSDP2), on two ranks: against a loop by hand in one process.

accelerate shards models on accelerators alone: on CPUs its ``AcceleratorState`` takes ``DistributedType.MULTI_CPU``,
which is DistributedDataParallel, whatever plugin it is given. Here it is told otherwise; all else is what runs on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed (the extra 'test')")
pytest.importorskip("accelerate", reason="accelerate is not installed (the extra 'test')")

from accelerate.state import AcceleratorState, DistributedType
from oracle import assert_close
from ranks import NEEDS_GLOO
from trainer_cases import descend, llama, own_loss_loop, padded, rows, trainer

import wplfast
from wplfast.integrations.transformers import WPLCallback, trainer_fisher
from wplfast.params import is_sharded

pytestmark = [NEEDS_GLOO, pytest.mark.usefixtures("one_thread")]

N_STEPS, ALPHA, CLIP = 4, 30.0, 0.1
DATA = rows(5, 3, 7, 4)
SAVING = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
#: Whether the penalty is clipped, and options. Checkpoints are of an optimizer with a state: without one, torch makes
#: the optimizer step before it is saved, and accelerate cannot restore it.
RUNS: dict[str, tuple[bool, dict[str, Any]]] = {
    "after clipping": (False, {}),
    "before clipping": (True, {}),
    "adamw": (False, SAVING),
}


def shard_on_cpus() -> None:
    """Let accelerate take FSDP for ranks on CPUs, as it does on accelerators."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None:  # each object made later takes over the process's type again
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = init


def penalty_of(model: nn.Module) -> tuple[wplfast.WeightPlasticityLoss, dict[str, Tensor], dict[str, Tensor]]:
    """A penalty of a model that is whole yet; its F and anchors, which are away from the parameters."""
    generator = torch.Generator().manual_seed(2)
    drawn = {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}
    fisher = {n: d**4 for n, d in drawn.items()}
    theta_hat = {n: p.detach() + 0.1 * (drawn[n] - 0.5) for n, p in model.named_parameters()}
    wpl = wplfast.WeightPlasticityLoss(model, alpha=ALPHA)
    wpl.consolidate(fisher, theta_hat=theta_hat)
    return wpl, fisher, theta_hat


def whole(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: shard.full_tensor().detach() for name, shard in named}


def _rank(rank: int, folder: str) -> None:
    """Train in one go, and as another process would after a checkpoint."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(folder, "store").as_uri(), rank=rank, world_size=2)
    shard_on_cpus()
    config = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    options = {"ddp_backend": "gloo", "max_grad_norm": CLIP, "max_steps": N_STEPS, "logging_steps": N_STEPS}
    options |= {"fsdp": True, "fsdp_config": config}
    found: dict[str, Any] = {}
    for name, (before_clipping, more) in RUNS.items():
        model = llama()
        callback = WPLCallback(penalty_of(model)[0], before_clipping=before_clipping)
        run = trainer(model, DATA, f"{folder}/{name}", callbacks=[callback], **options, **more)
        run.train()
        assert all(map(is_sharded, callback.wpl.fisher.values()))
        (logged,) = [entry["wpl"] for entry in run.state.log_history if "wpl" in entry]
        fisher = trainer_fisher(run, independent=True)
        found[name] = {"state": whole(run.model.named_parameters()), "wpl": logged, "fisher": whole(fisher.items())}
    model = llama()
    callback = WPLCallback(wplfast.WeightPlasticityLoss(model, alpha=ALPHA))
    run = trainer(model, DATA, f"{folder}/adamw", callbacks=[callback], **options, **SAVING)
    run.train(resume_from_checkpoint=f"{folder}/adamw/checkpoint-2")
    found["resumed"] = whole(run.model.named_parameters())
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.barrier()
    dist.destroy_process_group()


def test_a_sharded_trainer_is_a_loop_by_hand(tmp_path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "found")
    _, fisher, theta_hat = penalty_of(llama())
    for name in ("after clipping", "before clipping"):
        by_hand, before_clipping = llama().train(), RUNS[name][0]
        loss = lambda model: model(**padded(DATA)).loss  # noqa: E731
        values = descend(by_hand, loss, fisher, theta_hat, N_STEPS, ALPHA, CLIP, before_clipping)
        assert found[name]["wpl"] == pytest.approx(sum(values) / N_STEPS, rel=1e-5)
        assert min(values) > 0.1  # it weighs
        for key, p in by_hand.named_parameters():
            torch.testing.assert_close(found[name]["state"][key], p.detach(), rtol=1e-5, atol=1e-6)
        assert_close(found[name]["fisher"], own_loss_loop(by_hand, DATA, lambda batch: batch["labels"].numel() - 1))
    assert all(torch.equal(p, found["resumed"][key]) for key, p in found["adamw"]["state"].items())
    saved = wplfast.WeightPlasticityLoss(llama(), alpha=ALPHA)
    saved.load(tmp_path / "adamw" / f"checkpoint-{N_STEPS}" / "wpl.safetensors")
    assert all(torch.equal(f, fisher[key]) for key, f in saved.fisher.items())
