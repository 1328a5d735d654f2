"""What ranks do with the penalty of models in FSDP2, its files and its checkpoints, against one process."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp2_cases import batch, ce, data, everything, full, model, off, sharded
from oracle import fisher_loop
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import wplfast
from wplfast import Fisher, WeightPlasticityLoss, fisher_diagonal
from wplfast.distributed import WholeState, load_penalty
from wplfast.distributed.shards import like, local_part

ALPHA, L2, PART = 3.0, 0.1, ["blocks.0.qkv.weight", "head.weight"]


def folder() -> Path:
    """Shared by all launches of a test session."""
    return Path(os.environ["WPLFAST_TEST_FOLDER"])


def moved(module: nn.Module, seed: int) -> nn.Module:
    """Change all parameters, alike on all ranks and however they lie."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            change = 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(like(local_part(change, p), p))
    return module


@functools.cache
def fishers(n: int) -> list[Fisher]:
    """Two Fishers of one process, of anything."""
    whole = model()
    return [fisher_diagonal(whole, [b], ce, reduce=False) for b in (everything(n)[0], batch(4, 7))]


def penalty(module: nn.Module, **options) -> WeightPlasticityLoss:
    return WeightPlasticityLoss(module, alpha=ALPHA, l2=L2, **options)


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters()}


def against(n: int, act: Callable[[WeightPlasticityLoss, nn.Module], object], wrap: str = "each", **options) -> dict:
    """Let a penalty of one process and one of shards do the same; how far values and gradients are off."""
    found = []
    for module in (model(), sharded(model(), wrap, **options)):
        wpl = penalty(module)
        with wplfast.distributed.local():
            act(wpl, moved(module, 1))
        moved(module, 2)
        value = wpl()
        value.backward()
        added = wpl.add_grad_(0.5)
        placed = all(isinstance(p, DTensor) == isinstance(p.grad, DTensor) for p in module.parameters())
        found.append((value.item(), added.item(), grads(module), placed, wpl.n_anchors))
    (v, a, g, _, k), (v_, a_, g_, placed, k_) = found
    return {"off": max(abs(v - v_) / v, abs(a - a_) / a, off(g_, g)), "placed": placed, "anchors": k_ - k}


def consolidated(rank, n):
    first, _ = fishers(n)
    return against(n, lambda wpl, _: wpl.consolidate(first))


def merged_and_clipped(rank, n):
    first, second = fishers(n)

    def act(wpl, module):
        wpl.consolidate(first)
        wpl.consolidate(second, theta_hat=None, weight=0.5, clip_norm=0.2)
        moved(module, 3)
        wpl.consolidate(first, decay=0.7)

    return against(n, act, "nested")


def updated_and_normalised(rank, n):
    first, second = fishers(n)

    def act(wpl, module):
        wpl.consolidate(first, normalize="trace")
        wpl.update(second, 0.5, normalize="max", active=PART)

    return against(n, act, "root")


def some_parameters_whole(rank, n):
    first, _ = fishers(n)
    return against(n, lambda wpl, _: wpl.consolidate(first), "blocks")


def offloaded(rank, n):
    first, _ = fishers(n)
    return against(n, lambda wpl, _: wpl.consolidate(first), offload_policy=CPUOffloadPolicy(pin_memory=False))


def own_fisher_as_shards(rank, n):
    """Matched by the identity of the parameters, whatever their names are."""
    module, whole = sharded(model()), model()
    fisher = fisher_diagonal(module, data(rank), ce)
    wpl, one = (WeightPlasticityLoss({f"x.{k}": p for k, p in m.named_parameters()}) for m in (module, whole))
    wpl.consolidate(fisher)
    with wplfast.distributed.local():
        one.consolidate({f"x.{k}": full(f) for k, f in fisher.items()})
    moved(module, 2), moved(whole, 2)
    return {"off": abs(wpl().item() - one().item()) / one().item(), "again": off(wpl.fisher, one.fisher)}


def parts_and_prefixes(rank, n):
    first, _ = fishers(n)
    module, whole = sharded(model()), model()
    found = []
    for one in (whole, module):
        wpl = WeightPlasticityLoss(one, alpha={"": 1.0, "blocks.0.": 5.0})
        with wplfast.distributed.local():
            wpl.consolidate(first)
        moved(one, 2)
        part = wpl.subset(PART)
        found.append(
            [part().item(), float(part.add_grad_()), wpl().item(), sum(p.grad is not None for p in one.parameters())]
        )
    return {"off": max(abs(a - b) / a for a, b in zip(*found, strict=True))}


