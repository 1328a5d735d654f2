"""A newer anchor by the C++ kernel, beside plain PyTorch and float64; no interrupt between it and its commit."""

from __future__ import annotations

import ctypes
import os
import random
import signal
from functools import partial

import pytest
import torch
from penalty_cases import move, needs_cpp, random_fisher, same_state, trunk
from torch import Tensor

import wplfast
from wplfast import backends
from wplfast.ops.consolidation import Consolidation
from wplfast.ops.layout import flat_dtype

pytestmark = [pytest.mark.cpu_only("the kernel is for CPUs"), needs_cpp]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (3,), (16,), (17,), (5, 7), (2, 3, 4, 5), (1, 4, 1, 3), (8193,), (3, 9001)]
EPS_WIDE = (torch.float32, torch.float64)
EPS = {torch.float64: 2e-15, torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def kernel():
    return backends.consolidation(["cpu"])


def shifted(tensor: Tensor) -> Tensor:
    """A copy of the same strides that starts one element behind an aligned address."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return room[1:].as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


def laid_out(tensor: Tensor, how: str) -> Tensor:
    """The same values elsewhere in memory."""
    if how == "channels last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if how == "last dimension first" and tensor.dim() > 1:
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if how == "gaps" and tensor.dim() > 0:
        return torch.stack([tensor, tensor], -1)[..., 0]
    if how == "negated":
        return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag if tensor.dtype in EPS_WIDE else tensor
    return shifted(tensor) if how == "shifted" else tensor.clone()


LAYOUTS = ["as it is", "shifted", "channels last", "last dimension first", "gaps", "negated"]


def positive(shape, dtype) -> Tensor:
    values = torch.rand(shape, dtype=torch.float64) ** 4
    return (values * (torch.rand(shape) > 0.2)).to(dtype)  # some never anchored


class Drawn:
    """Anchors and newer ones of mixed types and orders."""

    def __init__(self, seed: int, dtypes=DTYPES) -> None:
        torch.manual_seed(seed)
        pick = random.Random(seed).choice
        self.theta_hat, self.offset, self.fisher, self.new_theta_hat, self.new_fisher = [], [], [], [], []
        for _ in range(pick(range(1, 6))):
            shape, dtype = pick(SHAPES), pick(dtypes)
            wide = flat_dtype(dtype)
            dense = pick(LAYOUTS[:4])
            self.theta_hat.append(laid_out(torch.randn(shape).to(dtype), dense))
            self.offset.append(laid_out(torch.randn(shape).to(wide) / 8, dense))
            kept = wide if wide == torch.float64 else pick([torch.float32, torch.bfloat16])
            self.fisher.append(laid_out(positive(shape, kept), dense))
            self.new_theta_hat.append(laid_out(torch.randn(shape).to(pick([dtype, torch.float32])), pick(LAYOUTS)))
            self.new_fisher.append(laid_out(positive(shape, pick(DTYPES)), pick(LAYOUTS)))
        self.options = {"decay": pick([0.0, 0.5, 1.0]), "weight": pick([0.0, 0.25, 3.0]), "merge": pick([True, False])}
        self.factors = pick([None, torch.rand(len(self.fisher), dtype=torch.float64)])
        if not self.options["merge"] and pick([True, False]):
            self.offset = []

    def enter(self, kind) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
        """Return copies of the anchors that a class of consolidations changed, and what it measured before."""
        columns = [list(map(shifted, column)) for column in (self.theta_hat, self.offset, self.fisher)]
        before = [t.clone() for column in columns for t in column]
        change = kind(*columns, self.new_theta_hat, self.new_fisher, **self.options)
        added, norms = change.measured()
        if self.factors is not None:
            change.scale(self.factors)
        steps = change.steps()
        assert all(map(torch.equal, before, [t for column in columns for t in column]))
        versions = [t._version for column in columns for t in column]
        for step in steps:
            step()
        assert all(t._version > v for t, v in zip([t for c in columns for t in c], versions, strict=True))
        return (*columns, added, norms)


@pytest.mark.parametrize("seed", range(150))
def test_as_in_plain_pytorch(seed):
    drawn = Drawn(seed)
    assert kernel() is not Consolidation
    found, wanted = drawn.enter(kernel()), drawn.enter(Consolidation)
    for got, want in zip(found[0], wanted[0], strict=True):
        assert torch.equal(got, want)
    for column in (1, 2):
        for got, want in zip(found[column], wanted[column], strict=True):
            assert got.stride() == want.stride()
            rtol, atol = 2 * EPS[got.dtype], 1e-15 if got.dtype == torch.float64 else 1e-7  # both round
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    decay, weight = drawn.options["decay"], drawn.options["weight"]
    for k, got in enumerate(found[2]):  # rounded once
        factor = 1.0 if drawn.factors is None else drawn.factors[k]
        exact = factor * (decay * drawn.fisher[k].double() + weight * drawn.new_fisher[k].double())
        torch.testing.assert_close(got.double(), exact, rtol=EPS[got.dtype], atol=1e-40)
    torch.testing.assert_close(found[3], wanted[3], rtol=1e-12, atol=0.0)  # c
    for k, f in enumerate(found[2]):  # PyTorch's norms are of F after it was rounded
        torch.testing.assert_close(found[4][k], wanted[4][k], rtol=max(1e-6, EPS[f.dtype]), atol=0.0)


@pytest.mark.parametrize("seed", range(12))
def test_a_merge_keeps_the_sum_of_both_penalties(seed):
    """At any theta, in float64, for tensors that are not rounded on the way."""
    drawn = Drawn(seed, [torch.float64])
    drawn.options["merge"], drawn.factors = True, None
    drawn.offset = [torch.randn_like(hat) / 8 for hat in drawn.theta_hat]
    decay, weight = drawn.options["decay"], drawn.options["weight"]
    hats, offsets, fishers, added, norms = drawn.enter(kernel())
    for k, hat in enumerate(hats):
        theta = torch.randn_like(hat)
        old = decay * drawn.fisher[k] * (theta - drawn.theta_hat[k] - drawn.offset[k]) ** 2
        new = weight * drawn.new_fisher[k].double() * (theta - drawn.new_theta_hat[k].double()) ** 2
        got = (fishers[k] * (theta - hat - offsets[k]) ** 2).sum() + added[k]
        torch.testing.assert_close(got, (old + new).sum(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(norms[k], fishers[k].norm(), rtol=1e-12, atol=0.0)


def test_the_same_bits_for_any_number_of_threads():
    drawn = Drawn(3, [torch.float32, torch.bfloat16])
    drawn.theta_hat, drawn.new_theta_hat = [torch.randn(300_001)], [torch.randn(300_001)]
    drawn.offset, drawn.factors = [torch.randn(300_001)], None
    drawn.fisher, drawn.new_fisher = [torch.rand(300_001)], [torch.rand(300_001)]
    drawn.options = {"decay": 0.5, "weight": 2.0, "merge": True}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            *columns, added, norms = drawn.enter(kernel())
            results.append([*(t for column in columns for t in column), added, norms])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_wrong_lengths_are_refused():
    change = kernel()(
        [torch.zeros(3)], [], [torch.zeros(3)], [torch.ones(3)], [torch.ones(3)], decay=1.0, weight=1.0, merge=True
    )
    with pytest.raises(ValueError, match="offset must have 1 entries, got 0"):
        change.measured()


# ---- by the public class -----------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["merge", "replace"])
@pytest.mark.parametrize("given", LAYOUTS)
def test_any_memory_order_of_what_is_given(given, anchor):
    conv = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    fisher = {n: torch.rand(p.shape) for n, p in conv.named_parameters()}
    hat = {n: torch.randn(p.shape) for n, p in conv.named_parameters()}
    penalties = [wplfast.WeightPlasticityLoss(conv) for _ in range(2)]
    for wpl, how in zip(penalties, (given, "as it is"), strict=True):
        wpl.consolidate(fisher)
        there = [{n: laid_out(t, how) for n, t in tensors.items()} for tensors in (fisher, hat)]
        wpl.consolidate(there[0], theta_hat=there[1], anchor=anchor, clip_norm=1.0)
    assert same_state(*penalties)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_fisher_of_another_type(dtype):
    module = trunk()
    fisher = {n: f.to(dtype) for n, f in random_fisher(module).items()}
    penalties = [wplfast.WeightPlasticityLoss(module) for _ in range(2)]
    for wpl, given in zip(penalties, (fisher, {n: f.float() for n, f in fisher.items()}), strict=True):
        for _ in range(2):
            wpl.consolidate(given, decay=0.5)
    assert same_state(*penalties)


def test_a_weight_brings_a_fisher_into_range():
    w = torch.ones(4, requires_grad=True)
    for anchor in ("merge", "replace"):
        wpl = wplfast.WeightPlasticityLoss({"w": w})
        for _ in range(2):
            wpl.consolidate({"w": torch.full((4,), 1e60, dtype=torch.float64)}, weight=1e-60, anchor=anchor)
        torch.testing.assert_close(wpl.fisher["w"], torch.full((4,), 2.0))


# ---- interrupts --------------------------------------------------------------------------------------------


class Signalled:
    """A class of consolidations that lets a signal arrive before, between or after the steps of the change."""

    def __init__(self, kind: type[Consolidation], position: int) -> None:
        self.kind, self.position, self.arrived = kind, position, False

    def __call__(self, *args, **kwargs):
        change = self.kind(*args, **kwargs)
        steps = change.steps

        def with_signal():
            found = steps()
            found.insert(self.position if self.position >= 0 else len(found), self.send)
            return found

        kill = ctypes.CDLL(None).kill  # os.kill may look for signals itself
        self.send = partial(kill, os.getpid(), int(signal.SIGUSR1))
        change.steps = with_signal
        return change


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals")
@pytest.mark.parametrize("options", [{}, {"anchor": "replace", "decay": 0.5}, {"clip_norm": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ["kernel", "plain PyTorch"])
@pytest.mark.parametrize("position", [0, -1], ids=["before the change", "after the change"])
def test_a_signal_between_the_change_and_its_commit_comes_after_both(monkeypatch, kind, position, options):
    def interrupt(*_):
        raise KeyboardInterrupt

    module = trunk()
    wpl, undisturbed = (wplfast.WeightPlasticityLoss(module) for _ in range(2))
    first, second = random_fisher(module), random_fisher(module)
    for penalty in (wpl, undisturbed):
        penalty.consolidate(first)
    before = {n: t.clone() for n, t in wpl.state_dict().items()}
    move(module)
    undisturbed.consolidate(second, **options)
    signalled = Signalled(kernel() if kind == "kernel" else Consolidation, position)
    monkeypatch.setattr(backends, "consolidation", lambda _: signalled)
    former = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            wpl.consolidate(second, **options)
    finally:
        signal.signal(signal.SIGUSR1, former)
    monkeypatch.undo()
    if position == 0 and kind == "kernel":  # a function of Python follows: the versions are changed by one
        assert same_state(wpl, before)
        wpl.consolidate(second, **options)
    reference = undisturbed.state_dict()
    assert all(torch.allclose(t, reference[n], rtol=1e-6) for n, t in wpl.state_dict().items())


@pytest.mark.parametrize("anchor", ["merge", "replace"])
def test_second_derivatives_know_that_an_anchor_changed(anchor):
    module = trunk()
    wpl = wplfast.WeightPlasticityLoss(module)
    wpl.consolidate(random_fisher(module))
    wpl.consolidate(random_fisher(module))
    move(module)
    value = wpl()
    wpl.consolidate(random_fisher(module), active=["0.weight"], anchor=anchor)
    with pytest.raises(RuntimeError, match="an anchor or a parameter changed"):
        torch.autograd.grad(value, list(module.parameters()), create_graph=True)
