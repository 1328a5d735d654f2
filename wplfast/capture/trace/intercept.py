"""What happens when a torch function meets a watched parameter: pass through, derive, or tap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import CoupledSamplesError, WplfastError
from ..call import Call, Operand, Slot, autocast_state, floating, is_in_place, kind_of, random_state
from ..rules import rule_for
from ..watched import Derived, map_tensors, tensors_in
from . import recurrent
from .call_cache import CachedCall, CallCache
from .functions import COPIES, EXPANSIONS, LIKE, LOOKUPS, SEEN_THROUGH, is_about_itself
from .operands import Operands
from .product import folded, product_of
from .tap import CallSite, CallSiteKey, CallSiteKeys, Listener


class Interception:
    """The forward half of a pass: it turns calls into derived tensors and tapped sites."""

    def __init__(self, parameters: list[Tensor], constants: list[Tensor], listener: Listener) -> None:
        """Watch ``parameters``; ``constants`` are the model's other parameters and its buffers."""
        self._operands = Operands(parameters, constants, self)
        self._listener = listener
        self._keys: dict[tuple[Any, ...], CallSiteKeys] = {}
        self._plan = CallCache()
        self.parameter_only: set[CallSiteKey] = set()  # calls that were measured to have no sample axis
        self.sites: list[CallSite] = []
        self.derived: list[Derived] = []
        self.in_backward = False
        self.reorders = False  # a call was seen whose rows lie in an order, or number, that depends on the data

    @property
    def leaves(self) -> list[Tensor]:
        """The plain leaves that stand for the parameters in parameter-only graphs and take ordinary gradients."""
        return self._operands.leaves

    def start_batch(self) -> None:
        """Forget the sites of the last forward pass."""
        self.sites, self.derived = [], []
        self._plan.start()
        for keys in self._keys.values():
            keys.used = 0

    def start_backward(self) -> None:
        """Begin a backward pass: sites that it creates (reentrant checkpoints) are numbered from zero again."""
        for keys in self._keys.values():
            if keys.in_backward:
                keys.used = 0
        self.sites = [site for site in self.sites if not site.in_backward]
        for site in self.sites:
            site.fired = False

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function some of whose arguments are watched or derived."""
        if func in SEEN_THROUGH:
            return SEEN_THROUGH[func](*args, **kwargs)
        if torch._C._are_functorch_transforms_active():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)  # a transform inside the model: the gradient arrives at the parameter
        if func in recurrent.SEEN:
            result = recurrent.run_as_linear_calls(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                args = folded(args)
            planned = None if kwargs or self.in_backward else self._plan.expected()
            if (
                planned is not None
                and planned.fits(func, args, self._operands)
                and planned.key not in self.parameter_only
            ):
                return self._tap_again(planned, args)
            name = getattr(func, "__name__", str(func))
            if is_about_itself(func, name, len(args) + len(kwargs)):
                return func(*args, **kwargs)
            if kwargs.get("scale_grad_by_freq"):
                raise CoupledSamplesError(
                    f"{name} with scale_grad_by_freq=True divides gradients by counts over the batch"
                )
            return self._call(func, name, args, kwargs)

    def _call(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sort the tensors of a call, then derive or tap."""
        call, inputs, key = self._take_apart(func, name, args, kwargs)
        if call.in_place and call.operand_at(0, "self") is not None:
            return self._update_derived(call, inputs, args)
        if call.name in LIKE:
            if call.operand_at(0, "self") is None:  # data cast or shaped like a parameter
                return call.result([operand.value for operand in call.operands], inputs)
            return self._derive(call, inputs, args)
        if not inputs or (key in self.parameter_only and not call.differentiable_inputs):
            return self._derive(call, inputs, args)
        return self._tap(call, inputs, key, args, kwargs)

    def _take_apart(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Call, list[Tensor], CallSiteKey]:
        """Replace tensors by slots."""
        operands: list[Operand] = []
        inputs: list[Tensor] = []
        constants: list[Tensor] = []
        slots: dict[int, Slot] = {}

        def slot(tensor: Tensor) -> Slot:
            if id(tensor) not in slots:
                operand = self._operands.of(tensor)
                if operand is not None:
                    slots[id(tensor)] = Slot("operand", len(operands))
                    operands.append(operand)
                elif self._operands.is_constant(tensor) and not (
                    name in LOOKUPS and tensor.dim() > 1 and len(tensor) > 1
                ):
                    slots[id(tensor)] = Slot("constant", len(constants))
                    constants.append(tensor)
                else:
                    slots[id(tensor)] = Slot("input", len(inputs))
                    inputs.append(tensor)
            return slots[id(tensor)]

        call = Call(
            func,
            name,
            map_tensors(slot, args),
            map_tensors(slot, kwargs),
            operands,
            constants,
            input_shapes=[t.shape for t in inputs],
            differentiable_inputs=any(t.requires_grad for t in inputs),
            input_kinds=[] if any(t.requires_grad for t in inputs) else [kind_of(t) for t in inputs],
            in_place=is_in_place(name, args),
            random_state=None,
            autocast=autocast_state(operands[0].value.device.type) if operands else None,
        )
        place = (self.in_backward, tuple(operand.key for operand in operands), name)
        keys = self._keys.get(place)
        if keys is None:
            keys = self._keys[place] = CallSiteKeys(self.in_backward, name)
        return call, inputs, keys.next()

    def _derive(self, call: Call, inputs: list[Tensor], args: tuple[Any, ...]) -> Any:
        """Compute on parameters alone, in a graph that leads to their leaves."""
        graphs, indices = self._below(call)
        plain = call.name in EXPANSIONS or call.name in COPIES
        origin = call.operands[0] if plain and len(call.operands) == 1 and not call.constants else None
        if call.in_place:  # parameters written into a plain tensor, which is derived from now on
            (graph,) = call.run(graphs, inputs)
            with torch.no_grad():
                args[0].copy_(graph)
            self.derived.append(Derived.become(args[0], graph, indices, self))
            return None if call.name == "__setitem__" else args[0]

        def wrap(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            self.derived.append(Derived.wrap(tensor, indices, self, origin))
            return self.derived[-1]

        return map_tensors(wrap, call.result(graphs, inputs))

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
        (graph,) = call.run(graphs, inputs)
        with torch.no_grad():
            target.copy_(graph)
        target._graph, target._parameters, target._origin = graph, indices, None
        return None if call.name == "__setitem__" else target

    @staticmethod
    def _below(call: Call) -> tuple[list[Tensor], tuple[int, ...]]:
        """Return the operands in their parameter-only graphs, and the parameters below them."""
        graphs = [operand.through for operand in call.operands]
        return graphs, tuple(sorted({index for operand in call.operands for index in operand.parameters}))

    def _tap(
        self, call: Call, inputs: list[Tensor], key: CallSiteKey, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a call natively with its operands as constants and tap its floating point outputs."""
        values = [operand.value for operand in call.operands]
        rule, device = rule_for(call), values[0].device
        site = CallSite(call, rule, key, self.in_backward, self._listener)
        before = None if rule.fast else random_state(device)
        planned = None
        product = product_of(call, rule, inputs)
        if call.in_place:  # out of place, tapped, and written back
            target = args[0]
            inputs = [tensor.clone() if tensor is target else tensor for tensor in inputs]
            (tapped,) = site.tap(call.run(values, inputs), inputs)
            target.copy_(tapped)
            result = None if call.name == "__setitem__" else target
        elif product is not None:
            planned = CachedCall.of(call, rule, key, args, kwargs, product)
            result = site.multiply(inputs[0], *product)
        else:
            result = call.result(values, inputs)
            if any(tensor.is_complex() for tensor in tensors_in(result)):
                return call.func(*args, **kwargs)  # not captured: the gradient arrives at the parameter
            outputs = floating(result)
            if not outputs:
                return result
            if outputs[0] is result:
                planned = CachedCall.of(call, rule, key, args, kwargs, None)
            queue = iter(site.tap(outputs, inputs))
            result = map_tensors(lambda t: next(queue) if t.is_floating_point() else t, result)
        if before is not None and not torch.equal(before, random_state(device)):
            call.random_state = before  # dropout inside an RNN kernel, say: running it again must draw the same
        if not self.in_backward:
            self._plan.advance(planned)
        self.sites.append(site)
        return result

    def _tap_again(self, planned: CachedCall, args: tuple[Any, ...]) -> Any:
        """Tap a call that stood at the same place in the last forward pass."""
        planned.key.keys.next()
        site = CallSite(planned.call, planned.rule, planned.key, False, self._listener)
        if planned.product is not None:
            result = site.multiply(args[planned.inputs[0]], *planned.product)
        else:
            output, inputs = planned.run(args)
            (result,) = site.tap([output], inputs)
        self.sites.append(site)
        self._plan.advance(planned)
        return result

    def tap_result(self, func: Callable[..., Any], args: tuple[Any, ...], like: Tensor, moves: bool) -> Tensor | None:
        """Tap a call that ran as a part of something else, on tensors without their graphs.

        Args:
            func: the function.
            args: its arguments.
            like: a tensor of the shape of its result.
            moves: whether its data depend on the samples differentiably, had they their graphs.

        Returns:
            An alias of ``like`` that stands for the result in the graph: what gradient arrives at it is taken to be
            that of the call's result. None if the call was measured to have no sample axis.
        """
        with torch._C.DisableTorchFunctionSubclass():
            call, inputs, key = self._take_apart(func, func.__name__, args, {})
            if not call.operands:
                return like
            if not inputs or (key in self.parameter_only and not moves):
                return None
            call.differentiable_inputs = moves
            site = CallSite(call, rule_for(call), key, self.in_backward, self._listener)
            self.sites.append(site)
            (tapped,) = site.tap([like], inputs)
            return tapped
