"""One torch call that consumes parameters and data: what it was, so that it can be run again on other tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .watched import map_tensors


@dataclass(eq=False)
class Operand:
    """Where a per-sample gradient goes: a watched parameter, or a tensor derived from some."""

    leaf: Tensor  # requires grad; ordinary gradients accumulate in its .grad
    value: Tensor  # the same memory without grad
    parameters: tuple[int, ...]  # indices of the watched parameters it depends on
    graph: Tensor | None = None  # for derived tensors: the value with its parameter-only graph
    leaves: tuple[Tensor, ...] = ()  # for derived tensors: the parameters' leaves in that graph
    region: tuple[int, torch.Size, tuple[int, ...], int] | None = None  # a pure view: parameter, size, stride, offset
    base: Operand | None = None  # what it was expanded from
    made_by: Call | None = None  # the call on parameters alone that it is the result of
    copy: Tensor | None = None  # of a cast or a copy: the value with its parameter-only graph

    @property
    def is_parameter(self) -> bool:
        """Whether this is a watched parameter itself, in its own memory."""
        return self.graph is None and self.copy is None

    @property
    def through(self) -> Tensor:
        """The value in a graph that leads to the parameters' leaves."""
        found = self.graph if self.copy is None else self.copy
        return self.leaf if found is None else found

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Identify the operand across batches, whatever part of a parameter it is."""
        return (self.parameters, self.graph is not None, self.value.dim())


@dataclass(frozen=True)
class Slot:
    """Stands in a call's arguments for the index-th tensor of a kind: 'operand', 'input' or 'constant'."""

    kind: str
    index: int


@dataclass(eq=False)
class Call:
    """A call with its tensors taken out: operands, inputs (saved by autograd) and constants (the model's own)."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: list[Operand]
    constants: list[Tensor]
    input_shapes: list[torch.Size]
    data_shapes: list[torch.Size]  # of the inputs that are not differentiable
    differentiable_inputs: bool
    input_kinds: list[tuple[torch.Size, torch.dtype, bool]]  # shape, dtype, whether it counts up by ones
    in_place: bool
    has_plain_inputs: bool  # none is sparse
    random_state: Tensor | None  # of the device's generator before the call, if the call drew from it
    autocast: tuple[str, torch.dtype] | None
    is_complex: bool = False  # some tensor is
    is_stackable: bool | None = None  # steps of a loop that make it are one call on all of them; None: not asked yet

    @cached_property
    def leaves(self) -> list[Tensor]:
        """The operands' leaves."""
        return [operand.leaf for operand in self.operands]

    @cached_property
    def step_key(self) -> tuple[Any, ...]:
        """What the steps of one loop have in common: the function and the operands."""
        return (self.func, *map(id, self.leaves))

    @cached_property
    def no_gradients(self) -> tuple[None, ...]:
        """One None for each operand."""
        return (None,) * len(self.operands)

    @cached_property
    def parameters(self) -> frozenset[int]:
        """The indices of the watched parameters that the call uses."""
        return frozenset(index for operand in self.operands for index in operand.parameters)

    @cached_property
    def pair(self) -> tuple[Operand, int, int] | None:
        """The operand of a call on one operand and one data tensor, its position (0 or 1) and the data's index."""
        if len(self.args) != 2 or not all(isinstance(slot, Slot) for slot in self.args):
            return None
        kinds = [slot.kind for slot in self.args]
        if sorted(kinds) != ["input", "operand"]:
            return None
        position = kinds.index("operand")
        return self.operands[self.args[position].index], position, self.args[1 - position].index

    @property
    def is_of_ranges(self) -> bool:
        """Whether all data are ranges of several numbers."""
        if self.differentiable_inputs or self.in_place or not self.input_kinds:
            return False
        return all(is_range and shape.numel() > 1 for shape, _, is_range in self.input_kinds)

    def argument(self, position: int, name: str) -> Any:
        """Return an argument by position or keyword; tensors are Slots."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def operand_at(self, position: int, name: str) -> Operand | None:
        """Return the operand that stands at an argument, if one does."""
        slot = self.argument(position, name)
        return self.operands[slot.index] if isinstance(slot, Slot) and slot.kind == "operand" else None

    def tensor_at(self, position: int, name: str, inputs: Sequence[Tensor]) -> Tensor | None:
        """Return the tensor that stands at an argument, whatever its kind; None if none does."""
        slot = self.argument(position, name)
        if not isinstance(slot, Slot):
            return None
        if slot.kind == "operand":
            return self.operands[slot.index].value
        return (inputs if slot.kind == "input" else self.constants)[slot.index]

    def is_input(self, position: int, name: str) -> bool:
        """Tell whether data stand at an argument."""
        slot = self.argument(position, name)
        return isinstance(slot, Slot) and slot.kind == "input"

    def result(self, operands: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
        """Run the call on these tensors and return its result as it is."""
        tensors = {"operand": operands, "input": inputs, "constant": self.constants}
        return self.func(*_fill(self.args, tensors), **_fill(self.kwargs, tensors))

    def run(self, operands: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run the call again, out of place and as autocast ran it; return its floating point outputs."""
        tensors = {"operand": operands, "input": inputs, "constant": self.constants}
        args = _fill(self.args, tensors)
        if self.in_place:
            args = (args[0].clone(), *args[1:])
        with self.casting(), self._drawing_again():
            result = self.func(*args, **_fill(self.kwargs, tensors))
        return floating(args[0] if result is None else result)

    def without(self, left_out: Mapping[int, str]) -> Call:
        """Return the call with None at some arguments, given as position -> name."""
        args = tuple(None if position in left_out else value for position, value in enumerate(self.args))
        kwargs = {name: value for name, value in self.kwargs.items() if name not in left_out.values()}
        kwargs |= {name: None for name in left_out.values() if name in self.kwargs}
        return replace(self, args=args, kwargs=kwargs)

    @contextmanager
    def _drawing_again(self) -> Iterator[None]:
        """Let the call draw the random numbers that it drew the first time."""
        if self.random_state is None:
            yield
            return
        device = self.operands[0].value.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            set_random_state(device, self.random_state)
            yield

    def casting(self) -> AbstractContextManager[Any]:
        """Restore the autocast state that the call ran under."""
        if self.autocast is None:
            return nullcontext()
        device, dtype = self.autocast
        return torch.autocast(device, dtype=dtype, cache_enabled=False)


