"""What a user of FSDP2 does, on ranks; then its last step in one process, from their checkpoint and from scratch.

Differences are norms over the norm of what is expected, all tensors together.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import wplfast
from wplfast.losses import cross_entropy

from .distributed_fsdp2 import sharded
from .models import Decoder
from .ranks import N_RANKS, on_ranks
from .timing import Budget
from .workloads import Workload, text

RATE, ALPHA, STEPS = 0.05, 1.0, 10
LARGE = Workload(
    "large", "decoder d=640, 10 layers, V=8000, T=16, N=4, tied head", 1.05,
    lambda quick: Decoder(50, 8, 16, 2, tied=True) if quick else Decoder(8000, 16, 640, 10, tied=True),
    text(4, 16, 8000),
)  # fmt: skip


def made(quick: bool) -> nn.Module:
    """Return the model, the same in every process."""
    torch.manual_seed(0)
    return LARGE.model(quick)


def batches(quick: bool, *seeds: int) -> list[tuple[Tensor, Tensor]]:
    """Return a batch for each seed."""
    return [LARGE.batch(quick, torch.Generator().manual_seed(seed)) for seed in seeds]


def seeds_of(rank: int) -> range:
    """Return those of a rank's data for the Fisher: each has a batch more than the one before."""
    return range(10 * rank, 10 * rank + 1 + rank)


def train(model: nn.Module, wpl: Any, quick: bool, steps: range, rank: int = 0, n_ranks: int = 1) -> float:
    """Train on batches of which each rank has an equal share; return the penalty's last value."""
    optimizer, value = torch.optim.SGD(model.parameters(), lr=RATE), torch.zeros(())
    for x, y in batches(quick, *(1000 + step for step in steps)):
        x, y = (part.chunk(n_ranks)[rank] for part in (x, y))
        cross_entropy(model(x), y, token_reduction="mean").mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        value = wpl.add_grad_()
        optimizer.step()
        optimizer.zero_grad()
    return float(value)


def on_each(quick: bool, folder: str) -> dict[str, Any]:
    """Fisher, consolidate, ten steps and save, on all ranks; then one more step."""
    import torch.distributed.checkpoint as dcp

    place = dist.get_rank(), dist.get_world_size()
    model, started = sharded(made(quick)), time.perf_counter()
    fisher = wplfast.fisher_diagonal(model, batches(quick, *seeds_of(place[0])), cross_entropy, independent=True)
    fisher_ended = time.perf_counter()
    wpl = wplfast.WeightPlasticityLoss(model, alpha=ALPHA)
    wpl.consolidate(fisher, normalize="max")
    penalty = train(model, wpl, quick, range(STEPS), *place)
    ended = time.perf_counter()
    dcp.save({"model": model.state_dict(), "wpl": wpl.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
    fisher.save(f"{folder}/fisher.safetensors")
    next_penalty = train(model, wpl, quick, range(STEPS, STEPS + 1), *place)
    after = {name: p.full_tensor() for name, p in model.state_dict().items()}
    if place[0] == 0:
        torch.save(after, f"{folder}/after")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {"fisher": fisher_ended - started, "ten steps": ended - fisher_ended},
        "penalty": penalty,
        "next_penalty": next_penalty,
    }


def in_one_process(quick: bool, folder: str) -> dict[str, Any]:
    """Load what the ranks saved, run the next step, and compare with theirs; and with all of it done here."""
    import torch.distributed.checkpoint as dcp

    after, last = torch.load(f"{folder}/after"), range(STEPS, STEPS + 1)
    loaded = made(quick)
    state = {"model": loaded.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint", no_dist=True)
    wpl = wplfast.WeightPlasticityLoss(loaded, alpha=ALPHA)
    wplfast.distributed.load_penalty(wpl, f"{folder}/checkpoint")
    train(loaded, wpl, quick, last)
    own = made(quick)
    data = batches(quick, *(seed for rank in range(N_RANKS) for seed in seeds_of(rank)))
    fisher = wplfast.fisher_diagonal(own, data, cross_entropy)
    wpl = wplfast.WeightPlasticityLoss(own, alpha=ALPHA)
    wpl.consolidate(fisher, normalize="max")
    return {
        "fisher_off": off(wplfast.Fisher.load(f"{folder}/fisher.safetensors"), fisher),
        "loaded_off": off(loaded.state_dict(), after),
        "penalty": train(own, wpl, quick, range(STEPS)),
        "next_penalty": train(own, wpl, quick, last),
        "own_off": off(own.state_dict(), after),
    }


def off(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference over that of what is expected, all tensors together."""
    squares = sum(float((found[name].double() - e.double()).square().sum()) for name, e in expected.items())
    return float((squares / sum(float(e.double().square().sum()) for e in expected.values())) ** 0.5)


def run(budget: Budget) -> dict[str, Any]:
    """Run it on ranks of their own, then in this process."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = on_ranks(on_each, budget.quick, folder)
        found = {"ranks": ranks, "one_process": in_one_process(budget.quick, folder)}
        return {"workload": LARGE.name, "shown": LARGE.shown, "n_ranks": N_RANKS, **found}
