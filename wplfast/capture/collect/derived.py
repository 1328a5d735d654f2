"""Gradients sent down through functions of parameters alone: ``W + s B A``, ``P Q``, masks, gates, norms.

The gradient of a derived matrix D is g_n = G_n^T A_n. Through a sum, a transpose, a product of matrices or a scale it
stays such a product: for D = P Q it is G_n^T (A_n Q^T) of P and (G_n P)^T A_n of Q. Through a norm or a mean it becomes
one number a row, times a matrix that all samples share. Then the fused operators serve the parameters, each by itself,
and no sample's gradient of D is made. What is not of that kind is sent down its graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ...ops.layout import flat_dtype
from ..call import Call, Operand, Slot
from ..rules.conv import ConvUse
from ..rules.embedding import LookupGradSample
from ..rules.grad_sample import FactoredGradSample, GradSample, SummedGradSample, padded
from ..rules.local import LocalBackward
from ..rules.sent_down import ScaledGradSample, SpreadGradSample
from ..trace.functions import EXPANSIONS

_SUMS = {
    **dict.fromkeys(("add", "__add__", "__radd__"), (1.0, 1.0)),
    **dict.fromkeys(("sub", "subtract", "__sub__"), (1.0, -1.0)),
    **dict.fromkeys(("rsub", "__rsub__"), (-1.0, 1.0)),
}
_PRODUCTS = frozenset({"mul", "multiply", "__mul__", "__rmul__"})
_QUOTIENTS = frozenset({"div", "divide", "true_divide", "__truediv__"})
_MATRIX_PRODUCTS = frozenset({"matmul", "mm", "__matmul__"})
#: Functions of one tensor, each element of whose result depends on one element of it.
_ELEMENTWISE = frozenset(
    """
    neg __neg__ tanh sigmoid exp log relu abs square sqrt rsqrt reciprocal pow __pow__ softplus clamp clamp_min
    """.split()  # noqa: SIM905
)
#: Functions of one tensor, each element of which goes into one element of the result -> where they take dimensions.
_REDUCTIONS = {
    **dict.fromkeys(("sum", "mean", "var", "std", "logsumexp", "amax", "amin"), 1),
    **dict.fromkeys(("norm", "linalg_vector_norm", "linalg_norm"), 2),
}
#: Functions whose result has the same elements in the same order.
_SHAPES = frozenset({"view", "reshape", "unsqueeze", "squeeze", "flatten"})

#: More uses than these of one tensor, and all are sent down its graph.
_MOST_USES = 8

_Use = TypeVar("_Use", bound=GradSample)


def sent_down(uses: Sequence[GradSample]) -> list[GradSample] | None:
    """Return uses that each depend on one parameter and stand for all given ones; None if some cannot be told apart.

    Tensors are gone through from the last to the first, each once, with all uses of it: an intermediate result may
    enter several steps, and the ways through them are many more than the steps.
    """
    order = _in_order([use.operand for use in uses])
    if order is None:
        return None
    waiting: dict[int, list[GradSample]] = {key: [] for key in order}
    for use in uses:
        waiting[_key(use.operand)].append(use)
    found: list[GradSample] = []
    for key in order:
        together = joined(waiting[key])
        if len(together) > _MOST_USES:
            return None
        for use in together:
            operand = use.operand
            call = _made_by(operand)
            steps = None if call is None else _through(use, call)
            if steps is not None:
                for step in steps:
                    waiting[_key(step.operand)].append(step)
            elif len(operand.parameters) > 1:
                return None
            elif call is not None and isinstance(use, SummedGradSample) and operand.value.numel() == 1:
                found.append(_through_graph(use))
            else:
                found.append(use)
    return found


def joined(uses: Sequence[GradSample]) -> list[GradSample]:
    """Add up uses of one operand, as far as that takes no more memory: sums, and what differs by factors alone."""
    sums = [use for use in uses if isinstance(use, SummedGradSample)]
    found: list[GradSample] = [sums[0].joined(sums[1:])] if sums else []
    spreads: dict[int, SpreadGradSample] = {}
    scaled: dict[tuple[int, ...], GradSample] = {}
    for use in uses:
        if isinstance(use, SpreadGradSample):
            known = spreads.get(id(use.factors))
            matrix = use.matrix if known is None else known.matrix + use.matrix
            spreads[id(use.factors)] = SpreadGradSample(use.operand, use.rule, use.factors, matrix)
        elif not isinstance(use, SummedGradSample):
            other = scaled.get(use.source)
            scaled[use.source] = use if other is None else ScaledGradSample(_bare(use), _scale(use) + _scale(other))
    return [*found, *spreads.values(), *scaled.values()]


def _bare(use: GradSample) -> GradSample:
    """Return what a scaled use scales, any other one as it is."""
    return use.use if isinstance(use, ScaledGradSample) else use


def _scale(use: GradSample) -> Tensor:
    """Return the factors of a use, 1 where it has none."""
    wide = flat_dtype(use.operand.value.dtype)
    return use.scale.to(wide) if isinstance(use, ScaledGradSample) else use.operand.value.new_ones((), dtype=wide)


def _key(operand: Operand) -> int:
    """Identify a tensor, in whatever call it is an operand."""
    return id(operand.leaf if operand.graph is None else operand.graph)


def _made_by(operand: Operand) -> Call | None:
    """Return the call that an operand is sent down through, if it is not sent to its parameter as it is."""
    if operand.graph is None or operand.region is not None:
        return None
    return None if operand.graph._backward_hooks else operand.made_by  # hooks are called by the graph alone


def _in_order(operands: Sequence[Operand]) -> list[int] | None:
    """Return the tensors below some operands, each before those that it was computed from.

    None if one that depends on several parameters was made by a function through which they cannot be told apart.
    """
    order: list[int] = []
    seen: set[int] = set()
    stack = [(operand, False) for operand in operands]
    while stack:
        operand, is_done = stack.pop()
        key = _key(operand)
        if is_done:
            order.append(key)
            continue
        if key in seen:
            continue
        seen.add(key)
        stack.append((operand, True))
        call = _made_by(operand)
        if len(operand.parameters) > 1 and not (call is not None and _is_known(call)):
            return None
        if call is not None:
            stack += [(below, False) for below in call.operands]
    return order[::-1]


def _through_graph(use: SummedGradSample) -> GradSample:
    """Send a use of one number that depends on one parameter, as a largest singular value does, down its graph."""
    operand = use.operand
    assert operand.graph is not None
    (leaf,) = operand.leaves
    one = torch.ones_like(operand.graph)
    (slope,) = torch.autograd.grad(operand.graph, leaf, one, retain_graph=True, allow_unused=True)
    if slope is None or slope.is_complex() or slope.layout != torch.strided:
        return use
    return _spread(use, Operand(leaf, leaf.detach(), operand.parameters), use.grads.reshape(-1), slope)


def _through(use: GradSample, call: Call) -> list[GradSample] | None:
    """Return the uses of a call's operands for a use of its result; None if they are not of a form that is known."""
    value = use.operand.value
    tensors = [*(operand.value for operand in call.operands), *call.constants]
    if not isinstance(use, _FORMS) or not value.numel() or call.in_place or call.input_shapes:
        return None
    alike = all(t.dtype in (value.dtype, torch.bool) for t in tensors)
    if call.autocast is not None or value.is_complex() or not alike:
        return None
    if call.name in _SUMS:
        return _through_sum(use, call)
    if call.name in _STEPS:
        return _STEPS[call.name](use, call)
    if call.name in _REDUCTIONS:
        return _through_reduction(use, call)
    if call.name in EXPANSIONS:
        spread_out = call.operand_at(0, "self")
        return None if spread_out is None else _all([_broadcast(use, spread_out, 1.0)])
    if call.name in _ELEMENTWISE:
        if len(call.operands) > 1 or call.operands[0].value.shape != value.shape:
            return None
        slope = _slope(call)
        return None if slope is None else [_scaled(use, call.operands[0], slope)]
    if call.kwargs:
        return None
    if call.name in _PRODUCTS | _QUOTIENTS and len(call.args) == 2:
        return _through_product(use, call)
    if _keeps_order(call) and isinstance(use, SummedGradSample):
        (below,) = call.operands
        if use.grads.dtype != flat_dtype(value.dtype):  # which the graph rounds
            return None
        return [SummedGradSample(below, use.rule, use.grads.reshape(-1, *below.value.shape))]
    if call.name in _MATRIX_PRODUCTS and len(call.args) == 2:
        return _through_matrix_product(use, call)
    if not isinstance(use, FactoredGradSample) or not use.is_by_rows:
        return None
    if _is_transpose(call) and call.operands[0].value.shape == value.shape[::-1]:
        return [FactoredGradSample(call.operands[0], use.rule, use.grad_outputs, use.activations)]
    return None


