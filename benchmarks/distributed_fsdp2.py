"""What a Fisher pass and the penalty cost under FSDP2, on two processes of this machine over gloo.

    python -m benchmarks.distributed_fsdp2              # time, bytes and memory, beside an ordinary FSDP2 step
    python -m benchmarks.distributed_fsdp2 end-to-end   # 50 M parameters: Fisher, training, save, load in one process
    python -m benchmarks.distributed_fsdp2 --json results.json

A step is a forward pass and ``loss.backward()``, gradients reduced. Batches of a pass are timed within it, from the
fourth on, and passes and steps take turns. Bytes are those of tensors that collectives were given: what an all-gather
fills, what a reduce-scatter or an all-reduce adds up. Memory is the process's own (resident), above that of the idle
model.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import wplfast
from wplfast.distributed import blocks

from .models import Decoder
from .plumbing.record import environment

N_RANKS = 2
ROUNDS, STEADY = 5, range(3, 8)  # batches of a pass that are timed: known, and not measured again

#: vocabulary, length, width, layers; samples a rank.
SIZES = {"decoder": (1000, 128, 256, 4, 8), "wide": (1000, 32, 640, 6, 1), "large": (8000, 16, 640, 10, 2)}
ce = wplfast.losses.cross_entropy


def made(size: str) -> nn.Module:
    """Return the model, the same on every rank."""
    torch.manual_seed(0)
    *shape, _ = SIZES[size]
    return Decoder(*shape, tied=True)


def sharded(model: nn.Module) -> nn.Module:
    """Apply FSDP2 to each block and the root."""
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def batch(size: str, seed: int, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Return tokens and the next ones."""
    vocabulary, length, _, _, count = SIZES[size]
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (n or count, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


# ---- time ------------------------------------------------------------------------------------------------------------


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Run an ordinary step."""
    ce(model(x), y).mean().backward()
    for p in model.parameters():
        p.grad = None


def times(size: str) -> dict[str, float]:
    """Return seconds of a step and of a steady batch of a pass, as medians, and their ratio with its quartiles."""
    model, (x, y) = sharded(made(size)), batch(size, dist.get_rank())
    found: dict[str, list[float]] = {"step": [], "fisher": [], "ratio": []}
    for _ in range(ROUNDS):
        steps: list[float] = []
        stamps: list[float] = []
        for _ in STEADY:
            dist.barrier()
            started = time.perf_counter()
            step(model, x, y)
            steps.append(time.perf_counter() - started)

        wplfast.fisher_diagonal(model, _stamped((x, y), stamps), ce, independent=True)
        passes = [stamps[i + 1] - stamps[i] for i in STEADY]
        found["step"].append(statistics.median(steps))
        found["fisher"].append(statistics.median(passes))
        found["ratio"].append(found["fisher"][-1] / found["step"][-1])
    low, _, high = statistics.quantiles(found["ratio"], n=4)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {**medians, "ratio from": low, "ratio to": high}


def _stamped(one: tuple[Tensor, Tensor], stamps: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a batch again and again; note when it is asked for."""
    for _ in range(STEADY.stop + 1):
        stamps.append(time.perf_counter())
        yield one


# ---- bytes -----------------------------------------------------------------------------------------------------------

_COLLECTIVES = {
    "all_gather_into_tensor": "all-gather",
    "all_gather_single": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "all_reduce": "all-reduce",
    "all_gather": "agreement",
}


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Count collectives of this process, and their bytes; a call within another one is not counted again."""
    calls: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    depth = [0]

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not depth[0]:
                tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, list) else [a])]
                calls[name] += 1
                sizes[name] += max(t.nbytes for t in tensors if isinstance(t, Tensor))
            depth[0] += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    before = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}
    scatter = blocks._reduce_scatter
    for name, function in before.items():
        setattr(dist, name, counting(_COLLECTIVES[name], function))
    blocks._reduce_scatter = counting("reduce-scatter", scatter)
    try:
        yield calls, sizes
    finally:
        blocks._reduce_scatter = scatter
        for name, function in before.items():
            setattr(dist, name, function)


def communicated(size: str) -> dict[str, Any]:
    """Return calls and bytes of a step, of a steady batch of a pass, and of each use of the penalty."""
    model, (x, y) = sharded(made(size)), batch(size, dist.get_rank())
    step(model, x, y)
    found: dict[str, Any] = {}
    with counted() as (calls, sizes):
        step(model, x, y)
        found["step"] = dict(calls), dict(sizes)
    with counted() as (calls, sizes):
        seen = []

        def data() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(6):
                seen.append((calls.copy(), sizes.copy()))
                yield x, y

        fisher = wplfast.fisher_diagonal(model, data(), ce, independent=True)
        (calls_before, before), (calls_after, after) = seen[4:6]
        found["batch of a pass"] = dict(calls_after - calls_before), dict(after - before)
        found["first batch"] = dict(seen[1][0] - seen[0][0]), dict(seen[1][1] - seen[0][1])
    wpl = wplfast.WeightPlasticityLoss(model)
    for name, use in (("consolidate", lambda: wpl.consolidate(fisher)), ("wpl()", wpl), ("add_grad_()", wpl.add_grad_)):
        with counted() as (calls, sizes):
            use()
            found[name] = dict(calls), dict(sizes)
    found["parameters"] = sum(p.numel() * p.element_size() for p in model.parameters())
    return found


# ---- memory ----------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(run: Callable[[], object]) -> int:
    """Return the most that was resident while something ran, above what was before."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, most, done = resident(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(0, most[0] - before)


def memory(size: str) -> dict[str, float]:
    """Return MB above the idle model: of a step with its gradients, of a pass, and what the contract allows a pass."""
    model, (x, y) = sharded(made(size)), batch(size, dist.get_rank())

    def ordinary() -> None:
        ce(model(x), y).mean().backward()

    ordinary()
    for p in model.parameters():
        p.grad = None
    of_step = peak(ordinary)
    for p in model.parameters():
        p.grad = None
    with torch.no_grad():
        model(x)
    for module in blocks.modules_of(model):
        module.reshard()
    fishers: list[Any] = []
    of_pass = peak(lambda: fishers.append(wplfast.fisher_diagonal(model, [(x, y)] * 4, ce, independent=True)))
    shards = sum(f.to_local().nbytes for f in fishers[0].values())
    whole = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in model.blocks]
    root = sum(p.numel() * p.element_size() for p in model.parameters()) - sum(whole)
    return {
        name: value / 2**20
        for name, value in {
            "step": of_step,
            "pass": of_pass,
            "shards of F": shards,
            "F of a block": max(whole),
            "F of the root": root,
        }.items()
    }


