"""What consolidation left: theta_hat, F, offset and constant of every parameter, in flat buffers per device and dtype.

K anchors cost what one does, exactly: sum_k F_k (theta - theta_k)^2 = F (theta - theta_bar)^2 + c with F = sum_k F_k
and theta_bar = sum_k F_k theta_k / F. The newest anchor is kept in the parameters' dtype and theta_bar as its float32
offset from there: theta_bar alone would lose what theta - theta_bar is made of (measured for K = 50: gradient error
1.5e-7 with the offset, 8.6e-5 with theta_bar in float32, 57% in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.layout import by_kind, flat_dtype, in_order_of, is_dense, packed_starts, packed_views, same_order
from .consolidate import NewerAnchor, Options

_CHUNK = 1 << 20  # elements that a merge widens to float64 at a time
_LEAST = torch.finfo(torch.float64).tiny


class Columns(NamedTuple):
    """What the penalty reads of some parameters' anchors; one entry per parameter."""

    theta_hat: list[Tensor]
    offset: list[Tensor]  #: empty where all are zero
    fisher: list[Tensor]


class Pending(NamedTuple):
    """Copies that are yet to be made, all by one call that no interrupt divides."""

    targets: list[Tensor]
    sources: list[Tensor]
    version: int  #: of the first target, as long as nothing was copied


