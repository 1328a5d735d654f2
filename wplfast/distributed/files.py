"""Files of tensors that are shards: gathered one after the other, written by one rank as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import WplfastError
from .agreement import gathered
from .shards import group_of


def writing(tensors: Iterable[Tensor], write: Callable[[Callable[[Tensor], Tensor]], None]) -> None:
    """Write a file on rank 0; all ranks call it, and return once the file is there.

    No rank holds more than one gathered tensor at a time.

    Args:
        tensors: in the order in which they are written.
        write: writes the file; it is given what makes a tensor whole, and calls that once for each, in order.

    Raises:
        OSError: on rank 0, if the file cannot be written.
        WplfastError: on all others then.
    """
    tensors = list(tensors)
    queue, group = iter(tensors), group_of(tensors)
    error: BaseException | None = None

    def whole(tensor: Tensor) -> Tensor:
        following = next(queue)
        assert following is tensor
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    if dist.get_rank(group) == 0:
        try:
            write(whole)
        except BaseException as failure:
            error = failure
    for tensor in queue:  # on the other ranks all of them, on rank 0 what an error left
        if isinstance(tensor, DTensor):
            tensor.full_tensor()
    said = gathered("" if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    if said[0]:
        raise WplfastError(f"rank 0 could not write the file: {said[0]}")
