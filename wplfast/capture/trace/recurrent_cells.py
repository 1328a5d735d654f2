"""LSTM, GRU and plain RNN layers: what :mod:`.recurrent_scan` runs over time, and its gradients.

Backwards, all that does not depend on later steps is computed for all steps at once; the loop is left with a product
with W_hh and a few elementwise operations. All of it is linear in the gradients, so that probe weights pass through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .product import Product
from .recurrent_scan import Cell, Run, Steps, Weights, each, split, start

_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward


def _project(x: Tensor, weight: Tensor, *biases: Tensor | None) -> Tensor:
    """Return ``x W^T`` plus biases."""
    product = Product(weight)(x)
    given = [bias for bias in biases if bias is not None]
    return product.add_(sum(given[1:], given[0])) if given else product


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
        i, f, g, o = gates.chunk(4, 1)
        for step in each(
            gates=steps.of(gates),
            i=steps.of(i),
            f=steps.of(f),
            i_and_f=steps.of(gates[:, : 2 * width]),
            g=steps.of(g),
            o=steps.of(o),
            h=steps.living(h),
            c=steps.living(c),
            h_before=steps.of(h_before),
            c_before=steps.of(c_before),
            tanh_c=steps.of(tanh_c),
            shown=steps.of(shown),
            out=steps.of(out),
        ):
            step.h_before.copy_(step.h)
            step.c_before.copy_(step.c)
            w_hh.onto(step.gates, step.h)
            step.i_and_f.sigmoid_()
            step.g.tanh_()
            step.o.sigmoid_()
            step.c.mul_(step.f).addcmul_(step.i, step.g)
            torch.tanh(step.c, out=step.tanh_c)
            torch.mul(step.o, step.tanh_c, out=step.shown)
            if w_hr is not None:
                w_hr.into(step.out, step.shown)
            step.h.copy_(step.out)
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
        for step in each(
            found=steps.of(found, back=True),
            of_cell=steps.of(found[:, : 3 * width].unflatten(1, (3, width)), back=True),
            of_o=steps.of(of_o, back=True),
            slope=steps.of(slope, back=True),
            f=steps.of(f, back=True),
            dh=steps.living(dh, back=True),
            dc=steps.living(dc, back=True),
            dc_thrice=steps.living(dc.unsqueeze(1), back=True),
            d_out=split(grads[0], steps),
            projected=split(projected, steps),
        ):
            if step.d_out is not None:
                step.dh.add_(step.d_out)
            d_shown = step.dh
            if w_hr is not None:
                step.projected.copy_(step.dh)
                d_shown = w_hr(step.dh)
            step.dc.addcmul_(d_shown, step.slope)
            step.of_cell.mul_(step.dc_thrice)
            step.of_o.mul_(d_shown)
            step.dc.mul_(step.f)
            w_hh.into(step.dh, step.found)
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
        r, z, n = gates.chunk(3, 1)
        for step in each(
            hidden=steps.of(hidden),
            x_r_and_z=steps.of(given[:, : 2 * width]),
            x_n=steps.of(given[:, 2 * width :]),
            h_r_and_z=steps.of(hidden[:, : 2 * width]),
            h_n=steps.of(hidden[:, 2 * width :]),
            r_and_z=steps.of(gates[:, : 2 * width]),
            r=steps.of(r),
            z=steps.of(z),
            n=steps.of(n),
            h=steps.living(h),
            h_before=steps.of(h_before),
            out=steps.of(out),
        ):
            step.h_before.copy_(step.h)
            w_hh.onto(step.hidden, step.h)
            torch.add(step.x_r_and_z, step.h_r_and_z, out=step.r_and_z).sigmoid_()
            torch.addcmul(step.x_n, step.r, step.h_n, out=step.n).tanh_()
            torch.lerp(step.n, step.h_before, step.z, out=step.out)
            step.h.copy_(step.out)
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
        for step in each(
            found=steps.of(found, back=True),
            thirds=steps.of(found.unflatten(1, (3, width)), back=True),
            z=steps.of(z, back=True),
            dh=steps.living(dh, back=True),
            dh_here=steps.of(dh_all, back=True),
            dh_thrice=steps.of(dh_all.unsqueeze(1), back=True),
            d_out=split(grads[0], steps),
        ):
            if step.d_out is None:
                step.dh_here.copy_(step.dh)
            else:
                torch.add(step.dh, step.d_out, out=step.dh_here)
            step.thirds.mul_(step.dh_thrice)
            torch.mul(step.dh_here, step.z, out=step.dh)
            w_hh.onto(step.dh, step.found)
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
