"""``wpl_penalty`` again and again: what is kept of earlier calls shows in the time alone, and keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from gpu_cases import in_threads
from penalty_oracle import ordered
from torch import Tensor, nn

from wplfast import backends
from wplfast.functional import wpl_penalty

SHAPES = [(5, 7), (7,), (2, 3, 5, 3), (), (1,), (0, 3), (33,)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
KEEPS = backends.kept_penalties("cpu") is not None

Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


@pytest.fixture(autouse=True)
def hits(monkeypatch) -> list[bool]:
    """Begin with nothing kept, and tell which calls found something."""
    if not KEEPS:
        return []
    found: list[bool] = []

    class Watched(backends.available()["cpp"].CppKeptPenalties):
        def find(self, *lists):
            result = super().find(*lists)
            found.append(result is not None)
            return result

    monkeypatch.setattr(backends.available()["cpp"], "kept_penalties", Watched())
    return found


def lists_of(shapes=SHAPES, dtype=torch.float32, fisher_dtype=None, order="plain") -> Lists:
    theta, hat = ([ordered(torch.randn(s, dtype=torch.float64).to(dtype), order) for s in shapes] for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fisher = [ordered(torch.rand(s, dtype=torch.float64).to(fisher_dtype or wide), order) for s in shapes]
    return [t.requires_grad_() for t in theta], hat, fisher


def check(lists: Lists, alpha=3.0, l2=0.25, penalty: Callable[..., Tensor] = wpl_penalty) -> None:
    """Compare value and gradients with the formula in float64."""
    theta, hat, fisher = lists
    doubles = {id(p): p.detach().double().requires_grad_(p.requires_grad) for p in theta}
    copies = [doubles[id(p)] for p in theta]  # one may be there twice
    a, b = float(alpha), float(l2)
    wanted = torch.zeros((), dtype=torch.float64)
    for p, h, f in zip(copies, hat, fisher, strict=True):
        wanted = wanted + a / 2 * (f.double() * (p - h.double()) ** 2).sum() + b / 2 * (p**2).sum()
    got = penalty(theta, hat, fisher, alpha, l2=l2)
    error = TOLERANCE[theta[0].dtype]
    torch.testing.assert_close(got.double(), wanted.detach() if not got.requires_grad else wanted, rtol=1e-5, atol=0)
    assert got.requires_grad == wanted.requires_grad
    if not got.requires_grad:
        return
    followed = [i for i, p in enumerate(theta) if p.requires_grad]
    gradients = torch.autograd.grad(got, [theta[i] for i in followed])
    expected = torch.autograd.grad(wanted, [copies[i] for i in followed])
    for i, gradient, e in zip(followed, gradients, expected, strict=True):
        assert gradient.shape == theta[i].shape
        assert gradient.dtype == theta[i].dtype
        largest = float(e.abs().max()) if e.numel() else 0.0
        torch.testing.assert_close(gradient.double(), e, rtol=error, atol=error * largest)


def change(lists: Lists) -> None:
    """Write other values to where the tensors are."""
    with torch.no_grad():
        for tensors, draw in zip(lists, (torch.randn, torch.randn, torch.rand), strict=True):
            for t in tensors:
                t.copy_(draw(t.shape))


# ---- hits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["plain", "channels_last", "transposed", "misaligned"])
@pytest.mark.parametrize(
    ("dtype", "fisher_dtype"),
    [(t, None) for t in TOLERANCE] + [(t, torch.bfloat16) for t in (torch.float32, torch.float16, torch.bfloat16)],
)
def test_every_kind_is_found_again_and_evaluated_anew(hits, dtype, fisher_dtype, order):
    lists = lists_of(SHAPES, dtype, fisher_dtype, order)
    for _ in range(4):
        check(lists)
        change(lists)
    assert hits == [False, True, True, True] * KEEPS


def test_other_objects_over_the_same_memory_are_a_hit(hits):
    lists = lists_of()
    check(lists)
    check(tuple(tuple(t.detach().requires_grad_(i == 0) for t in ts) for i, ts in enumerate(lists)))
    check((nn.ParameterList(nn.Parameter(p.detach()) for p in lists[0]), *lists[1:]))
    assert hits == [False, True, True] * KEEPS


def test_gradients_are_asked_for_at_every_call(hits):
    lists = lists_of()
    check(lists)
    for chosen in ([], [0], [1, 3], range(len(SHAPES))):
        for i, p in enumerate(lists[0]):
            p.requires_grad_(i in chosen)
        check(lists)
    with torch.no_grad():
        assert not wpl_penalty(*lists, 3.0).requires_grad
    assert all(hits[1:])


def test_a_training_loop_with_an_optimizer_and_an_alpha_schedule(hits):
    lists = lists_of([(9, 4), (9,)])
    optimizer = torch.optim.SGD(lists[0], lr=0.05, momentum=0.9)
    for step in range(12):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        alpha, l2 = 2.0 / (1 + step), 0.01 * step
        check(lists, alpha, l2)
        wpl_penalty(*lists, alpha, l2=l2).backward()
        optimizer.step()
    assert hits == ([False] + [True] * 23) * KEEPS


@pytest.mark.parametrize("kind", [float, int, torch.tensor, lambda a: torch.tensor(a, dtype=torch.float64)])
def test_alpha_is_read_at_every_call(kind):
    lists = lists_of()
    for alpha in (1.0, 3.0, 1.0, 0.0, 7.0):
        check(lists, kind(alpha), kind(alpha + 1))
    alpha = torch.tensor(2.0, dtype=torch.float64)
    for _ in range(3):
        check(lists, alpha)
        alpha.add_(1)
    with pytest.raises(ValueError, match=r"a float or a 0-d tensor, got shape \[1\]"):
        wpl_penalty(*lists, alpha[None])


def test_numbers_first_seen_in_inference_mode_serve_outside():
    lists, alpha = lists_of(), 0.123456789
    check(lists)
    with torch.inference_mode():
        wpl_penalty(*lists, alpha)
    check(lists, alpha)


def test_second_derivatives_and_graphs_that_are_kept(hits):
    theta, hat, fisher = lists_of([(4, 3), (3,)], torch.float64)
    for _ in range(3):
        assert torch.autograd.gradgradcheck(lambda *p: wpl_penalty(p, hat, fisher, 2.0, l2=0.5), theta)
        value = wpl_penalty(theta, hat, fisher, 2.0)
        once, twice = (torch.autograd.grad(value, theta, retain_graph=True) for _ in range(2))
        torch.testing.assert_close(once, twice)
        once[0].zero_()
        torch.testing.assert_close(torch.autograd.grad(3 * value, theta)[0], 3 * twice[0])
    assert any(hits) == KEEPS


@pytest.mark.parametrize("which", range(4), ids=["theta", "theta_hat", "fisher", "alpha"])
def test_a_change_before_a_second_derivative_is_an_error(which):
    lists, alpha = lists_of(), torch.tensor(2.0, dtype=torch.float64)
    for _ in range(2):
        value = wpl_penalty(*lists, alpha)
        with torch.no_grad():
            ([t[1] for t in lists] + [alpha])[which].mul_(2)
        with pytest.raises(RuntimeError, match="changed between the penalty and its backward"):
            torch.autograd.grad(value, lists[0], create_graph=True)


def test_lists_that_change_between_the_penalty_and_its_backward():
    lists = lists_of([(3,), (4,)])
    for _ in range(2):
        theta, hat, fisher = map(list, lists)
        value = wpl_penalty(theta, hat, fisher, 2.0)
        for tensors in (theta, hat, fisher):
            tensors.clear()
        gradients = torch.autograd.grad(value, lists[0], create_graph=True)
        for gradient, p, h, f in zip(gradients, *lists, strict=True):
            torch.testing.assert_close(gradient, 2 * f * (p - h))


# ---- misses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 2, 4, 6])
@pytest.mark.parametrize("column", range(3))
def test_exchanged_memory_is_seen(hits, column, index):
    lists = lists_of()
    check(lists)
    tensor = lists[column][index]
    kept = tensor.data  # the memory stays as it was
    tensor.data = torch.rand(tensor.shape) + 1
    check(lists)
    tensor.data = kept
    check(lists)
    assert not KEEPS or hits[1] is False


def test_another_dtype_is_seen():
    lists = lists_of()
    check(lists)
    for tensors in lists:
        for t in tensors:
            t.data = t.data.double()
    check(lists)


def reinterpreted(dtype, shape, stride=None):
    """Return what makes a tensor over the same memory that looks otherwise."""

    def make(t: Tensor) -> Tensor:
        flat = t.detach().view(-1).view(dtype)
        return flat.view(shape) if stride is None else flat.as_strided(shape, stride)

    return make


OTHERS = {
    "a shape": (reinterpreted(torch.float32, (6, 4)), r"theta_hat\[1\] must be float32\[4, 6\] on cpu, got .*\[6, 4\]"),
    "a dtype": (reinterpreted(torch.int32, (4, 6)), r"theta_hat\[1\] must be float32\[4, 6\] on cpu, got int32"),
    "halves": (reinterpreted(torch.bfloat16, (4, 12)), r"theta_hat\[1\] must be float32\[4, 6\] on cpu, got bfloat16"),
    "an order": (reinterpreted(torch.float32, (4, 6), (1, 4)), None),
    "one element": (reinterpreted(torch.float32, (4, 6), (0, 0)), None),
}


@pytest.mark.parametrize(("make", "error"), OTHERS.values(), ids=OTHERS)
def test_other_tensors_at_the_same_addresses(hits, make, error):
    """Right or wrong, they get what they would have got without a call before."""
    theta, hat, fisher = lists_of([(3,), (4, 6)])
    for _ in range(2):
        check((theta, hat, fisher))
        other = theta, [hat[0], make(hat[1])], fisher
        if error is None:
            check(other)
        else:
            with pytest.raises(ValueError, match=error):
                wpl_penalty(*other, 1.0)
    assert hits == [False, False, True, False] * KEEPS


@pytest.mark.parametrize("column", range(3))
def test_memory_that_was_freed_and_is_used_for_another_shape(column):
    """The same bytes serve other tensors when the first ones are gone."""
    memory = torch.rand(24)
    lists = lists_of([(4, 6)])
    lists[column][0].data = memory.view(4, 6)
    check(lists)
    del lists
    lists = lists_of([(8, 3)])
    lists[column][0].data = memory.view(8, 3)
    check(lists)
    lists[column][0].data = memory[:24].view(3, 8).t()
    check(lists)


def test_tensors_that_come_and_go():
    """The allocator hands the same addresses out again, for tensors of any shape."""
    for size in [*range(1, 40), *range(40, 1, -1)] * 2:
        check(lists_of([(size,), (2, size)]))


@pytest.mark.parametrize("column", range(3))
def test_wrong_lists_after_a_hit(column):
    lists = lists_of([(3,), (4, 6)])
    for _ in range(2):
        check(lists)
    for wrong, error in (
        (lists[column][:1], ValueError),
        ([*lists[column], torch.zeros(2)], ValueError),
        ([lists[column][0], torch.zeros(4, 5)], ValueError),
        ([lists[column][0], torch.zeros(4, 6, dtype=torch.int64)], ValueError),
        ([lists[column][0], torch.zeros(4, 6, device="meta")], ValueError),
        ([lists[column][0], torch.eye(4, 6).to_sparse()], (RuntimeError, ValueError)),
        ([lists[column][0], 3.0], AttributeError),
        ([lists[column][0], None], AttributeError),
        (lists[column][0], (TypeError, ValueError)),
        ({"0": lists[column][0]}, TypeError),
        ([], ValueError),
    ):
        given = list(lists)
        given[column] = wrong
        fresh = [t if isinstance(t, Tensor | dict) else [*t] for t in given]
        messages = []
        for kept in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not kept:
                    patch.setattr(backends, "kept_penalties", lambda kind: None)
                with pytest.raises(error) as caught:
                    wpl_penalty(*fresh, 1.0)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        check(lists)


@pytest.mark.parametrize("column", range(3))
def test_freed_memory_is_an_error(column):
    lists = lists_of([(3,), (4, 6)])
    check(lists)
    lists[column][1].untyped_storage().resize_(0)
    if KEEPS:
        with pytest.raises(ValueError, match="theta, theta_hat or fisher 1 has no memory: its storage was freed"):
            wpl_penalty(*lists, 1.0)


class Loud(Tensor):
    """A tensor that wants to see every function."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "wplfast" in str(func):
            raise LookupError("seen")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("column", range(3))
