"""The penalty on CPUs over lists of tensors that every call brings: tables of the last calls, proven by each anew.

Checking 3 n tensors in Python and making tables of them takes longer than a small penalty. Both follow from the
tensors' addresses, types, devices, shapes and strides, which C++ compares at a twentieth of a microsecond each. Tables
hold those and no tensor, so nothing of the user's stays alive, and memory that was freed and used again is a hit only
where tensors of the same kinds lie there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...ops.arguments import PenaltyArguments
from ...ops.kept import Found
from ...ops.layout import Packing, flat_dtype
from ...ops.prepared import PreparedPenalty, plain
from ..exchange import parameter_table
from .prepared import prepare

#: Calls whose tables are kept.
MAX_KEPT = 32

#: Number of parameters, and the addresses of the first parameter, anchor and Fisher: where to look, and no proof.
_Key: TypeAlias = tuple[int, int, int, int]


class _Tables:
    """What one call's lists came to."""

    def __init__(self, arguments: PenaltyArguments, tensors: Sequence[Tensor]) -> None:
        theta = arguments.theta
        self.all = parameter_table(tensors)
        self.prepared = prepare(parameter_table(theta), arguments, alpha=0, l2=0)
        self.packing = Packing(theta)
        self.dtype, self.wide = theta[0].dtype, flat_dtype(theta[0].dtype)


class _ListedPenalty(PreparedPenalty):
    """One call's penalty. Its tensors were just compared with tables, which are valid for as long as they stay."""

    def __init__(self, tables: _Tables, tensors: list[Tensor], alpha: Tensor, l2: Tensor) -> None:
        n = len(tensors) // 3
        super().__init__(tensors[:n], tensors[n : 2 * n], (), tensors[2 * n :], alpha, l2)
        self._tables, self._packing = tables, tables.packing
        self._strengths = alpha.data_ptr(), l2.data_ptr()

    def value(self) -> Tensor:
        """Return the value."""
        value = torch.empty((), dtype=self._tables.wide, device="cpu")
        self._tables.prepared.value(value.data_ptr(), torch.get_num_threads(), *self._strengths)
        return value

    def with_grad(self) -> tuple[Tensor, Tensor]:
        """Return the value and the packed gradient."""
        tables = self._tables
        value = torch.empty((), dtype=tables.wide, device="cpu")
        packed = torch.empty(tables.packing.length, dtype=tables.dtype, device="cpu")
        tables.prepared.store(packed.data_ptr(), value.data_ptr(), torch.get_num_threads(), *self._strengths)
        return value, packed


class CppKeptPenalties:
    """The last calls' tables; see :class:`wplfast.ops.kept.KeptPenalties`.

    There is no lock: every change is one operation on a dictionary, and what another thread dropped is made anew.
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[_Key, _Tables] = OrderedDict()

    def find(self, theta: Sequence[Tensor], theta_hat: Sequence[Tensor], fisher: Sequence[Tensor]) -> Found | None:
        """Return what the lists came to if all tensors are proven to be what and where they were."""
        tensors = [*theta, *theta_hat, *fisher]
        key = _key(tensors)
        tables = None if key is None else self._tables.get(key)
        if key is None or tables is None or not tables.all.unchanged(tensors, []):
            return None
        with suppress(KeyError):  # another thread dropped it at this moment
            self._tables.move_to_end(key)
        return partial(_penalty, tables, tensors)

    def penalty(
        self,
        arguments: PenaltyArguments,
        theta: Sequence[Tensor],
        theta_hat: Sequence[Tensor],
        fisher: Sequence[Tensor],
    ) -> PreparedPenalty:
        """Return the penalty of checked arguments; keep their tables if they are the lists' own tensors."""
        tensors = [*arguments.theta, *arguments.theta_hat, *arguments.fisher]
        given = [*theta, *theta_hat, *fisher]
        copied = len(tensors) != len(given) or any(a is not b for a, b in zip(tensors, given, strict=True))
        key = None if copied else _key(tensors)
        if key is None or any(t.numel() and not t.data_ptr() for t in tensors):
            return PreparedPenalty(*arguments)
        tables = self._tables[key] = _Tables(arguments, tensors)
        while len(self._tables) > MAX_KEPT:
            try:
                self._tables.popitem(last=False)
            except KeyError:  # other threads dropped them all
                break
        return _penalty(tables, tensors, arguments.alpha, arguments.l2)


def _penalty(tables: _Tables, tensors: list[Tensor], alpha: Tensor, l2: Tensor) -> PreparedPenalty:
    """Return the penalty of proven tensors; the common one where an operator must look at alpha or l2 itself."""
    if plain((alpha, l2)):
        return _ListedPenalty(tables, tensors, alpha, l2)
    n = len(tensors) // 3
    return PreparedPenalty(tensors[:n], tensors[n : 2 * n], (), tensors[2 * n :], alpha, l2)


def _key(tensors: Sequence[Tensor]) -> _Key | None:
    """Return where to look for the tables of three lists, one behind the other; None where there cannot be any."""
    n, rest = divmod(len(tensors), 3)
    if rest or forward_ad._current_level >= 0 or not plain(tensors):
        return None
    try:
        return n, tensors[0].data_ptr(), tensors[n].data_ptr(), tensors[2 * n].data_ptr()
    except RuntimeError:  # sparse, or a transform's
        return None
