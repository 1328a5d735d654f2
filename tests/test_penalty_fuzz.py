"""WeightPlasticityLoss under random sequences of everything that it can meet, against the plain sum in float64.

Tolerances. One rounding in float32 is 6e-8. The value is a sum of terms that are not negative, so errors relative to
the terms are errors relative to the sum: 1e-6 is DESIGN's bound, and every consolidation rounds F and the offset once
more. A gradient may cancel between anchors; its error is relative to the sum of its terms' magnitudes and, where it is
stored, to a unit in the last place of the storage type. F in bfloat16 is rounded by up to 2^-8, half of its epsilon, at
each consolidation.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from penalty_oracle import DTYPES, FISHERS, LARGE, ORDERS, SHAPES, Oracle, ordered, random, random_fisher
from torch import Tensor

import wplfast
from wplfast import backends

PROFILE = {
    "derandomize": True,  # the same cases on every run
    "database": None,
    "deadline": None,
    "report_multiple_bugs": False,
    "suppress_health_check": list(HealthCheck),
}

#: How many sequences; after a change of the penalty, or of what it computes with, more are worth their minutes.
EXAMPLES = int(os.environ.get("WPLFAST_TEST_EXAMPLES", "60"))


class Machine(RuleBasedStateMachine):
    """Everything that can happen to a penalty and its parameters."""

    @initialize(
        shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5),
        orders=st.lists(st.sampled_from([*ORDERS, "neighbour", "neighbour"]), min_size=6, max_size=6),
        dtypes=st.one_of(
            st.sampled_from(DTYPES).map(lambda dtype: [dtype] * 6),
            st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
        ),
        large=st.sampled_from([False, False, True]),
        fisher_dtype=st.sampled_from([None, None, torch.bfloat16]),
        l2=st.sampled_from([0.0, 0.05]),
        anchors=st.sampled_from([1, 2, 1, 3, 0]),
        seed=st.integers(0, 2**20),
    )
    def start(self, shapes, orders, dtypes, large, fisher_dtype, l2, anchors, seed):
        self.generator = torch.Generator().manual_seed(seed)
        shapes = [*shapes, LARGE] if large else shapes
        flats = {dtype: random((16 * 4300 + LARGE[0],), self.generator, dtype) for dtype in set(dtypes)}
        used = dict.fromkeys(flats, 1)  # neighbours follow each other without gaps, from an odd address on
        self.params: dict[str, Tensor] = {}
        for i, (shape, order, dtype) in enumerate(zip(shapes, orders, dtypes, strict=False)):
            if order == "neighbour":
                numel = math.prod(shape)
                theta = flats[dtype][used[dtype] : used[dtype] + numel].view(shape)
                used[dtype] += numel
            else:
                theta = ordered(random(shape, self.generator, dtype), order)
            self.params[f"p{i}"] = theta.detach().requires_grad_()
        self.oracles = None
        self.alpha = dict.fromkeys(self.params, 3.0)
        self.settings = {"l2": l2, "fisher_dtype": fisher_dtype}
        self.l2, self.bf16 = l2, fisher_dtype is not None
        self.wpl = wplfast.WeightPlasticityLoss(self.params, alpha=3.0, **self.settings)
        for k in range(anchors):  # many runs would never come to these by themselves
            self.enter(list(self.params)[k // 2 :] or None, FISHERS[(seed + k) % len(FISHERS)])
            self.step(0.1)

    # ---- what is expected --------------------------------------------------------------------------------------

    def oracle(self, name: str) -> Oracle:
        return Oracle(self.params[name]) if self.oracles is None else self.oracles[name]

    def chosen(self, data, least=1) -> list[str] | None:
        if data.draw(st.booleans(), label="all"):
            return None
        return data.draw(st.lists(st.sampled_from(list(self.params)), min_size=least, unique=True), label="active")

    def check_value(self, value: Tensor, names) -> None:
        names = list(self.params) if names is None else names
        if self.before_anchors:
            return
        exact = sum(self.oracle(n).value(self.params[n], self.alpha[n], self.l2) for n in names)
        roundings = max(self.oracle(n).roundings for n in names)
        doubles = all(self.params[n].dtype == torch.float64 for n in names)
        rtol = 1e-11 if doubles and self.settings_were_double(names) else 1e-6 + 1.2e-7 * roundings
        if self.bf16:
            rtol += roundings * 2**-8
        assert value.dim() == 0
        assert value.dtype in (torch.float32, torch.float64)
        # Where all anchors are theta, what is left is the square of a rounding.
        unit = 2**-50 if rtol < 1e-10 else 2**-20
        zero = sum(
            self.alpha[n] * float((self.oracle(n).fisher() * self.params[n].detach().double() ** 2).sum())
            for n in names
        )
        assert abs(value.item() - exact) <= rtol * exact + unit**2 * zero + 1e-36

    @property
    def before_anchors(self) -> bool:
        """Whether there is the l2 term alone; test_penalty.py looks at that."""
        return self.oracles is None and self.l2 != 0

    def settings_were_double(self, names) -> bool:
        return all(name not in self.converted for name in names)

    @property
    def converted(self) -> set[str]:
        return self.__dict__.setdefault("_converted", set())

    def check_gradient(self, name: str, got: Tensor, factor: float, before: Tensor | None, stores: int) -> None:
        """Compare with ``before + factor * gradient``, which was rounded ``stores`` times to the parameter's dtype."""
        theta, oracle = self.params[name], self.oracle(name)
        exact, magnitude = oracle.gradient(theta, self.alpha[name], self.l2)
        info, start = torch.finfo(theta.dtype), torch.zeros_like(exact) if before is None else before.double()
        want = start + factor * exact
        exactly = theta.dtype == torch.float64 and name not in self.converted
        inner = (2**-50 if exactly else 2**-22) * (2 + oracle.roundings)
        if self.bf16:
            inner += 2**-8 * (1 + oracle.roundings)
        if self.before_anchors:
            inner = 2**-22  # l2 times a float32 scale
        error = (inner * factor * magnitude) + stores * info.eps * (want.abs() + (factor * exact).abs())
        error += stores * info.smallest_normal * info.eps * max(1.0, factor)  # subnormal numbers are coarser
        inside = torch.stack([factor * exact, exact, start, want]).abs().amax(0) < info.max / 4  # False for NaN
        assert got.dtype == theta.dtype
        assert got.shape == theta.shape
        assert bool(((got.double() - want).abs() <= error)[inside].all()), name

    def frozen_copies(self):
        """Everything of the user's, and the anchors, to compare afterwards."""
        state = {k: v.clone() for k, v in self.wpl.state_dict().items()}
        thetas = {n: p.detach().clone() for n, p in self.params.items()}
        return state, thetas

    def assert_untouched(self, copies) -> None:
        state, thetas = copies
        now = self.wpl.state_dict()
        assert now.keys() == state.keys()
        assert all(torch.equal(now[k], v) for k, v in state.items())
        assert all(torch.equal(self.params[n], t) for n, t in thetas.items())

    # ---- consolidation -----------------------------------------------------------------------------------------

    @rule(
        data=st.data(),
        style=st.sampled_from(FISHERS),
        fisher_dtype=st.sampled_from([None, None, torch.float64, torch.bfloat16]),
        how=st.sampled_from(["merge", "merge", "merge", "replace", "update"]),
        weight=st.sampled_from([1.0, 0.3, 0.0]),
        decay=st.sampled_from([1.0, 0.5, 0.0]),
        given_hat=st.sampled_from([None, None, torch.float32, torch.float64]),
        clip_norm=st.sampled_from([None, None, None, 0.7]),
        normalize=st.sampled_from([None, None, None, "trace", "max"]),
    )
    def consolidate(self, data, style, fisher_dtype, how, weight, decay, given_hat, clip_norm, normalize):
        self.enter(self.chosen(data), style, fisher_dtype, how, weight, decay, given_hat, clip_norm, normalize)

    def enter(
        self,
        active,
        style,
        fisher_dtype=None,
        how="merge",
        weight=1.0,
        decay=1.0,
        given_hat=None,
        clip_norm=None,
        normalize=None,
    ):
        names = list(self.params) if active is None else active
        before = {kind: {n: t.clone() for n, t in getattr(self.wpl, kind).items()} for kind in ("fisher", "theta_hat")}
        fisher = {}
        for name in names:
            dtype = fisher_dtype or (torch.float64 if self.params[name].dtype == torch.float64 else torch.float32)
            fisher[name] = ordered(random_fisher(self.params[name].shape, style, self.generator, dtype), "transposed")
        hats = None
        if given_hat is not None:
            hats = {
                n: p.detach().to(given_hat) + 0.1 * random(p.shape, self.generator, given_hat)
                for n, p in self.params.items()
            }
        factor = 1.0
        if normalize is not None:
            largest = max((float(f.max()) for f in fisher.values() if f.numel()), default=0.0)
            if largest == 0.0:
                normalize = None
            elif normalize == "max":
                factor = 1 / largest
            else:
                factor = sum(f.numel() for f in fisher.values()) / sum(float(f.double().sum()) for f in fisher.values())
        given = {"fisher": fisher, **({} if hats is None else {"hat": hats})}
        copies = {kind: {n: t.clone() for n, t in mapping.items()} for kind, mapping in given.items()}
        thetas = {n: p.detach().clone() for n, p in self.params.items()}
        options = {"active": active, "theta_hat": hats, "clip_norm": clip_norm, "normalize": normalize}
        if how == "update":
            how, weight, decay = "replace", 0.75, 0.25
            self.wpl.update(fisher, rate=0.75, **options)
        else:
            self.wpl.consolidate(fisher, weight=weight, decay=decay, anchor=how, **options)
        if self.oracles is None:
            self.oracles = {n: Oracle(p) for n, p in self.params.items()}
        for name in names:
            theta = self.params[name].detach()
            hat = theta if hats is None else hats[name].to(theta.dtype)
            self.oracles[name].enter(hat, fisher[name].double(), weight * factor, decay, how)
            if clip_norm is not None:
                self.oracles[name].clip(clip_norm)
            assert torch.equal(self.wpl.theta_hat[name], hat)
            assert bool((self.wpl.fisher[name][self.oracles[name].fisher() == 0] == 0).all())
        for kind, mapping in before.items():  # whoever was not consolidated kept what it had, to the bit
            for name in mapping.keys() - set(names):
                assert torch.equal(getattr(self.wpl, kind)[name], mapping[name])
        for kind, mapping in given.items():
            assert all(torch.equal(t, copies[kind][n]) for n, t in mapping.items())
        assert all(torch.equal(p, thetas[n]) for n, p in self.params.items())

    @rule(sure=st.sampled_from([False] * 7 + [True]))
    def reset(self, sure):
        if not sure:
            return
        self.wpl.reset()
        self.oracles = None
        self.converted.clear()

    @rule(data=st.data(), kind=st.sampled_from(["float", "tensor", "prefix"]), value=st.sampled_from([0.0, 0.5, 40.0]))
    def set_alpha(self, data, kind, value):
        self.alpha = dict.fromkeys(self.params, value)
        if kind == "prefix":
            name = data.draw(st.sampled_from(list(self.params)))
            self.alpha |= dict.fromkeys([n for n in self.params if n.startswith(name)], 7.0)
            self.wpl.alpha = {"": value, name: 7.0}
        else:
            self.wpl.alpha = torch.tensor(value) if kind == "tensor" else value

    # ---- what users and optimizers do --------------------------------------------------------------------------

    @rule(size=st.sampled_from([1e-3, 0.1, 2.0]))
    def step(self, size):
        with torch.no_grad():
            for p in self.params.values():
                p.add_(size * random(p.shape, self.generator, p.dtype))

    @rule(data=st.data(), order=st.sampled_from(ORDERS))
    def exchange_memory(self, data, order):
        p = self.params[data.draw(st.sampled_from(list(self.params)))]
        p.data = ordered(p.detach(), order)

    @rule(data=st.data(), dtype=st.sampled_from(DTYPES))
    def convert(self, data, dtype):
        name = data.draw(st.sampled_from(list(self.params)))
        p = self.params[name]
        changed, p.grad, p.data = p.dtype != dtype, None, p.data.to(dtype)
        if self.oracles is not None and changed:
            self.oracles[name].convert(dtype)
            self.converted.add(name)
            self.wpl()  # the anchors follow at the next call, not before

    @rule(data=st.data())
    def freeze_or_thaw(self, data):
        p = self.params[data.draw(st.sampled_from(list(self.params)))]
        p.requires_grad_(not p.requires_grad)

    @rule(data=st.data(), order=st.sampled_from([None, *ORDERS]))
    def set_grad(self, data, order):
        p = self.params[data.draw(st.sampled_from(list(self.params)))]
        p.grad = None if order is None else ordered(random(p.shape, self.generator, p.dtype), order)

    @precondition(lambda self: any(p.dim() for p in self.params.values()))
    @rule(data=st.data(), by=st.integers(1, 3))
    def grow(self, data, by):
        name = data.draw(st.sampled_from([n for n, p in self.params.items() if p.dim()]))
        old = self.params[name]
        dim = data.draw(st.integers(0, old.dim() - 1))
        shape = list(old.shape)
        shape[dim] += by
        new = random(shape, self.generator, old.dtype)
        new[tuple(slice(0, n) for n in old.shape)] = old.detach()
        if self.oracles is not None:
            self.oracles[name].grow(new)
        self.params[name] = new.requires_grad_()
        self.wpl.rebind(self.params)

    # ---- round trips -------------------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["state_dict", "file", "deepcopy", "pickle"]))
    def round_trip(self, how):
        bits = self.wpl().detach()
        if how == "deepcopy":
            again = copy.deepcopy(self.wpl)
        elif how == "pickle":
            again = pickle.loads(pickle.dumps(self.wpl))
            again.rebind(self.params)
        else:
            again = wplfast.WeightPlasticityLoss(self.params, alpha=1.0, **self.settings)
            kinds = set(self.alpha.values())
            again.alpha = kinds.pop() if len(kinds) == 1 else self.alpha
            if how == "file":
                with tempfile.TemporaryDirectory() as folder:
                    self.wpl.save(Path(folder) / "wpl.safetensors")
                    again.load(Path(folder) / "wpl.safetensors")
            else:
                again.load_state_dict({k: v.clone() for k, v in self.wpl.state_dict().items()})
        assert again.n_anchors == self.wpl.n_anchors
        assert torch.equal(again().detach(), bits)
        self.wpl = again

    # ---- evaluation --------------------------------------------------------------------------------------------

    @invariant()
    def value_and_gradient_are_right(self):
        if "wpl" not in self.__dict__:
            return
        value, trained = self.wpl(), [n for n, p in self.params.items() if p.requires_grad]
        self.check_value(value, None)
        if trained and value.requires_grad:
            found = torch.autograd.grad(value, [self.params[n] for n in trained])
            for name, gradient in zip(trained, found, strict=True):
                self.check_gradient(name, gradient, 1.0, None, 3 if self.before_anchors else 1)

    @rule(
        data=st.data(),
        path=st.sampled_from(["backward", "grad", "retain", "create_graph"]),
        factor=st.sampled_from([1.0, 1.0, 2.5, 1e-3]),
    )
    def differentiate(self, data, path, factor):
        names = self.chosen(data)
        chosen = list(self.params) if names is None else names
        trained = [n for n in chosen if self.params[n].requires_grad]
        value = self.wpl(active=names)
        self.check_value(value, names)
        assert value.requires_grad == bool(trained and (self.l2 or self.oracles is not None))
        if not value.requires_grad:
            return
        stores = 2 if factor != 1 else 1  # the gradient is stored, and scaled afterwards
        if self.oracles is None:
            stores = 3  # the l2 term alone is ordinary autograd
        copies, befores = self.frozen_copies(), {n: self.grad_of(n) for n in self.params}
        if path in ("grad", "create_graph"):
            found = torch.autograd.grad(
                factor * value, [self.params[n] for n in trained], create_graph=path == "create_graph"
            )
            for name, gradient in zip(trained, found, strict=True):
                self.check_gradient(name, gradient, factor, None, stores)
            assert all(self.same(self.grad_of(n), g) for n, g in befores.items())
        else:
            times = 2 if path == "retain" else 1
            for k in range(times):
                (factor * value).backward(retain_graph=k + 1 < times)
            for name in self.params:
                if name in trained:
                    self.check_gradient(
                        name, self.params[name].grad, times * factor, befores[name], (times + 1) * stores
                    )
                else:
                    assert self.same(self.grad_of(name), befores[name])
        self.assert_untouched(copies)

    @rule(data=st.data(), scale=st.sampled_from([1.0, 1, 0.25, torch.tensor(3.0)]))
    def add(self, data, scale):
        names = self.chosen(data)
        copies, befores = self.frozen_copies(), {n: self.grad_of(n) for n in self.params}
        value = self.wpl.add_grad_(scale, active=names)
        assert not value.requires_grad
        self.check_value(value, names)
        for name, p in self.params.items():
            if p.requires_grad and (names is None or name in names) and not (self.oracles is None and self.l2 == 0):
                # Once into .grad where it lies as its parameter does; apart, scaled and added otherwise.
                self.check_gradient(name, p.grad, float(scale), befores[name], 3)
            else:
                assert self.same(self.grad_of(name), befores[name])
        self.assert_untouched(copies)

    @precondition(lambda self: not self.before_anchors)
    @precondition(lambda self: backends.serving(torch.get_default_device().type) != "reference")
    @rule()
    def same_bits_for_one_thread_and_two(self):  # PyTorch's own sums differ
        threads, results = torch.get_num_threads(), []
        trained = [p for p in self.params.values() if p.requires_grad]
        grads = {n: self.grad_of(n) for n in self.params}
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                value = self.wpl()
                found = torch.autograd.grad(value, trained) if trained and value.requires_grad else ()
                for n, p in self.params.items():
                    p.grad = None if grads[n] is None else grads[n].clone()
                results.append([value.detach(), *found, self.wpl.add_grad_(), *[self.grad_of(n) for n in self.params]])
        finally:
            torch.set_num_threads(threads)
            for n, p in self.params.items():
                p.grad = grads[n]
        for one, two in zip(*results, strict=True):
            assert self.same(one, two)

    def grad_of(self, name: str) -> Tensor | None:
        gradient = self.params[name].grad
        return None if gradient is None else gradient.detach().clone()

    @staticmethod
    def same(first: Tensor | None, second: Tensor | None) -> bool:
        """Equal bits; NaN too, where a large F meets float16."""
        if first is None or second is None:
            return first is second
        return torch.equal(first.nan_to_num(0.5), second.nan_to_num(0.5))


