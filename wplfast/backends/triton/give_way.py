"""Plain PyTorch in the place of kernels that cannot be compiled or started, with one warning that names them.

Not inside a CUDA graph's capture, where a graph would replay the slow way for good, and not where ``WPLFAST_REQUIRE``
names ``triton``: there it is an error.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .kernel import COUNT, KernelError
from .launch import INTERPRETED

#: (operator, dtype, device) that plain PyTorch serves -> the kernel and what is wrong with it.
_GAVE_WAY: dict[tuple[str, torch.dtype, torch.device], tuple[str, str]] = {}
#: Calls like these have launched all of their kernels before.
_STARTED: set[tuple[object, ...]] = set()
_MOST_KINDS = 1 << 14
#: What operators call their inputs; the first of them has the dtype that kernels are compiled for.
_INPUTS = {"activations", "grads", "grad_outputs", "inputs", "tensor", "theta"}


def gave_way() -> dict[str, str]:
    """Return the kernels that plain PyTorch stands in for in this process, with the reasons."""
    return {
        f"{kernel} (in {name}, {dtype}, {device})": reason
        for (name, dtype, device), (kernel, reason) in _GAVE_WAY.items()
    }


def gives_way(operator: Callable[..., Any], *added_to: str) -> Callable[..., Any]:
    """Return an operator whose kernels give way to plain PyTorch.

    Args:
        operator: one of the contract's; its arguments are given by position.
        added_to: the arguments that it adds to by more than one launch. They are copied before the first call of a
            kind, the only one whose kernels are compiled, to start again from if a launch after the first fails.
    """
    if INTERPRETED:  # nothing is compiled
        return operator
    name = operator.__name__
    in_torch: Callable[..., Any] = getattr(reference, name)
    parameters = list(inspect.signature(operator).parameters)
    places = [parameters.index(argument) for argument in added_to]
    inputs = min(map(parameters.index, _INPUTS.intersection(parameters)))

    def place(arguments: tuple[Any, ...]) -> tuple[str, torch.dtype, torch.device]:
        """Return the operator, and the dtype and device of its inputs."""
        given = arguments[inputs]
        tensor = given if isinstance(given, Tensor) else given[0]
        return name, tensor.dtype, tensor.device

    def give_way(error: KernelError, arguments: tuple[Any, ...], written: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Start again from the copies, in plain PyTorch."""
        if "triton" in os.environ.get("WPLFAST_REQUIRE", "").split(","):
            raise error
        if _capturing():
            raise RuntimeError(
                f"{error}. This is inside the capture of a CUDA graph, where plain PyTorch must not stand in for it: "
                "call what is captured once before, outside of it"
            ) from error
        for tensor, copy in written:
            tensor.copy_(copy)
        _, dtype, device = place(arguments)
        _GAVE_WAY[name, dtype, device] = error.kernel, error.reason  # not the error, whose traceback holds tensors
        warnings.warn(
            f"{error}. Plain PyTorch computes {name} for {dtype} on {device} from here on: as exact, but slower. "
            "`wplfast info` says what is installed, `wplfast selftest` what works",
            RuntimeWarning,
            stacklevel=4,
        )
        return in_torch(*arguments)

    @functools.wraps(operator)
    def guarded(*arguments: Any) -> Any:
        if _GAVE_WAY and place(arguments) in _GAVE_WAY:
            return in_torch(*arguments)
        if not places:
            try:
                return operator(*arguments)
            except KernelError as error:
                return give_way(error, arguments, ())
        kind = (name, *map(_kind, arguments))
        known = kind in _STARTED or _capturing()  # a graph would replay the copies
        copies = None if known else _copies([arguments[i] for i in places])
        launches = COUNT[0]
        try:
            operator(*arguments)
        except KernelError as error:
            if copies is None and COUNT[0] != launches:  # something may have been added
                raise
            return give_way(error, arguments, copies or ())
        if copies is not None:
            if len(_STARTED) >= _MOST_KINDS:
                _STARTED.clear()
            _STARTED.add(kind)
        return None

    return guarded


def _capturing() -> bool:
    """Tell whether a CUDA graph is being captured."""
    try:
        return bool(torch.cuda.is_current_stream_capturing())
    except RuntimeError:  # torch without CUDA
        return False


def _copies(tensors: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    """Return tensors with copies of them."""
    return [(tensor, tensor.clone()) for tensor in tensors if tensor is not None]


def _kind(argument: Any) -> object:
    """Return all of an argument that a kernel is compiled for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.get_device(), argument.shape, argument.stride(), argument.data_ptr() % 16
    return tuple(argument) if isinstance(argument, list) else argument