def trained(rank, n):
    """Steps with a loss: clipped, and the gradient added by the optimizer; by the graph; and under a loss scale."""
    first, _ = fishers(n)
    x, y = batch(8, 5)
    found = []
    for module in (model(), sharded(model())):
        wpl = penalty(module)
        with wplfast.distributed.local():
            wpl.consolidate(first)
        moved(module, 2)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        share = slice(rank * 8 // n, (rank + 1) * 8 // n) if wpl._groups.references.is_sharded else slice(None)
        for step in range(6):
            optimizer.zero_grad()
            loss = ce(module(x[share]), y[share]).mean()
            loss = loss + wpl() if step < 2 else loss
            scaler.scale(loss).backward() if step >= 4 else loss.backward()
            if step >= 4:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            if step == 2:
                handle = wpl.attach(optimizer)
            if step >= 4:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        handle.remove()
        found.append(dict(module.named_parameters()))
    return {"off": off(found[1], found[0])}


def while_gathered(rank, n):
    """Made and evaluated after a forward pass, when modules hold whole parameters."""
    first, _ = fishers(n)
    module = sharded(model(), reshard_after_forward=False)
    module(batch(2, 0)[0])
    wpl = penalty(module)
    wpl.consolidate(first)
    module(batch(2, 0)[0])
    kinds = {isinstance(p, DTensor) for p in module.parameters()}
    before, value = wpl().item(), wpl.add_grad_()
    return {
        "gathered": False in kinds,
        "off": abs(before - float(value)),
        "placed": all(isinstance(t, DTensor) for t in wpl.fisher.values()),
    }


def one_rank_fails_to_consolidate(rank, n):
    module = sharded(model())
    wpl, (first, second) = penalty(module), fishers(n)
    wpl.consolidate(first)
    before = {name: full(f).clone() for name, f in wpl.fisher.items()}
    bad = {name: f.clone() for name, f in second.items()}
    if rank == 1:
        bad["head.weight"][-1, -1] = float("nan")
    try:
        wpl.consolidate(bad)
    except wplfast.errors.WplfastError as error:
        return {"error": f"{type(error).__name__}: {error}", "off": off(wpl.fisher, before)}
    return {"error": ""}


def states(rank, n):
    """state_dict to another sharded penalty, and to one of one process; and back from there."""
    first, second = fishers(n)
    module, whole, other = sharded(model()), model(), sharded(model(), "root")
    wpl = penalty(module)
    wpl.consolidate(first)
    moved(module, 1)
    wpl.consolidate(second)
    state = wpl.state_dict()
    one, again, back = penalty(whole), penalty(other), penalty(module)
    one.load_state_dict({key: full(value) for key, value in state.items()})
    again.load_state_dict(state)
    back.load_state_dict(one.state_dict())
    moved(whole, 2), moved(other, 2)
    values = [one().item(), again().item()]
    moved(module, 3)
    old = [wpl().item(), back().item()]
    return {
        "off": max(abs(values[0] - values[1]) / values[0], abs(old[0] - old[1]) / old[0]),
        "keys": all(
            isinstance(v, DTensor) for k, v in state.items() if k.startswith(("fisher", "offset", "theta_hat"))
        ),
    }


def saves(rank, n):
    """A checkpoint and files, on four ranks; what is in them is told to those that load."""
    module = sharded(model())
    fisher = fisher_diagonal(module, data(rank), ce, with_grad=True)
    wpl = penalty(module)
    wpl.consolidate(fisher)
    moved(module, 1)
    wpl.consolidate(fisher)
    fisher.save(folder() / "fisher.safetensors", theta_hat=module)
    wpl.save(folder() / "wpl.safetensors")
    moved(module, 2)
    dcp.save({"model": module.state_dict(), "wpl": wpl.state_dict()}, checkpoint_id=folder() / "checkpoint")
    whole = {name: full(f) for name, f in fisher.items()}, {name: full(g) for name, g in fisher.mean_grad.items()}
    hats = {name: full(t) for name, t in wpl.theta_hat.items()}
    value = wpl().item()
    if rank == 0:
        torch.save((*whole, hats, value, fisher.n_samples), folder() / "told")
    dist.barrier()
    return True


def loads(rank, n):
    module = sharded(model())
    state = {"model": module.state_dict()}
    dcp.load(state, checkpoint_id=folder() / "checkpoint")
    module.load_state_dict(state["model"])
    return loaded(module)


def loaded(module: nn.Module) -> dict:
    """What files and a checkpoint of four ranks give here."""
    fisher, gradient, hats, value, n_samples = torch.load(folder() / "told", weights_only=False)
    from_checkpoint, from_file, from_fisher = penalty(module), penalty(module), penalty(module)
    load_penalty(from_checkpoint, folder() / "checkpoint")
    from_file.load(folder() / "wpl.safetensors")
    read = Fisher.load(folder() / "fisher.safetensors")
    from_fisher.consolidate(read)
    return {
        "values": [abs(wpl().item() - value) / value for wpl in (from_checkpoint, from_file)],
        "F": max(off(read, fisher), off(read.mean_grad, gradient), off(from_fisher.fisher, fisher)),
        "theta_hat": off(from_file.theta_hat, hats),
        "n": read.n_samples - n_samples,
        "anchors": from_checkpoint.n_anchors,
    }


def accelerated(rank, n):
    """A prepared model and loader, and a checkpoint of accelerate's, which pickles what rank 0 says of the penalty."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True)
    engine = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}  # on accelerators it chooses it itself
    accelerator.state._shared_state.update(engine)
    x, y = batch(5 * n - 1, 3)
    module = model()
    parts = (module, torch.optim.SGD(module.parameters(), lr=0.1), DataLoader(TensorDataset(x, y), batch_size=2))
    module, optimizer, loader = accelerator.prepare(*parts)
    fisher = fisher_diagonal(module, loader, ce)
    found = {"kind": type(module).__name__, "F": off(fisher, fisher_loop(model(), [(x, y)], ce))}
    wpl = penalty(module)
    wpl.consolidate(fisher)
    accelerator.register_for_checkpointing(WholeState(wpl), wpl)

    def step():
        optimizer.zero_grad()
        accelerator.backward(ce(module(x), y).mean())
        accelerator.clip_grad_norm_(module.parameters(), 1.0)
        value = wpl.add_grad_()
        optimizer.step()
        return value.item()

    step()
    accelerator.state._shared_state.update(engine)
    path = folder() / f"accelerated.{n}"
    accelerator.save_state(path)
    kept = {name: full(f).clone() for name, f in wpl.fisher.items()}
    values = [step(), step()]
    wpl.reset()
    try:
        accelerator.load_state(path)
    except (ValueError, wplfast.errors.RankFailedError) as error:  # of the penalty itself, after the other
        found["error"] = str(error)
    found["off"] = max(off(wpl.fisher, kept), *(abs(step() - value) for value in values))
    whole = penalty(model())
    whole.load_state_dict(torch.load(path / "custom_checkpoint_0.pkl", weights_only=True))
    found["whole"] = off(whole.fisher, kept)
    dist.barrier()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return found


def one_part_of_a_state_is_bad(rank, n):
    """NaN in what lies on rank 1 alone."""
    wpl = penalty(sharded(model()))
    wpl.consolidate(fishers(n)[0])
    state, expected = wpl.state_dict(), {name: full(f).clone() for name, f in wpl.fisher.items()}
    if rank == 1:
        state["fisher.head.weight"].to_local()[-1, -1] = float("nan")
    try:
        wpl.load_state_dict(state)
    except RuntimeError as error:
        return {"error": str(error), "off": off(wpl.fisher, expected)}
    return {"error": ""}


def disk_is_missing(rank, n):
    """Rank 0 cannot write: all say so."""
    try:
        fisher_diagonal(sharded(model()), [batch(2, rank)], ce).save(folder() / "nowhere" / "f.safetensors")
    except (OSError, wplfast.errors.WplfastError) as error:
        return f"{type(error).__name__}: {error}"


PENALTIES = [
    consolidated,
    merged_and_clipped,
    updated_and_normalised,
    some_parameters_whole,
    offloaded,
]
OTHERS = [
    own_fisher_as_shards,
    parts_and_prefixes,
    trained,
    while_gathered,
    one_rank_fails_to_consolidate,
    states,
    accelerated,
    one_part_of_a_state_is_bad,
    disk_is_missing,
]
