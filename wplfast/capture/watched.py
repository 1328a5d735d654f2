"""Watched parameters: their class is swapped in place, so that every torch call that consumes one is seen.

``UninitializedParameter.materialize`` of PyTorch swaps classes in the same way. Object identity, storage, hooks,
optimizer state, tied names and lists such as ``nn.LSTM._flat_weights`` all stay as they are, and recomputation inside
a backward pass is seen too. Not seen: custom ``autograd.Function.apply``, TorchScript and C++ code that calls ATen
directly; there the gradient arrives at the parameter's ``.grad``, which is how ``capture/collect`` notices.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from functools import partial
from itertools import compress, repeat
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.overrides import has_torch_function

from ..errors import UnsupportedParameterError, WplfastError
from .undo import Undo


class Interceptor(Protocol):
    """What handles the calls: one for each pass."""

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function some of whose arguments are watched."""

    def note_without_grad(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Hear of a torch function that runs without grad mode."""


#: ``torch.autograd.backward`` of PyTorch itself.
BACKWARD: Callable[..., Any] = torch.autograd.backward

is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled

#: Functions that matter without grad mode too.
_DERIVATIVES = frozenset({torch.autograd.grad, BACKWARD})

_interceptors: dict[int, Interceptor] = {}  # id(parameter) -> the pass that watches it


def _dispatch(
    cls: type,
    func: Callable[..., Any],
    types: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Hand a call to the pass that watches one of its arguments."""
    kwargs = kwargs or {}
    if is_grad_enabled() or func in _DERIVATIVES:
        for argument in args:  # most calls have their tensors right here
            interceptor = _interceptors.get(id(argument))
            if interceptor is not None:
                return interceptor.call(func, args, kwargs)
        for tensor in tensors_in((args, kwargs)):
            interceptor = tensor._pass if isinstance(tensor, Derived) else _interceptors.get(id(tensor))
            if interceptor is not None:
                return interceptor.call(func, args, kwargs)
    else:
        for argument in args:
            if (interceptor := _interceptors.get(id(argument))) is not None:
                interceptor.note_without_grad(func, args)
                break
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


class WatchedParameter(nn.Parameter):
    """An ``nn.Parameter`` during a pass."""

    __torch_function__: Any = classmethod(_dispatch)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Copy as what the parameter is outside of the pass."""
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        copy: nn.Parameter = memo[id(self)]
        return copy


class WatchedTensor(Tensor):
    """A leaf tensor that is no ``nn.Parameter`` during a pass."""

    __torch_function__: Any = classmethod(_dispatch)


class Derived(Tensor):
    """The result of an operation on parameters alone (a view, W + BA, a masked weight): it has no sample axis.

    It is a leaf of the model's graph; ``_graph`` is the same value in a graph of its own that leads to the parameters.
    """

    _pass: Interceptor
    _graph: Tensor
    _parameters: tuple[int, ...]
    _origin: Any = None  # the source that it is a copy or an expansion of
    _made_by: Any = None  # the call that it is the only result of

    __torch_function__: Any = classmethod(_dispatch)

    @staticmethod
    def wrap(graph: Tensor, parameters: tuple[int, ...], interceptor: Interceptor, origin: Any = None) -> Derived:
        """Wrap a tensor that was computed from the parameters with these indices alone."""
        derived = graph.detach().as_subclass(Derived)
        with torch._C.DisableTorchFunctionSubclass():
            derived.requires_grad_()
        derived._graph, derived._parameters, derived._pass, derived._origin = graph, parameters, interceptor, origin
        return derived

    @staticmethod
    def become(tensor: Tensor, graph: Tensor, parameters: tuple[int, ...], interceptor: Interceptor) -> Derived:
        """Turn a plain tensor that parameters were written into, and that has their value, into a derived one.

        Raises:
            WplfastError: if it is a view or already part of a graph, whose history this would hide.
        """
        if type(tensor) is not Tensor or tensor.requires_grad or tensor._is_view():
            raise WplfastError("parameters were written in place into a view or into data; use an out-of-place form")
        tensor.__class__ = Derived
        derived = cast(Derived, tensor)
        with torch._C.DisableTorchFunctionSubclass():
            derived.requires_grad_()
        derived._graph, derived._parameters, derived._pass = graph, parameters, interceptor
        return derived


def seen(run: Callable[..., Any]) -> Callable[..., Any]:
    """Let passes see ``backward(inputs=...)`` of a PyTorch that asks no class of these inputs, as 2.10 does not.

    Their gradients would be missing from a Fisher, without a word.

    Args:
        run: that PyTorch's ``torch.autograd.backward``; it runs where no input is watched.
    """

    @functools.wraps(run)
    def backward(
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> Any:
        if inputs is not None:
            inputs = (inputs,) if isinstance(inputs, (Tensor, GradientEdge)) else tuple(inputs)
            ours = (WatchedParameter, WatchedTensor, Derived)
            if has_torch_function(inputs) and any(isinstance(tensor, ours) for tensor in inputs):
                given = grad_tensors if grad_variables is None else grad_variables
                options = {"grad_tensors": given, "retain_graph": retain_graph, "create_graph": create_graph}
                return _dispatch(Tensor, BACKWARD, (), (tensors,), {**options, "inputs": inputs})
        return run(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)

    return backward


_code = getattr(BACKWARD, "__code__", None)  # of another package's wrapper there may be none
if _code is not None and "handle_torch_function" not in _code.co_names:
    torch.autograd.backward = seen(BACKWARD)

_SWAPS: dict[type, type] = {nn.Parameter: WatchedParameter, Tensor: WatchedTensor}


def is_watched(tensor: Tensor) -> bool:
    """Tell whether a pass watches a tensor."""
    return id(tensor) in _interceptors


def check_supported(parameters: dict[str, Tensor]) -> None:
    """Check that every parameter can be watched.

    Raises:
        UnsupportedParameterError: if a parameter is of a subclass (DTensor, quantised, uninitialised, ...), sparse, or
            was made in inference mode.
    """
    for name, parameter in parameters.items():
        if parameter.is_inference():
            raise UnsupportedParameterError(
                f"{name!r} was made under torch.inference_mode(), where no tensor can take a gradient; make the model "
                "outside of it, and load_state_dict into that one"
            )
        if parameter.layout != torch.strided:
            raise UnsupportedParameterError(
                f"{name!r} is a sparse tensor ({parameter.layout}); per-sample gradients are captured for dense ones "
                "(make it dense, or leave it out of params)"
            )
        if type(parameter) not in _SWAPS and id(parameter) not in _interceptors:
            raise UnsupportedParameterError(
                f"{name!r} is a {type(parameter).__name__}; per-sample gradients can be captured for plain "
                "nn.Parameter and Tensor only (gather or dequantise it, or leave it out of params)"
            )


def watch(parameters: dict[str, Tensor], interceptor: Interceptor, undo: Undo) -> None:
    """Send every call that consumes one of the parameters to ``interceptor``, until ``undo`` is closed.

    Their gradient hooks, among them optimizers that step in the backward pass, sleep meanwhile.

    Raises:
        WplfastError: if another pass watches one of them already.
        UnsupportedParameterError: if the class of one cannot be swapped.
    """
    check_supported(parameters)
    tensors, ids = list(parameters.values()), [id(p) for p in parameters.values()]
    # A claim is one call of C: no lock is needed between threads, which an interrupt could leave locked.
    claimed = compress(ids, map(operator.is_, map(_interceptors.get, ids), repeat(interceptor)))
    undo.by(_interceptors.pop, claimed, repeat(None))
    for name, key in zip(parameters, ids, strict=True):
        if _interceptors.setdefault(key, interceptor) is not interceptor:
            raise WplfastError(f"{name!r} is being watched by another Fisher pass; run one pass at a time")
    found = [hooks for p in tensors for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)]
    awake = [hooks for hooks in found if hooks]
    undo.by(setattr, tensors, repeat("__class__"), [type(p) for p in tensors])
    undo.by(partial.__call__, [partial(hooks.update, dict(hooks)) for hooks in awake])
    for parameter in tensors:
        parameter.__class__ = _SWAPS[type(parameter)]
    for hooks in awake:
        hooks.clear()


def tensors_in(tree: Any) -> Iterable[Tensor]:
    """Yield the tensors of nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Replace the tensors of nested tuples (named ones too), lists and dicts."""
    return map_parts(function, tree, lambda part: isinstance(part, Tensor))


def map_parts(function: Callable[[Any], Any], tree: Any, is_part: Callable[[Any], bool]) -> Any:
    """Replace the parts of nested tuples (named ones too), lists and dicts."""
    if is_part(tree):
        return function(tree)
    if isinstance(tree, tuple):
        items = [map_parts(function, item, is_part) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else _rebuild_tuple(tree, items)
    if isinstance(tree, list):
        return [map_parts(function, item, is_part) for item in tree]
    if isinstance(tree, dict):
        return {key: map_parts(function, item, is_part) for key, item in tree.items()}
    return tree


def _rebuild_tuple(tree: tuple[Any, ...], items: list[Any]) -> Any:
    """Rebuild a tuple; torch.return_types take one sequence, torch.Size holds no tensors."""
    return tuple(items) if type(tree) is tuple else type(tree)(items)
