"""What ``wplfast selftest`` compares: every operator, with sizes that fill no tile and memory on no boundary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends, ops
from ..ops.arguments import PenaltyArguments
from ..ops.expect import FLOATING
from ..ops.layout import flat_dtype

#: Elements of other memory on both sides of every tensor.
GUARD = 64
_HALVES = (torch.bfloat16, torch.float16)


class Source:
    """Makes random tensors on a device, the same ones every time, with guards on both sides.

    Args:
        device: where they are made.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator("cpu").manual_seed(0)
        #: what is on both sides of the tensors: (memory, first element, end, copy)
        self._guards: list[tuple[Tensor, int, int, Tensor]] = []

    def normal(self, dtype: torch.dtype, *shape: int, shift: int = 0) -> Tensor:
        """Return normal numbers, ``shift`` elements off a boundary of memory."""
        return self._guarded(torch.randn(shape, generator=self._generator), dtype, shift)

    def positive(self, dtype: torch.dtype, *shape: int, shift: int = 0) -> Tensor:
        """Return numbers between 0.1 and 1.1."""
        return self._guarded(torch.rand(shape, generator=self._generator) + 0.1, dtype, shift)

    def indices(self, below: int, *shape: int) -> Tensor:
        """Return indices, some of them -1."""
        return self._guarded(torch.randint(-1, below, shape, generator=self._generator), torch.int64, 0)

    def number(self, value: float) -> Tensor:
        """Return a float64 scalar."""
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def _guarded(self, values: Tensor, dtype: torch.dtype, shift: int) -> Tensor:
        """Return a copy of values with other memory around it, which is remembered."""
        start, end = GUARD + shift, GUARD + shift + values.numel()
        memory = torch.full((end + GUARD,), 7, dtype=dtype, device=self.device)
        memory[start:end] = values.flatten().to(self.device, dtype)
        self._guards.append((memory, start, end, memory.clone()))
        return memory[start:end].view(values.shape)

    def overrun(self) -> bool:
        """Tell whether anything was written outside of the tensors."""
        return any(
            not (torch.equal(memory[:start], copy[:start]) and torch.equal(memory[end:], copy[end:]))
            for memory, start, end, copy in self._guards
        )


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Args:
        operator: its name in :mod:`wplfast.ops`.
        what: what is particular about the call.
        arguments: makes the keyword arguments for a dtype.
        written: names of those that the operator writes to.
        dtypes: what it is made for.
        prepared: whether it is called as penalties of parameters that stay where they are do.
    """

    operator: str
    what: str
    arguments: Callable[[Source, torch.dtype], dict[str, Any]]
    written: tuple[str, ...] = ()
    dtypes: Sequence[torch.dtype] = FLOATING
    prepared: bool = False

    def run(self, arguments: dict[str, Any]) -> Any:
        """Call the operator; if prepared, more than once, as a training loop does."""
        if not self.prepared:
            return getattr(ops, self.operator)(**arguments)
        columns = {name: arguments[name] for name in PenaltyArguments._fields}
        columns["theta"] = [torch.nn.Parameter(tensor) for tensor in arguments["theta"]]
        evaluated = backends.prepared_penalty(columns["theta"][0].device.type)(**columns)
        if self.operator == "penalty_with_grad":
            evaluated.value(), evaluated.with_grad(), evaluated.value()
            return evaluated.with_grad()
        for parameter, gradient in zip(columns["theta"], arguments["grad"], strict=True):
            parameter.grad = gradient
        evaluated.add_grad_(torch.zeros_like(arguments["scale"]))
        return evaluated.add_grad_(arguments["scale"])


def _squares(weights: bool, shift: int) -> Callable[[Source, torch.dtype], dict[str, Any]]:
    def arguments(source: Source, dtype: torch.dtype) -> dict[str, Any]:
        grads = source.normal(dtype, 9, 37, 29, shift=shift)
        fisher = source.positive(flat_dtype(dtype), 37, 29, shift=shift)
        return {"fisher": fisher, "grads": grads, "weights": source.positive(torch.float64, 9) if weights else None}

    return arguments


def _linear(
    n: int, t: int, d_in: int, d_out: int, more: bool = False, shift: int = 0
) -> Callable[[Source, torch.dtype], dict[str, Any]]:
    """Return a linear layer's arguments; ``more``: weights, and the plain gradient; shifted ones are views, too."""

    def arguments(source: Source, dtype: torch.dtype) -> dict[str, Any]:
        wide, wider = flat_dtype(dtype), 3 * bool(shift)
        return {
            "fisher": source.positive(wide, d_out, d_in, shift=shift),
            "activations": source.normal(dtype, n, t, d_in + wider, shift=shift)[..., wider:],
            "grad_outputs": source.normal(dtype, n, t, d_out, shift=shift),
            "weights": source.positive(torch.float32, n) if more else None,
            "gradient": source.normal(wide, d_out, d_in, shift=shift) if more else None,
        }

    return arguments