# ---- steps: a use of a call's result, as uses of its operands --------------------------------------------------------


def _through_sum(use: GradSample, call: Call) -> list[GradSample] | None:
    """Send a use of ``P + c Q`` or ``P - c Q`` down; either may be spread over the result, as a mean is."""
    factor = 1.0 if call.name == "rsub" else call.kwargs.get("alpha", 1)
    if set(call.kwargs) - {"alpha"} or (call.name == "rsub" and call.kwargs) or len(call.args) != 2:
        return None
    signs = _SUMS[call.name]
    terms = [
        (call.operands[a.index], signs[i] * (factor if i else 1)) for i, a in enumerate(call.args) if _is_operand(a)
    ]
    return _all([_broadcast(use, operand, factor) for operand, factor in terms])


def _through_product(use: GradSample, call: Call) -> list[GradSample] | None:
    """Send a use of ``P S`` or ``P / S`` down: S is a matrix, or spread over rows, columns or all."""
    found: list[GradSample | None] = []
    left, right = call.args
    for position, (slot, other) in enumerate(((left, right), (right, left))):
        if not _is_operand(slot):
            continue
        operand, factor = call.operands[slot.index], _value(call, other)
        if call.name in _QUOTIENTS:
            factor = 1 / factor if position == 0 else -factor / operand.value.square()
        found.append(_broadcast(use, operand, factor))
    return _all(found)


