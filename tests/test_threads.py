"""Passes beside others in threads, and threads that use a model while a pass watches it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch._dynamo
from fisher_cases import batches, ce, mlp
from oracle import assert_close, fisher_loop
from pairwise import pairwise
from torch import nn

import wplfast
from wplfast.capture import watched
from wplfast.capture.undo import Undo
from wplfast.errors import WplfastError
from wplfast.fisher.undisturbed import CUDNN


def in_a_thread(function: Callable[[], object]) -> BaseException | None:
    """Run a function in a thread of its own; return its error."""
    errors: list[BaseException] = []

    def run():
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors[0] if errors else None


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_last_pass_gives_settings_back(order):
    models, steps = {name: mlp() for name in "ab"}, {name: threading.Event() for name in "ab"}
    opened = {name: threading.Event() for name in "ab"}

    def work(name):
        with wplfast.FisherAccumulator(models[name]):
            opened[name].set()
            steps[name].wait(20)

    threads = {name: threading.Thread(target=work, args=(name,)) for name in "ab"}
    stance = torch._dynamo.eval_frame._stance
    for name in "ab":
        threads[name].start()
        assert opened[name].wait(20)
    for name, is_last in zip(order, (False, True), strict=True):
        assert not torch.backends.mha.get_fastpath_enabled()
        steps[name].set()
        threads[name].join()
        assert torch.backends.mha.get_fastpath_enabled() is is_last
        assert (torch._dynamo.eval_frame._stance == stance) is is_last


def test_cudnn_is_shared_too():
    before = torch.backends.cudnn.enabled
    first, second = Undo(), Undo()
    CUDNN.hold(first)
    CUDNN.hold(second)
    first.close()
    assert not torch.backends.cudnn.enabled
    second.close()
    assert torch.backends.cudnn.enabled == before


def test_passes_in_threads_are_right():
    torch.manual_seed(0)
    models, data = [mlp(torch.float64) for _ in range(4)], [batches((5, 5, 2), torch.float64) for _ in range(4)]
    found: dict[int, wplfast.Fisher] = {}
    errors = []

    def work(index):
        for _ in range(5):
            found[index] = wplfast.fisher_diagonal(models[index], data[index], ce)

    threads = [threading.Thread(target=lambda i=i: errors.append(in_a_thread(lambda: work(i)))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [None] * 4
    for index, model in enumerate(models):
        assert_close(found[index], fisher_loop(model, data[index], ce), 1e-12, 1e-12)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not watched._interceptors


class Checkpointed(nn.Module):
    """Calls that the backward pass makes."""

    def __init__(self):
        super().__init__()
        self.body = mlp(torch.float64)

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)


FOREIGN = {
    "a step of training": lambda m, x, y: ce(m(x), y).sum().backward(),
    "a forward pass": lambda m, x, y: m(x),
    "a functional call": lambda m, x, y: torch.func.functional_call(m, dict(m.named_parameters()), (x,)),
    "a penalty": lambda m, x, y: sum(p.square().sum() for p in m.parameters()).backward(),
    "a product": lambda m, x, y: x @ next(m.parameters()).t(),
    "autograd.grad": lambda m, x, y: torch.autograd.grad(ce(m(x), y).sum(), list(m.parameters())),
}


@pytest.mark.parametrize(
    ("what", "batch", "kind"), pairwise(FOREIGN, [0, 1, 3], [lambda: mlp(torch.float64), Checkpointed])
)
def test_a_thread_that_trains_the_model(what, batch, kind):
    """It gets the error, in any batch; the pass goes on and is right."""
    torch.manual_seed(0)
    model, data = kind(), batches((5, 5, 5, 5, 2), torch.float64)
    x, y = batches((4,), torch.float64)[0]
    with wplfast.FisherAccumulator(model) as acc:
        for index, (inputs, targets) in enumerate(data):
            losses = ce(model(inputs), targets)
            if index == batch:
                error = in_a_thread(lambda: FOREIGN[what](model, x, y))
                assert isinstance(error, WplfastError)
                assert "another thread uses parameters" in str(error)
            acc.backward(losses)
        fisher = acc.result()
    assert_close(fisher, fisher_loop(model, data, ce), 1e-12, 1e-12)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "what",
    [
        lambda m, x: torch.no_grad()(m)(x),
        lambda m, x: torch.inference_mode()(m)(x),
        lambda m, x: [(p.shape, p.dtype, p.grad, p.requires_grad, p.numel()) for p in m.parameters()],
        lambda m, x: torch.no_grad()(lambda: [p.norm() for p in m.parameters()])(),
        lambda m, x: copy.deepcopy(m)(x).sum().backward(),
        lambda m, x: mlp(torch.float64)(x).sum().backward(),
    ],
)
def test_threads_that_may(what):
    model, data = mlp(torch.float64), batches((5, 5, 2), torch.float64)
    with wplfast.FisherAccumulator(model) as acc:
        for inputs, targets in data:
            losses = ce(model(inputs), targets)
            assert in_a_thread(partial(what, model, inputs)) is None
            acc.backward(losses)
    assert_close(acc.result(), fisher_loop(model, data, ce), 1e-12, 1e-12)


def test_a_pass_belongs_to_its_thread():
    model = mlp()
    with wplfast.FisherAccumulator(model) as acc:
        losses = ce(model(torch.randn(3, 6)), torch.tensor([0, 1, 2]))
        error = in_a_thread(lambda: acc.backward(losses))
        assert isinstance(error, WplfastError)
        assert "in the thread that opened it" in str(error)
        acc.backward(losses)
    assert acc.result().n_samples == 3


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4])
def test_a_backward_pass_of_earlier_losses(threaded, batch):
    """Its gradients would be lost, and might be taken for this pass's: an error of the pass."""
    model, data = mlp(torch.float64), batches((5, 5, 5, 5), torch.float64)
    earlier = ce(model(data[0][0]), data[0][1]).sum()
    run = in_a_thread if threaded else lambda function: function()

    def work():
        with wplfast.FisherAccumulator(model) as acc:
            for index, (inputs, targets) in enumerate(data):
                losses = ce(model(inputs), targets)
                if index == batch:
                    run(earlier.backward)
                acc.backward(losses)
            if batch == len(data):
                run(earlier.backward)
            acc.result()

    with pytest.raises(WplfastError, match=r"that this pass did not compute|or from another thread"):
        work()
    assert not watched._interceptors


