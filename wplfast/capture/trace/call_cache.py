"""The calls of earlier forward passes, in order, so that one that comes again need not be taken apart.

Taking a call apart and finding its rule costs many times what a small operation does. Most models make the same calls
in every batch. Each call that was tapped is kept here as it was, down to shapes and addresses, after the one that came
before it; models whose calls vary from batch to batch have several ways through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call, Slot, is_differentiable, kind_of
from ..call_site import CallSite, Relay, TappedCall
from ..probe.graph import Fingerprint
from .affine import AffineMap
from .tap import tap

STRIDED, is_autocast_enabled = torch.strided, torch.is_autocast_enabled  # looked up once, not for every call

#: Graphs behind the same calls whose steady batches are kept.
MAX_STEADY = 16
#: Calls that are kept as they were, or eight times those of the longest pass; beyond, all are forgotten.
MAX_CALLS = 1 << 14
#: Sites that are known, or eight times the calls of the longest pass; beyond, all are forgotten.
MAX_SITES = 1 << 16
#: Entries of all fingerprints that steady batches are known by, or eight times those of the longest one; likewise.
MAX_ENTRIES = 1 << 20


class _OperandForm(NamedTuple):
    """A watched parameter whose memory is that of its value, wherever it is by now."""

    position: int  # among the values of the arguments, those with names last
    tensor: Tensor
    value: Tensor
    stride: tuple[int, ...]


class _InputForm(NamedTuple):
    """A plain tensor that carries samples: all about it but its values and address."""

    position: int
    requires_grad: bool
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    node: type
    may_count: bool  # it may be a range of integers


class _PlainForm(NamedTuple):
    """What is no tensor."""

    position: int
    kind: type
    value: Any


class KeptCall:
    """A call as it was, with all that tells whether another one is like it; steps of a loop that are alike share one.

    Attributes:
        func: what is called.
        names: of its arguments that were given with one.
        signature: what its site is known by, after the place before it.
        sizes: what its place is known by, at that site.
    """

    __slots__ = (
        "_affine",
        "_autocast",
        "_call",
        "_device_type",
        "_inputs",
        "_n_args",
        "_n_values",
        "_of_inputs",
        "_of_operands",
        "_plain",
        "_rule",
        "_shapes",
        "func",
        "name",
        "names",
        "signature",
        "sizes",
    )

    def __init__(
        self,
        tapped: TappedCall,
        names: tuple[str, ...],
        forms: tuple[tuple[_OperandForm, ...], tuple[_InputForm, ...], tuple[_PlainForm, ...]],
        given: Sequence[Tensor],
        inputs: Sequence[int],
        affine: AffineMap | None,
    ) -> None:
        """Keep a call that was tapped.

        Args:
            tapped: it.
            names: of its arguments that were given with one.
            forms: of its arguments.
            given: its inputs.
            inputs: their positions among the values of its arguments.
            affine: the matrix and the vector that its input is multiplied with and added to, if that is all it does.
        """
        call = tapped.call
        self.func, self.name, self.names = call.func, call.name, names
        self.signature, self.sizes = _signature(call, given), _sizes(call, given)
        self._call, self._rule, self._shapes, self._affine = call, tapped.rule, tapped.shapes, affine
        self._n_args, self._n_values, self._inputs = len(call.args), len(call.args) + len(names), inputs
        self._of_operands, self._of_inputs, self._plain = forms
        self._autocast, self._device_type = call.autocast, call.operands[0].value.device.type

    def values_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return the values of arguments, those with names last; none if there are others than before."""
        return (*args, *kwargs.values()) if len(args) == self._n_args and tuple(kwargs) == self.names else ()

    def fits(self, values: tuple[Any, ...], is_constant: Callable[[Tensor], bool]) -> bool:
        """Tell whether a call of the same function on these values is this one again."""
        if len(values) != self._n_values:
            return False
        for position, tensor, value, stride in self._of_operands:
            if values[position] is not tensor or tensor.data_ptr() != value.data_ptr() or tensor.stride() != stride:
                return False
        for position, requires_grad, shape, stride, dtype, node, may_count in self._of_inputs:
            x = values[position]
            if (
                type(x) is not Tensor
                or x.requires_grad is not requires_grad
                or x.dtype is not dtype
                or x.layout is not STRIDED  # others have no strides, and
                or x.is_nested  # some no shape
                or x.shape != shape
                or x.stride() != stride
                or type(x.grad_fn) is not node
                or not (requires_grad or not is_constant(x))
                or (may_count and kind_of(x)[2])
            ):
                return False
        for position, kind, value in self._plain:
            found = values[position]
            if found is not value and (type(found) is not kind or found != value):
                return False
        device_type = self._device_type
        now = (device_type, torch.get_autocast_dtype(device_type)) if is_autocast_enabled(device_type) else None
        return now == self._autocast

    def run(self, site: CallSite, relay: Relay, index: int, values: tuple[Any, ...]) -> tuple[TappedCall, Any]:
        """Run the call with its parameters as constants, and tap it; return the tapped call and the result."""
        call, affine = self._call, self._affine
        tapped = TappedCall(call, site, self._rule, relay, index)
        if affine is not None:
            tapped.shapes = self._shapes
            return tapped, affine.apply(tapped, values[self._inputs[0]], affine, *call.leaves)
        filled = list(values)
        for position, _, value, _ in self._of_operands:
            filled[position] = value
        n = self._n_args
        result = self.func(*filled[:n], **dict(zip(self.names, filled[n:], strict=True)))
        return tapped, tap(tapped, [result], [values[position] for position in self._inputs])[0]