def _through_matrix_product(use: GradSample, call: Call) -> list[GradSample] | None:
    """Send a use of ``P Q`` down."""
    left, right = call.args
    p, q = _value(call, left), _value(call, right)
    found: list[GradSample | None] = []
    if not all(isinstance(t, Tensor) and t.dim() == 2 for t in (p, q)):
        return None
    if isinstance(use, FactoredGradSample) and use.is_by_rows:
        a, g = use.activations, use.grad_outputs
        if _is_operand(left):
            found.append(FactoredGradSample(call.operands[left.index], use.rule, a @ q.t().to(a.dtype), g))
        if _is_operand(right):
            found.append(FactoredGradSample(call.operands[right.index], use.rule, a, g @ p.to(g.dtype)))
    elif isinstance(use, SpreadGradSample):
        c, d = use.factors, use.matrix
        p, q = p.to(d), q.to(d)
        if _is_operand(left):
            small = None if c.shape[2] == 1 else lambda: d @ (c.transpose(1, 2) * q.t())
            found.append(_spread_or_small(use, call.operands[left.index], c, lambda: d @ q.t(), small))
        if _is_operand(right):
            small = None if c.shape[1] == 1 else lambda: (p.t() * c.transpose(1, 2)) @ d
            found.append(_spread_or_small(use, call.operands[right.index], c, lambda: p.t() @ d, small))
    return _all(found) if found else None


def _spread_or_small(
    use: SpreadGradSample, operand: Operand, c: Tensor, matrix: Callable[[], Tensor], grads: Callable[[], Tensor] | None
) -> GradSample | None:
    """Return ``c * matrix()`` of an operand, or its gradients as they are, if these are small; None if they are not."""
    if grads is None:
        return _spread(use, operand, c, matrix())
    small = 4 * operand.value.numel() <= use.operand.value.numel()
    return SummedGradSample(operand, use.rule, grads()) if small else None


def _through_reduction(use: GradSample, call: Call) -> list[GradSample] | None:
    """Send a use of a norm, a sum or a variance over some dimensions down: each number goes to all it came from."""
    if not isinstance(use, SummedGradSample) or len(call.operands) > 1 or call.kwargs.get("dtype") is not None:
        return None
    operand = call.operands[0]
    slope, shape = _slope(call), operand.value.shape
    kept = use.operand.value.shape
    if len(kept) < len(shape):
        dims = call.argument(_REDUCTIONS[call.name], "dim")
        dims = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
        reduced = {dim % len(shape) for dim in dims}
        kept = torch.Size(1 if dim in reduced else size for dim, size in enumerate(shape))
    if slope is None or kept.numel() != use.operand.value.numel():
        return None
    return [_spread(use, operand, use.grads.reshape(-1, *kept), slope)]


