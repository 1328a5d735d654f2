"""Calls that are kept as they were, and loops whose steps are squared at once: the same again, or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from torch import Tensor, nn

import wplfast
from wplfast.capture.collect.steps import stacked
from wplfast.capture.sample_layout import AxisLayout, OneSample, is_summable, sum_to

N, T, D = 4, 5, 6


def squares(outputs, targets):
    return (outputs.flatten(1) - targets).square().sum(1)


class Model(nn.Module):
    """Runs a function of itself and its inputs."""

    def __init__(self, run):
        super().__init__()
        self.run = run

        def matrix(*shape):
            return nn.Parameter(torch.randn(shape, dtype=torch.float64) / D**0.5)

        self.w, self.u, self.v, self.b, self.scalar = matrix(D, D), matrix(D, D), matrix(D, D), matrix(D), matrix()
        self.table, self.kernel = matrix(7, D), matrix(2, 1, 2, 2)

    def forward(self, *inputs):
        return self.run(self, *inputs)


def check(run, batches):
    """Compare the Fisher of batches, each of them twice in a row so that it is steady, with the loop's."""
    torch.manual_seed(0)
    model = Model(run)
    doubled = [batch for batch in batches for _ in range(2)]
    expected = fisher_loop(model, doubled, squares)
    with wplfast.FisherAccumulator(model, verify=True) as accumulator:
        for inputs, targets in doubled:
            accumulator.backward(squares(model(*inputs), targets))
        found = accumulator.result()
    assert_close(found, expected, 1e-10, 1e-12)
    return found.report


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64)


def sequences(n=N, t=T):
    return ((numbers(n, t, D),), torch.zeros(n, 1, dtype=torch.float64))


def cell(m, x, state):
    return torch.tanh(x @ m.w + state @ m.u + m.b)


def over_slices(m, x):
    state = x.new_zeros(len(x), D)
    for t in range(x.shape[1]):
        state = cell(m, x[:, t], state)
    return state


def backwards(m, x):
    state = x.new_zeros(len(x), D)
    for t in reversed(range(x.shape[1])):
        state = cell(m, x[:, t], state)
    return state


def over_copies(m, x):
    state = x.new_zeros(len(x), D)
    for part in x.unbind(1):
        state = cell(m, part * 2, state)
    return state


def every_other(m, x):
    state = x.new_zeros(len(x), D)
    for part in x[:, ::2].unbind(1):
        state = cell(m, part, state)
    return state


def last_step_unused(m, x):
    states = [x.new_zeros(len(x), D)]
    for part in x.unbind(1):
        states.append(cell(m, part, states[-1]))
    return states[-2]


def with_linear(m, x):
    state = x.new_zeros(len(x), D)
    for part in x.unbind(1):
        state = torch.tanh(F.linear(part, m.w, m.b) + torch.addmm(m.b, state, m.u))
    return state


def used_elsewhere(m, x):
    return over_slices(m, x) + torch.tanh(x @ m.w).sum(1) + m.b


def two_loops(m, x):
    first, second = x.new_zeros(len(x), D), x.new_zeros(len(x), D)
    for part in x.unbind(1):
        first = torch.tanh(part @ m.w + first @ m.u + m.b)
        second = torch.tanh(first @ m.v + second * m.scalar)
    return second


def two_at_a_time(m, x):
    """Steps of other sizes than the first ones."""
    state = cell(m, x[:, 0], x.new_zeros(len(x), D))
    both = torch.cat([state, state * 0.5])
    both = cell(m, torch.cat([x[:, 1], x[:, 2]]), both)
    return both[: len(x)] + both[len(x) :]


def with_factors(m, x):
    state = x.new_zeros(len(x), D)
    for t, part in enumerate(x.unbind(1)):
        state = torch.tanh(torch.add(part @ m.w, m.b, alpha=2 if t % 2 else 1) - m.b + (m.scalar - state))
    return state


def of_a_scalar(m, x):
    state = x.new_zeros(len(x), D)
    for part in x.unbind(1):
        state = torch.tanh(m.scalar + part + state @ m.u)
    return state


LOOPS = [
    over_slices,
    backwards,
    over_copies,
    every_other,
    last_step_unused,
    with_linear,
    used_elsewhere,
    two_loops,
    two_at_a_time,
    with_factors,
    of_a_scalar,
]


@pytest.mark.parametrize("run", LOOPS, ids=lambda run: run.__name__)
def test_loops(run):
    check(run, [sequences(), sequences(3, 4), sequences(), sequences(1), sequences(T, N)])


def test_a_step_whose_gradient_is_none():
    class Sometimes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, passes):
            ctx.passes = passes
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return (gradient if ctx.passes else None), None

    def run(m, x, passes):
        found = [Sometimes.apply(torch.tanh(x[:, t] @ m.w + m.b), t < passes) for t in range(x.shape[1])]
        return torch.stack(found, 1).sum(1)

    torch.manual_seed(0)
    model = Model(run)
    x, zero = numbers(N, T, D), torch.zeros(N, 1, dtype=torch.float64)
    total = dict.fromkeys(("w", "b"), 0)
    with wplfast.FisherAccumulator(model, {name: getattr(model, name) for name in total}) as accumulator:
        for passes in (T, T, T, 2, 0, T):  # one graph, whatever the Function does
            accumulator.backward(squares(model(x, passes), zero))
        found = accumulator.result()
    for passes in (T, T, T, 2, 0, T):
        for n in range(N):
            model.zero_grad()
            squares(model(x[n : n + 1], passes), zero[n : n + 1]).sum().backward()
            for name in total:
                gradient = getattr(model, name).grad
                total[name] = total[name] + (0 if gradient is None else gradient.square())
    assert_close(found, {name: value / (6 * N) for name, value in total.items()}, 1e-10, 1e-12)