def test_a_subclass_over_the_same_memory_is_never_looked_through(hits, column):
    lists = lists_of([(3,), (4, 6)])
    check(lists)
    given = [list(tensors) for tensors in lists]
    given[column][1] = given[column][1].detach().as_subclass(Loud)
    with torch.no_grad(), pytest.raises(LookupError, match="seen"):
        wpl_penalty(*given, 1.0)
    with torch.no_grad(), pytest.raises(LookupError, match="seen"):
        wpl_penalty(*lists, torch.tensor(1.0, dtype=torch.float64).as_subclass(Loud))
    assert hits == [False, False, True] * KEEPS


@pytest.mark.parametrize("column", range(3))
def test_negated_views_of_the_same_memory(column):
    lists = lists_of([(3,), (4, 6)])
    for _ in range(2):
        check(lists)
        given = [list(tensors) for tensors in lists]
        given[column][1] = torch._neg_view(given[column][1].detach())
        check(tuple(given))
    check(lists, torch.tensor(1 - 2j, dtype=torch.complex128).conj().imag)


def test_gaps_and_duplicates_and_several_kinds(hits):
    theta, hat, fisher = lists_of([(4, 6), (3, 2)])
    gaps = ordered(theta[0].detach(), "gaps").requires_grad_()
    mixed = lists_of([(5,)], torch.float64)
    for _ in range(3):
        check(([gaps, theta[1]], hat, fisher))
        check(([theta[0]] * 3, [hat[0]] * 3, [fisher[0]] * 3))
        joined = [a + b for a, b in zip((theta, hat, fisher), mixed, strict=True)]
        value = wpl_penalty(*joined, 2.0)
        parts = wpl_penalty(theta, hat, fisher, 2.0) + wpl_penalty(*mixed, 2.0)
        torch.testing.assert_close(value, parts)
    assert sum(hits) == 6 * KEEPS


