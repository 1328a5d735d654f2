"""The calls of earlier forward passes, in order, so that one that comes again need not be taken apart.

Taking a call apart and finding its rule costs many times what a small operation does. Most models make the same calls
in every batch. Each call that was tapped is kept here as it was, down to shapes and addresses, after the one that came
before it; models whose calls vary from batch to batch have several ways through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..call import Call, Slot, autocast_state
from ..call_site import CallSite
from ..probe.graph import Fingerprint
from ..rules import Rule
from .operands import Operands
from .product import AffineMap

#: Graphs behind the same calls whose steady batches are kept.
MAX_STEADY = 16
#: Calls that are kept as they were, or eight times those of the longest pass; beyond, all are forgotten.
MAX_CALLS = 1 << 14
#: Sites that are known, or eight times the calls of the longest pass; beyond, all are forgotten.
MAX_SITES = 1 << 16
#: Entries of all fingerprints that steady batches are known by, or eight times those of the longest one; likewise.
MAX_ENTRIES = 1 << 20


class _OperandForm:
    """A watched parameter whose memory is that of its value, wherever it is by now."""

    __slots__ = ("stride", "tensor", "value")

    def __init__(self, tensor: Tensor, value: Tensor) -> None:
        self.tensor, self.value, self.stride = tensor, value, tensor.stride()

    def fits(self, value: Any, operands: Operands) -> bool:
        return (
            value is self.tensor
            and self.tensor.data_ptr() == self.value.data_ptr()
            and self.tensor.stride() == self.stride
        )


class _InputForm:
    """A plain tensor that carries samples: all about it but its values and address."""

    __slots__ = ("dtype", "node", "requires_grad", "shape", "stride")

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.requires_grad, self.node = tensor.requires_grad, type(tensor.grad_fn)

    def fits(self, value: Any, operands: Operands) -> bool:
        return (
            type(value) is Tensor
            and value.layout == torch.strided  # others have no strides, and
            and not value.is_nested  # some no shape
            and value.shape == self.shape
            and value.stride() == self.stride
            and value.dtype is self.dtype
            and value.requires_grad is self.requires_grad
            and type(value.grad_fn) is self.node
            and (self.requires_grad or not operands.is_constant(value))
        )


class _PlainForm:
    """Anything that is no tensor."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def fits(self, value: Any, operands: Operands) -> bool:
        return value is self.value or (type(value) is type(self.value) and value == self.value)


_Form = _OperandForm | _InputForm | _PlainForm


class CachedCall:
    """A call at its site, as it was; see :meth:`fits` for when it can be repeated.

    Attributes:
        call: the call; None for the start of a pass, and where it is to be taken apart each time.
        site: where it stands.
        rule: what serves it.
        product: the matrix and bias that its input is multiplied with, where that is all it does.
        inputs: positions of its inputs among the arguments.
        steady: for the last call of a pass: number of samples and fingerprint of the losses' graph -> what such a batch
            does backwards, once that is known.
    """

    __slots__ = (
        "_after",
        "_autocast",
        "_forms",
        "_values",
        "call",
        "following",
        "inputs",
        "product",
        "rule",
        "site",
        "steady",
    )

    def __init__(self, site: CallSite) -> None:
        """Know a place alone."""
        self.site = site
        self.call: Call | None = None
        self.rule: Rule | None = None
        self.product: AffineMap | None = None
        self.inputs: list[int] = []
        self.following: CachedCall | None = None  # the call that came next the last time
        self.steady: dict[Any, Any] = {}
        self._after: dict[Any, CachedCall] = {}
        self._forms: list[_Form] = []
        self._values: list[tuple[int, Tensor]] = []
        self._autocast: tuple[str, torch.dtype] | None = None

    def keep(self, call: Call, rule: Rule, args: tuple[Any, ...], product: AffineMap | None) -> None:
        """Keep a call, to repeat it, if all about it can be compared: its tensors are its plain arguments."""
        self.call = None
        simple = rule.fast and call.has_plain_inputs and not call.in_place and not call.kwargs and not call.constants
        if not simple or any(operand.graph is not None or operand.copy is not None for operand in call.operands):
            return
        forms: list[_Form] = []
        inputs: dict[int, int] = {}
        values: list[tuple[int, Tensor]] = []
        for position, (slot, value) in enumerate(zip(call.args, args, strict=True)):
            if isinstance(value, Tensor):
                if slot.kind == "operand":
                    own = call.operands[slot.index].value
                    forms.append(_OperandForm(value, own))
                    values.append((position, own))
                    continue
                # Integers are looked at each time (do they count up?), leaves may be another model's parameters.
                if (
                    type(value) is not Tensor
                    or not value.is_floating_point()
                    or (value.requires_grad and value.is_leaf)
                ):
                    return
                if inputs.setdefault(slot.index, position) != position:
                    return
                forms.append(_InputForm(value))
            elif value is None or type(value) in (bool, int, float, str):
                forms.append(_PlainForm(value))
            else:
                return
        self.call, self.rule, self.product, self._forms, self._values = call, rule, product, forms, values
        self.inputs, self._autocast = [inputs[i] for i in range(len(inputs))], call.autocast

    def fits(self, func: Callable[..., Any], args: tuple[Any, ...], operands: Operands) -> bool:
        """Tell whether a call is this one again."""
        call = self.call
        if call is None or func is not call.func or len(args) != len(self._forms) or self.site.is_parameter_only:
            return False
        for value, form in zip(args, self._forms, strict=True):
            if not form.fits(value, operands):
                return False
        return autocast_state(call.operands[0].value.device.type) == self._autocast

    def run(self, args: tuple[Any, ...]) -> Any:
        """Run the call with its parameters as constants."""
        assert self.call is not None
        filled = list(args)
        for position, value in self._values:
            filled[position] = value
        return self.call.func(*filled)