def random_state(device: torch.device) -> Tensor:
    """Return the state of a device's default generator; on the host, so without a synchronisation."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set the state of a device's default generator."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _fill(tree: Any, tensors: dict[str, Sequence[Tensor]]) -> Any:
    """Put tensors back where slots stand."""
    if isinstance(tree, Slot):
        return tensors[tree.kind][tree.index]
    if type(tree) in (tuple, list):
        return type(tree)(_fill(item, tensors) for item in tree)
    if isinstance(tree, dict):
        return {key: _fill(item, tensors) for key, item in tree.items()}
    return tree


def is_differentiable(tensor: Tensor) -> bool:
    """Tell whether a tensor is of a type that has gradients."""
    return tensor.is_floating_point() or tensor.is_complex()


def region_of(
    graph: Tensor, leaves: tuple[Tensor, ...], parameters: tuple[int, ...]
) -> tuple[int, torch.Size, tuple[int, ...], int] | None:
    """Return which part of a parameter's accumulator a derived tensor is: parameter, size, stride, offset.

    None if it is no view of one parameter, or if it is complex: complex parameters have real accumulators, [*shape, 2].
    """
    leaf = leaves[0]
    if len(leaves) > 1 or graph._base is not leaf or not leaf.is_contiguous() or graph.dtype != leaf.dtype.to_real():
        return None
    first = leaf.storage_offset() * (2 if leaf.is_complex() else 1)
    return parameters[0], graph.size(), graph.stride(), int(graph.storage_offset()) - int(first)


def floating(tree: Any) -> list[Tensor]:
    """List the tensors of a call's result that have gradients: floating point and complex ones."""
    found: list[Tensor] = []

    def visit(tensor: Tensor) -> Tensor:
        if is_differentiable(tensor):
            found.append(tensor)
        return tensor

    map_tensors(visit, tree)
    return found


def kind_of(tensor: Tensor) -> tuple[torch.Size, torch.dtype, bool]:
    """Describe a data tensor: shape, dtype, and whether it is one range that counts up by ones, as positions do."""
    is_range = False
    if (
        tensor.layout == torch.strided
        and not tensor.is_complex()
        and 0 < tensor.numel() == max(tensor.shape, default=1)
    ):
        flat = tensor.reshape(-1)
        is_range = bool((flat.diff() == 1).all())
        if is_range and tensor.is_floating_point():
            is_range = len(flat) > 1 and bool(flat[0] == flat[0].round())
    return tensor.shape, tensor.dtype, is_range


def autocast_state(device_type: str) -> tuple[str, torch.dtype] | None:
    """Return the device type and dtype of the autocast region the caller is in."""
    if not torch.is_autocast_enabled(device_type):
        return None
    return device_type, torch.get_autocast_dtype(device_type)


def is_in_place(name: str, args: tuple[Any, ...]) -> bool:
    """Tell whether a torch function writes to its first argument."""
    if name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"):
        return True
    return name.endswith("_") and not name.endswith("__") and bool(args) and isinstance(args[0], Tensor)


def in_order(gradient: Tensor | None) -> Tensor | None:
    """Return a gradient of ``batch_norm`` as PyTorch takes it rightly: of one sample, it errs at some strides."""
    return gradient if gradient is None or gradient.shape[0] != 1 else gradient.contiguous()
