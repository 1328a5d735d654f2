"""What the tensors among a call's arguments are: watched parameters, derived from them, constants, or data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import Operand, Slot, region_of
from ..watched import Derived, Interceptor
from .functions import LOOKUPS


class Operands:
    """The watched parameters as operands, and the model's other tensors as constants."""

    def __init__(self, parameters: list[Tensor], constants: list[Tensor], interceptor: Interceptor) -> None:
        """Take the watched parameters, and the model's other parameters and its buffers."""
        self._parameters = parameters
        self._index = {id(p): i for i, p in enumerate(parameters)}
        self.leaves = [p.detach().requires_grad_() for p in parameters]
        self._watched = [Operand(leaf, leaf.detach(), (i,)) for i, leaf in enumerate(self.leaves)]
        # Kept, so that data cannot take the place of a buffer that the model replaces. Not known by their addresses: a
        # sharded model frees its parameters' memory and fills it again, elsewhere.
        kept = [storage for t in (*constants, *self.leaves) if t.numel() and (storage := _memory(t)) is not None]
        self._constants = {storage._cdata: storage for storage in kept}
        self._buffers: dict[torch.Size, list[Tensor]] = {}  # small ones, by shape
        for tensor in constants:
            if type(tensor) is Tensor and _is_small(tensor):
                self._buffers.setdefault(tensor.shape, []).append(tensor)
        self._computed: dict[int, tuple[Tensor, int]] = {}  # of this forward pass, and their versions
        self._interceptor = interceptor

    def of(self, tensor: Tensor) -> Operand | None:
        """Return the operand that a tensor is, if it is one."""
        if type(tensor) is Tensor:
            return None
        if isinstance(tensor, Derived):
            return self._derived(tensor) if tensor._pass is self._interceptor else None
        index = self._index.get(id(tensor))
        return None if index is None else self.watched(index)

    def index_of(self, value: Any) -> tuple[int, ...]:
        """Return the index of a watched parameter, if a value is one."""
        index = self._index.get(id(value))
        return () if index is None else (index,)

    def watched(self, index: int) -> Operand:
        """Return a watched parameter's operand, where the parameter is now."""
        leaf, tensor = self.leaves[index], self._parameters[index]
        if leaf.data_ptr() != tensor.data_ptr() or leaf.stride() != tensor.stride():  # `p.data = ...` during the pass
            leaf.data = tensor.detach()
            self._watched[index] = Operand(leaf, leaf.detach(), (index,))
        return self._watched[index]

    def _derived(self, tensor: Derived) -> Operand:
        """Describe a derived tensor: the parameters below it, and the region if it is a pure view of one."""
        graph, origin = tensor._graph, tensor._origin
        value = graph.detach()
        alike = origin is not None and graph.is_complex() == origin.value.is_complex()
        if alike and graph.shape == origin.value.shape:  # cast or copied: the gradient is its origin's
            below = (origin.parameters, origin.graph, origin.leaves, origin.region, origin.base)
            return Operand(tensor, value, *below, copy=graph)
        indices = tensor._parameters
        leaves = tuple(self.leaves[i] for i in indices)
        region = region_of(graph, leaves, indices) if not graph._backward_hooks else None
        return Operand(tensor, value, indices, graph, leaves, region, origin if alike else None, tensor._made_by)

    def is_constant(self, tensor: Tensor) -> bool:
        """Tell whether a tensor cannot carry samples: a scalar, a parameter that is not watched, a buffer."""
        if tensor.requires_grad and not tensor.is_leaf:
            return False
        if tensor.dim() == 0:
            return True
        storage = _memory(tensor)
        if storage is None or storage._cdata not in self._constants:
            return False
        computed = self._computed.get(storage._cdata)
        return computed is None or computed[0]._version == computed[1]

    def is_copy(self, tensor: Tensor) -> bool:
        """Tell whether a tensor has the values of a small buffer, as what spectral norm makes of its vectors has.

        Chance does no harm: what counts as a constant and is none costs time.
        """
        if tensor.requires_grad or not _is_small(tensor):
            return False
        return any(
            other.dtype == tensor.dtype and other.device == tensor.device and torch.equal(other, tensor)
            for other in self._buffers.get(tensor.shape, ())
        )

    def add_computed(self, tensor: Tensor) -> None:
        """Take for a constant what was computed from parameters alone and takes no gradient, until it is written to.

        Such are masks, thresholds, and what a straight-through estimator adds. It is kept for this forward pass, so
        that data cannot take its place.
        """
        storage = _memory(tensor)
        if storage is not None and storage._cdata not in self._constants:
            self._constants[storage._cdata] = storage
            self._computed[storage._cdata] = tensor, tensor._version

    def forget_computed(self) -> None:
        """Let go of the constants that a forward pass computed."""
        for key in self._computed:
            del self._constants[key]
        self._computed.clear()


class Sorter:
    """Takes the tensors out of one call's arguments, each once, and says what they are.

    Attributes:
        operands: watched parameters and what was derived from them.
        inputs: tensors that may carry samples.
        constants: the model's other tensors.
    """

    def __init__(self, known: Operands, name: str) -> None:
        """Sort for a call of a function of this name."""
        self._known, self._name = known, name
        self._slots: dict[int, Slot] = {}
        self.operands: list[Operand] = []
        self.inputs: list[Tensor] = []
        self.constants: list[Tensor] = []

    def slot(self, tensor: Tensor) -> Slot:
        """Return what stands for a tensor in the arguments."""
        slot = self._slots.get(id(tensor))
        if slot is None:
            slot = self._slots[id(tensor)] = self._sort(tensor)
        return slot

    def _sort(self, tensor: Tensor) -> Slot:
        """Put a tensor where it belongs."""
        operand = self._known.of(tensor)
        if operand is not None:
            return _add("operand", self.operands, operand)
        may_be_samples = self._name in LOOKUPS and tensor.dim() > 1 and len(tensor) > 1
        if not may_be_samples and (self._known.is_constant(tensor) or self._known.is_copy(tensor)):
            return _add("constant", self.constants, tensor)
        return _add("input", self.inputs, tensor)


def _is_small(tensor: Tensor) -> bool:
    """Tell whether a tensor is one of a few thousand floating point numbers, which are soon compared."""
    return tensor.layout == torch.strided and tensor.is_floating_point() and 1 < tensor.numel() <= 1 << 14


def _memory(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the memory of a tensor, of a sparse one that of its values; None if it has none of its own."""
    if tensor.layout == torch.strided:
        return tensor.untyped_storage()
    if tensor.layout == torch.sparse_coo:
        return tensor._values().untyped_storage()
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return tensor.values().untyped_storage()
    return None


def _add(kind: str, tensors: list[Any], tensor: Any) -> Slot:
    """Append to one of the lists; return the slot."""
    tensors.append(tensor)
    return Slot(kind, len(tensors) - 1)
