"""What ranks do with options of a Fisher pass in FSDP2, and with what goes wrong on one of them."""

from __future__ import annotations

import datetime
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fsdp2_cases import GPT, SIZES, T, batch, ce, compare, data, everything, full, model, off, sharded
from oracle import fisher_loop

import wplfast
from wplfast import fisher_diagonal
from wplfast.distributed import blocks
from wplfast.distributed.blocks import Block

# ---- the Fisher: options ---------------------------------------------------------------------------------------------


def _joined(n, sizes=SIZES):
    return tuple(torch.cat(column) for column in zip(*everything(n, sizes), strict=True))


def weights_and_mean_gradient(rank, n):
    w = [torch.rand(s, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(9)]
    mine = [(x, y, w[len(x)]) for x, y in data(rank)]
    every = [(x, y, w[len(x)]) for x, y in everything(n)]
    one = fisher_diagonal(model(), every, ce, with_grad=True, reduce=False)
    fisher = fisher_diagonal(sharded(model()), mine, ce, with_grad=True)
    return {
        "off": max(off(fisher, one), off(fisher.mean_grad, one.mean_grad)),
        "weight": fisher.total_weight - one.total_weight,
        "n": fisher.n_samples,
    }


def max_samples(rank, n):
    """In the order of batches, then of ranks."""
    parts, found = [data(r) for r in range(n)], []
    x, y = (torch.cat(c) for c in zip(*(p[i] for i in range(3) for p in parts if i < len(p)), strict=True))
    for most in (4, 8, 100):
        fisher = fisher_diagonal(sharded(model()), data(rank), ce, max_samples=most)
        found.append((fisher.n_samples, off(fisher, fisher_loop(model(), [(x[:most], y[:most])], ce))))
    return {"counts": [c for c, _ in found], "total": len(y), "off": max(e for _, e in found)}


def exact_and_drawn(rank, n):
    """Targets from the model: all of them, and draws that are counted alone."""

    class Last(GPT):
        def forward(self, x):
            return super().forward(x)[:, -1, :3]

    def last():
        torch.manual_seed(0)
        return Last().double()

    sizes = [(2, 1), (2,), (), (1,)]
    mine, every = ([(x, y[:, -1] % 3) for x, y in d] for d in (data(rank, sizes), everything(n, sizes)))
    one = fisher_diagonal(last(), every, ce, fisher_type="exact", reduce=False)
    fisher = fisher_diagonal(sharded(last()), mine, ce, fisher_type="exact")
    drawn = fisher_diagonal(sharded(last()), mine, ce, fisher_type="mc", mc_samples=2)
    return {
        "off": off(fisher, one),
        "n": drawn.n_samples,
        "finite": all(bool(full(f).isfinite().all()) for f in drawn.values()),
    }


def losses_as_samples(rank, n):
    """Each token's loss is a sample, in a model without attention."""

    class Tokens(GPT):
        def forward(self, x):
            return self.head(self.tokens(x) + self.places(torch.arange(T).expand_as(x)))

    def made():
        torch.manual_seed(0)
        found = Tokens().double()
        del found.blocks
        found.blocks = []
        return found

    def by_token(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")

    whole, total, count = made(), None, 0
    for x, y in everything(n):
        for loss in by_token(whole(x), y):
            gradients = torch.autograd.grad(loss, list(whole.parameters()), retain_graph=True)
            total = (
                [g.square() for g in gradients]
                if total is None
                else [t + g.square() for t, g in zip(total, gradients, strict=True)]
            )
            count += 1
    expected = {name: t / count for (name, _), t in zip(whole.named_parameters(), total, strict=True)}
    fisher = fisher_diagonal(sharded(made()), data(rank), by_token, samples="losses")
    return {"off": off(fisher, expected), "n": fisher.n_samples - count}


def skipping(rank, n):
    """A batch of rank 0 has NaN in its loss, another in a gradient: that is left out on all ranks."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, spoils):
            ctx.spoils = spoils
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (float("nan") if ctx.spoils else 1.0), None

    def loss(outputs, targets):
        return ce(Spoil.apply(outputs, len(targets) == 3), targets) * (float("nan") if len(targets) == 1 else 1.0)

    sizes = [(3, 2, 1), (4, 5), (2, 4), (5,)]
    fisher = fisher_diagonal(sharded(model()), data(rank, sizes), loss, on_nonfinite="skip")
    left = [b for r in range(n) for i, b in enumerate(data(r, sizes)) if i > 0 and len(b[0]) > 1]
    return {"off": off(fisher, fisher_loop(model(), left, ce)), "n": fisher.n_samples - sum(len(x) for x, _ in left)}


def between_accumulated_steps(rank, n):
    """Gradients of two batches add up, the first without reduction, with a pass in between; each layout is measured."""
    pair, found = (model(), sharded(model())), {}
    x, y = batch(4 * n, 3)
    mine = [slice(4 * rank + 2 * i, 4 * rank + 2 * i + 2) for i in range(2)]
    ce(pair[0](x), y).mean().backward()
    module = pair[1]
    module.set_requires_gradient_sync(False)
    (ce(module(x[mine[0]]), y[mine[0]]).mean() / 2).backward()
    fisher = fisher_diagonal(module, data(rank), ce, verify="always")
    found["off"] = off(fisher, fisher_loop(model(), everything(n), ce))
    module.set_requires_gradient_sync(True)
    (ce(module(x[mine[1]]), y[mine[1]]).mean() / 2).backward()
    grads = [{name: p.grad for name, p in one.named_parameters()} for one in pair]
    return {**found, "step": off(grads[1], grads[0]), "n": fisher.n_samples}


OPTIONS = [
    between_accumulated_steps,
    weights_and_mean_gradient,
    max_samples,
    exact_and_drawn,
    losses_as_samples,
    skipping,
]

# ---- errors ----------------------------------------------------------------------------------------------------------


class BrokenError(Exception):
    pass


def _failing(at: int, rank: int):
    """A loss that fails on rank 1 in its n-th call."""
    calls = []

    def loss(outputs, targets):
        calls.append(0)
        if rank == 1 and len(calls) > at:
            raise BrokenError("the loss is broken")
        return ce(outputs, targets)

    return loss


def loss_fails(rank, n):
    fisher_diagonal(sharded(model()), data(rank), _failing(0, rank))


def loss_fails_later(rank, n):
    fisher_diagonal(sharded(model()), data(rank, [(2, 2, 2)] * n), _failing(3, rank))


def loader_fails(rank, n):
    def batches():
        yield batch(2, rank)
        if rank == 1:
            raise BrokenError("the loader is broken")
        yield batch(2, 10 + rank)

    fisher_diagonal(sharded(model()), batches(), ce)


def gradient_is_nan(rank, n):
    def loss(outputs, targets):
        if rank == 1:
            outputs.register_hook(lambda g: g * float("nan"))
        return ce(outputs, targets)

    fisher_diagonal(sharded(model()), data(rank), loss)


def samples_are_coupled(rank, n):
    fisher_diagonal(sharded(model()), data(rank), lambda o, y: ce(o - o.mean(0) if rank == 1 else o, y))


def no_data_at_all(rank, n):
    fisher_diagonal(sharded(model()), [], ce)


def local_alone(rank, n):
    fisher_diagonal(sharded(model()), data(rank), ce, reduce=False)


def own_accumulator(rank, n):
    wplfast.FisherAccumulator(sharded(model()))


def after_an_error(rank, n):
    """The same model goes on after a pass that failed."""
    module = sharded(model())
    with suppress(BrokenError, wplfast.errors.RankFailedError):
        fisher_diagonal(module, data(rank), _failing(0, rank))
    return compare(rank, n, model(), module)


ERRORS = [
    loss_fails,
    loss_fails_later,
    loader_fails,
    gradient_is_nan,
    samples_are_coupled,
    no_data_at_all,
    local_alone,
    own_accumulator,
]

# ---- what it costs ---------------------------------------------------------------------------------------------------


def costs(rank, n):
    """Collectives of a steady batch beside those of a step, and how many bytes of squares there are at once."""
    module, (x, y) = sharded(model()), batch(4, rank)
    calls: list[tuple[str, int]] = []
    names = [name for name in ("all_gather_into_tensor", "all_gather_single") if hasattr(dist, name)]
    scatter, gathers, opened, closed = (
        blocks._reduce_scatter,
        [getattr(dist, name) for name in names],
        Block.open,
        Block.close,
    )
    held, most, seen = set(), [0], []

    def counting(what, function):
        def call(*args, **options):
            tensors = [t for t in (*args, *options.values()) if isinstance(t, torch.Tensor)]
            calls.append((what, max(t.nbytes for t in tensors)))
            return function(*args, **options)

        return call

    def opens(block):
        opened(block)
        held.add(block)
        most[0] = max(most[0], sum(b._n_bytes for b in held))

    def closes(block):
        closed(block)
        held.discard(block)

    def repeated():
        for _ in range(6):
            seen.append(len(calls))
            yield x, y

    def step():
        ce(module(x), y).mean().backward()

    step()
    blocks._reduce_scatter, Block.open, Block.close = counting("reduce-scatter", scatter), opens, closes
    for name, function in zip(names, gathers, strict=True):
        setattr(dist, name, counting("all-gather", function))
    fsdp_scatters = [name for name in ("reduce_scatter_tensor", "reduce_scatter_single") if hasattr(dist, name)]
    own = [getattr(dist, name) for name in fsdp_scatters]
    for name, function in zip(fsdp_scatters, own, strict=True):
        setattr(dist, name, counting("reduce-scatter", function))
    try:
        step()
        of_step = sorted(calls)
        calls.clear()
        fisher_diagonal(module, repeated(), ce, independent=True)
        of_pass = sorted(calls[seen[4] : seen[5]])
    finally:
        blocks._reduce_scatter, Block.open, Block.close = scatter, opened, closed
        for name, function in zip([*names, *fsdp_scatters], [*gathers, *own], strict=True):
            setattr(dist, name, function)
    whole = max(sum(p.numel() * p.element_size() for p in part.parameters()) for part in module.blocks)
    return {
        "step": of_step,
        "pass": of_pass,
        "most": most[0],
        "block": whole,
        "parameters": sum(p.nbytes for p in model().parameters()),
    }


def fails_inside(rank: int, path: str) -> None:
    """A process whose model fails in its forward pass, and ends; and one that waits for what FSDP2 gathers there."""
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=Path(path, "store").as_uri(), rank=rank, world_size=2, timeout=patience)
    module = sharded(model())

    def fail(*_):
        raise BrokenError("the model is broken")

    if rank == 1:
        module.blocks[1].register_forward_pre_hook(fail)
    dist.barrier()
    started = time.monotonic()
    try:
        fisher_diagonal(module, data(rank), ce)
    except Exception as error:
        told = f"{time.monotonic() - started:.3f} {type(error).__name__}: {error}"
        Path(path, f"told.{rank}").write_text(told)
    os._exit(0)
