"""Ranks that fail, differ or are alone; :mod:`test_ddp_failures` says what must come of it."""

from __future__ import annotations

from contextlib import suppress

import torch
from ddp_cases import batch, data, ddp, model
from fisher_cases import ce
from torch import nn

import wplfast
from wplfast import Fisher, fisher_diagonal
from wplfast.distributed import replicas
from wplfast.distributed.agreement import gathered

#: Many batches, in which a rank is busy when another one fails.
MANY = 40


def busy(rank: int, n_batches: int = MANY):
    return (batch(4, 100 * rank + i) for i in range(n_batches))


# ---- one rank raises -------------------------------------------------------------------------------------------------


def in_the_loss(rank, n):
    calls = 0

    def loss(outputs, targets):
        nonlocal calls
        calls += 1
        if rank == 1 and calls > 12:
            raise ZeroDivisionError("this loss divides by nothing")
        return ce(outputs, targets)

    fisher_diagonal(ddp(), busy(rank), loss)


def in_the_loader(rank, n):
    def loader():
        yield batch(4, rank)
        if rank == 1:
            raise OSError("the disk is gone")
        yield from busy(rank)

    fisher_diagonal(ddp(), loader(), ce)


def before_its_first_batch(rank, n):
    fisher_diagonal(ddp(), busy(rank), ce, mc_samples=0 if rank == 1 else 1)


def when_the_others_ended(rank, n):
    """Rank 0 has one batch and waits for the end of the pass."""
    fisher_diagonal(ddp(), busy(rank, 1 if rank == 0 else 3), ce if rank == 0 else lambda o, t: ce(o, t).mean())


def without_data_beside_one_that_fails(rank, n):
    in_the_loader(rank, n) if rank else fisher_diagonal(ddp(), [], ce)


def when_verified(rank, n):
    coupled = (lambda o, t: ce(o, t) * o.abs().max()) if rank == 1 else ce
    fisher_diagonal(ddp(), busy(rank), coupled)


def with_nan(rank, n):
    batches = list(busy(rank))
    batches[7][0][2] = float("nan") if rank == 1 else 0.0
    fisher_diagonal(ddp(), batches, ce)


def in_a_round(rank, n):
    """Where ranks share max_samples, all exchange something in every batch."""
    fisher_diagonal(
        ddp(), busy(rank), ce if rank == 0 else lambda o, t: 1 / 0 if len(t) != 4 else ce(o, t)[:3], max_samples=100
    )


def interrupted(rank, n):
    def loader():
        yield batch(4, rank)
        if rank == 1:
            raise KeyboardInterrupt
        yield from busy(rank)

    try:
        fisher_diagonal(ddp(), loader(), ce)
    except KeyboardInterrupt:
        raise RuntimeError("KeyboardInterrupt, as it was") from None


#: Situation -> what rank 1 raises, and what the others say of it.
ONE_FAILS = {
    in_the_loss: "ZeroDivisionError: this loss divides by nothing",
    in_the_loader: "OSError: the disk is gone",
    before_its_first_batch: "ValueError: mc_samples must be at least 1",
    when_the_others_ended: "ValueError: ",
    without_data_beside_one_that_fails: "OSError: the disk is gone",
    when_verified: "CoupledSamplesError: ",
    with_nan: "NonFiniteError: the loss of sample 2 is nan",
    in_a_round: "ValueError: loss_fn must return one loss per sample",
    interrupted: "KeyboardInterrupt",
}

# ---- all ranks raise alike -------------------------------------------------------------------------------------------


def other_parameters(rank, n):
    torch.manual_seed(rank)
    fisher_diagonal(nn.Linear(6, 4).double(), data(rank), ce, reduce=True)


def other_models(rank, n):
    fisher_diagonal(nn.Sequential(nn.Linear(6, 4), *[nn.ReLU()] * rank)[: 1 + rank].double() if rank else model(),
                    data(rank), ce, reduce=True)  # fmt: skip