def _conv(
    channels: int, outputs: int, groups: int, size: Sequence[int], more: bool = False, shift: int = 0
) -> Callable[[Source, torch.dtype], dict[str, Any]]:
    """Return a convolution's arguments, with a kernel of 3, and of 2 along the first of three dimensions."""

    def arguments(source: Source, dtype: torch.dtype) -> dict[str, Any]:
        n_spatial = len(size)
        kernel = (2, 3, 3)[-n_spatial:]
        stride, padding, dilation = (1, 2, 1)[-n_spatial:], (0, 1, 2)[-n_spatial:], (1, 1, 2)[-n_spatial:]
        spans = zip(size, kernel, stride, padding, dilation, strict=True)
        positions = [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in spans]
        wide, shape = flat_dtype(dtype), (outputs, channels // groups, *kernel)
        return {
            "fisher": source.positive(wide, *shape, shift=shift),
            "inputs": source.normal(dtype, 3, 2, *size, channels, shift=shift),
            "grad_outputs": source.normal(dtype, 3, 2, *positions, outputs, shift=shift),
            "weights": source.positive(torch.float32, 3) if more else None,
            "gradient": source.normal(wide, *shape, shift=shift) if more else None,
            "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        }  # fmt: skip

    return arguments


def _embedding(d: int, more: bool, shift: int = 0) -> Callable[[Source, torch.dtype], dict[str, Any]]:
    def arguments(source: Source, dtype: torch.dtype) -> dict[str, Any]:
        wide = flat_dtype(dtype)
        return {
            "fisher": source.positive(wide, 23, d, shift=shift),
            "indices": source.indices(23, 7, 61),
            "grad_outputs": source.normal(dtype, 7, 61, d, shift=shift),
            "weights": source.positive(torch.float32, 7) if more else None,
            "gradient": source.normal(wide, 23, d, shift=shift) if more else None,
        }

    return arguments


def _scale(d: int, transposed: bool) -> Callable[[Source, torch.dtype], dict[str, Any]]:
    def arguments(source: Source, dtype: torch.dtype) -> dict[str, Any]:
        first = source.normal(dtype, 5, 33, d)
        second = (
            source.normal(dtype, 5, d, 33, shift=1).transpose(1, 2) if transposed else source.normal(dtype, 5, 33, d)
        )
        return {"activations": first, "grad_outputs": second}

    return arguments


def _anchors(
    source: Source, dtype: torch.dtype, offset: bool = False, fisher: torch.dtype | None = None, each: bool = False
) -> dict[str, Any]:
    """Return a penalty's arguments: sizes 0 and 1, odd ones, chunks that are full and not, memory in another order."""
    wide = flat_dtype(dtype)

    def column(make: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        shapes: list[tuple[int, ...]] = [(5,), (37, 129), (0,), (4099,), (9001,), (1,)]
        tensors = [make(kind, *shape, shift=index % 2) for index, shape in enumerate(shapes)]
        return [*tensors, make(kind, 3, 17, 19).permute(0, 2, 1)]

    theta = column(source.normal, dtype)
    return {
        "theta": theta,
        "theta_hat": column(source.normal, dtype),
        "offset": column(source.normal, wide) if offset else [],
        "fisher": column(source.positive, fisher or wide),
        "alpha": source.positive(torch.float64, len(theta)) if each else source.number(1.7),
        "l2": source.number(0.3),
    }


def _penalty(
    adding: bool = False, offset: bool = False, fisher: torch.dtype | None = None, each: bool = False
) -> Callable[[Source, torch.dtype], dict[str, Any]]:
    def arguments(source: Source, dtype: torch.dtype) -> dict[str, Any]:
        found = _anchors(source, dtype, offset, fisher, each)
        if adding:
            found |= {"grad": _anchors(source, dtype)["theta_hat"], "scale": source.number(-0.7)}
        return found

    return arguments


def _factor(value: float, shift: int) -> Callable[[Source, torch.dtype], dict[str, Any]]:
    def arguments(source: Source, dtype: torch.dtype) -> dict[str, Any]:
        return {"tensor": source.normal(dtype, 5003, shift=shift), "factor": source.number(value).to(flat_dtype(dtype))}

    return arguments


_BOTH = ("fisher", "gradient")
_NARROW = (torch.float32, *_HALVES)
CASES = (
    Case("accumulate_squares_", "plain", _squares(False, 0), ("fisher",)),
    Case("accumulate_squares_", "weights, misaligned", _squares(True, 1), ("fisher",)),
    Case("fisher_linear_", "T = 1", _linear(33, 1, 65, 24), _BOTH),
    Case("fisher_linear_", "short samples, weights, gradient", _linear(6, 7, 72, 133, more=True), _BOTH),
    Case("fisher_linear_", "long samples, misaligned", _linear(3, 150, 37, 41, shift=1), _BOTH),
    Case("fisher_conv_", "two dimensions, weights, gradient", _conv(24, 40, 1, (9, 11), more=True), _BOTH),
    Case("fisher_conv_", "few channels, three dimensions", _conv(3, 10, 1, (4, 6, 7)), _BOTH),
    Case("fisher_conv_", "groups, misaligned", _conv(12, 18, 3, (9, 11), shift=1), _BOTH),
    Case("fisher_conv_", "depthwise, one dimension", _conv(37, 37, 37, (23,)), _BOTH),
    Case("fisher_embedding_", "plain", _embedding(40, False), _BOTH),
    Case("fisher_embedding_", "weights, gradient, misaligned", _embedding(33, True, shift=1), _BOTH),
    Case("scale_grads", "in order", _scale(40, False)),
    Case("scale_grads", "transposed, misaligned", _scale(37, True)),
    Case("penalty", "plain", _penalty()),
    Case("penalty_with_grad", "offsets, a strength each", _penalty(offset=True, each=True)),
    Case("penalty_with_grad", "bfloat16 Fishers", _penalty(fisher=torch.bfloat16), dtypes=_NARROW),
    Case("penalty_add_grad_", "plain", _penalty(adding=True), ("grad",)),
    Case("penalty_add_grad_", "offsets", _penalty(adding=True, offset=True), ("grad",)),
    Case("penalty_with_grad", "prepared", _penalty(), prepared=True),
    Case("penalty_add_grad_", "prepared", _penalty(adding=True), ("grad",), prepared=True),
    Case("scale_unless_one_", "a factor", _factor(0.7, 0), ("tensor",)),
    Case("scale_unless_one_", "one, misaligned", _factor(1.0, 1), ("tensor",)),
)