# ---- end to end ------------------------------------------------------------------------------------------------------

RATE, ALPHA, STEPS = 0.05, 1.0, 10


def train(model: nn.Module, wpl: Any, size: str, share: slice, steps: range) -> float:
    """Train on batches of all ranks, of which this one takes a share; return the penalty's last value."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    value = torch.zeros(())
    for i in steps:
        x, y = batch(size, 1000 + i, 4)
        ce(model(x[share]), y[share], token_reduction="mean").mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        value = wpl.add_grad_()
        optimizer.step()
        optimizer.zero_grad()
    return float(value)


def end_to_end(size: str, folder: str) -> dict[str, Any]:
    """Fisher, consolidate, ten steps and save on all ranks; then one more step."""
    import torch.distributed.checkpoint as dcp

    rank, said = dist.get_rank(), {}
    model = sharded(made(size))
    said["parameters"] = sum(p.numel() for p in model.parameters())
    started = time.perf_counter()
    fisher = wplfast.fisher_diagonal(model, [batch(size, 10 * rank + i) for i in range(1 + rank)], ce, independent=True)
    said["Fisher, s"] = time.perf_counter() - started
    wpl = wplfast.WeightPlasticityLoss(model, alpha=ALPHA)
    wpl.consolidate(fisher, normalize="max")
    started = time.perf_counter()
    share = slice(2 * rank, 2 * rank + 2)
    said["penalty"] = train(model, wpl, size, share, range(STEPS))
    said["ten steps, s"] = time.perf_counter() - started
    dcp.save({"model": model.state_dict(), "wpl": wpl.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
    fisher.save(f"{folder}/fisher.safetensors")
    said["next penalty"] = train(model, wpl, size, share, range(STEPS, STEPS + 1))
    after = {name: p.full_tensor() for name, p in model.state_dict().items()}
    if rank == 0:
        torch.save(after, f"{folder}/after")
    return said


def in_one_process(size: str, folder: str) -> dict[str, float]:
    """Load what the ranks saved, run the next step, and compare with theirs; and with all of it done here."""
    import torch.distributed.checkpoint as dcp

    after, whole = torch.load(f"{folder}/after"), slice(None)
    model = made(size)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint", no_dist=True)
    wpl = wplfast.WeightPlasticityLoss(model, alpha=ALPHA)
    wplfast.distributed.load_penalty(wpl, f"{folder}/checkpoint")
    train(model, wpl, size, whole, range(STEPS, STEPS + 1))
    loaded = _off(model.state_dict(), after)
    other = made(size)
    data = [batch(size, 10 * rank + i) for rank in range(N_RANKS) for i in range(1 + rank)]
    fisher = wplfast.fisher_diagonal(other, data, ce)
    own = wplfast.WeightPlasticityLoss(other, alpha=ALPHA)
    own.consolidate(fisher, normalize="max")
    value = train(other, own, size, whole, range(STEPS))
    next_value = train(other, own, size, whole, range(STEPS, STEPS + 1))
    saved = wplfast.Fisher.load(f"{folder}/fisher.safetensors")
    return {
        "F off by": _off(saved, fisher),
        "loaded, next step off by": loaded,
        "all in one process, off by": _off(other.state_dict(), after),
        "penalty": value,
        "next penalty": next_value,
    }


def _off(found: Any, expected: Any) -> float:
    """Return the norm of the difference over that of what is expected, all tensors together."""
    squares = sum(float((found[n].double() - e.double()).square().sum()) for n, e in expected.items())
    return float((squares / sum(float(e.double().square().sum()) for e in expected.values())) ** 0.5)


# ---- processes -------------------------------------------------------------------------------------------------------


def _work(rank: int, function: Callable[..., Any], arguments: tuple[Any, ...], folder: str) -> None:
    torch.set_num_threads(1)
    store, patience = Path(folder, "store").as_uri(), datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=N_RANKS, timeout=patience)
    found = function(*arguments)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function on all ranks and return what it gives on the first."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (function, arguments, folder), nprocs=N_RANKS)
        return json.loads(Path(folder, "found.json").read_text())


def main(arguments: list[str] | None = None) -> int:
    """Measure; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("costs", "end-to-end"), default="costs")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args(arguments)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)  # freed memory is given back, so that residence tells
    found: dict[str, Any] = {"environment": environment()}
    if options.what == "costs":
        found |= {"time": on_ranks(times, "decoder"), "bytes": on_ranks(communicated, "decoder")}
        found["memory"] = on_ranks(memory, "wide")
    else:
        with tempfile.TemporaryDirectory() as folder:
            found["ranks"] = on_ranks(end_to_end, "large", folder)
            found["one process"] = in_one_process("large", folder)
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
