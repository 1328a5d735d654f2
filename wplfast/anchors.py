"""What consolidation left: theta_hat, F, offset and constant of every parameter, in flat buffers per device and dtype.

K anchors cost what one does, exactly: sum_k F_k (theta - theta_k)^2 = F (theta - theta_bar)^2 + c with F = sum_k F_k and
theta_bar = sum_k F_k theta_k / F. The newest anchor is kept in the parameters' dtype and theta_bar as its float32 offset
from there: theta_bar alone would lose what theta - theta_bar is made of (measured for K = 50: gradient error 1.5e-7 with
the offset, 8.6e-5 with theta_bar in float32, 57% in bfloat16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from .ops.layout import flat_dtype, is_dense, packed_starts, packed_views

#: Address, dtype, device, shape and stride: what a table was built on.
Signature: TypeAlias = tuple[int, torch.dtype, torch.device, torch.Size, tuple[int, ...]]


def signature(parameter: Tensor) -> Signature:
    """Return what must not have changed since a table was built."""
    return (parameter.data_ptr(), parameter.dtype, parameter.device, parameter.shape, parameter.stride())


@dataclass
class Anchor:
    """The state of one parameter; the tensors are views of flat buffers, in the parameter's memory order."""

    theta_hat: Tensor  # the newest anchor, in the parameter's dtype
    fisher: Tensor  # float32 or wider
    offset: Tensor | None = None  # theta_bar - theta_hat, once there are several anchors
    constant: float = 0.0  # c

    def merge(self, theta_hat: Tensor, fisher: Tensor, decay: float) -> Anchor:
        """Return the exact sum of ``decay`` times this penalty and that of a newer anchor."""
        old, new = self.fisher.double() * decay, fisher.double()
        gap = self.theta_hat.double() - theta_hat.double()  # theta_bar - theta_hat of the newer anchor
        if self.offset is not None:
            gap += self.offset.double()
        total = old + new
        share = torch.where(total > 0, old / total, 0.0)
        constant = decay * self.constant + float((share * new * gap.square()).sum())
        offset = (share * gap).to(self.fisher.dtype)
        return Anchor(theta_hat, total.to(self.fisher.dtype), offset, constant)


@dataclass
class Group:
    """Parameters of one device and dtype: the lists that the penalty operators take."""

    indices: list[int]
    theta: list[Tensor]
    theta_hat: list[Tensor]
    offset: list[Tensor]
    fisher: list[Tensor]
    alpha: Tensor
    l2: Tensor
    constant: Tensor | None  # sum of alpha_p c_p needs alpha: c, 0-d or per parameter as alpha is
    signatures: list[Signature]
    sparse: list[int] = field(default_factory=list)  # positions of parameters with gaps in memory


def pack(anchors: Sequence[Anchor], parameters: Sequence[Tensor]) -> list[Anchor]:
    """Lay anchors out in flat buffers, one of each kind per device and dtype, as the parameters are now.

    Args:
        anchors: one per parameter; any device, dtype and memory order, shapes as the parameters.
        parameters: the parameters.
    """
    packed: list[Anchor | None] = [None] * len(anchors)
    for indices in by_kind(parameters).values():
        chosen = [anchors[i] for i in indices]
        like = [dense_like(parameters[i]) for i in indices]
        _, length = packed_starts([p.numel() for p in like])
        dtype, device = like[0].dtype, like[0].device
        wide = flat_dtype(dtype)
        several = any(anchor.offset is not None for anchor in chosen)
        columns: list[list[Tensor]] = []
        for values, kind in (
            ([anchor.theta_hat for anchor in chosen], dtype),
            ([anchor.fisher for anchor in chosen], wide),
            ([anchor.offset for anchor in chosen] if several else None, wide),
        ):
            if values is None:
                columns.append([])
                continue
            views = packed_views(torch.zeros(length, dtype=kind, device=device), like)
            for view, value in zip(views, values, strict=True):
                if value is not None:
                    view.copy_(value)
            columns.append(views)
        for position, i in enumerate(indices):
            offset = columns[2][position] if several else None
            packed[i] = Anchor(columns[0][position], columns[1][position], offset, anchors[i].constant)
    return [anchor for anchor in packed if anchor is not None]


def by_kind(parameters: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Group indices by device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, parameter in enumerate(parameters):
        groups.setdefault((parameter.device, parameter.dtype), []).append(index)
    return groups


def dense_like(parameter: Tensor) -> Tensor:
    """Return the parameter, or a dense copy where it has gaps in memory."""
    parameter = parameter.detach()
    return parameter if is_dense(parameter) else parameter.contiguous()