def test_replicas_in_threads():
    """What ``nn.DataParallel`` does: a function that cannot be seen copies parameters, and threads use the copies."""

    class Broadcast(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.n = len(tensors)
            return tuple(t.clone() for _ in range(2) for t in tensors)

        @staticmethod
        def backward(ctx, *grads):
            return tuple(a + b for a, b in zip(grads[: ctx.n], grads[ctx.n :], strict=True))

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(torch.float64)

        def forward(self, x):
            names = [name for name, _ in self.body.named_parameters()]
            copies = Broadcast.apply(*self.body.parameters())
            parts: list = [None, None]

            def work(i):
                own = dict(zip(names, copies[i * len(names) : (i + 1) * len(names)], strict=True))
                parts[i] = torch.func.functional_call(nn.Sequential(*self.body), own, (x[i::2],))

            assert [in_a_thread(lambda i=i: work(i)) for i in range(2)] == [None, None]
            return torch.stack([parts[i % 2][i // 2] for i in range(len(x))])

    model, data = Parallel(), batches((4, 6), torch.float64)
    fisher = wplfast.fisher_diagonal(model, data, ce)
    assert_close(fisher, fisher_loop(model, data, ce), 1e-10, 1e-12)
    assert set(fisher.report.slow) == set(fisher)


def test_no_lock_is_left_behind():
    """An interrupt in the progress bar's constructor leaves its lock to this thread: others must not need it."""
    from tqdm.auto import tqdm

    model, done = mlp(), threading.Event()
    with tqdm.get_lock():
        thread = threading.Thread(
            target=lambda: (wplfast.fisher_diagonal(model, batches(), ce), done.set()), daemon=True
        )
        thread.start()
        assert done.wait(30)
    thread.join()
