"""What consolidation left: theta_hat, F, offset and constant of every parameter, in flat buffers per device and dtype.

K anchors cost what one does, exactly: sum_k F_k (theta - theta_k)^2 = F (theta - theta_bar)^2 + c with F = sum_k F_k
and theta_bar = sum_k F_k theta_k / F. The newest anchor is kept in the parameters' dtype and theta_bar as its float32
offset from there: theta_bar alone would lose what theta - theta_bar is made of (measured for K = 50: gradient error
1.5e-7 with the offset, 8.6e-5 with theta_bar in float32, 57% in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..ops.layout import flat_dtype, in_order_of, is_dense, packed_starts, packed_views, same_order

_CHUNK = 1 << 20  # elements that a merge widens to float64 at a time


class Anchors:
    """The anchors of some parameters; a new one holds nothing: F = 0 at the current values.

    All tensors are views of flat buffers, in the memory order of their parameters.

    Args:
        parameters: they give shapes, devices, dtypes and memory orders.
        fisher_dtype: bfloat16, or None for float32; F of float64 parameters is in float64 in any case.
    """

    def __init__(self, parameters: Sequence[Tensor], fisher_dtype: torch.dtype | None = None) -> None:
        self._fisher_dtype = fisher_dtype
        dense = [dense_like(p) for p in parameters]
        self.theta_hat = _buffers(dense, lambda dtype: dtype)
        self.fisher = _buffers(dense, self._kept_as)
        self.offset: list[Tensor] | None = None  # theta_bar - theta_hat, once there are several anchors
        self.constant = torch.zeros(len(dense), dtype=torch.float64, device="cpu")  # c
        self.bound = self.constant.clone()  # no entry of a parameter's F is larger
        torch._foreach_copy_(self.theta_hat, dense)
        self._firsts = [indices[0] for indices in by_kind(dense).values()]  # one view of each buffer

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Tell whether the parameters still have the devices, dtypes and memory orders that they had."""
        return all(
            hat.dtype == p.dtype
            and hat.device == p.device
            and hat.shape == p.shape
            and (same_order(hat, p) if is_dense(p) else hat.is_contiguous())
            for hat, p in zip(self.theta_hat, parameters, strict=True)
        )

    def moved(self, parameters: Sequence[Tensor], sources: Sequence[int] | None = None) -> Anchors:
        """Return these anchors laid out beside other parameters.

        Args:
            parameters: they may be on other devices, of other dtypes, and larger in any dimension: what is beyond the
                old shape is free (F = 0).
            sources: for each, which of the old anchors it takes; default: the same position's.
        """
        sources = range(len(parameters)) if sources is None else sources
        new = Anchors(parameters, self._fisher_dtype)
        for i, source in enumerate(sources):
            corner = tuple(slice(0, size) for size in self.fisher[source].shape)
            new.theta_hat[i][corner] = self.theta_hat[source].to(new.theta_hat[i])
            new.fisher[i][corner] = self.fisher[source].to(new.fisher[i])
            if self.offset is not None:
                new.with_offset()[i][corner] = self.offset[source].to(new.fisher[i].device)
        new.constant, new.bound = self.constant[list(sources)], self.bound[list(sources)]
        return new

    def apart(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors, those that lie in these buffers as copies."""
        own = {t[i].untyped_storage().data_ptr() for t in (self.theta_hat, self.fisher) for i in self._firsts}
        return [t.clone() if t.untyped_storage().data_ptr() in own else t for t in tensors]

    def columns(self, indices: Sequence[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return theta_hat, offset (empty where there is none) and F of some parameters."""
        offset = [] if self.offset is None else [self.offset[i] for i in indices]
        return [self.theta_hat[i] for i in indices], offset, [self.fisher[i] for i in indices]

    def constants(self, indices: Sequence[int], summed: bool, device: torch.device) -> Tensor | None:
        """Return c of some parameters, or their sum, float64 on a device; None where all are zero."""
        chosen = self.constant[list(indices)]
        if not bool(chosen.any()):
            return None
        return (chosen.sum() if summed else chosen).to(device)

    def with_offset(self) -> list[Tensor]:
        """Return the offsets, made now if there were none."""
        if self.offset is None:
            self.offset = _buffers(self.theta_hat, flat_dtype)
        return self.offset

    def merge_(
        self,
        indices: Sequence[int],
        theta_hat: Sequence[Tensor],
        fisher: Sequence[Tensor],
        weight: float,
        decay: float,
    ) -> bool:
        """Make the penalty the exact sum of ``decay`` times what it is and ``weight`` times a newer one.

        Args:
            indices: of the parameters that the newer one anchors; the others keep what they have.
            theta_hat: its anchors, on the parameters' devices.
            fisher: its Fishers, likewise.
            weight: factor on the newer one.
            decay: factor on what was there.

        Returns:
            Whether buffers were exchanged, so that groups of them are out of date.
        """
        exchanged, offsets = self.offset is None, self.with_offset()
        chosen, added = list(indices), []
        for i, new_hat, new_fisher in zip(indices, theta_hat, fisher, strict=True):
            tensors = self.theta_hat[i], self.fisher[i], offsets[i]
            given = [in_order_of(t, self.theta_hat[i]) for t in (new_hat, new_fisher)]
            parts = zip(*(_run(t).split(_CHUNK) for t in (*tensors, *given)), strict=True)
            terms = [_merge_run(a, b, c, d, e, weight, decay) for a, b, c, d, e in parts]
            added.append(torch.stack(terms).sum())
        self.constant[chosen] = decay * self.constant[chosen] + torch.stack([term.cpu() for term in added])
        return exchanged

    def replace_(
        self,
        indices: Sequence[int],
        theta_hat: Sequence[Tensor],
        fisher: Sequence[Tensor],
        weight: float,
        decay: float,
    ) -> bool:
        """Make F the sum of ``decay`` times what it is and ``weight`` times a newer one, around the newer anchor alone.

        Arguments and result are those of :meth:`merge_`.
        """
        old = [self.fisher[i] for i in indices]
        wide = [f.float() if f.dtype == torch.bfloat16 else f for f in old]  # rounded once
        torch._foreach_mul_(wide, decay)
        torch._foreach_add_(wide, list(fisher), alpha=weight)
        torch._foreach_copy_(old, wide)
        torch._foreach_copy_([self.theta_hat[i] for i in indices], list(theta_hat))
        self.constant[list(indices)] = 0
        if self.offset is None:
            return False
        if len(indices) == len(self.fisher):
            self.offset = None
            return True
        torch._foreach_zero_([self.offset[i] for i in indices])
        return False

    def clip_(self, indices: Sequence[int], max_norm: float) -> None:
        """Scale the penalty of each parameter whose F has a larger Euclidean norm down to it."""
        chosen = list(indices)
        for positions in by_kind(self.fisher[i] for i in chosen).values():
            fisher = [self.fisher[chosen[k]] for k in positions]
            norms = torch.stack(torch._foreach_norm(fisher, 2, dtype=torch.float64))
            factors = (max_norm / norms).clamp_(max=1.0)  # of F = 0 too: 1 / 0 is inf
            torch._foreach_mul_(fisher, list(factors.unbind()))
            if bool(self.constant.any()):
                self.constant[[chosen[k] for k in positions]] *= factors.cpu()

    def _kept_as(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of F for parameters of a dtype."""
        wide = flat_dtype(dtype)
        return wide if wide == torch.float64 or self._fisher_dtype is None else self._fisher_dtype


def by_kind(parameters: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Group indices by device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, parameter in enumerate(parameters):
        groups.setdefault((parameter.device, parameter.dtype), []).append(index)
    return groups


def dense_like(parameter: Tensor) -> Tensor:
    """Return the parameter, or a dense copy where it has gaps in memory."""
    parameter = parameter.detach()
    return parameter if is_dense(parameter) else parameter.contiguous()


def _buffers(like: Sequence[Tensor], dtype_of: Callable[[torch.dtype], torch.dtype]) -> list[Tensor]:
    """Return a zeroed tensor for each dense one, of its shape and memory order: views of one buffer per kind."""
    found: dict[int, Tensor] = {}
    for (device, dtype), indices in by_kind(like).items():
        chosen = [like[i] for i in indices]
        _, length = packed_starts([t.numel() for t in chosen])
        flat = torch.zeros(length, dtype=dtype_of(dtype), device=device)
        found |= dict(zip(indices, packed_views(flat, chosen), strict=True))
    return [found[i] for i in range(len(like))]


def _run(tensor: Tensor) -> Tensor:
    """View a dense tensor as one dimension, in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _merge_run(
    theta_hat: Tensor,
    fisher: Tensor,
    offset: Tensor,
    new_hat: Tensor,
    new_fisher: Tensor,
    weight: float,
    decay: float,
) -> Tensor:
    """Merge one run in place, in float64 throughout; return what it adds to c, 0-d."""
    rounded = new_hat.to(theta_hat.dtype)
    old, new = fisher.double().mul_(decay), new_fisher.double() * weight
    gap = (theta_hat.double() + offset).sub_(rounded)  # theta_bar - theta_hat of the newer anchor
    total = old + new
    share = torch.where(total > 0, old / total, 0.0)
    added = (share * new).mul_(gap).mul_(gap).sum()
    theta_hat.copy_(rounded)
    fisher.copy_(total)
    offset.copy_(share.mul_(gap))
    return added
