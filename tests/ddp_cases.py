"""What ranks do with a model in DistributedDataParallel; :mod:`test_ddp` says what must come out."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from fisher_cases import ce, mlp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import wplfast
from wplfast import Fisher, fisher_diagonal

#: Batches of each rank; of two ranks the first two. The third has no data.
SIZES = [(3, 2), (4,), (), (1, 3, 2)]


def model() -> nn.Module:
    """The same model on every rank."""
    torch.manual_seed(0)
    return mlp(torch.float64)


def ddp(**options) -> DistributedDataParallel:
    return DistributedDataParallel(model(), **options)


def batch(n: int, seed: int, *more: str):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 6, generator=generator, dtype=torch.float64), torch.randint(4, (n,), generator=generator)
    return (x, y, torch.rand(n, generator=generator, dtype=torch.float64)) if "weights" in more else (x, y)


def data(rank: int, *more: str) -> list:
    """A rank's own batches."""
    return [batch(n, 10 * rank + i, *more) for i, n in enumerate(SIZES[rank])]


def told(fisher: Fisher) -> dict:
    """What a test asks of a Fisher."""
    grad = None if fisher.mean_grad is None else dict(fisher.mean_grad)
    return {
        "F": dict(fisher),
        "n": fisher.n_samples,
        "weight": fisher.total_weight,
        "grad": grad,
        "reduced": fisher.reduced,
        "skipped": fisher.report.skipped_samples,
    }


# ---- one Fisher of all ranks -----------------------------------------------------------------------------------------


def wrapped(rank, n):
    return told(fisher_diagonal(ddp(), data(rank), ce, with_grad=True))


def inner_module(rank, n):
    return told(fisher_diagonal(ddp().module, data(rank), ce, reduce=True, with_grad=True))


def params_of_the_wrapper(rank, n):
    wrapper = ddp()
    return told(fisher_diagonal(wrapper, data(rank), ce, params=wrapper))


def verified_always(rank, n):
    return told(fisher_diagonal(ddp(), data(rank), ce, verify="always"))


def not_verified(rank, n):
    return told(fisher_diagonal(ddp(), data(rank), ce, verify=False))


def samples_are_losses(rank, n):
    return told(fisher_diagonal(ddp(), data(rank), ce, samples="losses"))


def accumulated(rank, n):
    """The context manager: the wrapper is called as ever, and each rank has its own until they reduce."""
    wrapper = ddp()
    batches = data(rank)
    if not batches:
        return told(Fisher.zeros(wrapper).all_reduce_())
    with wplfast.FisherAccumulator(wrapper) as accumulator:
        for x, y in batches:  # of other numbers on other ranks: a broadcast in the forward pass would wait
            accumulator.backward(ce(wrapper(x), y))
        own = accumulator.result()
    assert "forward" not in wrapper.__dict__
    assert own.n_samples == sum(SIZES[rank])
    return told(own.all_reduce_())


class Parts(nn.Module):
    """A model of which a part is wrapped."""

    def __init__(self):
        super().__init__()
        self.part = ddp()

    def forward(self, x):
        return self.part(x)


def part_is_wrapped(rank, n):
    found = told(fisher_diagonal(Parts(), data(rank), ce))
    return found | {"F": {name.removeprefix("part.module."): f for name, f in found["F"].items()}}


def compiled(rank, n):
    return told(fisher_diagonal(torch.compile(ddp(), backend="eager"), data(rank), ce))


class DeepSpeedEngine(nn.Module):
    """What tells DeepSpeed's engine: a module, and the stage of its optimizer."""

    def __init__(self, stage):
        super().__init__()
        self.module, self.stage = model(), stage

    def zero_optimization_stage(self):
        return self.stage


def zero_two(rank, n):
    return told(fisher_diagonal(DeepSpeedEngine(2), data(rank), ce))


#: All of them give the Fisher of all data.
OF_ALL_DATA = [
    wrapped, inner_module, params_of_the_wrapper, verified_always, not_verified, samples_are_losses, accumulated,
    part_is_wrapped, compiled, zero_two
]  # fmt: skip


