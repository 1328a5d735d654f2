"""LSTM, GRU and plain RNN layers: what :mod:`.recurrent_scan` runs over time, and its gradients.

Backwards, all that does not depend on later steps is computed for all steps at once; the loop is left with a product
with W_hh and a few elementwise operations. All of it is linear in the gradients, so that probe weights pass through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .product import Product
from .recurrent_scan import Cell, Run, Steps, Weights, split, start

_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


def _project(x: Tensor, weight: Tensor, *biases: Tensor | None) -> Tensor:
    """Return ``x W^T`` plus biases."""
    product = Product(weight)(x)
    given = [bias for bias in biases if bias is not None]
    return product.add_(sum(given[1:], given[0])) if given else product


def _parts(gates: Tensor, steps: Steps, *cuts: int) -> list[list[Tensor]]:
    """Cut gates into runs of columns that end at ``cuts``, each split into steps."""
    return [steps.of(gates[:, first:last]) for first, last in zip((0, *cuts), cuts, strict=False)]


class Lstm(Cell):
    """c' = f c + i g; h' = o tanh(c'), projected by W_hr if there is one."""

    n_states = 2

    def forward(self, x: Tensor, states: Sequence[Tensor], weights: Weights, steps: Steps) -> Run:
        """Run over time."""
        h, c = (state.clone(memory_format=torch.contiguous_format) for state in states)
        width, rows = c.shape[1], len(x)
        gates, w_hh = _project(x, weights.ih, weights.b_ih, weights.b_hh), Product(weights.hh)
        h_before, c_before = (x.new_empty(rows, state.shape[1]) for state in states)
        tanh_c, shown = x.new_empty(rows, width), x.new_empty(rows, width)
        w_hr = None if weights.hr is None else Product(weights.hr)
        out = shown if w_hr is None else torch.empty_like(h_before)
        columns = _parts(gates, steps, width, 2 * width, 3 * width, 4 * width)
        in_and_forget = steps.of(gates[:, : 2 * width])
        living = (steps.living(h), steps.living(c), steps.of(h_before), steps.of(c_before))
        made = (steps.of(tanh_c), steps.of(shown), steps.of(out))
        for gate, both, i, f, g, o, h_now, c_now, h_old, c_old, squashed, m, result in zip(
            steps.of(gates), in_and_forget, *columns, *living, *made, strict=True
        ):
            h_old.copy_(h_now)
            c_old.copy_(c_now)
            w_hh.onto(gate, h_now)
            both.sigmoid_()
            g.tanh_()
            o.sigmoid_()
            c_now.mul_(f).addcmul_(i, g)
            torch.tanh(c_now, out=squashed)
            torch.mul(o, squashed, out=m)
            if w_hr is not None:
                w_hr.into(result, m)
            h_now.copy_(result)
        kept = (gates, tanh_c, c_before, weights.hh, *(() if weights.hr is None else (weights.hr,)))
        return Run((out, h, c), h_before, (gates, gates), kept, None if w_hr is None else shown)

    def backward(self, kept: Sequence[Tensor], steps: Steps, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run back over time."""
        gates, tanh_c, c_before = kept[:3]
        w_hh, w_hr = Product(kept[3].t()), Product(kept[4].t()) if len(kept) > 4 else None
        width = c_before.shape[1]
        found = torch.empty_like(gates)  # first what the gradients of c' (i, f, g) and of h' (o) are multiplied with
        i, f, g, o = gates.chunk(4, 1)
        of_i, of_f, of_g, of_o = found.chunk(4, 1)
        _sigmoid_backward.grad_input(g, i, grad_input=of_i)
        _sigmoid_backward.grad_input(c_before, f, grad_input=of_f)
        _tanh_backward.grad_input(i, g, grad_input=of_g)
        _sigmoid_backward.grad_input(tanh_c, o, grad_input=of_o)
        slope = _tanh_backward(o, tanh_c)
        dh, dc = start(grads[1], steps, kept[3].shape[1], gates), start(grads[2], steps, width, gates)
        projected = None if w_hr is None else gates.new_empty(len(gates), dh.shape[1])
        of_cell = found[:, : 3 * width].unflatten(1, (3, width))
        for d_gate, d_cell, d_o, slope_now, f_now, dh_now, dc_now, dc_thrice, d_out, d_result in zip(
            steps.of(found, back=True),
            steps.of(of_cell, back=True),
            steps.of(of_o, back=True),
            steps.of(slope, back=True),
            steps.of(f, back=True),
            steps.living(dh, back=True),
            steps.living(dc, back=True),
            steps.living(dc.unsqueeze(1), back=True),
            split(grads[0], steps),
            split(projected, steps),
            strict=True,
        ):
            if d_out is not None:
                dh_now.add_(d_out)
            dm = dh_now
            if w_hr is not None and d_result is not None:
                d_result.copy_(dh_now)
                dm = w_hr(dh_now)
            dc_now.addcmul_(dm, slope_now)
            d_cell.mul_(dc_thrice)
            d_o.mul_(dm)
            dc_now.mul_(f_now)
            w_hh.into(dh_now, d_gate)
        return [found, found, projected, dh, dc]


class Gru(Cell):
    """n = tanh(x_n + r h_n); h' = n + z (h - n), where x_n and h_n are the projections' last thirds."""

    def forward(self, x: Tensor, states: Sequence[Tensor], weights: Weights, steps: Steps) -> Run:
        """Run over time."""
        h = states[0].clone(memory_format=torch.contiguous_format)
        width, w_hh, given = h.shape[1], Product(weights.hh), _project(x, weights.ih, weights.b_ih)
        gates = torch.empty_like(given)
        hidden = torch.zeros_like(given) if weights.b_hh is None else weights.b_hh.expand_as(given).clone()
        h_before, out = x.new_empty(len(x), width), x.new_empty(len(x), width)
        thirds = [_parts(tensor, steps, 2 * width, 3 * width) for tensor in (given, hidden, gates)]
        columns = (*thirds[0], *thirds[1], *thirds[2], *_parts(gates, steps, width, 2 * width))
        for product, x_both, x_n, h_both, h_n, both, n, r, z, h_now, h_old, result in zip(
            steps.of(hidden), *columns, steps.living(h), steps.of(h_before), steps.of(out), strict=True
        ):
            h_old.copy_(h_now)
            w_hh.onto(product, h_now)
            torch.add(x_both, h_both, out=both).sigmoid_()
            torch.addcmul(x_n, r, h_n, out=n).tanh_()
            torch.lerp(n, h_old, z, out=result)
            h_now.copy_(result)
        return Run((out, h), h_before, (given, hidden), (gates, hidden, h_before, weights.hh))

    def backward(self, kept: Sequence[Tensor], steps: Steps, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run back over time."""
        gates, hidden, h_before = kept[:3]
        width, w_hh = h_before.shape[1], Product(kept[3].t())
        r, z, n = gates.chunk(3, 1)
        found = torch.empty_like(gates)  # first what the gradient of h' is multiplied with
        of_r, of_z, of_n = found.chunk(3, 1)
        slope = _tanh_backward(1 - z, n)
        _sigmoid_backward.grad_input(slope * hidden[:, 2 * width :], r, grad_input=of_r)
        _sigmoid_backward.grad_input(h_before - n, z, grad_input=of_z)
        torch.mul(slope, r, out=of_n)
        dh, dh_all = start(grads[1], steps, width, gates), torch.empty_like(h_before)
        for d_gate, d_thrice, z_now, dh_now, dh_here, dh_thrice, d_out in zip(
            steps.of(found, back=True),
            steps.of(found.unflatten(1, (3, width)), back=True),
            steps.of(z, back=True),
            steps.living(dh, back=True),
            steps.of(dh_all, back=True),
            steps.of(dh_all.unsqueeze(1), back=True),
            split(grads[0], steps),
            strict=True,
        ):
            if d_out is None:
                dh_here.copy_(dh_now)
            else:
                torch.add(dh_now, d_out, out=dh_here)
            d_thrice.mul_(dh_thrice)
            torch.mul(dh_here, z_now, out=dh_now)
            w_hh.onto(dh_now, d_gate)
        return [torch.cat([found[:, : 2 * width], slope.mul_(dh_all)], 1), found, None, dh]


class Rnn(Cell):
    """h' = tanh(x + h) or relu(x + h), x and h projected."""

    def __init__(self, nonlinearity: str) -> None:
        """Take ``tanh`` or ``relu``."""
        self.nonlinearity = nonlinearity

    def forward(self, x: Tensor, states: Sequence[Tensor], weights: Weights, steps: Steps) -> Run:
        """Run over time."""
        h = states[0].clone(memory_format=torch.contiguous_format)
        out, w_hh = _project(x, weights.ih, weights.b_ih, weights.b_hh), Product(weights.hh)
        squash = torch.tanh_ if self.nonlinearity == "tanh" else torch.relu_
        h_before = torch.empty_like(out)
        for result, h_now, h_old in zip(steps.of(out), steps.living(h), steps.of(h_before), strict=True):
            h_old.copy_(h_now)
            w_hh.onto(result, h_now)
            squash(result)
            h_now.copy_(result)
        return Run((out.clone(), h), h_before, (out, out), (out, weights.hh))

    def backward(self, kept: Sequence[Tensor], steps: Steps, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run back over time."""
        out, w_hh = kept[0], Product(kept[1].t())
        slope = _tanh_backward(torch.ones_like(out), out) if self.nonlinearity == "tanh" else (out > 0).to(out)
        dh = start(grads[1], steps, out.shape[1], out)
        for found, dh_now, d_out in zip(
            steps.of(slope, back=True), steps.living(dh, back=True), split(grads[0], steps), strict=True
        ):
            if d_out is not None:
                dh_now.add_(d_out)
            found.mul_(dh_now)
            w_hh.into(dh_now, found)
        return [slope, slope, None, dh]