class CachedCall:
    """A place among the calls of forward passes.

    Attributes:
        site: where it stands.
        kept: the call as it was; None for the start of a pass, and where it is to be taken apart each time.
        following: the call that came next the last time.
        steady: for the last call of a pass: number of samples and fingerprint of the losses' graph -> what such a batch
            does backwards, once that is known.
        after: the calls that were seen to come next.
    """

    __slots__ = ("after", "following", "kept", "site", "steady")

    def __init__(self, site: CallSite) -> None:
        """Know a place alone."""
        self.site = site
        self.kept: KeptCall | None = None
        self.following: CachedCall | None = None
        self.steady: dict[Any, Any] = {}
        self.after: dict[Any, CachedCall] = {}


def _form_of(position: int, tensor: Tensor) -> _InputForm:
    """Describe an input."""
    may_count = not is_differentiable(tensor) and 0 < tensor.numel() == tensor.shape[-1]
    about = tensor.requires_grad, tensor.shape, tensor.stride(), tensor.dtype, type(tensor.grad_fn)
    return _InputForm(position, *about, may_count)


def _is_plain(value: Any) -> bool:
    """Tell whether an argument is no tensor and is told apart by its type and value."""
    if type(value) in (tuple, torch.Size):
        return all(type(item) is int for item in value)
    return value is None or type(value) in (bool, int, float, str)


class CallCache:
    """All ways through a model that were seen, and where the pass is that runs."""

    def __init__(self) -> None:
        """Know nothing."""
        self._n_calls = self._n_sites = self._longest = 0
        self._n_entries = self._most_entries = 0
        self._is_stale = False
        self._start = self.here = CachedCall(CallSite())
        self._kept: dict[Any, KeptCall] = {}
        self._latest: dict[tuple[Callable[..., Any], int], KeptCall] = {}

    def keep(
        self,
        place: CachedCall,
        tapped: TappedCall,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        affine: AffineMap | None,
    ) -> None:
        """Keep a call, to repeat it, if all about it can be compared: its tensors are plain arguments."""
        call, rule = tapped.call, tapped.rule
        place.kept = None
        simple = rule.fast and call.has_plain_inputs and not (call.in_place or call.constants or "out" in kwargs)
        if not simple or any(operand.graph is not None or operand.copy is not None for operand in call.operands):
            return
        of_operands: list[_OperandForm] = []
        of_inputs: list[_InputForm] = []
        plain: list[_PlainForm] = []
        inputs: dict[int, int] = {}
        slots = (*call.args, *call.kwargs.values())
        for position, (slot, value) in enumerate(zip(slots, (*args, *kwargs.values()), strict=True)):
            if not isinstance(value, Tensor):
                if not _is_plain(value):
                    return
                plain.append(_PlainForm(position, type(value), value))
            elif slot.kind == "operand":
                of_operands.append(_OperandForm(position, value, call.operands[slot.index].value, value.stride()))
            elif type(value) is not Tensor or (value.requires_grad and value.is_leaf):
                return  # leaves may be another model's parameters
            elif kind_of(value)[2] or inputs.setdefault(slot.index, position) != position:
                return
            else:
                of_inputs.append(_form_of(position, value))
        names, forms = tuple(kwargs), (tuple(of_operands), tuple(of_inputs), tuple(plain))
        operands = tuple((position, id(tensor), id(value), stride) for position, tensor, value, stride in of_operands)
        key = (call.func, slots, names, operands, *forms[1:], call.autocast)
        kept = self._kept.get(key)
        if kept is None:
            if len(self._kept) > max(MAX_CALLS, 8 * self._longest):
                self._kept.clear()
                self._latest.clear()
            in_order = [inputs[index] for index in range(len(inputs))]
            values = (*args, *kwargs.values())
            given = [values[position] for position in in_order]
            kept = self._kept[key] = KeptCall(tapped, names, forms, given, in_order, affine)
        place.kept = self._latest[call.func, id(of_operands[0].tensor)] = kept

    def latest(self, func: Callable[..., Any], values: Iterable[Any]) -> KeptCall | None:
        """Return the last call that was kept of a function and a parameter among its arguments, wherever it stood."""
        for value in values:
            found = self._latest.get((func, id(value)))
            if found is not None:
                return found
        return None

    def go_on_with(self, kept: KeptCall) -> CachedCall | None:
        """Go on to a call like one that was kept, at another place; None if its result counts as parameters' alone."""
        site, is_new = self.here.site.after(kept.signature, kept.name)
        self._n_sites += is_new
        if site.is_parameter_only:
            return None
        place = self._advance((site, *kept.sizes))
        place.kept = kept
        return place

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

    def site(self, call: Call, inputs: list[Tensor], place: CallSite, behind: tuple[Any, ...] = ()) -> CallSite:
        """Return the site of a call that comes after a place, with a graph behind its inputs."""
        site, is_new = place.after((*_signature(call, inputs), *behind), call.name)
        self._n_sites += is_new
        return site

    def go_to(self, site: CallSite, call: Call, inputs: list[Tensor]) -> CachedCall:
        """Go on to a site, with a call of these sizes."""
        return self._advance((site, *_sizes(call, inputs)))

    def _advance(self, key: tuple[Any, ...]) -> CachedCall:
        """Go on to the place that is known by a site and sizes, after the one that was reached."""
        here = self.here
        found = here.after.get(key)
        if found is None:
            found = here.after[key] = CachedCall(key[0])
            self._n_calls += 1
        here.following = self.here = found
        return found


def call_key(call: Call, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Describe a call and the sizes of its tensors."""
    return _signature(call, inputs), _sizes(call, inputs)


def _sizes(call: Call, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Describe the sizes of a call's tensors."""
    of_inputs = ((t.shape, t.stride()) if t.layout == torch.strided else t.shape for t in inputs)
    return (*of_inputs, *(operand.value.shape for operand in call.operands))


def _signature(call: Call, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
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