def _through_normalize(use: GradSample, call: Call) -> list[GradSample] | None:
    """Send a use of ``D = P / max(|P|, eps)`` down, |P| over some dimensions: ``(g_n - (g_n D) D) / |P|``."""
    operand, (p, dim, eps) = call.operands[0], (call.argument(i, n) for i, n in ((1, "p"), (2, "dim"), (3, "eps")))
    if p not in (None, 2, 2.0) or call.argument(4, "out") is not None:
        return None
    norm = operand.value.norm(2, 1 if dim is None else dim, keepdim=True)
    least = 1e-12 if eps is None else eps
    sums = use.contracted(use.operand.value, norm.shape)
    if sums is None:
        return None
    scale = 1 / norm.clamp_min(least)
    return [_scaled(use, operand, scale), _spread(use, operand, -sums * scale * (norm >= least), use.operand.value)]


def _through_weight_norm(use: GradSample, call: Call) -> list[GradSample] | None:
    """Send a use of ``g v / |v|`` down: of ``torch.nn.utils.parametrizations.weight_norm``."""
    v, g = call.operand_at(0, "v"), call.operand_at(1, "g")
    if v is None or g is None:
        return None
    lengths = g.value.reshape(padded(g.value.shape, v.value.dim()))
    norm = v.value.norm(2, [dim for dim, size in enumerate(lengths.shape) if size == 1], keepdim=True)
    unit = v.value / norm
    sums = use.contracted(unit, lengths.shape)
    if sums is None or norm.shape != lengths.shape:
        return None
    scale = lengths / norm
    of_v = [_scaled(use, v, scale), _spread(use, v, -sums * scale, unit)]
    return [*of_v, SummedGradSample(g, use.rule, sums.reshape(-1, *g.value.shape))]


def _through_softmax(use: GradSample, call: Call) -> list[GradSample] | None:
    """Send a use of ``D = softmax(P)`` along one dimension down, ``(g_n - sum g_n D) D``, or of its logarithm."""
    operand, value, dim = call.operands[0], use.operand.value, call.argument(1, "dim")
    if dim is None or len(call.operands) > 1:
        return None
    is_log = call.name == "log_softmax"
    weights = value.exp() if is_log else value
    kept = torch.Size(1 if i == dim % value.dim() else size for i, size in enumerate(value.shape))
    sums = use.contracted(torch.ones_like(value) if is_log else value, kept)
    if sums is None:
        return None
    return [_scaled(use, operand, 1 if is_log else value), _spread(use, operand, -sums, weights)]


_Step: TypeAlias = Callable[[GradSample, Call], "list[GradSample] | None"]
_STEPS: dict[str, _Step] = {
    "normalize": _through_normalize,
    "_weight_norm": _through_weight_norm,
    "softmax": _through_softmax,
    "log_softmax": _through_softmax,
}
_FORMS = (FactoredGradSample, ConvUse, LookupGradSample, ScaledGradSample, SpreadGradSample, SummedGradSample)
_KNOWN = (
    _SUMS.keys()
    | EXPANSIONS
    | _PRODUCTS
    | _QUOTIENTS
    | _MATRIX_PRODUCTS
    | _ELEMENTWISE
    | _REDUCTIONS.keys()
    | _STEPS.keys()
)


# ---- a use of ``factor * operand``, as one of the operand ------------------------------------------------------------


def _broadcast(use: GradSample, operand: Operand, factor: Any) -> GradSample | None:
    """Return a use of ``factor * operand`` as one of the operand, which may be spread over rows, columns or all."""
    value, shape = use.operand.value, operand.value.shape
    if shape == value.shape:
        return _scaled(use, operand, factor)
    factor = factor if isinstance(factor, Tensor) else value.new_tensor(factor)
    sums = use.contracted(factor.expand(value.shape), shape)
    return None if sums is None else SummedGradSample(operand, use.rule, sums)