def test_fishers_in_another_order_of_memory_are_copied_at_every_call(hits):
    theta, hat, fisher = lists_of([(4, 6)])
    fisher = [f.t().contiguous().t() for f in fisher]
    for _ in range(3):
        check((theta, hat, fisher))
        change((theta, hat, fisher))
    assert not any(hits)


# ---- many calls --------------------------------------------------------------------------------------------


def test_models_in_turn_and_more_of_them_than_are_kept(hits):
    most = sys.modules["wplfast.backends.cpp.kept"].MAX_KEPT if KEEPS else 8
    several = [lists_of([(3,), (2, size)]) for size in range(1, most + 9)]
    for lists in several[:5] * 3:
        check(lists)
    assert hits == ([False] * 5 + [True] * 10) * KEEPS
    for lists in several * 2:
        check(lists)
    kept = backends.kept_penalties("cpu")
    assert not KEEPS or len(kept._tables) == most
    del hits[:]
    for lists in several[-most:]:
        check(lists)
    assert all(hits)


def test_anchors_of_several_tasks_over_the_same_parameters(hits):
    theta, _, _ = lists_of()
    tasks = [lists_of()[1:] for _ in range(4)]
    for _ in range(3):
        for hat, fisher in tasks:
            check((theta, hat, fisher))
    assert hits == ([False] * 4 + [True] * 8) * KEEPS