def test_weights_stay_outside_the_square_of_a_loop():
    torch.manual_seed(0)
    model, weights = Model(two_loops), torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)
    (x,), zero = sequences()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(N):
        model.zero_grad()
        squares(model(x[n : n + 1]), zero[n : n + 1]).sum().backward()
        for name, p in model.named_parameters():
            expected[name] += 0 if p.grad is None else weights[n] * p.grad.square() / weights.sum()
    model.zero_grad()
    with wplfast.FisherAccumulator(model) as accumulator:
        for _ in range(3):
            accumulator.backward(squares(model(x), zero), weights)
        assert_close(accumulator.result(), expected, 1e-10, 1e-12)


def tokens(*rows):
    return ((torch.tensor(rows),), torch.zeros(len(rows), 1, dtype=torch.float64))


@pytest.mark.parametrize("padding", [None, 1, -6])
def test_looked_up_rows(padding):
    def run(m, indices):
        return torch.tanh(F.embedding(indices, m.table, padding_idx=padding))

    check(run, [tokens([1, 2, 2], [3, 1, 0]), tokens([0, 0, 0], [6, 1, 1]), tokens([1, 1, 1], [1, 1, 1])])


def test_indices_that_begin_to_count_up():
    """One row of integers may be samples' own, or positions that all samples share."""

    def run(m, x, indices):
        return torch.tanh(x + F.embedding(indices, m.table)[: x.shape[1]])

    x = numbers(N, T, D)

    def batch(*indices):
        return ((x, torch.tensor(indices)), torch.zeros(N, 1, dtype=torch.float64))

    torch.manual_seed(0)
    model = Model(run)
    data = [batch(*indices) for indices in ((3, 1, 4, 1, 5), (0, 1, 2, 3, 4), (1, 2, 3, 4, 5), (2, 6, 5, 3, 5))] * 2
    total = torch.zeros_like(model.table)
    for (inputs, indices), zero in data:
        for n in range(N):
            model.zero_grad()
            squares(model(inputs[n : n + 1], indices), zero[n : n + 1]).sum().backward()
            total += model.table.grad.square()
    model.zero_grad()
    found = wplfast.fisher_diagonal(model, data, squares, params={"table": model.table})
    assert_close(found, {"table": total / (N * len(data))}, 1e-10, 1e-12)


def test_other_plain_arguments_in_the_same_place():
    def run(m, x, stride, padding):
        y = F.conv2d(x.unsqueeze(1), m.kernel, None, stride, padding)
        return torch.tanh(F.layer_norm(y.flatten(2).mean(2) @ m.w[:2], (D,), m.b, eps=padding[0] + 1e-5))

    def batch(stride, padding):
        return ((numbers(N, 5, 5), stride, padding), torch.zeros(N, 1, dtype=torch.float64))

    torch.manual_seed(0)
    model = Model(run)
    data = [batch(*sizes) for sizes in (((1, 1), (0, 0)), ((2, 1), (0, 0)), ((1, 1), (1, 1)), ((1, 1), (0, 0)))] * 2
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for (x, stride, padding), zero in data:
        for n in range(N):
            model.zero_grad()
            squares(model(x[n : n + 1], stride, padding), zero[n : n + 1]).sum().backward()
            for name, p in model.named_parameters():
                expected[name] += 0 if p.grad is None else p.grad.square() / (N * len(data))
    model.zero_grad()
    with wplfast.FisherAccumulator(model) as accumulator:
        for inputs, zero in data:
            accumulator.backward(squares(model(*inputs), zero))
        assert_close(accumulator.result(), expected, 1e-10, 1e-12)


def test_alike_calls_share_what_is_kept():
    torch.manual_seed(0)
    model = Model(over_slices)
    (x,), zero = sequences()
    with wplfast.FisherAccumulator(model) as accumulator:
        accumulator.backward(squares(model(x), zero))
        calls = {id(tapped.call) for tapped in accumulator._session.interception.taps}
    assert len(calls) == 4  # the first state needs no gradient; x @ w, state @ u, b


def test_steps_that_lie_in_one_tensor_are_not_copied():
    x = numbers(N, T, D)
    whole = stacked([x[:, t] for t in range(T)])
    assert whole.data_ptr() == x.data_ptr()
    assert torch.equal(whole, x)
    every = stacked([x[:, t] for t in range(0, T, 2)])
    assert every.data_ptr() == x.data_ptr()
    assert torch.equal(every, x[:, ::2])
    for parts in ([x[:, 1], x[:, 0]], [x[:, 0], x[:, 1], x[:, 3]], [x[:, 0], numbers(N, D)], [x[:, 2]]):
        assert torch.equal(stacked(parts), torch.stack(parts, 1))


@pytest.mark.parametrize("shape", [(D,), (1,), (), (1, D), (T, D), (T, 1), (1, T, D), (1, 1, 1)])
@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (AxisLayout(0, 1, N, 1), (N, T, D)),
        (AxisLayout(1, 1, T, 1), (N, T, D)),
        (AxisLayout(0, 2, 2, 1), (N, T, D)),
        (AxisLayout(0, 1, 2, 2), (N, T, D)),
        (AxisLayout(2, 2, 3, 1), (N, T, D)),
        (OneSample(), (N, T, D)),
    ],
)
def test_sums_over_what_was_broadcast(layout, size, shape):
    gradient = numbers(*size)
    if not is_summable(layout, len(size), torch.Size(shape)):
        return
    found = sum_to(layout, gradient, torch.Size(shape))
    each: list[Tensor] = [layout.only(gradient, n).sum_to_size(shape) for n in range(layout.n_samples)]
    assert torch.allclose(found, torch.stack(each))