class CallCache:
    """All ways through a model that were seen, and where the pass is that runs."""

    def __init__(self) -> None:
        """Know nothing."""
        self._n_calls = self._n_sites = self._longest = 0
        self._n_entries = self._most_entries = 0
        self._is_stale = False
        self._start = self.here = CachedCall(CallSite())

    def restart(self, length: int) -> None:
        """Go back to where a forward pass begins, after one of so many calls."""
        self._longest = max(self._longest, length)
        if self._is_stale or self._n_sites > max(MAX_SITES, 8 * self._longest):
            self._start, self._n_calls, self._n_sites, self._n_entries = CachedCall(CallSite()), 0, 0, 0
            self._is_stale = False
        elif self._n_calls > max(MAX_CALLS, 8 * self._longest) or self._n_entries > max(
            MAX_ENTRIES, 8 * self._most_entries
        ):
            self._start, self._n_calls, self._n_entries = CachedCall(self._start.site), 0, 0
        self.here = self._start

    def keep_steady(self, key: tuple[int, Fingerprint], batch: Any) -> None:
        """Keep what a batch does backwards whose last call was the one here."""
        steady, n_entries = self.here.steady, sum(map(len, key[1]))
        if len(steady) == MAX_STEADY:  # sizes or places that are others in every batch
            steady.clear()
        steady[key] = batch
        self._n_entries += n_entries
        self._most_entries = max(self._most_entries, n_entries)

    def forget(self) -> None:
        """Forget all calls and sites when the next pass begins."""
        self._is_stale = True

    def find(self, func: Callable[..., Any], args: tuple[Any, ...], operands: Operands) -> CachedCall | None:
        """Return the call that came next before, if it comes again."""
        expected = self.here.following
        return expected if expected is not None and expected.fits(func, args, operands) else None

    def site(self, call: Call, inputs: list[Tensor], place: CallSite, behind: tuple[Any, ...] = ()) -> CallSite:
        """Return the site of a call that comes after a place, with a graph behind its inputs."""
        site, is_new = place.after((*_signature(call, inputs), *behind), call.name)
        self._n_sites += is_new
        return site

    def go_to(self, site: CallSite, call: Call, inputs: list[Tensor]) -> CachedCall:
        """Go on to a site, with a call of these sizes."""
        sizes = (site, *((t.shape, t.stride()) if t.layout == torch.strided else t.shape for t in inputs))
        key = (*sizes, *(operand.value.shape for operand in call.operands))
        found = self.here._after.get(key)
        if found is None:
            found = self.here._after[key] = CachedCall(site)
            self._n_calls += 1
        self.advance(found)
        return found

    def advance(self, call: CachedCall) -> None:
        """Go on to a call."""
        self.here.following = call
        self.here = call


def _signature(call: Call, inputs: list[Tensor]) -> tuple[Any, ...]:
    """Describe a call, up to the sizes of its inputs."""
    return (
        call.func,
        _frozen(call.args),
        _frozen(call.kwargs),
        tuple(operand.key for operand in call.operands),
        tuple(
            (t.dtype, _order(t) if t.layout == torch.strided else t.layout, t.requires_grad, type(t.grad_fn))
            for t in inputs
        ),
        tuple(is_range for _, _, is_range in call.input_kinds),
        call.autocast,
    )


def _order(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's dimensions in the order of their strides, the largest first."""
    strides = tensor.stride()
    return tuple(sorted(range(len(strides)), key=lambda dim: -strides[dim]))


def _frozen(tree: Any) -> Any:
    """Return something hashable that is equal for equal arguments."""
    if isinstance(tree, Slot):
        return tree
    if isinstance(tree, (tuple, list)):
        return (type(tree), *map(_frozen, tree))
    if isinstance(tree, dict):
        return tuple((key, _frozen(value)) for key, value in tree.items())
    if isinstance(tree, slice):
        return (slice, tree.start, tree.stop, tree.step)
    try:
        hash(tree)
    except TypeError:
        return (type(tree), repr(tree))
    return (type(tree), tree)
