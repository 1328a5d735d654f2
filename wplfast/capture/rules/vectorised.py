"""The local backward passes of a call for many samples at once, by ``torch.func.vmap``, where that is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..sample_layout import AxisLayout, SampleLayout

_functorch: Any = torch._C._functorch

#: How far gradients by two ways may be apart, relative to the largest.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}

#: Larger gradients are sent down a graph one by one: each is worth its calls, and what is computed stays in the caches.
MAX_TOGETHER = 1 << 16

#: Calls of which both sides were compared, and whether they agreed: at first use.
_checked: dict[Any, bool] = {}
_MAX_CHECKED = 1 << 12


def by_sample(tensor: Tensor, axis: AxisLayout) -> Tensor:
    """Return a tensor as [N, *shape], the part of each sample having as many dimensions as all of it."""
    return axis.split(tensor.contiguous()).flatten(axis.dim + 1, axis.dim + 2)


def signature(
    call: Call, inputs: Sequence[Tensor], axes: Sequence[AxisLayout | None], layouts: Sequence[SampleLayout | None]
) -> Any:
    """Describe a call up to its number of samples, which lie along ``axes`` of its inputs, None where all share it."""
    about: list[Any] = [(o.value.dtype, o.value.device.type, tuple(o.value.shape)) for o in call.operands]
    about += [(t.dtype, t.device.type, tuple(t.shape)) for t in call.constants]
    for tensor, axis in zip(inputs, axes, strict=True):
        shape = list(tensor.shape)
        if axis is not None:
            shape[axis.dim] //= axis.n_samples
        about.append((tensor.dtype, axis and (axis.dim, axis.outer, axis.inner), tuple(shape)))
    lying = [(axis.dim, axis.outer, axis.inner) for axis in layouts if isinstance(axis, AxisLayout)]
    return call.func, repr((call.args, call.kwargs, about, lying, call.autocast))


def agreed(key: Any, compare: Callable[[], bool]) -> bool:
    """Tell whether both sides of a call agreed at first use; they are compared now if there was none."""
    found = _checked.get(key)
    if found is None:
        if len(_checked) >= _MAX_CHECKED:
            _checked.clear()
        found = _checked[key] = compare()
    return found


def gradients(
    call: Call,
    inputs: Sequence[Tensor],
    axes: Sequence[AxisLayout | None],
    grads: Sequence[Tensor | None],
    layouts: Sequence[SampleLayout | None],
    samples: range,
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Run a call on each of some samples, and its backward pass.

    Args:
        call: the call.
        inputs: its data.
        axes: the sample axis of each; None where all samples share it.
        grads: of its outputs.
        layouts: of these, by position; None where the gradient is None or zero.
        samples: which.

    Returns:
        The gradients of each operand, [n, *shape], and the outputs, [n, *shape for one sample]; None where the call
        cannot be vectorised.
    """
    operands = [operand.value for operand in call.operands]
    owned = [isinstance(layout, AxisLayout) and g is not None for g, layout in zip(grads, layouts, strict=True)]

    def one(xs: tuple[Tensor, ...], gs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        both = torch.func.vjp(lambda *values: tuple(call.run(values, xs)), *operands)
        outputs, backward, rest = both[0], both[1], iter(gs)
        own = [
            next(rest).reshape(y.shape) if is_own else torch.zeros_like(y)
            for y, is_own in zip(outputs, owned, strict=True)
        ]
        return backward(tuple(own)), outputs

    part = slice(samples.start, samples.stop)
    pairs = zip(inputs, axes, strict=True)
    xs = tuple(x.detach() if axis is None else by_sample(x.detach(), axis)[part] for x, axis in pairs)
    both = zip(grads, layouts, strict=True)
    gs = tuple(by_sample(g, axis)[part] for g, axis in both if g is not None and isinstance(axis, AxisLayout))
    try:
        along = tuple(None if axis is None else 0 for axis in axes), 0
        with _no_loops():
            found, outputs = torch.func.vmap(one, along)(xs, gs)
    except Exception:  # an operation without a rule for it, or one that looks at its values
        return None
    return list(found), list(outputs)


def backward(
    output: Tensor, leaves: Sequence[Tensor], grads: Tensor, structure: Callable[[Tensor], Any]
) -> list[Tensor | None]:
    """Send gradients [n, *output.shape] down a graph; return those of its leaves, [n, *shape], or None.

    All at once, where that agreed at the first use of a graph of this ``structure`` with one by one, for the first and
    the last of them.
    """

    def one(gradient: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(output, leaves, gradient, retain_graph=True, allow_unused=True)

    def agree() -> bool:
        pairs = [pair for i in (0, -1) for pair in zip(together, one(grads[i]), [i] * len(leaves), strict=True)]
        return all(
            (many is None) == (want is None) and (many is None or want is None or is_close(many[i], want))
            for many, want, i in pairs
        )

    grads = grads.to(output.dtype)
    if len(grads) > 2 and output.numel() <= MAX_TOGETHER:
        try:
            with _no_loops():
                together = torch.autograd.grad(
                    output, leaves, grads, retain_graph=True, allow_unused=True, is_grads_batched=True
                )
            if agreed((structure(output), output.dtype, "down"), agree):
                return list(together)
        except RuntimeError:  # an operation without a rule for it
            pass
    found: list[Tensor | None] = [None] * len(leaves)
    for row, gradient in enumerate(grads):  # each is copied at once: its memory serves the next one
        for index, of_leaf in enumerate(one(gradient)):
            if of_leaf is not None:
                every = found[index]
                if every is None:
                    every = found[index] = of_leaf.new_zeros(len(grads), *of_leaf.shape)
                every[row].copy_(of_leaf)
    return found


def is_close(got: Tensor, want: Tensor) -> bool:
    """Compare gradients that were had in two ways, relative to the largest element."""
    limit = TOLERANCE[want.dtype.to_real()] * want.abs().amax() if want.numel() else 0
    return bool(((got - want).abs() <= limit).all())


@contextmanager
def _no_loops() -> Iterator[None]:
    """Let vmap fail where it would run a loop, and warn of it."""
    before = _functorch._is_vmap_fallback_enabled()
    _functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_enabled(before)