def weighted(rank, n):
    return told(fisher_diagonal(ddp(), data(rank, "weights"), ce, with_grad=True))


def max_samples(rank, n):
    return [told(fisher_diagonal(ddp(), data(rank), ce, max_samples=most)) for most in (1, 4, 6, 8, 1000)]


def max_samples_skipping(rank, n):
    """Samples that are left out make room for others."""
    batches = data(rank)
    if rank == 0:
        batches[0][0][0] = float("nan")
    return told(fisher_diagonal(ddp(), batches, ce, max_samples=3, on_nonfinite="skip"))


def skipped(rank, n):
    batches = data(rank)
    if rank == 1:
        batches[0][0][0] = float("nan")
    return told(fisher_diagonal(ddp(), batches, ce, on_nonfinite="skip"))


def exact(rank, n):
    return told(fisher_diagonal(ddp(), data(rank), ce, fisher_type="exact"))


def not_reduced(rank, n):
    return told(fisher_diagonal(ddp(), data(rank) or data(0), ce, reduce=False))


def plain(rank, n):
    for _ in range(2):
        found = told(fisher_diagonal(model(), data(rank) or data(0), ce))
    return found


def drawn(rank, n):
    """All ranks draw for the same data."""
    options = {"fisher_type": "mc", "mc_samples": 2}
    own = [dict(fisher_diagonal(model(), data(0), ce, reduce=reduce, **options)) for reduce in (None, None, False)]
    return (
        own,
        told(fisher_diagonal(ddp(), data(0), ce, **options)),
        told(fisher_diagonal(ddp(), data(0), ce, **options)),
    )


def constants_on_one(rank, n):
    """Losses of a rank that depend on nothing count with gradients of zero."""
    loss = (lambda outputs, targets: torch.ones(len(targets), dtype=torch.float64)) if rank == 1 else ce
    return told(fisher_diagonal(ddp(), data(rank), loss))


def pairs(rank, n):
    """The ranks of the group that the model is wrapped for."""
    group = [dist.new_group([first, first + 1]) for first in range(0, n, 2)][rank // 2]
    return told(fisher_diagonal(ddp(process_group=group), data(rank), ce))


# ---- what the pass leaves --------------------------------------------------------------------------------------------


class Normed(nn.Sequential):
    """With buffers that training changes."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
        self.double()


def buffers(rank, n):
    """Each rank's are of its own batch, and those of rank 0 hold from the next forward pass on."""
    wrapper = DistributedDataParallel(Normed())
    wrapper(batch(3, 100 + rank)[0]).sum().backward()
    before = copy.deepcopy(dict(wrapper.module.named_buffers()))
    found = told(fisher_diagonal(wrapper, data(rank), ce))
    same = all(torch.equal(b, before[name]) for name, b in wrapper.module.named_buffers())
    return found, before, same, all(module.training for module in wrapper.modules())


def own_buffers(rank, n):
    wrapper = DistributedDataParallel(Normed(), broadcast_buffers=False)
    wrapper(batch(3, 100 + rank)[0]).sum().backward()
    found = told(fisher_diagonal(wrapper, data(rank), ce))
    return found, dict(wrapper.module.named_buffers())


OPTIONS = {
    "plain": {},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "small buckets": {"bucket_cap_mb": 1e-5},
}


def steps_around(rank, n):
    """Training steps, with a pass at every point where one may be; and without any."""
    results = {}
    for name, options in OPTIONS.items():
        kept = []
        for passes in (False, True):
            wrapper = ddp(**options)
            sgd = torch.optim.SGD(wrapper.parameters(), lr=0.1)

            def estimate(on=passes, wrapper=wrapper):
                if on:
                    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in wrapper.parameters()]
                    fisher_diagonal(wrapper, data(rank)[:1], ce)
                    for p, (grad, value) in zip(wrapper.parameters(), before, strict=True):
                        assert p.grad is grad
                        assert grad is None or torch.equal(grad, value)

            for step in range(2):
                x, y = batch(4, 1000 * step + rank)
                if step == 1 and name != "static":  # whose first two steps find out what the graph is
                    with wrapper.no_sync():
                        ce(wrapper(x), y).mean().backward()
                loss = ce(wrapper(x), y).mean()
                estimate()  # while the wrapper waits for this graph's gradients
                loss.backward()
                estimate()
                sgd.step()
                sgd.zero_grad(set_to_none=step == 1)
            kept.append([p.detach().clone() for p in wrapper.module.parameters()])
        results[name] = kept
    return results