def _scaled(use: GradSample, operand: Operand, factor: Any) -> GradSample:
    """Return a use of ``factor * operand`` as one of the operand, of the same shape."""
    if isinstance(use, ScaledGradSample):
        return ScaledGradSample(_moved(use.use, operand), use.scale * factor)
    if isinstance(use, SpreadGradSample):
        return _spread(use, operand, use.factors, use.matrix * factor)
    if isinstance(use, SummedGradSample):
        factor = factor.to(use.grads) if isinstance(factor, Tensor) else factor
        return SummedGradSample(operand, use.rule, use.grads * factor)
    if isinstance(use, FactoredGradSample) and use.is_by_rows:
        return _scaled_product(use, operand, factor)
    if not isinstance(factor, Tensor):
        if factor == 1:
            return _moved(use, operand)
        factor = operand.value.new_tensor(factor)
    return ScaledGradSample(_moved(use, operand), factor.expand(operand.value.shape))


def _scaled_product(use: FactoredGradSample, operand: Operand, factor: Any) -> GradSample:
    """Scale a product of rows: one of its factors, unless rows and columns are scaled differently."""
    a, g = use.activations, use.grad_outputs
    if isinstance(factor, Tensor) and factor.numel() > 1:
        factor = factor.expand(operand.value.shape).to(g.dtype)
        rows, columns = factor.stride()
        if rows and columns:
            return ScaledGradSample(FactoredGradSample(operand, use.rule, a, g), factor)
        if rows:
            return FactoredGradSample(operand, use.rule, a, g * factor[:, 0])
        return FactoredGradSample(operand, use.rule, a * factor[0], g)
    if isinstance(factor, Tensor):
        factor = factor.reshape(()).to(g.dtype)
    elif factor == 1:
        return FactoredGradSample(operand, use.rule, a, g)
    return FactoredGradSample(operand, use.rule, *((a * factor, g) if a.shape[2] < g.shape[2] else (a, g * factor)))


def _spread(use: GradSample, operand: Operand, factors: Tensor, matrix: Tensor) -> SpreadGradSample:
    """Return gradients ``factors * matrix`` of an operand, in float32 or wider."""
    wide = flat_dtype(matrix.dtype)
    factors = factors.reshape(len(factors), *padded(factors.shape[1:], matrix.dim()))
    return SpreadGradSample(operand, use.rule, factors.to(wide), matrix.to(wide))


def _moved(use: _Use, operand: Operand) -> _Use:
    """Return the same use, of another operand of the same shape."""
    moved = copy.copy(use)
    moved.operand = operand
    return moved


def _slope(call: Call) -> Tensor | None:
    """Return the gradient of the sum of a call's result with respect to its one operand."""
    local = LocalBackward(call, ())
    (slope,) = local([torch.ones_like(local.outputs[0])])
    return slope


def _all(found: Sequence[GradSample | None]) -> list[GradSample] | None:
    """Return uses, None if one of them is none."""
    known = [use for use in found if use is not None]
    return known if len(known) == len(found) else None


def _is_operand(argument: Any) -> bool:
    """Tell whether an operand stands at an argument."""
    return isinstance(argument, Slot) and argument.kind == "operand"


def _value(call: Call, argument: Any) -> Any:
    """Return the tensor that stands at an argument, or the number."""
    if not isinstance(argument, Slot):
        return argument
    return call.operands[argument.index].value if argument.kind == "operand" else call.constants[argument.index]


def _is_known(call: Call) -> bool:
    """Tell, by its name, whether there may be a step through a call."""
    return call.name in _KNOWN or _keeps_order(call) or _is_transpose(call)


def _keeps_order(call: Call) -> bool:
    """Tell whether a call's result has the elements of its operand, in the same order."""
    if call.name == "__getitem__":
        index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
        return all(part is None or part is Ellipsis or part == slice(None) for part in index)
    return call.name in _SHAPES


def _is_transpose(call: Call) -> bool:
    """Tell whether a call exchanges the dimensions of a matrix."""
    if call.name == "__get__":
        return getattr(getattr(call.func, "__self__", None), "__name__", "") in ("T", "mT")
    return call.name == "t" or (call.name in ("transpose", "swapaxes") and {d % 2 for d in call.args[1:]} == {0, 1})
