"""What happens when a torch function meets a watched parameter: pass through, derive, or tap."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from ...errors import CoupledSamplesError, WplfastError
from ..call import Call, Operand, autocast_state, floating, is_differentiable, is_in_place, kind_of, random_state
from ..call_site import CallSite, Listener, Relay, TappedCall
from ..probe.graph import may_reorder, structure_behind
from ..rules import GENERIC, rule_for
from ..watched import Derived, map_tensors, tensors_in
from . import recurrent
from .affine import NODES, affine_map_of, folded
from .call_cache import CachedCall, CallCache, call_key
from .functions import COPIES, EXPANSIONS, LIKE, SEEN_THROUGH, is_about_itself, is_the_same
from .nested import DERIVATIVES, is_hidden, is_recomputing, keeping_own
from .operands import Operands, Sorter
from .tap import TAP_NODE, tap

# Looked up once: what follows runs for every call of every forward pass.
LINEAR: Callable[..., Any] = torch.nn.functional.linear
NATIVELY: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunctionSubclass
is_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

#: Losses, whose integers are labels and no positions, whatever they are.
_OF_LABELS = frozenset({"cross_entropy", "cross_entropy_loss", "nll_loss", "multi_margin_loss"})


class Interception:
    """The forward half of a pass: it turns calls into derived tensors and tapped calls.

    Attributes:
        cache: the calls of earlier forward passes, and the one that this one has reached.
        relay: where both halves of the pass meet.
        taps: the tapped calls of the last forward pass, in order.
        derived: the derived tensors of the last forward pass.
        leaves: what stands for the parameters in parameter-only graphs, and takes ordinary gradients.
        reorders: a call was seen whose rows lie in an order, or number, that depends on the data.
        native_dtypes: types of half precision that functions which were seen through would have computed in.
        n_parameter_only: number of call sites that were found to have no sample axis.
        n_samples: size of the batch that comes, where its inputs say so; None if they do not.
        branch: where calls for further losses of one forward pass begin; None before losses of it were collected.
        is_patchwork: calls of the last forward pass were made after some of its losses were collected.
        hidden: parameters that were used in the forward pass of a Function (a checkpoint) without a backward pass.
        has_frozen: such Functions are looked for: parameters before them may be frozen for the pass alone.
        has_asked: the forward pass took gradients with respect to parameters, which may enter it as data.
        thread: the one that opened the pass.
    """

    def __init__(self, parameters: list[Tensor], constants: list[Tensor], idle: Listener) -> None:
        """Watch parameters.

        Args:
            parameters: the watched ones.
            constants: the model's other parameters and its buffers.
            idle: what hears of gradients while no backward pass of ours runs.
        """
        self._operands = Operands(parameters, constants, self)
        self.cache, self.relay = CallCache(), Relay(idle)
        self.taps: list[TappedCall] = []
        self.derived: list[Derived] = []
        self.leaves = self._operands.leaves
        self.reorders = self.has_asked = False
        self.native_dtypes: set[torch.dtype] = set()
        self.is_patchwork = False
        self.branch: CachedCall | None = None
        self._n_kept = 0
        self._without_samples: set[Any] = set()  # calls of this forward pass whose results count as derived
        self.hidden: set[int] = set()
        self.has_frozen = False
        self.n_parameter_only = 0
        self.n_samples: int | None = None
        self.thread = get_ident()

    def start_batch(self) -> None:
        """Forget the calls of the last forward pass."""
        self.cache.restart(len(self.taps))
        self._operands.forget_computed()
        self.taps, self.derived, self.relay.is_over, self.has_asked = [], [], False, False
        self._without_samples.clear()
        self.is_patchwork, self.branch = False, None

    def go_on(self) -> None:
        """Keep the calls of this forward pass after losses were collected: further losses of it may follow.

        What computes these stands where the first of them begin, however many there are.
        """
        if self.branch is None:
            self.branch = self.cache.here
        self.cache.here, self._n_kept = self.branch, len(self.taps)

    def let_go(self) -> None:
        """Forget the calls that no graph has any more, those for earlier losses of this forward pass alone."""
        if len(self.taps) == self._n_kept:
            return
        self.is_patchwork = True
        taps, derived = list(map(weakref.ref, self.taps)), list(map(weakref.ref, self.derived))
        self.taps.clear()
        self.taps += [tapped for found in taps if (tapped := found()) is not None]
        self.derived.clear()
        self.derived += [tensor for found in derived if (tensor := found()) is not None]
        self._number()

    def adopt(self, taps: Iterable[TappedCall], derived: Iterable[Derived]) -> None:
        """Take the calls behind losses that come after a newer forward pass began for those of this one."""
        self.is_patchwork = True
        self.taps, self.derived = [tapped for tapped in taps if not tapped.in_backward], list(derived)
        self._number()

    def _number(self) -> None:
        """Number the calls, and let each have a site of its own."""
        sites: set[CallSite] = set()
        for index, tapped in enumerate(self.taps):
            tapped.index = tapped.index if tapped.in_backward else index
            while tapped.site in sites:  # what earlier losses computed lives on in this one
                tapped.site = tapped.site.again
            sites.add(tapped.site)

    @property
    def _is_backward(self) -> bool:
        """Whether a backward pass runs, which makes calls itself: those of checkpoints."""
        return self.relay.listener is not self.relay.idle

    def note_without_grad(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Note the parameters among the arguments of a call without grad mode, as a checkpoint makes."""
        if (
            self.has_frozen
            and not is_about_itself(func, getattr(func, "__name__", ""), len(args))
            and get_ident() == self.thread
            and is_hidden()
        ):
            self.hidden |= {index for a in args for index in self._operands.index_of(a)}

    def operand(self, tensor: Tensor) -> Operand | None:
        """Return the operand that a tensor is, if it is a watched parameter or was computed from some alone."""
        return self._operands.of(tensor)

    def mark_parameter_only(self, taps: Iterable[TappedCall]) -> None:
        """Take the results of these calls for derived from parameters, from the next forward pass on."""
        for tapped in taps:
            self.n_parameter_only += not tapped.site.is_parameter_only
            tapped.site.is_parameter_only = True

    # ---- calls -----------------------------------------------------------------------------------------------------

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function some of whose arguments are watched or derived."""
        if get_ident() != self.thread and not _is_of_autograd():
            if not is_about_itself(func, getattr(func, "__name__", str(func)), len(args) + len(kwargs)):
                self.check_thread()
            with NATIVELY():
                return func(*args, **kwargs)
        relay = self.relay
        if relay.is_over:
            self.start_batch()
        expected = self.cache.here.following
        if (
            expected is not None
            and (kept := expected.kept) is not None
            and kept.func is func
            and relay.listener is relay.idle
            and not expected.site.is_parameter_only
            and not is_functorch_active()
        ):
            with NATIVELY():
                if func is LINEAR:
                    args = folded(args, self._operands.is_constant)
                values = kept.values_of(args, kwargs) if kwargs or kept.names else args
                if kept.fits(values, self._operands.is_constant):
                    tapped, result = kept.run(expected.site, relay, len(self.taps), values)
                    self.taps.append(tapped)
                    self.cache.here = expected
                    return result
        return self._call_anew(func, args, kwargs)

    def _call_anew(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function that is not the call which came next the last time."""
        if func in SEEN_THROUGH:
            return SEEN_THROUGH[func](*args, **kwargs)
        if is_functorch_active():
            with NATIVELY():
                return func(*args, **kwargs)  # a transform inside the model: the gradient arrives at the parameter
        if func in recurrent.SEEN:
            result = recurrent.run_as_linear_calls(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        with NATIVELY():
            if func is LINEAR:
                args = folded(args, self._operands.is_constant)
            if not (self._is_backward or self.has_frozen):
                again = self._tap_alike(func, args, kwargs)
                if again is not None:
                    return again
            if func in DERIVATIVES:
                return DERIVATIVES[func](self, *args, **kwargs)
            name = getattr(func, "__name__", str(func))
            if is_about_itself(func, name, len(args) + len(kwargs)):
                if name == "register_hook" and isinstance(args[0], Derived):
                    args[0]._origin = None  # each sample's gradient goes through the graph, and through the hook
                    return args[0]._graph.register_hook(*args[1:], **kwargs)
                if name == "detach_" and isinstance(args[0], Derived):
                    return self._detach(args[0])
                found = func(*args, **kwargs)
                if type(found) is Tensor and isinstance(args[0], Derived) and is_the_same(func, name):
                    self._operands.add_computed(found)
                return found
            if kwargs.get("scale_grad_by_freq"):
                raise CoupledSamplesError(
                    f"{name} with scale_grad_by_freq=True divides gradients by counts over the batch"
                )
            return self._call(func, name, args, kwargs)

    def _tap_alike(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run and tap a call that is like one at another place, as steps of a loop are; None if there is none."""
        kept = self.cache.latest(func, (*args, *kwargs.values()))
        if kept is None:
            return None
        values = kept.values_of(args, kwargs)
        if not kept.fits(values, self._operands.is_constant):
            return None
        place = self.cache.go_on_with(kept)
        if place is None:
            return None
        tapped, result = kept.run(place.site, self.relay, len(self.taps), values)
        self.taps.append(tapped)
        return result

    def _call(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sort the tensors of a call, then derive or tap."""
        if any(tensor.is_nested for tensor in tensors_in((args, kwargs))):
            return func(*args, **kwargs)  # whose rows have no layout: the gradient arrives at the parameter
        call, inputs = self._take_apart(func, name, args, kwargs)
        if self.has_frozen and is_hidden():
            self.hidden |= call.parameters
        if call.in_place and call.operand_at(0, "self") is not None:
            return self._update_derived(call, inputs, args)
        if call.name in LIKE:
            if call.operand_at(0, "self") is None:  # data cast or shaped like a parameter
                return call.result([operand.value for operand in call.operands], inputs)
            return self._derive(call, inputs, args)
        if not inputs:
            return self._derive(call, inputs, args)
        site = self._site(call, inputs)
        if call.differentiable_inputs:
            return self._tap(call, inputs, site, args, kwargs)
        if self._is_backward and is_recomputing():  # what the forward pass did: it saved tensors in the same order
            site.is_parameter_only = call_key(call, inputs) in self._without_samples
        # Either way is exact; but it takes a pass to find out that samples share a result, and the batch runs again.
        elif call.is_of_ranges and call.name not in _OF_LABELS and self._are_positions(call):
            site.is_parameter_only = True
        if not site.is_parameter_only:
            return self._tap(call, inputs, site, args, kwargs)
        self._without_samples.add(call_key(call, inputs))
        self._arrive(site, call, inputs)
        return self._derive(call, inputs, args)

    def _are_positions(self, call: Call) -> bool:
        """Tell whether ranges are likely positions: not as long as the batch, or what may be the batch."""
        sizes = {self.n_samples}
        if self.n_samples is None:  # as far as can be told from the data of earlier calls, if there were any
            sizes = {shape[0] for tapped in self.taps for shape in tapped.call.input_shapes if len(shape) > 1}
            if not sizes and any(dtype.is_floating_point for _, dtype, _ in call.input_kinds):
                return False  # numbers may well be samples; indices are so seldom
        return all(sizes.isdisjoint(shape) for shape in call.input_shapes)

    def _take_apart(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Call, list[Tensor]]:
        """Replace tensors by slots; return the call and its inputs."""
        found = Sorter(self._operands, name)
        slots, named_slots = map_tensors(found.slot, args), map_tensors(found.slot, kwargs)
        inputs, moves = found.inputs, any(t.requires_grad for t in found.inputs)
        call = Call(
            func,
            name,
            slots,
            named_slots,
            found.operands,
            found.constants,
            input_shapes=[t.shape for t in inputs],
            data_shapes=[t.shape for t in inputs if not t.requires_grad],
            differentiable_inputs=moves,
            input_kinds=[] if moves else [kind_of(t) for t in inputs],
            in_place=is_in_place(name, args),
            has_plain_inputs=all(t.layout == torch.strided for t in inputs),
            random_state=None,
            autocast=autocast_state(found.operands[0].value.device.type) if found.operands else None,
            is_complex=any(t.is_complex() for t in (*inputs, *(operand.value for operand in found.operands))),
        )
        return call, inputs

    def check_thread(self) -> None:
        """Refuse to mix what threads do.

        Raises:
            WplfastError: if this is not the thread that opened the pass.
        """
        if get_ident() != self.thread:
            raise WplfastError(
                "another thread uses parameters that a Fisher pass watches: it would get no gradients, and the pass "
                "its calls; let it wait for the pass, give it a copy of the model, or run the model there under "
                "torch.no_grad(). A pass is used in the thread that opened it"
            )

    # ---- where calls stand -----------------------------------------------------------------------------------------

    def _site(self, call: Call, inputs: list[Tensor]) -> CallSite:
        """Return the site of a call that comes next."""
        here = self.cache.here.site
        if not self._is_backward:
            return self.cache.site(call, inputs, here)
        # The graph behind the losses tells nothing of what a backward pass computes, unless it only computes it again.
        behind = () if is_recomputing() else structure_behind(inputs, (TAP_NODE, *NODES))
        self.reorders = self.reorders or any(isinstance(kind, type) and may_reorder(kind) for kind in behind)
        return self.cache.site(call, inputs, self.relay.site or here.in_backward, behind)

    def _arrive(self, site: CallSite, call: Call, inputs: list[Tensor]) -> CachedCall | None:
        """Go on to a site; return the place of a call of these sizes there, unless a backward pass runs."""
        if not self._is_backward:
            return self.cache.go_to(site, call, inputs)
        self.relay.site = site
        return None

    def _new(self, call: Call, site: CallSite) -> TappedCall:
        """Return a call that is to be tapped."""
        return TappedCall(call, site, rule_for(call), self.relay, -1 if self._is_backward else len(self.taps))

    def _add(self, tapped: TappedCall) -> None:
        """Add a call that was tapped."""
        if not tapped.in_backward:
            self.taps.append(tapped)

    # ---- calls on parameters alone ---------------------------------------------------------------------------------

    def _derive(self, call: Call, inputs: list[Tensor], args: tuple[Any, ...]) -> Any:
        """Compute on parameters alone, in a graph that leads to their leaves."""
        graphs, indices = self._below(call)
        plain = call.name in EXPANSIONS or call.name in COPIES
        origin = call.operands[0] if plain and len(call.operands) == 1 and not call.constants else None
        if call.in_place:  # parameters written into a plain tensor, which is derived from now on
            with keeping_own():
                (graph,) = call.run(graphs, inputs)
            with torch.no_grad():
                args[0].copy_(graph)
            self.derived.append(Derived.become(args[0], graph, indices, self))
            return None if call.name == "__setitem__" else args[0]

        def wrap(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                if not inputs:  # else it may be one of them, or a view
                    self._operands.add_computed(tensor)
                return tensor
            self.derived.append(Derived.wrap(tensor, indices, self, origin))
            return self.derived[-1]

        with keeping_own():
            result = map_tensors(wrap, call.result(graphs, inputs))
        if isinstance(result, Derived):
            result._made_by = call
        return result

    def _update_derived(self, call: Call, inputs: list[Tensor], args: tuple[Any, ...]) -> Any:
        """Run an in-place operation on a derived tensor out of place, then store the result in it."""
        target = args[0]
        if not isinstance(target, Derived):
            return call.func(*args)  # in place on a leaf that requires grad: PyTorch's own error
        memory = target.untyped_storage().data_ptr()
        if any(other is not target and other.untyped_storage().data_ptr() == memory for other in self.derived):
            raise WplfastError(
                f"{call.name} changes a view of a tensor that was computed from parameters, or one that has views; use "
                "an out-of-place form"
            )
        if call.differentiable_inputs:
            raise WplfastError(
                f"{call.name} writes data into a tensor that was computed from parameters; use the out-of-place form"
            )
        graphs, indices = self._below(call)
        with keeping_own():
            (graph,) = call.run(graphs, inputs)
        with torch.no_grad():
            target.copy_(graph)
        target._graph, target._parameters, target._origin, target._made_by = graph, indices, None, None
        return None if call.name == "__setitem__" else target

    def _detach(self, tensor: Tensor) -> Tensor:
        """Turn a derived tensor into the constant that its value is."""
        tensor.requires_grad_(False)
        tensor.__class__ = Tensor
        self.derived[:] = [other for other in self.derived if other is not tensor]
        self._operands.add_computed(tensor)
        return tensor

    @staticmethod
    def _below(call: Call) -> tuple[list[Tensor], tuple[int, ...]]:
        """Return the operands in their parameter-only graphs, and the parameters below them."""
        graphs = [operand.through for operand in call.operands]
        return graphs, tuple(sorted({index for operand in call.operands for index in operand.parameters}))

    # ---- calls on parameters and data ------------------------------------------------------------------------------

    def _tap(
        self, call: Call, inputs: list[Tensor], site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a call natively with its operands as constants and tap its floating point outputs."""
        values = [operand.value for operand in call.operands]
        tapped, device = self._new(call, site), values[0].device
        before = None if tapped.rule.fast else random_state(device)
        affine = affine_map_of(call, tapped.rule, inputs)
        given, repeatable = inputs, not call.in_place
        if call.in_place:  # out of place, tapped, and written back
            target = args[0]
            inputs = [tensor.clone() if tensor is target else tensor for tensor in inputs]
            (output,) = tap(tapped, call.run(values, inputs), inputs)
            target.copy_(output)
            result = None if call.name == "__setitem__" else target
        elif affine is not None:
            result = affine.apply(tapped, inputs[0], affine, *call.leaves)
            tapped.shapes = (result.shape,)
        else:
            result = call.result(values, inputs)
            outputs = floating(result)
            if not call.is_complex and any(output.is_complex() for output in outputs):
                call.is_complex, tapped.rule = True, GENERIC
            if not outputs:
                return result
            repeatable = outputs[0] is result
            queue = iter(tap(tapped, outputs, inputs))
            result = map_tensors(lambda t: next(queue) if is_differentiable(t) else t, result)
        if before is not None and not torch.equal(before, random_state(device)):
            call.random_state = before  # dropout inside an RNN kernel, say: running it again must draw the same
        cached = self._arrive(site, call, given)
        if cached is not None and repeatable:
            self.cache.keep(cached, tapped, args, kwargs, affine)
        self._add(tapped)
        return result

    def tap_result(self, func: Callable[..., Any], args: tuple[Any, ...], like: Tensor, moves: bool) -> Tensor | None:
        """Tap a call that ran as a part of something else, on tensors without their graphs.

        Args:
            func: the function.
            args: its arguments.
            like: a tensor of the shape of its result.
            moves: whether its inputs depend on the samples differentiably, had they their graphs.

        Returns:
            An alias of ``like`` that stands for the result in the graph: what gradient arrives at it is taken to be
            that of the call's result. None if the call was measured to have no sample axis.
        """
        with NATIVELY():
            call, inputs = self._take_apart(func, func.__name__, args, {})
            if not call.operands:
                return like
            if not inputs:
                return None
            site = self._site(call, inputs)
            self._arrive(site, call, inputs)
            if site.is_parameter_only and not moves:
                return None
            call.differentiable_inputs = moves
            tapped = self._new(call, site)
            (tensor,) = tap(tapped, [like], inputs)
            self._add(tapped)
            return tensor


def _is_of_autograd() -> bool:
    """Tell whether this is a thread in which autograd runs backward passes on a device: they may recompute calls."""
    if torch._C._current_graph_task_id() == -1:
        return False
    known = threading._active.get(get_ident())  # type: ignore[attr-defined]
    return known is None or isinstance(known, threading._DummyThread)
