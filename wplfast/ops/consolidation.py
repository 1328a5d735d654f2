"""How a newer anchor enters the anchors of some parameters: first what it comes to, then one call that makes it so.

This one computes in plain PyTorch, on any device; a backend may give a subclass that does it faster
(:func:`wplfast.backends.consolidation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .layout import by_kind, in_order_of

_CHUNK = 1 << 20  # elements that a merge widens to float64 at a time
_LEAST = torch.finfo(torch.float64).tiny


class Consolidation:
    """What becomes of anchors; nothing of them changes until the calls of :meth:`steps` are made.

    F becomes ``total = decay F + weight F_new``, and theta_hat the newer one's. In a merge, with
    ``gap = theta_hat + offset - theta_hat_new``, offset becomes ``decay F / total gap`` (0 where total is) and c gains
    ``sum decay F weight F_new / total gap^2``; otherwise offset becomes 0.

    Args:
        theta_hat: dense tensors, as for offset and fisher; one entry per parameter in each list.
        offset: of the merged anchors; empty means zero, which a merge does not take.
        fisher: of the merged anchors, of its own dtype each.
        new_theta_hat: on theta_hat's devices, of any dtype and memory order, apart from the anchors' memory.
        new_fisher: likewise.
        decay: factor on what was there.
        weight: factor on what is new.
        merge: whether both anchors count, or the newer alone.
        in_place: whether the anchors are nobody's yet, so that they may be written to at once.
    """

    def __init__(
        self,
        theta_hat: Sequence[Tensor],
        offset: Sequence[Tensor],
        fisher: Sequence[Tensor],
        new_theta_hat: Sequence[Tensor],
        new_fisher: Sequence[Tensor],
        *,
        decay: float,
        weight: float,
        merge: bool,
        in_place: bool = False,
    ) -> None:
        self.theta_hat, self.offset, self.fisher = theta_hat, offset, fisher
        # PyTorch's copies to another type forget the sign of lazily negated tensors.
        self.new_theta_hat, self.new_fisher = ([t.resolve_neg() for t in c] for c in (new_theta_hat, new_fisher))
        self.decay, self.weight, self.merge, self.in_place = decay, weight, merge, in_place
        self._prepare()

    def _prepare(self) -> None:
        """Compute into memory of its own."""
        columns = [self.theta_hat, self.offset, self.fisher]
        to_hat, to_offset, to_fisher = columns if self.in_place else [list(map(torch.empty_like, c)) for c in columns]
        self._added = torch.zeros(len(self.fisher), dtype=torch.float64, device="cpu")
        if self.merge:
            pairs = zip(*columns, to_hat, to_offset, to_fisher, self.new_theta_hat, self.new_fisher, strict=True)
            self._added = torch.stack([_merge(tensors, self.weight, self.decay).cpu() for tensors in pairs])
        else:
            _add_up(self.fisher, to_fisher, self.new_fisher, self.weight, self.decay)
            to_hat = self.new_theta_hat  # read where it lies
            to_offset = [t.new_zeros(()).expand_as(t) for t in self.offset]
        self._targets, self._sources = list(chain(*columns)), [*to_hat, *to_offset, *to_fisher]
        self._fisher = to_fisher

    def measured(self) -> tuple[Tensor, Tensor]:
        """Return what c gains, and the Euclidean norm of F as it becomes: [n], float64, on the CPU."""
        norms = torch.zeros_like(self._added)
        for positions in by_kind(self._fisher).values():
            found = torch._foreach_norm([self._fisher[k] for k in positions], 2, dtype=torch.float64)
            norms[positions] = torch.stack(found).cpu()
        return self._added, norms

    def scale(self, factors: Tensor) -> None:
        """Multiply what F becomes by factors, [n], float64, on the CPU; called once at most."""
        for positions in by_kind(self._fisher).values():
            chosen = [self._fisher[k] for k in positions]
            torch._foreach_mul_(chosen, list(factors[positions].to(chosen[0].device).unbind()))

    def steps(self) -> list[partial[Any]]:
        """Return calls that change the anchors, all by the last one, which runs no Python code.

        They refer to what they need through this object, which must live until then.
        """
        return [partial(torch._foreach_copy_, self._targets, self._sources)]


def _add_up(
    old: Sequence[Tensor], new: Sequence[Tensor], entering: Sequence[Tensor], weight: float, decay: float
) -> None:
    """Write the sum of the decayed F and the newer one."""
    for f, total, added in zip(old, new, entering, strict=True):
        if f.dtype == torch.bfloat16:
            total.copy_(f.float().mul_(decay).add_(added, alpha=weight))  # rounded once
        else:
            torch.mul(f, decay, out=total).add_(added, alpha=weight)


def _merge(tensors: Sequence[Tensor], weight: float, decay: float) -> Tensor:
    """Write what becomes of one parameter's anchors: the exact sum of both; return what it adds to c, 0-d."""
    *anchors, new_hat, new_fisher = tensors
    given = [in_order_of(t, anchors[0]) for t in (new_hat, new_fisher)]
    runs = zip(*(_run(t).split(_CHUNK) for t in (*anchors, *given)), strict=True)
    return torch.stack([_merge_run(run, weight, decay) for run in runs]).sum()


def _run(tensor: Tensor) -> Tensor:
    """View a dense tensor as one dimension, in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _merge_run(run: Sequence[Tensor], weight: float, decay: float) -> Tensor:
    """Merge one run of a parameter's tensors, in float64 throughout; return what it adds to c, 0-d."""
    theta_hat, offset, fisher, to_theta_hat, to_offset, to_fisher, new_hat, new_fisher = run
    copy = partial(torch.Tensor.to, dtype=torch.float64, copy=True)  # of float64 too: the anchors are not to change
    gap = copy(theta_hat).add_(offset)
    gap.sub_(to_theta_hat.copy_(new_hat))  # theta_bar - theta_hat of the newer anchor
    share, added = copy(fisher).mul_(decay), copy(new_fisher).mul_(weight)
    total = share + added
    to_fisher.copy_(total)
    shift = share.div_(total.clamp_(min=_LEAST)).mul_(gap)  # 0 where F is 0, at a fifth of the price of torch.where
    to_offset.copy_(shift)
    return shift.mul_(gap).mul_(added).sum()