def other_options(rank, n):
    fisher_diagonal(ddp(), data(rank), ce, max_samples=5 + rank)


def other_subsets(rank, n):
    wrapper = ddp()
    fisher_diagonal(wrapper, data(rank), ce, params=wrapper.module[2 if rank else 0])


def no_data(rank, n):
    fisher_diagonal(ddp(), [], ce)


def all_skipped(rank, n):
    x, y = batch(2, rank)
    fisher_diagonal(ddp(), [(x / 0, y)], ce, on_nonfinite="skip")


def constants_on_all(rank, n):
    fisher_diagonal(ddp(), data(rank), lambda o, t: torch.ones(len(t), dtype=torch.float64))


ALL_FAIL = {
    other_parameters: ("ValueError", "2 parameters, among them ['weight', 'bias']", "on rank 1 than on rank 0"),
    other_models: ("NameMismatchError", "rank 0 alone has ['2.weight', '2.bias']"),
    other_options: ("ValueError", "max_samples must be the same on all ranks, got 5 on rank 0, 6 on rank 1"),
    other_subsets: ("ValueError", "must have one shape on all ranks, got [9, 6] on rank 0, [4, 9] on rank 1"),
    no_data: ("ValueError", "data is empty on all 2 ranks"),
    all_skipped: ("ValueError", "no usable samples on any of the 2 ranks (4 skipped)"),
    constants_on_all: ("ValueError", "losses must depend on the parameters"),
}

# ---- penalties -------------------------------------------------------------------------------------------------------


def consolidated(wrapper, fisher, **options):
    wpl = wplfast.WeightPlasticityLoss(wrapper)
    wpl.consolidate(fisher, **options)
    return wpl


def forgotten_reduction(rank, n):
    """Each rank's own F, of the module in the wrapper: nothing says that there are replicas, but their values."""
    consolidated(model(), fisher_diagonal(model(), data(rank), ce, reduce=False))


def mapping_that_differs(rank, n):
    wrapper = ddp()
    consolidated(wrapper, {name: torch.full(p.shape, 1.0 + rank) for name, p in wrapper.module.named_parameters()})


def anchors_that_differ(rank, n):
    wrapper = ddp()
    with torch.no_grad():
        wrapper.module[0].bias += rank
    consolidated(wrapper, {name: torch.ones(p.shape) for name, p in wrapper.module.named_parameters()})


def anchors_that_differ_though_reduced(rank, n):
    plain = model()
    fisher = fisher_diagonal(plain, data(rank), ce, reduce=True)
    consolidated(plain, fisher, theta_hat={name: p.detach() + rank for name, p in plain.named_parameters()})


DIFFER = {
    forgotten_reduction: ("the F of this penalty differs", "samples and was not reduced", "all_reduce_()", "local()"),
    mapping_that_differs: ("the F of this penalty differs", "rank 0's", "rank 1's"),
    anchors_that_differ: ("the anchors of this penalty differ", "rank 0's", "rank 1's"),
    anchors_that_differ_though_reduced: ("the anchors of this penalty differ",),
}


def goes_on(rank, n):
    """After an error: the old anchors hold, and a right F enters; the n-th meets the n-th."""
    wrapper = ddp()
    wpl = wplfast.WeightPlasticityLoss(wrapper)
    fisher = fisher_diagonal(wrapper, data(rank), ce)
    for _ in range(3):
        wpl.consolidate(fisher)
    with suppress(wplfast.errors.WplfastError):
        wpl.consolidate(fisher_diagonal(wrapper, data(rank), ce, reduce=False))
    kept = wpl.n_anchors
    wpl.update(fisher, 0.5)
    return kept, wpl.n_anchors


def meant_to_differ(rank, n):
    with wplfast.distributed.local():
        wpl = consolidated(model(), fisher_diagonal(model(), data(rank), ce, reduce=False))
    return wpl.n_anchors