# ---- loaders that repeat samples -------------------------------------------------------------------------------------

ELEVEN = TensorDataset(*batch(11, 7))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([ELEVEN[i] for i in range(11)])


class SizedStream(Stream):
    def __len__(self):
        return 11


def padded(rank, n):
    found = {}
    for shuffle in (False, True):
        sampler = DistributedSampler(ELEVEN, n, rank, shuffle=shuffle)
        loader = DataLoader(ELEVEN, 2, sampler=sampler)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            found[f"{shuffle} {epoch}"] = told(fisher_diagonal(ddp(), loader, ce))
    found["plain"] = told(fisher_diagonal(model(), loader, ce).all_reduce_())
    found["counted"] = told(fisher_diagonal(ddp(), loader, ce, reduce=False).all_reduce_())
    found["limited"] = told(fisher_diagonal(ddp(), loader, ce, max_samples=11))
    both = DataLoader(range(2), 1, sampler=DistributedSampler(range(2), n, rank, shuffle=False))
    found["two"] = told(fisher_diagonal(ddp(), both, ce, unpack=lambda i: ELEVEN[i]))
    return found


def padded_and_collated(rank, n):
    """A batch of other samples than the loader's."""
    loader = DataLoader(
        ELEVEN, 2, sampler=DistributedSampler(ELEVEN, n, rank), collate_fn=lambda items: batch(len(items) + 1, 0)
    )
    return told(fisher_diagonal(ddp(), loader, ce))


def prepared(rank, n):
    """Accelerate's own, over 11 samples in batches of 2, for 2 epochs, whole and split; and a stream."""
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState, GradientState, PartialState

    found = {}
    for split in (False, True):
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=split))
        generator = torch.Generator().manual_seed(5)
        wrapper, loader = accelerator.prepare(model(), DataLoader(ELEVEN, 4, shuffle=True, generator=generator))
        for epoch in range(2):
            found[f"{split} {epoch}"] = told(fisher_diagonal(wrapper, loader, ce))
        counted = told(fisher_diagonal(wrapper, loader, ce, reduce=False))["n"]
        found[f"{split} rows"] = accelerator.reduce(torch.tensor(counted), "sum").item()
    for stream in (SizedStream(), Stream()):
        options = DataLoaderConfiguration(dispatch_batches=False)
        accelerator = Accelerator(cpu=True, dataloader_config=options)
        try:
            found[type(stream).__name__] = told(
                fisher_diagonal(wrapper, accelerator.prepare(DataLoader(stream, 4)), ce)
            )
        except ValueError as error:
            found[type(stream).__name__] = str(error)
    dispatched = Accelerator(cpu=True).prepare(DataLoader(Stream(), 4))
    try:
        fisher_diagonal(wrapper, dispatched, ce)
    except ValueError as error:
        found["dispatched"] = str(error)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return found


#: What ranks do, by their number.
SITUATIONS = {4: [wrapped, inner_module, accumulated, weighted, max_samples, skipped, pairs, buffers, padded]}
SITUATIONS[2] = [
    *OF_ALL_DATA, weighted, max_samples, max_samples_skipping, skipped, exact, not_reduced, plain, drawn,
    constants_on_one, pairs, buffers, own_buffers, steps_around, padded, padded_and_collated, prepared
]  # fmt: skip
