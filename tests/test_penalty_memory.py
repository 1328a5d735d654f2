"""Threads, gradient memory that is used again, lifetimes, many tensors."""

from __future__ import annotations

import copy
import gc
import sys
import time
import weakref

import pytest
import torch
from gpu_cases import in_threads
from penalty_cases import BIG, anchored, needs_cpp, one_big, set_to, trunk
from torch import Tensor

import wplfast
from wplfast.errors import NameMismatchError

# ---- threads -----------------------------------------------------------------------------------------------


@pytest.fixture
def _nervous():
    """Let threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_nervous")
def test_threads_on_one_penalty():
    """Several differentiate, one adds to .grad: gradients of 1 MiB, so that the reused buffer is in play."""
    theta, wpl = one_big()
    set_to(theta, 2.0)
    value = wpl().item()

    def differentiate() -> None:
        for _ in range(40):
            result = wpl()
            (gradient,) = torch.autograd.grad(result, theta)
            assert result.item() == value
            assert bool((gradient == 2).all())

    def add() -> None:
        for _ in range(40):
            assert wpl.add_grad_().item() == value

    in_threads(differentiate, differentiate, add)
    assert bool((theta.grad == 80).all())


@pytest.mark.usefixtures("_nervous")
def test_threads_on_several_penalties():
    def work(value: float) -> None:
        theta, wpl = one_big()
        set_to(theta, value)
        for k in range(1, 20):
            wpl().backward()
            wpl.add_grad_()
            assert bool((theta.grad == 2 * k * value).all())

    in_threads(*[lambda v=float(v): work(v) for v in range(1, 4)])


@pytest.mark.usefixtures("_nervous")
def test_threads_with_more_active_sets_than_are_kept():
    params = {f"p{i}": torch.ones(3, requires_grad=True) for i in range(40)}
    wpl = wplfast.WeightPlasticityLoss(params, alpha=2.0)
    wpl.consolidate(
        {name: torch.full((3,), float(i)) for i, name in enumerate(params)},
        theta_hat={n: torch.zeros(3) for n in params},
    )

    def work(first: int) -> None:
        for i in [*range(first, 40), *range(first)] * 3:
            assert wpl(active=[f"p{i}"]).item() == 3.0 * i

    in_threads(*[lambda first=first: work(first) for first in (0, 13, 26)])


# ---- the gradient buffer that is used again ----------------------------------------------------------------


@needs_cpp
def test_the_buffer_is_used_again_in_a_training_loop():
    theta, wpl = one_big()
    addresses = set()
    for k in range(6):
        set_to(theta, float(k))
        wpl().backward()
        assert bool((theta.grad == k).all())
        addresses.add(theta.grad.data_ptr())
        theta.grad = None
    assert len(addresses) == 1


def keep_grad_result(theta, wpl, kept):
    kept.append(torch.autograd.grad(wpl(), theta)[0])


def keep_in_a_hook(theta, wpl, kept):
    handle = theta.register_hook(lambda g: kept.append(g))
    torch.autograd.grad(wpl(), theta)
    handle.remove()


def keep_a_retained_graph(theta, wpl, kept):
    value = wpl()
    kept.append(torch.autograd.grad(value, theta, retain_graph=True)[0])
    kept.append(torch.autograd.grad(3 * value, theta)[0] / 3)


def keep_of_dot_grad(take):
    """Keep what a function makes of ``.grad``, which is then set to None."""

    def keep(theta, wpl, kept):
        wpl().backward()
        kept.append(take(theta.grad))
        theta.grad = None

    return keep


def memoryview_of(gradient):
    return torch.frombuffer(memoryview(gradient.cpu().numpy()), dtype=torch.float32)


KEEP = {
    "the result": keep_grad_result,
    "in a hook": keep_in_a_hook,
    "a retained graph": keep_a_retained_graph,
    ".grad": keep_of_dot_grad(lambda gradient: gradient),
    "a view": keep_of_dot_grad(lambda gradient: gradient[5:50]),
    "numpy": keep_of_dot_grad(lambda gradient: gradient.cpu().numpy()[::7]),
    "a memoryview": keep_of_dot_grad(memoryview_of),
    "dlpack": pytest.param(keep_of_dot_grad(torch.from_dlpack), marks=pytest.mark.not_rehearsed("DLPack")),
    "the storage": pytest.param(keep_of_dot_grad(Tensor.untyped_storage), marks=needs_cpp),
}


@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
def test_what_someone_keeps_is_not_overwritten(keep):
    theta, wpl = one_big()
    kept: list = []
    for k in range(1, 5):
        set_to(theta, float(k))
        keep(theta, wpl, kept)
    each = len(kept) // 4
    for index, one in enumerate(kept):
        numbers = torch.empty(0).set_(one) if isinstance(one, torch.UntypedStorage) else torch.as_tensor(one)
        assert bool((numbers == index // each + 1).all())


@needs_cpp
def test_what_another_process_has_is_not_overwritten():
    from torch.multiprocessing import reductions

    theta, wpl = one_big()
    set_to(theta, 1.0)
    wpl().backward()
    # As a queue of torch.multiprocessing does:
    rebuild, arguments = reductions.reduce_storage(theta.grad.untyped_storage())
    reductions.shared_cache.clear()  # as another process would
    received = torch.empty(0).set_(rebuild(*arguments))
    theta.grad = None
    set_to(theta, 2.0)
    wpl().backward()
    assert bool((received == 1).all())


@pytest.mark.parametrize("second", [1.0, 2.0], ids=["at one point", "around a step"])
def test_two_live_graphs(second):
    """Autograd of the plain formula allows a step between: it keeps theta - theta_hat, not theta."""
    theta, wpl = one_big()
    set_to(theta, 1.0)
    first = wpl()
    set_to(theta, second)
    (first + 2 * wpl()).backward()
    assert bool((theta.grad == 1 + 2 * second).all())


@needs_cpp
def test_active_sets_do_not_multiply_memory():
    params = {f"p{i}": torch.zeros(BIG, requires_grad=True) for i in range(6)}
    wpl = wplfast.WeightPlasticityLoss(params)
    wpl.consolidate({name: torch.ones(BIG) for name in params})
    for skipped in params:
        wpl(active=[name for name in params if name != skipped]).backward()
        for theta in params.values():
            theta.grad = None
    kept = [t for t in gc.get_objects() if type(t) is Tensor and t.dim() == 1 and t.numel() == 5 * BIG]
    assert len({t.data_ptr() for t in kept}) <= 1


# ---- lifetime and scale ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cycle", ["none", "attribute", "hook"])
def test_a_forgotten_penalty_is_freed(cycle):
    module = trunk()
    module.wpl = anchored(module, anchors=2)
    module.wpl(active=["0.bias"]).backward()
    module.wpl.add_grad_()
    if cycle == "attribute":
        module[0].weight.owner = module
    elif cycle == "hook":
        module[0].weight.register_hook(lambda grad, module=module: grad)
    alive = weakref.ref(module.wpl), weakref.ref(module[0].weight)
    del module
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_thousands_of_tensors_take_no_time_that_grows_with_their_square():
    def seconds(n: int) -> float:
        params = {f"layer{i}.weight": torch.zeros(4, requires_grad=True) for i in range(n)}
        fisher = {name: torch.ones(4) for name in params}
        wpl = wplfast.WeightPlasticityLoss(params)
        start = time.perf_counter()
        wpl.consolidate(fisher)
        wpl.consolidate(fisher)
        wpl(active=list(params)[::2]).backward()
        wpl.add_grad_()
        wpl.load_state_dict(wpl.state_dict())
        copy.deepcopy(wpl).rebind(params)
        with pytest.raises(NameMismatchError):
            wpl.consolidate({f"x{name}y": f for name, f in fisher.items()})
        return time.perf_counter() - start

    seconds(100)
    assert seconds(4000) < 10 * (seconds(1000) + 0.1)  # 4 if linear, 16 if square
