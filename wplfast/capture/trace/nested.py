"""Derivatives that are taken while a pass runs, by a model's own code: in its forward pass, in its Functions, in hooks.

Every backward pass of autograd is a *task* of its own. A tapped call may be reached in the pass's own task, or in one
that something else started: a checkpoint that recomputes and calls ``torch.autograd.backward``, a hook that looks at
another graph, an adversarial example. Whether its gradient belongs to the parameters then is what PyTorch itself knows
of the task: gradients accumulate (``backward``), are asked for (``grad`` with respect to parameters), or neither.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ...errors import WplfastError
from ..call_site import Listener, TappedCall
from ..watched import BACKWARD, Derived

if TYPE_CHECKING:
    from .intercept import Interception

#: The number of the task that runs in this thread; -1 where none does.
current_task: Callable[[], int] = torch._C._current_graph_task_id

SECOND_DERIVATIVE = (
    "a second derivative through watched parameters (create_graph=True inside the model or the loss) is not supported: "
    "per-sample gradients cannot be captured there"
)


def is_hidden() -> bool:
    """Tell whether this runs in the forward pass of a Function no argument of which requires grad: it has no backward.

    What it computes of parameters inside, to send gradients there itself, gets none then.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_forward(frame.f_code) and not _needs_grad(frame):
            return True
        frame = frame.f_back
    return False


@functools.lru_cache(maxsize=4096)
def _is_forward(code: CodeType) -> bool:
    """Tell whether this is the code of a Function's ``forward``. From torch 2.14 on, nothing of Python calls that."""
    classes: list[type[torch.autograd.Function]] = [torch.autograd.Function]
    for cls in classes:
        classes += cls.__subclasses__()
    return any(getattr(cls.forward, "__code__", None) is code for cls in classes)


def _needs_grad(frame: FrameType) -> bool:
    """Tell whether an argument that a Function's ``forward`` was called with requires grad."""
    names, rest, _, values = inspect.getargvalues(frame)
    arguments = [values[name] for name in names if name in values]
    if rest is not None:
        arguments += values[rest]
    if arguments and isinstance(arguments[0], torch._C._FunctionBase):
        return any(arguments[0].needs_input_grad)
    # A Function with ``setup_context`` is not given its context here, and a name may stand for a leaf by now that it
    # made of its argument, for a graph of its own.
    return any(
        isinstance(value, Tensor) and value.requires_grad and (not value.is_leaf or isinstance(value, nn.Parameter))
        for value in arguments
    )


class _Asked:
    """Listens where ``torch.autograd.grad`` was asked for gradients of parameters."""

    def receive(
        self, tapped: TappedCall, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Compute the gradients of a call's operands."""
        return tapped.rule.ordinary(tapped.call, inputs, grads)


_ASKED = _Asked()


def listener_of(node: Node, tapped: TappedCall) -> Listener:
    """Return what listens to a tapped call in a task that is not the pass's own.

    Args:
        node: the tap's node; its last edges lead to the operands' leaves.
        tapped: the call. It counts as one that a backward pass made if its gradient accumulates.
    """
    accumulates = False
    for leaf, _ in node.next_functions[-len(tapped.call.operands) :]:
        assert leaf is not None
        try:
            accumulates |= torch._C._will_engine_execute_node(leaf)
        except RuntimeError:  # of a leaf that ``grad`` was asked for
            return _ASKED
    relay = tapped.relay
    if not accumulates:
        return relay.idle
    if relay.listener is not relay.idle:
        tapped.index = -1
    return relay.listener


def is_recomputing() -> bool:
    """Tell whether a checkpoint that is not reentrant runs its forward pass again, for the tensors that were saved."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_recomputation_hook")


def keeping_own() -> AbstractContextManager[Any]:
    """Keep what a graph of parameters alone saves, where a checkpoint would drop it and run its part again.

    Such a graph is gone through between the backward passes of the losses, when no call is to be seen.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or "checkpoint" not in getattr(hooks[0], "__module__", ""):
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    """Give back what was kept."""
    return tensor


def grad(
    interception: Interception,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
    only_inputs: bool = True,
) -> tuple[Tensor | None, ...]:
    """Do what ``torch.autograd.grad`` does, where outputs or inputs are watched parameters or computed from them alone.

    Raises:
        WplfastError: for second derivatives, and for batches of gradients.
    """
    if create_graph:
        raise WplfastError(SECOND_DERIVATIVE)
    if is_grads_batched:
        raise WplfastError("torch.autograd.grad of watched parameters with is_grads_batched=True is not supported")
    operands = [interception.operand(tensor) for tensor in inputs]
    given = grad_outputs if isinstance(grad_outputs, (tuple, list)) else [grad_outputs] * len(outputs)
    below: list[tuple[Tensor, Tensor | None]] = []  # in the graphs on parameters alone, with gradients
    above: list[tuple[Tensor, Tensor | None]] = []
    for output, gradient in zip(outputs, given, strict=True):
        operand = interception.operand(output)
        (above if operand is None else below).append((output if operand is None else operand.through, gradient))
    derived = [tensor for tensor in interception.derived if tensor._graph.requires_grad]
    found: list[Tensor | None] = [None] * len(inputs)
    if above:
        interception.has_asked = True
        targets = [tensor if o is None else o.leaf for tensor, o in zip(inputs, operands, strict=True)]
        ends, gradients = zip(*above, strict=True)
        both = torch.autograd.grad(ends, [*targets, *derived], gradients, retain_graph, allow_unused=True)
        found = list(both[: len(inputs)])
        pairs = zip(derived, both[len(inputs) :], strict=True)
        below += [(tensor._graph, g.to(tensor._graph.dtype)) for tensor, g in pairs if g is not None]
    asked = [index for index, operand in enumerate(operands) if operand is not None]
    if below and asked:
        ends, gradients = zip(*below, strict=True)
        leaves = [operand.through for operand in operands if operand is not None]
        through = torch.autograd.grad(ends, leaves, gradients, retain_graph=True, allow_unused=True)
        for index, gradient in zip(asked, through, strict=True):
            direct = None if isinstance(inputs[index], Derived) else found[index]  # the other is a root of its own
            found[index] = gradient if direct is None else direct if gradient is None else direct + gradient
    if materialize_grads:
        return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True))
    if not allow_unused and any(gradient is None for gradient in found):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True if "
            "this is the desired behavior."
        )
    return tuple(found)


def backward(
    interception: Interception, tensors: Sequence[Tensor], *, inputs: Sequence[Tensor] | None, **options: Any
) -> None:
    """Do what ``torch.autograd.backward`` does, where ``inputs`` has watched parameters.

    Raises:
        WplfastError: outside of a pass, where the parameters' ``.grad`` would be wanted.
    """
    operands = [] if inputs is None else [interception.operand(tensor) for tensor in inputs]
    if inputs is None or not any(operands):
        BACKWARD(tensors, inputs=inputs, **options)
        return
    relay = interception.relay
    if relay.listener is relay.idle:
        raise WplfastError(
            "backward(inputs=...) asks for the .grad of watched parameters inside the model's forward pass, where none "
            "is computed; use torch.autograd.grad there"
        )
    targets = [tensor if o is None else o.leaf for tensor, o in zip(inputs, operands, strict=True)]
    asked = {index for operand in operands if operand is not None for index in operand.parameters}
    targets += [tensor for tensor in interception.derived if asked & set(tensor._parameters)]
    BACKWARD(tensors, inputs=targets, **options)


#: Functions that take derivatives, as they are run where watched parameters are among their arguments.
DERIVATIVES: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.autograd.grad: grad,
    BACKWARD: backward,
}