def other_models_altogether(rank, n):
    """Ranks whose models have nothing to do with each other."""
    replicas.WAIT = 0.3
    torch.manual_seed(rank)
    try:
        plain = nn.Linear(6, 4).double()
        return consolidated(plain, fisher_diagonal(plain, data(rank), ce, reduce=False)).n_anchors
    finally:
        replicas.WAIT = 10.0
        replicas._gave_up.clear()


def one_rank_alone(rank, n):
    """It waits once, says so, and goes on; whoever comes later compares with what it left."""
    replicas.WAIT = 0.5
    wrapper = ddp()
    fisher = fisher_diagonal(wrapper, data(rank), ce)
    other = Fisher({name: 2 * f for name, f in fisher.items()}, fisher.n_samples, reduced=True)
    found = []
    try:
        if rank == 0:
            for _ in range(3):
                found.append(consolidated(wrapper, fisher).n_anchors)
        gathered(None)
        if rank == 1:
            for each in (fisher, other):
                try:
                    found.append(consolidated(wrapper, each).n_anchors)
                except wplfast.errors.WplfastError as error:
                    found.append(str(error))
        gathered(None)
        return found
    finally:
        replicas.WAIT = 10.0
        replicas._gave_up.clear()


def together_after_one_alone(rank, n):
    """A rank that was alone once is ahead; the others find it, and differ from it only if they do."""
    replicas.WAIT = 0.5
    wrapper = ddp()
    fisher = fisher_diagonal(wrapper, data(rank), ce)
    double = Fisher({name: 2 * f for name, f in fisher.items()}, fisher.n_samples, reduced=True)
    found = []
    try:
        if rank == 0:
            for factor in (2, 3):
                alone = Fisher({name: factor * f for name, f in fisher.items()}, fisher.n_samples, reduced=True)
                consolidated(wrapper, alone)
        gathered(None)
        replicas.WAIT = 10.0
        for mine in (fisher, fisher, double if rank else fisher):
            try:
                found.append(consolidated(wrapper, mine).n_anchors)
            except wplfast.errors.WplfastError as error:
                found.append(str(error))
            gathered(None)
        return found
    finally:
        replicas.WAIT = 10.0
        replicas._gave_up.clear()


# ---- other engines ---------------------------------------------------------------------------------------------------


def text_of(function, *arguments, **options) -> str:
    try:
        function(*arguments, **options)
    except wplfast.errors.UnsupportedParameterError as error:
        return str(error)
    return ""


def fsdp1(rank, n):
    """Refused before anything is changed: the next training step is as it would have been."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    weights, texts = [], []
    for asks in (False, True):
        wrapped = FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=True)
        sgd = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for step in range(2):
            if asks:
                texts += [text_of(fisher_diagonal, wrapped, data(rank), ce)]
                texts += [text_of(wplfast.WeightPlasticityLoss, wrapped), text_of(wplfast.FisherAccumulator, wrapped)]
            x, y = batch(4, 10 * step + rank)
            ce(wrapped(x), y).mean().backward()
            sgd.step()
            sgd.zero_grad()
        weights.append(wrapped(batch(4, 0)[0]).detach())
    return texts, torch.equal(*weights)


def tensor_parallel(rank, n):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallel = parallelize_module(model(), init_device_mesh("cpu", (n,)), plan)
    return text_of(fisher_diagonal, parallel, data(rank), ce), text_of(wplfast.WeightPlasticityLoss, parallel)


def pipeline(rank, n):
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = PipelineStage(model()[2 * rank : 2 * rank + 2], rank, n, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=ce)
    return text_of(fisher_diagonal, schedule, data(rank), ce), text_of(wplfast.WeightPlasticityLoss, schedule)


ENGINES = {fsdp1: "FSDP1", tensor_parallel: "tensor parallelism", pipeline: "pipeline"}

SITUATIONS = [
    *ONE_FAILS, *ALL_FAIL, *DIFFER, goes_on, meant_to_differ, other_models_altogether, one_rank_alone,
    together_after_one_alone, *ENGINES
]  # fmt: skip
