"""What consolidation left: theta_hat, F, offset and constant of every parameter, in flat buffers per device and dtype.

K anchors cost what one does, exactly: sum_k F_k (theta - theta_k)^2 = F (theta - theta_bar)^2 + c with F = sum_k F_k
and theta_bar = sum_k F_k theta_k / F. The newest anchor is kept in the parameters' dtype and theta_bar as its float32
offset from there: theta_bar alone would lose what theta - theta_bar is made of (measured for K = 50: gradient error
1.5e-7 with the offset, 8.6e-5 with theta_bar in float32, 57% in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..ops.consolidation import Consolidation
from ..ops.layout import by_kind, flat_dtype, is_dense, packed_starts, packed_views, same_order
from .consolidate import NewerAnchor, Options


class Columns(NamedTuple):
    """What the penalty reads of some parameters' anchors; one entry per parameter."""

    theta_hat: list[Tensor]
    offset: list[Tensor]  #: empty where all are zero
    fisher: list[Tensor]


class Anchors:
    """The anchors of some parameters; a new one holds nothing: F = 0 at the current values.

    All tensors are views of flat buffers, in the memory order of their parameters.

    A consolidation is atomic. :meth:`consolidated` changes nothing that can be seen: it returns successors that share
    the buffers, and what is to be done to these. Whoever commits puts the successors in the place of these anchors and
    changes the buffers in one go (:meth:`.WeightPlasticityLoss._commit`). The buffers themselves stay: second
    derivatives tell by their versions that an anchor changed, groups of parameters and CUDA graphs hold their
    addresses, and parameters that moved to buffers of their own, a part at a time, would keep alive the memory that
    they came from.

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
        self._firsts = [indices[0] for indices in by_kind(dense).values()]  # one view of each buffer
        torch._foreach_copy_(self.theta_hat, dense)

    def fits(self, parameters: Sequence[Tensor], indices: Sequence[int]) -> bool:
        """Tell whether some of the parameters still have the devices, dtypes and memory orders that they had."""
        return all(
            hat.dtype == p.dtype
            and hat.device == p.device
            and hat.shape == p.shape
            and (same_order(hat, p) if is_dense(p) else hat.is_contiguous())
            for hat, p in ((self.theta_hat[i], parameters[i]) for i in indices)
        )

    def evaluates_as(self, other: Anchors | None) -> bool:
        """Tell whether the penalty reads the same tensors and constants as with other anchors."""
        return (
            other is not None
            and self.theta_hat is other.theta_hat
            and self.offset is other.offset
            and torch.equal(self.constant, other.constant)
        )

    def moved(self, parameters: Sequence[Tensor], sources: Sequence[int | None] | None = None) -> Anchors:
        """Return these anchors laid out beside other parameters.

        Args:
            parameters: they may be on other devices, of other dtypes, and larger in any dimension: what is beyond the
                old shape is free (F = 0).
            sources: for each, which of the old anchors it takes, None where it is not anchored; default: the same
                position's.
        """
        new = Anchors(parameters, self._fisher_dtype)
        pairs = enumerate(range(len(parameters)) if sources is None else sources)
        taken = {i: source for i, source in pairs if source is not None}
        for i, source in taken.items():
            corner = tuple(slice(0, size) for size in self.fisher[source].shape)
            new.theta_hat[i][corner] = self.theta_hat[source].to(new.theta_hat[i])
            new.fisher[i][corner] = self.fisher[source].to(new.fisher[i])
            if self.offset is not None:
                new.with_offset()[i][corner] = self.offset[source].to(new.fisher[i].device)
        for column, old in ((new.constant, self.constant), (new.bound, self.bound)):
            column[list(taken)] = old[list(taken.values())]
        new.n_anchors = self.n_anchors
        return new

    def cut(self, shards: Mapping[int, Tensor]) -> Anchors:
        """Return views of the parts that lie on this rank now that parameters are shards, to be moved from.

        Args:
            shards: parameters by position. Anchors of other shapes than theirs stay whole.
        """
        from ..distributed.shards import holds_constant, local_part  # not with the package

        found = copy(self)
        found.theta_hat, found.fisher, found.constant = [*self.theta_hat], [*self.fisher], self.constant.clone()
        found.offset = None if self.offset is None else [*self.offset]
        for i, shard in shards.items():
            if shard.shape == self.fisher[i].shape:
                for tensors in filter(None, (found.theta_hat, found.fisher, found.offset)):
                    tensors[i] = local_part(tensors[i], shard)
                if not holds_constant(shard):
                    found.constant[i] = 0
        return found

    def columns(self, indices: Sequence[int]) -> Columns:
        """Return what the penalty reads of some parameters' anchors."""
        offset = [] if self.offset is None else [self.offset[i] for i in indices]
        return Columns([self.theta_hat[i] for i in indices], offset, [self.fisher[i] for i in indices])

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

    def consolidated(
        self, indices: Sequence[int], newer: NewerAnchor, options: Options, in_place: bool
    ) -> tuple[Anchors, Consolidation]:
        """Return what these anchors become when a newer one enters, and what makes them so; see the class.

        Args:
            indices: of the parameters that the newer one anchors; the others keep what they have.
            newer: its theta_hat and F, checked.
            options: ``decay`` is the factor on what was there; ``anchor`` says whether the penalty becomes the exact
                sum of both, or F their sum around the newer anchor alone; ``clip_norm`` bounds F's norm.
            in_place: whether these anchors are nobody's yet, so that their buffers may be written at once.

        Raises:
            ValueError: if F would be more than its dtype holds.
        """
        chosen, decay, successors = list(indices), options.decay, copy(self)
        largest = torch.tensor(newer.largest, dtype=torch.float64, device="cpu")
        bound = decay * self.bound[chosen] + newer.weight * largest
        for key, i, most in zip(newer.keys, chosen, bound.tolist(), strict=True):
            if not most <= torch.finfo(self.fisher[i].dtype).max:
                raise ValueError(f"fisher[{key!r}] adds up to {most:g}, more than {self.fisher[i].dtype} holds")
        merging = options.anchor == "merge" and self.n_anchors > 0
        if merging:
            successors.with_offset()
        elif len(chosen) == len(self.fisher):
            successors.offset = None
        old, given = successors.columns(chosen), [self._apart(tensors) for tensors in (newer.theta_hat, newer.fisher)]
        change = backends.consolidation(t.device.type for t in old.fisher)(
            *old, *given, decay=decay, weight=newer.weight, merge=merging, in_place=in_place
        )
        constant = torch.zeros_like(bound)
        if merging or options.clip_norm is not None:
            added, norms = change.measured()
            if merging:
                constant = decay * self.constant[chosen] + added
            if options.clip_norm is not None:
                norms = torch.tensor(
                    newer.over_ranks(norms.square().tolist()), dtype=torch.float64, device="cpu"
                ).sqrt()
                factors = (options.clip_norm / norms).clamp_(max=1.0)  # of F = 0 too: 1 / 0 is inf
                change.scale(factors)
                constant *= factors
        successors.constant, successors.bound = self.constant.clone(), self.bound.clone()
        successors.constant[chosen], successors.bound[chosen] = constant, bound
        successors.n_anchors = 1 if options.anchor == "replace" else self.n_anchors + 1
        return successors, change

    def _apart(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return tensors, those that lie in these buffers as copies: they would be read and written at once."""
        own = {t[i].untyped_storage().data_ptr() for t in (self.theta_hat, self.fisher) for i in self._firsts}
        return [t.clone() if t.untyped_storage().data_ptr() in own else t for t in tensors]


def kept_as(dtype: torch.dtype, fisher_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of F for parameters of a dtype."""
    wide = flat_dtype(dtype)
    return wide if wide == torch.float64 or fisher_dtype is None else fisher_dtype


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
