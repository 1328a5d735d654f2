"""Where samples lie in a batch: hypotheses about which tensors and lists have them, and along which dimension."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..capture.watched import map_parts

#: For each part of a batch, the dimension along which its samples lie; None for a part that all samples share.
Cut: TypeAlias = tuple[int | None, ...]

#: Most parts that are spared one at a time, and most whose first two dimensions both are tried.
_MAX_SPARED, _MAX_EITHER = 8, 4


class Parts:
    """The tensors and lists of a batch that samples may lie along.

    Args:
        inputs: of the model. A tuple or list at the top holds the arguments, and is no list of samples.
        targets: of the loss.
        n_samples: size of the batch.
    """

    def __init__(self, inputs: Any, targets: Any, n_samples: int) -> None:
        self._inputs, self._targets, self.n_samples = inputs, targets, n_samples
        self._found: list[Any] = []
        self.take((), [])
        self._n_inputs = self._found.index(None)

    def cuts(self, ours: Collection[int] = ()) -> Iterator[Cut]:
        """Yield ways to cut the batch, the likeliest first; each cuts an input and a target, if any can be.

        All parts are cut that have the batch's size, then all but one: a mask [T, T] or positions [T] may have that
        size too. Labels are nobody's but a sample's.

        Args:
            ours: parts that are known to be the samples' own.
        """
        seen: set[Cut] = set()
        either = [i for i, part in enumerate(self._found) if self._dim(part, 0, True) != self._dim(part, 1, True)]
        firsts = itertools.product((0, 1), repeat=min(len(either), _MAX_EITHER))
        for of_lists, dims in itertools.product((True, False), firsts):
            first = dict(zip(either, dims, strict=False))
            whole = tuple(self._dim(part, first.get(i, 0), of_lists) for i, part in enumerate(self._found))
            cut = [i for i, dim in enumerate(whole) if dim is not None]
            spared = [i for i in cut[:_MAX_SPARED] if i not in ours] if len(cut) > 1 else []
            for candidate in (whole, *(self.sparing(whole, {i}) for i in spared)):
                if candidate not in seen and self.is_possible(candidate):
                    seen.add(candidate)
                    yield candidate

    def is_possible(self, cut: Cut) -> bool:
        """Tell whether a cut leaves neither everything nor all inputs or targets whole, though one could be cut."""
        n_inputs = self._n_inputs

        def is_cut(first: int, last: int) -> bool:
            can_be = any(self._dim(part, 0, True) is not None for part in self._found[first:last])
            return not can_be or any(dim is not None for dim in cut[first:last])

        everything = len(self._found)
        return is_cut(0, n_inputs) and is_cut(n_inputs, everything) and any(dim is not None for dim in cut)

    def has_size(self, position: int, dim: int) -> bool:
        """Tell whether a part has the batch's size along a dimension."""
        part = self._found[position] if position < len(self._found) else None
        if isinstance(part, Tensor):
            return dim < part.dim() and part.shape[dim] == self.n_samples
        return part is not None and dim == 0

    def are_inputs_cut(self, cut: Cut) -> bool:
        """Tell whether a cut goes through an input."""
        return any(dim is not None for dim in cut[: self._n_inputs])

    def faintest(self, cut: Cut) -> list[int]:
        """Return two samples before the last, those with the least sums of absolute values.

        Statistics of the batch are mostly set by others: the brightest image, the longest sentence.
        """
        inputs = [(part, dim) for part, dim in zip(self._found[: self._n_inputs], cut, strict=False) if dim is not None]
        tensors = [pair for pair in inputs if isinstance(pair[0], Tensor) and _has_numbers(pair[0])]
        if not tensors:
            return list(range(min(2, self.n_samples - 1)))
        part, dim = next((pair for pair in tensors if pair[0].is_floating_point()), tensors[0])
        values = part.detach().movedim(dim, 0).reshape(self.n_samples, -1)[:-1]
        sizes = values.abs() if values.is_complex() else values.float().abs()
        return sorted(sizes.sum(1).argsort()[:2].tolist())

    def numbers_of_samples(self) -> set[int]:
        """Return the targets that number the samples of their batch: 0, 1, ..., N - 1."""
        targets = enumerate(self._found[self._n_inputs + 1 :], self._n_inputs + 1)
        lists = {i: part for i, part in targets if isinstance(part, Tensor) and part.shape == (self.n_samples,)}
        return {i for i, part in lists.items() if part.tolist() == [*range(self.n_samples)]}

    def are_plain(self, cut: Cut) -> bool:
        """Tell whether a cut goes through every part, along the same dimension of each."""
        parts = [(part, dim) for part, dim in zip(self._found, cut, strict=True) if part is not None]
        return len({dim for part, dim in parts if not isinstance(part, Tensor) or part.dim()}) == 1 and bool(parts)

    @staticmethod
    def sparing(cut: Cut, parts: set[int]) -> Cut:
        """Return a cut that leaves some parts whole."""
        return tuple(None if i in parts else dim for i, dim in enumerate(cut))

    def take(self, cut: Cut, samples: Sequence[int]) -> tuple[Any, Any]:
        """Return inputs and targets of some samples; parts that are not cut are whole."""
        found: list[Any] = []

        def part(value: Any) -> Any:
            position = len(found)
            found.append(value)
            dim = cut[position] if position < len(cut) else None
            if dim is None:
                return value
            if isinstance(value, Tensor):
                return value.index_select(dim, torch.tensor(samples, device=value.device))
            return type(value)(value[sample] for sample in samples)

        top = type(self._inputs) in (tuple, list)
        inputs = [self._map(part, i) for i in self._inputs] if top else self._map(part, self._inputs)
        found.append(None)  # between inputs and targets
        targets = self._map(part, self._targets)
        self._found = self._found or found
        return (type(self._inputs)(inputs) if top else inputs), targets

    def _map(self, function: Callable[[Any], Any], tree: Any) -> Any:
        """Replace tensors and lists of the batch's length."""
        return map_parts(function, tree, lambda part: isinstance(part, Tensor) or self._is_list(part))

    def _is_list(self, part: Any) -> bool:
        """Tell whether something may be a list of samples: a tuple of tensors rather is a structure."""
        if type(part) not in (list, tuple) or len(part) != self.n_samples:
            return False
        return type(part) is list or not any(isinstance(item, Tensor) for item in part)

    def _dim(self, part: Any, first: int, of_lists: bool) -> int | None:
        """Return the dimension of a part that has the batch's size, looking at one of 0 and 1 before the other."""
        if not isinstance(part, Tensor):
            return 0 if of_lists and part is not None else None
        if part.is_nested or part.layout not in (torch.strided, torch.sparse_coo):
            return None
        dims = (d for d in (first, 1 - first) if d < part.dim() and part.shape[d] == self.n_samples)
        return next(dims, None)


def _has_numbers(part: Tensor) -> bool:
    """Tell whether a tensor is an array of numbers, which can be summed."""
    return part.layout == torch.strided and not part.is_quantized
