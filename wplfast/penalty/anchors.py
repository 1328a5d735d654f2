"""What consolidation left: theta_hat, F, offset and constant of every parameter, in flat buffers per device and dtype.

K anchors cost what one does, exactly: sum_k F_k (theta - theta_k)^2 = F (theta - theta_bar)^2 + c with F = sum_k F_k
and theta_bar = sum_k F_k theta_k / F. The newest anchor is kept in the parameters' dtype and theta_bar as its float32
offset from there: theta_bar alone would lose what theta - theta_bar is made of (measured for K = 50: gradient error
1.5e-7 with the offset, 8.6e-5 with theta_bar in float32, 57% in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import partial
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from ..ops.layout import flat_dtype, in_order_of, is_dense, packed_starts, packed_views, same_order
from .consolidate import NewerAnchor, Options

#: theta_hat, offset (empty where there is none) and F of some parameters.
Columns: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor]]

_CHUNK = 1 << 20  # elements that a merge widens to float64 at a time


class Anchors:
    """The anchors of some parameters; a new one holds nothing: F = 0 at the current values.

    All tensors are views of flat buffers, in the memory order of their parameters.

    A consolidation is atomic. :meth:`consolidated` computes all that changes into memory of its own and returns
    successors that share the buffers, which are left alone. Whoever puts the successors in the place of these anchors
    has committed, by that one assignment, and calls :meth:`settle`, which copies into the buffers what is ``pending``.
    An interrupt before the assignment leaves these anchors as they were; one after it leaves copies to be made, and
    whoever reads anchors settles them first. The buffers themselves stay: second derivatives tell by their versions
    that an anchor changed, groups of parameters and CUDA graphs hold their addresses, and a part of the parameters
    that lay in a buffer of its own would keep the memory that it came from alive.

    Args:
        parameters: they give shapes, devices, dtypes and memory orders.
        fisher_dtype: bfloat16, or None for float32; F of float64 parameters is in float64 in any case.
    """

    def __init__(self, parameters: Sequence[Tensor], fisher_dtype: torch.dtype | None = None) -> None:
        self._fisher_dtype = fisher_dtype
        dense = [dense_like(p) for p in parameters]
        self.theta_hat = _buffers(dense, lambda dtype: dtype)
        self.fisher = _buffers(dense, partial(kept_as, fisher_dtype=fisher_dtype))
        self.offset: list[Tensor] | None = None  # theta_bar - theta_hat, once there are several anchors
        self.constant = torch.zeros(len(dense), dtype=torch.float64, device="cpu")  # c
        self.bound = self.constant.clone()  # no entry of a parameter's F is larger
        self.n_anchors = 0
        self.pending: tuple[list[Tensor], list[Tensor]] | None = None  # parts of the buffers, and what they become
        torch._foreach_copy_(self.theta_hat, dense)

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Tell whether the parameters still have the devices, dtypes and memory orders that they had."""
        return all(
            hat.dtype == p.dtype
            and hat.device == p.device
            and hat.shape == p.shape
            and (same_order(hat, p) if is_dense(p) else hat.is_contiguous())
            for hat, p in zip(self.theta_hat, parameters, strict=True)
        )

    def evaluates_as(self, other: Anchors | None) -> bool:
        """Tell whether the penalty reads the same tensors and constants as with other anchors."""
        return (
            other is not None
            and self.theta_hat is other.theta_hat
            and self.offset is other.offset
            and torch.equal(self.constant, other.constant)
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
        new.n_anchors = self.n_anchors
        return new

    def columns(self, indices: Sequence[int]) -> Columns:
        """Return what the penalty reads of some parameters' anchors."""
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

    def consolidated(self, indices: Sequence[int], newer: NewerAnchor, options: Options) -> Anchors:
        """Return what these anchors become when a newer one enters; see the class for when that is.

        Args:
            indices: of the parameters that the newer one anchors; the others keep what they have.
            newer: its theta_hat and F, checked.
            options: ``decay`` is the factor on what was there; ``anchor`` says whether the penalty becomes the exact
                sum of both, or F their sum around the newer anchor alone; ``clip_norm`` bounds F's norm.

        Raises:
            ValueError: if F would be more than its dtype holds.
        """
        chosen, decay, successors = list(indices), options.decay, copy(self)
        largest = torch.tensor(newer.largest, dtype=torch.float64, device="cpu")
        bound = decay * self.bound[chosen] + newer.weight * largest
        for key, i, most in zip(newer.keys, chosen, bound.tolist(), strict=True):
            if not most <= torch.finfo(self.fisher[i].dtype).max:
                raise ValueError(f"fisher[{key!r}] adds up to {most:g}, more than {self.fisher[i].dtype} holds")
        if options.anchor == "merge" and self.n_anchors > 0:
            successors.with_offset()
            columns, added = _merged(successors.columns(chosen), newer, decay)
            constant = decay * self.constant[chosen] + added
        else:
            if len(chosen) == len(self.fisher):
                successors.offset = None
            columns = _replaced(successors.columns(chosen), newer, decay)
            constant = torch.zeros_like(bound)
        if options.clip_norm is not None:
            constant *= _clip_(columns[2], options.clip_norm)
        successors.constant, successors.bound = self.constant.clone(), self.bound.clone()
        successors.constant[chosen], successors.bound[chosen] = constant, bound
        successors.n_anchors = 1 if options.anchor == "replace" else self.n_anchors + 1
        successors.pending = list(chain(*successors.columns(chosen))), list(chain(*columns))
        return successors

    def settle(self) -> None:
        """Copy what is pending into the buffers; called again after an interrupt, it does what was left undone."""
        if self.pending is not None:
            with torch.inference_mode(False), torch.no_grad():
                torch._foreach_copy_(*self.pending)
            self.pending = None


def kept_as(dtype: torch.dtype, fisher_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of F for parameters of a dtype."""
    wide = flat_dtype(dtype)
    return wide if wide == torch.float64 or fisher_dtype is None else fisher_dtype


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


def _replaced(old: Columns, newer: NewerAnchor, decay: float) -> Columns:
    """Return what becomes of theta_hat, offset and F: the newer anchor, no offset, the sum of both Fishers."""
    theta_hat, offset, fisher = old
    wide = [f.float() if f.dtype == torch.bfloat16 else f for f in fisher]
    total = torch._foreach_mul(wide, decay)
    torch._foreach_add_(total, list(newer.fisher), alpha=newer.weight)
    return (
        [new.to(hat.dtype, copy=True) for new, hat in zip(newer.theta_hat, theta_hat, strict=True)],
        [torch.zeros_like(o) for o in offset],
        [t.to(f.dtype) for t, f in zip(total, fisher, strict=True)],  # rounded once
    )


def _merged(old: Columns, newer: NewerAnchor, decay: float) -> tuple[Columns, Tensor]:
    """Return what becomes of theta_hat, offset and F, and what is added to c, one entry per parameter."""
    theta_hat, offset, fisher = ([torch.empty_like(t) for t in column] for column in old)
    added = []
    for *tensors, new_hat, new_fisher in zip(
        *old, theta_hat, offset, fisher, newer.theta_hat, newer.fisher, strict=True
    ):
        given = [in_order_of(t, tensors[0]) for t in (new_hat, new_fisher)]
        runs = zip(*(_run(t).split(_CHUNK) for t in (*tensors, *given)), strict=True)
        added.append(torch.stack([_merge_run(run, newer.weight, decay) for run in runs]).sum().cpu())
    return (theta_hat, offset, fisher), torch.stack(added)


def _run(tensor: Tensor) -> Tensor:
    """View a dense tensor as one dimension, in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _merge_run(run: Sequence[Tensor], weight: float, decay: float) -> Tensor:
    """Merge one run of a parameter's tensors, in float64 throughout; return what it adds to c, 0-d."""
    theta_hat, offset, fisher, to_theta_hat, to_offset, to_fisher, new_hat, new_fisher = run
    rounded = new_hat.to(theta_hat.dtype)
    old, new = fisher.double().mul_(decay), new_fisher.double() * weight
    gap = (theta_hat.double() + offset).sub_(rounded)  # theta_bar - theta_hat of the newer anchor
    total = old + new
    share = torch.where(total > 0, old / total, 0.0)
    added = (share * new).mul_(gap).mul_(gap).sum()
    to_theta_hat.copy_(rounded)
    to_fisher.copy_(total)
    to_offset.copy_(share.mul_(gap))
    return added


def _clip_(fisher: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale each F whose Euclidean norm is larger down to it; return the factors, one entry per parameter."""
    factors = torch.ones(len(fisher), dtype=torch.float64, device="cpu")
    for positions in by_kind(fisher).values():
        chosen = [fisher[k] for k in positions]
        norms = torch.stack(torch._foreach_norm(chosen, 2, dtype=torch.float64))
        scales = (max_norm / norms).clamp_(max=1.0)  # of F = 0 too: 1 / 0 is inf
        torch._foreach_mul_(chosen, list(scales.unbind()))
        factors[positions] = scales.cpu()
    return factors
