"""What consolidation left: theta_hat, F, offset and constant of every parameter, in flat buffers per device and dtype.

K anchors cost what one does, exactly: sum_k F_k (theta - theta_k)^2 = F (theta - theta_bar)^2 + c with F = sum_k F_k
and theta_bar = sum_k F_k theta_k / F. The newest anchor is kept in the parameters' dtype and theta_bar as its float32
offset from there: theta_bar alone would lose what theta - theta_bar is made of (measured for K = 50: gradient error
1.5e-7 with the offset, 8.6e-5 with theta_bar in float32, 57% in bfloat16).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops.layout import flat_dtype, is_dense, packed_starts, packed_views


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


def nothing(parameter: Tensor) -> Anchor:
    """Return an anchor that does not hold: F = 0 at the current value."""
    return Anchor(parameter.detach(), torch.zeros_like(parameter, dtype=flat_dtype(parameter.dtype)))


#: Version of the keys that ``to_state`` writes.
STATE_VERSION = 1


def to_state(names: Sequence[str], anchors: Sequence[Anchor], n_anchors: int) -> dict[str, Tensor]:
    """Return anchors as named tensors: what a state_dict or a file holds."""
    state = {"version": torch.tensor(STATE_VERSION), "n_anchors": torch.tensor(n_anchors)}
    for name, anchor in zip(names, anchors, strict=False):
        state[f"fisher.{name}"] = anchor.fisher
        state[f"theta_hat.{name}"] = anchor.theta_hat
        if anchor.offset is not None:
            state[f"offset.{name}"] = anchor.offset
    if anchors:
        state["constant"] = torch.tensor([anchor.constant for anchor in anchors], dtype=torch.float64)
    return state


@dataclass
class Restored:
    """What a state held: anchors (None if there were none), or what is wrong with it."""

    anchors: list[Anchor] | None
    n_anchors: int
    missing: list[str]
    unexpected: list[str]
    errors: list[str]

    @property
    def whole(self) -> bool:
        """Tell whether it can be taken over."""
        return not (self.missing or self.unexpected or self.errors)


def from_state(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Restored:
    """Read what ``to_state`` wrote, strictly by name and shape.

    Args:
        state: the named tensors.
        shapes: the parameters' shapes by name.
    """
    wanted = {"version", "n_anchors"}
    if "constant" in state or int(state.get("n_anchors", torch.tensor(0))):
        wanted |= {f"{kind}.{name}" for kind in ("fisher", "theta_hat") for name in shapes} | {"constant"}
    missing = sorted(wanted - state.keys())
    unexpected = sorted(state.keys() - wanted - {f"offset.{name}" for name in shapes})
    errors = []
    if "version" in state and int(state["version"]) != STATE_VERSION:
        errors.append(f"the penalty's state must be of version {STATE_VERSION}, got {int(state['version'])}")
    for name, shape in shapes.items():
        for kind in ("fisher", "theta_hat", "offset"):
            tensor = state.get(f"{kind}.{name}")
            if tensor is not None and tensor.shape != shape:
                errors.append(
                    f"{kind}[{name!r}] must have shape {list(shape)} as its parameter, got {list(tensor.shape)}"
                )
    restored = Restored(None, int(state.get("n_anchors", torch.tensor(0))), missing, unexpected, errors)
    if restored.whole and "constant" in state:
        restored.anchors = [
            Anchor(state[f"theta_hat.{n}"], state[f"fisher.{n}"], state.get(f"offset.{n}"), float(c))
            for n, c in zip(shapes, state["constant"], strict=True)
        ]
    return restored