def test_threads_that_drop_each_others_tables():
    def work(sizes) -> None:
        several = [lists_of([(size,), (2, size)]) for size in sizes]
        shared_value = None
        for _ in range(6):
            for lists in several:
                check(lists)
            value = wpl_penalty(*shared, 2.0).item()
            assert shared_value is None or value == shared_value
            shared_value = value

    shared, interval = lists_of(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(*[lambda k=k: work(range(1 + k, 16 + k)) for k in range(4)])
    finally:
        sys.setswitchinterval(interval)


# ---- what stays alive --------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 3])
def test_nothing_of_the_users_stays_alive(hits, calls):
    lists = lists_of()
    gone = [weakref.ref(t) for tensors in lists for t in tensors]
    gone += [weakref.ref(t.untyped_storage()) for tensors in lists for t in tensors]
    for _ in range(calls):
        loss = wpl_penalty(*lists, 2.0)
        loss.backward()
    assert hits[:calls] == ([False] + [True] * (calls - 1)) * KEEPS
    del lists, loss
    gc.collect()
    assert not any(ref() is not None for ref in gone)


def test_a_graph_keeps_its_tensors_until_it_goes():
    lists = lists_of([(3,)])
    wpl_penalty(*lists, 2.0)
    loss, hat = wpl_penalty(*lists, 2.0), weakref.ref(lists[1][0])
    del lists
    gc.collect()
    assert hat() is not None
    del loss
    gc.collect()
    assert hat() is None


def test_what_is_kept_is_in_nobodys_way():
    """Neither copies nor pickles of the user's tensors carry any of it."""
    lists = lists_of()
    check(lists)
    for again in (copy.deepcopy(lists), pickle.loads(pickle.dumps(lists))):
        check(again)
    check(lists)


# ---- tracing, transforms, modes ----------------------------------------------------------------------------


def test_compiled_after_a_hit():
    lists = lists_of([(4, 3), (3,)])
    for _ in range(2):
        check(lists)
    compiled = torch.compile(wpl_penalty, fullgraph=True, backend="aot_eager")
    check(lists, penalty=compiled)
    change(lists)
    check(lists, penalty=compiled)
    check(lists)


def test_transforms_and_dual_numbers_after_a_hit():
    (theta,), (hat,), (fisher,) = lists_of([(6,)])
    theta = theta.detach()
    for _ in range(2):
        wpl_penalty([theta], [hat], [fisher], 2.0)
        gradient = torch.func.grad(lambda p: wpl_penalty([p], [hat], [fisher], 2.0))(theta)
        torch.testing.assert_close(gradient, 2 * fisher * (theta - hat))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(theta, torch.ones(6))
            value = wpl_penalty([dual], [hat], [fisher], 2.0)
            tangent = torch.autograd.forward_ad.unpack_dual(value).tangent
        torch.testing.assert_close(tangent, gradient.sum())


def test_modes_see_the_operator_after_a_hit():
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    lists, names = lists_of(), []
    for _ in range(2):
        check(lists)
    with Seen():
        wpl_penalty(*lists, 2.0)
    assert "wplfast.penalty_with_grad.default" in names


def test_inference_mode_after_a_hit_and_before_one():
    lists = lists_of()
    for _ in range(2):
        with torch.inference_mode():
            value = wpl_penalty(*lists, 2.0)
        torch.testing.assert_close(value.clone(), wpl_penalty(*lists, 2.0).detach())
        check(lists)
