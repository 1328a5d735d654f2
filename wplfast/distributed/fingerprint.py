"""Numbers that are the same where all bits of some tensors are: what ranks compare in place of the tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..ops.layout import as_real, by_kind

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Elements that are widened at a time.
CHUNK = 1 << 20


def fingerprints(tensors: Iterable[Tensor]) -> list[int]:
    """Return a number of 64 bits for each tensor, made of the bits and the places of all its entries.

    They are computed where the tensors are, with one synchronisation for each device.
    """
    given = list(tensors)
    found = [0] * len(given)
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        for indices in by_kind(given).values():
            if indices:
                sums = torch.stack([_sum(given[index]) for index in indices])
                for index, value in zip(indices, sums.tolist(), strict=True):
                    found[index] = value
    return found


def _sum(tensor: Tensor) -> Tensor:
    """Return the sum of all entries' bits, each times an odd number that belongs to its place, modulo 2^64."""
    flat = as_real(tensor.detach()).contiguous().reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    odd = torch.arange(1, 2 * min(CHUNK, bits.numel()), 2, device=bits.device)
    for part in bits.split(CHUNK):
        total = total * 31 + (part.long() * odd[: len(part)]).sum()
    return total