TestSequences = Machine.TestCase
TestSequences.settings = settings(max_examples=EXAMPLES, stateful_step_count=25, **PROFILE)


@settings(max_examples=60, **PROFILE)
@given(
    shape=st.sampled_from([*SHAPES, LARGE]),
    dtype=st.sampled_from(DTYPES),
    orders=st.lists(st.sampled_from(ORDERS), min_size=3, max_size=3),
    bf16=st.booleans(),
    l2=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_the_function_in_any_memory_order(shape, dtype, orders, bf16, l2, seed):
    """theta, theta_hat and F may all lie in memory differently."""
    generator = torch.Generator().manual_seed(seed)
    theta, hat = (ordered(random(shape, generator, dtype), order) for order in orders[:2])
    theta.requires_grad_()
    kept = torch.float64 if dtype == torch.float64 else torch.bfloat16 if bf16 else torch.float32
    fisher = ordered(random_fisher(shape, "wide", generator, kept), orders[2])
    value = wplfast.functional.wpl_penalty([theta], [hat], [fisher], torch.tensor(2.0), l2=l2)
    oracle = Oracle(hat)
    oracle.enter(hat, fisher, 1.0, 1.0, "merge")
    exact, (gradient, magnitude) = oracle.value(theta, 2.0, l2), oracle.gradient(theta, 2.0, l2)
    assert value.item() == pytest.approx(exact, rel=1e-12 if dtype == torch.float64 else 1e-6)
    (found,) = torch.autograd.grad(value, theta)
    inner = 2**-50 if dtype == torch.float64 else 2**-21
    assert bool(
        ((found.double() - gradient).abs() <= inner * magnitude + torch.finfo(dtype).eps * gradient.abs() + 6e-8).all()
    )