class Scratch:
    """Memory for what a consolidation computes before it changes anything.

    What is small beside the anchors is kept for the next time, since fresh memory comes from the operating system page
    by zeroed page, which doubled the time of an update of a tenth of 10 M parameters.

    Args:
        kept_bytes: the most that is kept of each device and dtype.
    """

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes = kept_bytes
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, columns: Columns) -> Columns:
        """Return uninitialised columns, in the memory that was returned before where it is large enough."""
        tensors = iter(_buffers(list(chain(*columns)), lambda dtype: dtype, self._take))
        return Columns(*([next(tensors) for _ in column] for column in columns))

    def _take(self, length: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer."""
        flat = self._kept.get((device, dtype))
        if flat is None or len(flat) < length:
            flat = torch.empty(length, dtype=dtype, device=device)
            if flat.nbytes <= self._kept_bytes:
                self._kept[device, dtype] = flat
        return flat[:length]

    def __reduce__(self) -> tuple[type[Scratch], tuple[int]]:
        """Copy and pickle no memory."""
        return Scratch, (self._kept_bytes,)


class Anchors:
    """The anchors of some parameters; a new one holds nothing: F = 0 at the current values.

    All tensors are views of flat buffers, in the memory order of their parameters.

    A consolidation is atomic. :meth:`consolidated` computes all that changes into memory of its own and returns
    successors that share the buffers, which are left alone. Whoever puts the successors in the place of these anchors
    has committed, by that one assignment, and calls :meth:`settle`, which copies into the buffers what is ``pending``.
    An interrupt before the assignment leaves these anchors as they were; one after it leaves copies to be made, and
    whoever reads anchors settles them first. The buffers themselves stay: second derivatives tell by their versions
    that an anchor changed, groups of parameters and CUDA graphs hold their addresses, and parameters that moved to
    buffers of their own, a part at a time, would keep alive the memory that they came from.

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
        self.pending: Pending | None = None
        self._firsts = [indices[0] for indices in by_kind(dense).values()]  # one view of each buffer
        self._scratch = Scratch(sum(t.nbytes for t in (*self.theta_hat, *self.fisher)) // 4)
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

    def consolidated(self, indices: Sequence[int], newer: NewerAnchor, options: Options, in_place: bool) -> Anchors:
        """Return what these anchors become when a newer one enters; see the class for when that is.

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
        old = successors.columns(chosen)
        if merging:
            new = old if in_place else self._scratch.like(old)
            constant = decay * self.constant[chosen] + _merge(old, new, newer, decay)
        else:
            fisher = old.fisher if in_place else self._scratch.like(Columns([], [], old.fisher)).fisher
            _add_up(old.fisher, fisher, newer, decay)
            # theta_hat is read where it lies. The caller may write there only after it was copied, or after two
            # interrupts before the copy: then the anchor is what lies there when the penalty is used next.
            zeros = [offset.new_zeros(()).expand_as(offset) for offset in old.offset]
            new, constant = Columns(self._apart(newer.theta_hat), zeros, fisher), torch.zeros_like(bound)
        if options.clip_norm is not None:
            constant *= _clip_(new.fisher, options.clip_norm)
        successors.constant, successors.bound = self.constant.clone(), self.bound.clone()
        successors.constant[chosen], successors.bound[chosen] = constant, bound
        successors.n_anchors = 1 if options.anchor == "replace" else self.n_anchors + 1
        successors.pending = Pending(list(chain(*old)), list(chain(*new)), successors.theta_hat[chosen[0]]._version)
        return successors

    def settle(self) -> None:
        """Copy what is pending into the buffers; called again after an interrupt, it does what was left undone."""
        pending = self.pending
        if pending is not None:
            if pending.targets[0]._version == pending.version:
                with torch.inference_mode(False), torch.no_grad():
                    torch._foreach_copy_(pending.targets, pending.sources)
            self.pending = None

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


def _buffers(
    like: Sequence[Tensor], dtype_of: Callable[[torch.dtype], torch.dtype], make: Callable[..., Tensor] = torch.zeros
) -> list[Tensor]:
    """Return a tensor for each dense one, of its shape and memory order: views of one zeroed buffer per kind."""
    found: dict[int, Tensor] = {}
    for (device, dtype), indices in by_kind(like).items():
        chosen = [like[i] for i in indices]
        _, length = packed_starts([t.numel() for t in chosen])
        flat = make(length, dtype=dtype_of(dtype), device=device)
        found |= dict(zip(indices, packed_views(flat, chosen), strict=True))
    return [found[i] for i in range(len(like))]


def _add_up(old: Sequence[Tensor], new: Sequence[Tensor], newer: NewerAnchor, decay: float) -> None:
    """Write the sum of the decayed F and the newer one."""
    for f, total, added in zip(old, new, newer.fisher, strict=True):
        if f.dtype == torch.bfloat16:
            total.copy_(f.float().mul_(decay).add_(added, alpha=newer.weight))  # rounded once
        else:
            torch.mul(f, decay, out=total).add_(added, alpha=newer.weight)


def _merge(old: Columns, new: Columns, newer: NewerAnchor, decay: float) -> Tensor:
    """Write what becomes of anchors: the exact sum of both; return what it adds to c, one entry per parameter."""
    added = []
    for *tensors, new_hat, new_fisher in zip(*old, *new, newer.theta_hat, newer.fisher, strict=True):
        given = [in_order_of(t, tensors[0]) for t in (new_hat, new_fisher)]
        runs = zip(*(_run(t).split(_CHUNK) for t in (*tensors, *given)), strict=True)
        added.append(torch.stack([_merge_run(run, newer.weight, decay) for run in runs]).sum().cpu())
    return torch.stack(added)


def _run(tensor: Tensor) -> Tensor:
    """View a dense tensor as one dimension, in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _merge_run(run: Sequence[Tensor], weight: float, decay: float) -> Tensor:
    """Merge one run of a parameter's tensors, in float64 throughout; return what it adds to c, 0-d."""
    theta_hat, offset, fisher, to_theta_hat, to_offset, to_fisher, new_hat, new_fisher = run
    gap = theta_hat.double().add_(offset)
    gap.sub_(to_theta_hat.copy_(new_hat))  # theta_bar - theta_hat of the newer anchor
    share, added = fisher.double().mul_(decay), new_fisher.to(torch.float64, copy=True).mul_(weight)
    total = share + added
    to_fisher.copy_(total)
    shift = share.div_(total.clamp_(min=_LEAST)).mul_(gap)  # 0 where F is 0, at a fifth of the price of torch.where
    to_offset.copy_(shift)
    return shift.mul_(gap).mul_(added).sum()


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
