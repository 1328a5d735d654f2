"""The result of a Fisher pass: a mapping from names to diagonals, with what is needed to merge and keep it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import storage
from ..params import Params, check_names, is_sharded, named
from . import files
from .buffers import Buffers
from .faults import check_form
from .origins import joined
from .report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .summary import Summary


class Fisher(Mapping[str, Tensor]):
    """A Fisher diagonal by parameter name: ``F = sum_n w_n g_n^2 / sum_n w_n``.

    Attributes:
        n_samples: number of samples behind it.
        total_weight: sum of their weights (n_samples if they carried none).
        mean_grad: parameter name -> ``sum_n w_n g_n / sum_n w_n``; None unless asked for.
        theta_hat: parameter name -> its values that the Fisher belongs to, where a file kept them; else None.
        report: how the pass was served.
        reduced: whether :meth:`all_reduce_` made it: what all ranks' samples are counted in already. Copies, parts,
            files and sums of it are, too.

    Example:
        >>> import torch, wplfast
        >>> one = wplfast.Fisher({"w": torch.tensor([1.0, 3.0])}, n_samples=1)
        >>> other = wplfast.Fisher({"w": torch.tensor([5.0, 3.0])}, n_samples=3)
        >>> (one + other)["w"]
        tensor([4., 3.])
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        n_samples: int,
        *,
        total_weight: float | None = None,
        mean_grad: Mapping[str, Tensor] | None = None,
        theta_hat: Mapping[str, Tensor] | None = None,
        report: Report | None = None,
        metadata: Mapping[str, str] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        reduced: bool = False,
    ) -> None:
        """Wrap diagonals; see the class. ``parameters`` are remembered weakly, for matching by identity.

        Raises:
            TypeError: if an entry is no tensor, or n_samples no integer.
            ValueError: if a count is negative or not finite, or mean_grad has other names or shapes.
        """
        self._tensors = dict(tensors)
        if theta_hat is not None:
            check_names(theta_hat, self._tensors, "theta_hat")
        self.theta_hat = None if theta_hat is None else {name: theta_hat[name] for name in self._tensors}
        self._parameters = {name: weakref.ref(p) for name, p in (parameters or {}).items()}
        self.n_samples = n_samples
        self.total_weight = float(n_samples) if total_weight is None else total_weight
        self.mean_grad = None if mean_grad is None else dict(mean_grad)
        self.report = Report() if report is None else report
        self.metadata = dict(metadata or {})
        self.reduced = reduced
        check_form(self._tensors, self.mean_grad, self.n_samples, self.total_weight)

    @classmethod
    def zeros(cls, params: Params, *, with_grad: bool = False) -> Fisher:
        """Return the Fisher of no samples: what a rank without data takes part in :meth:`all_reduce_` with.

        Args:
            params: as :func:`wplfast.fisher_diagonal` takes them.
            with_grad: whether it has a ``mean_grad``.

        Example:
            >>> import torch, wplfast
            >>> wplfast.Fisher.zeros(torch.nn.Linear(3, 2))
            Fisher(2 parameters, 8 elements, 0 samples)
        """
        parameters = named(params)
        zeros, *gradient = (
            dict(zip(parameters, Buffers(parameters).views, strict=True)) for _ in range(2 if with_grad else 1)
        )
        return cls(zeros, 0, mean_grad=gradient[0] if gradient else None, parameters=parameters)

    def __getitem__(self, name: str) -> Tensor:
        """Return one parameter's diagonal, in the parameter's shape.

        Raises:
            NameMismatchError: (a KeyError) if there is none of this name.
        """
        try:
            return self._tensors[name]
        except KeyError:
            if isinstance(name, str):
                check_names(self, [name], "the Fisher")
            raise

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a diagonal of this name."""
        return name in self._tensors

    def get(self, name: str, default: Any = None) -> Any:
        """Return one parameter's diagonal, or default if there is none of this name."""
        return self._tensors.get(name, default)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self._tensors)

    def __repr__(self) -> str:
        """Summarise."""
        numel = sum(t.numel() for t in self.values())
        return f"Fisher({len(self)} parameters, {numel:,} elements, {self.n_samples:,} samples)"

    def names_of(self, parameters: Sequence[Tensor]) -> dict[int, str]:
        """Return, by position, the names of those of the given tensors that this Fisher was computed for."""
        names = {id(p): name for name, reference in self._parameters.items() if (p := reference()) is not None}
        return {index: names[id(p)] for index, p in enumerate(parameters) if id(p) in names}

    def __getstate__(self) -> dict[str, object]:
        """Pickle and copy without the references to parameters."""
        return {**self.__dict__, "_parameters": {}}

    @property
    def flat(self) -> Tensor:
        """All diagonals in one 1-D tensor, in the mapping's order.

        Raises:
            ValueError: if they are shards (DTensor), of which none has all.
        """
        if any(map(is_sharded, self.values())):
            raise ValueError(
                "F lies as shards on several ranks, and flat would be all of it on one: sum over names instead "
                "(fisher[name].sum().full_tensor()), or let consolidate(normalize='trace') divide by the mean"
            )
        return torch.cat([tensor.reshape(-1) for tensor in self.values()])

    def __add__(self, other: Fisher) -> Fisher:
        """Merge with the Fisher of other samples of the same parameters: the mean over both sets.

        Raises:
            TypeError: if other is no Fisher.
            NameMismatchError: if the names differ.
            ValueError: if both are the same object, shapes or fisher types differ, a mean gradient is complex in one
                alone, or both have theta_hat and they differ.
        """
        if not isinstance(other, Fisher):
            return NotImplemented
        if other is self:
            raise ValueError("a Fisher and itself do not add up: they hold the same samples, which would count twice")
        check_names(other, self, "the second Fisher")
        check_names(self, other, "the first Fisher")
        metadata = joined(self.metadata, other.metadata)
        total = self.total_weight + other.total_weight
        share = self.total_weight / total if total else 0.0

        def mean(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
            merged = {}
            for name, tensor in first.items():
                if tensor.shape != second[name].shape:
                    expected, got = list(tensor.shape), list(second[name].shape)
                    raise ValueError(f"fisher[{name!r}] must have shape {expected} as in the first, got {got}")
                if tensor.is_complex() != second[name].is_complex():
                    raise ValueError(f"mean_grad[{name!r}] is complex in one of the Fishers alone: they do not add up")
                merged[name] = tensor * share + second[name].to(tensor) * (1 - share)
            return merged

        both = self.mean_grad is not None and other.mean_grad is not None
        return Fisher(
            mean(self, other),
            self.n_samples + other.n_samples,
            total_weight=total,
            mean_grad=mean(self.mean_grad or {}, other.mean_grad or {}) if both else None,
            theta_hat=_common(self.theta_hat, other.theta_hat),
            report=self.report.merged(other.report, self.n_samples, other.n_samples),
            metadata=metadata,
            reduced=self.reduced or other.reduced,
        )

    def __radd__(self, other: object) -> Fisher:
        """Let ``sum(fishers)`` begin with its 0.

        Raises:
            TypeError: if it is something else.
        """
        if not (isinstance(other, int) and other == 0):
            return NotImplemented
        return self.select(list(self))

    def to(self, *args: object, **kwargs: object) -> Fisher:
        """Return a copy whose tensors went through ``Tensor.to`` (a device, a dtype)."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))  # type: ignore[call-overload]

    def select(self, names: Sequence[str]) -> Fisher:
        """Return the part with these names.

        Raises:
            NameMismatchError: if one is missing.
        """
        check_names(self, names, "the Fisher")
        return self._rename({name: name for name in names})

    def rename(self, rename: Callable[[str], str]) -> Fisher:
        """Return the same tensors under other names.

        Raises:
            ValueError: if two names become one.
        """
        names = {name: rename(name) for name in self}
        if len(set(names.values())) != len(names):
            raise ValueError("rename must keep names distinct")
        return self._rename(names)

    def all_reduce_(self, group: object | None = None) -> Fisher:
        """Become the mean over the samples of all ranks of a ``torch.distributed`` group: matched by name, once.

        Every rank of the group calls it. Ranks may hold names in any order, in other dtypes (sums are taken in the
        widest, of at least float32) and on other devices; each keeps its own. A rank without data takes part with
        ``Fisher.zeros(params)``, or with ``Fisher({}, 0)``, which takes over the names of the others. So does a rank
        whose own pass failed, if the others are to go on. ``mean_grad`` remains if all ranks that have samples have it.
        An error is raised on all ranks, and leaves all as they were. It takes one more Fisher of memory; tensors that
        were taken out of this Fisher earlier keep their values.

        Args:
            group: the process group; default: all ranks.

        Returns:
            This Fisher.

        Raises:
            RuntimeError: if there is no process group.
            WplfastError: if the Fisher of a rank was reduced already, or one has no memory for the sums.
            NameMismatchError: if names differ; the message has those of both sides.
            ValueError: if shapes differ, an entry is NaN, infinite or negative, or no rank has samples.
        """
        from ..distributed.reduce import merged  # not with the package: not every torch has torch.distributed

        found = merged(self, group)
        self._tensors, self.mean_grad, self.reduced = found.tensors, found.mean_grad, True
        self.n_samples, self.total_weight = found.n_samples, found.total_weight
        return self

    def save(self, path: storage.FilePath, theta_hat: nn.Module | Mapping[str, Tensor] | None = None) -> None:
        """Write a safetensors file atomically: diagonals, mean gradients, counts, provenance, and a checksum of all.

        A file that is there keeps its permissions, a symbolic link stays one. Other threads and processes may save to
        the same path; whoever ends last remains.

        Args:
            path: of the file.
            theta_hat: the model, or its parameters by name, whose values are to be kept beside F. A penalty that
                consolidates what :meth:`load` returns is anchored there, whatever its parameters' values are by then.
                Default: what this Fisher has itself. Without it, a penalty is anchored where its parameters are.

        Raises:
            OSError: if the file cannot be written.
            NameMismatchError: if theta_hat lacks a parameter.
            ValueError: if a shape differs, or an entry is NaN, infinite or negative, which :meth:`load` would refuse.
            RankFailedError: if F lies as shards on several ranks, all of which save it, and another one failed.
        """
        files.save(self, path, theta_hat)

    @classmethod
    def load(cls, path: storage.FilePath, device: str | torch.device = "cpu") -> Fisher:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, damaged, foreign or of another version, or holds what no Fisher is:
                entries that are NaN, infinite or negative, other names than its metadata, bad counts.
        """
        return cls(**files.load(path, device))

    def summary(self, depth: int | None = None) -> Summary:
        """Return a table by module: elements, mean, share of the trace, largest entry.

        The trace is the sum of all entries, ``sum_i F_i``. The table prints well, renders as HTML in notebooks, and is
        a sequence of rows.

        Args:
            depth: how many parts of a module's name count: 1 for ``encoder``, 2 for ``encoder.0``; 0 for one row of
                everything. Default: all of them, a row for each module that has parameters of its own. A parameter
                outside of any module has a row itself.

        Raises:
            ValueError: if depth is negative.

        Example:
            >>> import torch, wplfast
            >>> fisher = wplfast.Fisher({"a.weight": torch.tensor([1.0, 2.0]), "b.weight": torch.tensor([1.0])}, 5)
            >>> [(row.module, row.share) for row in fisher.summary()]
            [('a', 0.75), ('b', 0.25)]
        """
        from .summary import Summary

        return Summary.of(self, depth)

    def plot(self, path: storage.FilePath | None = None) -> Figure:
        """Draw where the model keeps what it knows: each module's share of the trace, and how large its entries are.

        Modules that repeat, such as the blocks of a transformer, are drawn as a map, with a column for each block.

        Args:
            path: a file to draw to; its suffix says the format (.png, .svg, .pdf). Default: none.

        Returns:
            A ``matplotlib.figure.Figure``, which notebooks show.

        Raises:
            ImportError: if matplotlib is missing.
            OSError: if the file cannot be written.
            ValueError: if the suffix names no format that matplotlib draws, or there are no parameters.
        """
        from .plot import draw
        from .spread import Spread

        return draw([Spread.of(name, tensor) for name, tensor in self.items()], self.n_samples, path)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Fisher:
        """Apply a function to every tensor."""
        grad = None if self.mean_grad is None else {name: function(t) for name, t in self.mean_grad.items()}
        return self._with({name: function(t) for name, t in self.items()}, grad, self.report, {n: n for n in self})

    def _rename(self, names: Mapping[str, str]) -> Fisher:
        """Take some names under new ones."""
        grad = None if self.mean_grad is None else {new: self.mean_grad[old] for old, new in names.items()}
        return self._with({new: self[old] for old, new in names.items()}, grad, self.report.renamed(names), names)

    def _with(
        self, tensors: dict[str, Tensor], grad: dict[str, Tensor] | None, report: Report, names: Mapping[str, str]
    ) -> Fisher:
        """Copy with other tensors; ``names`` maps old names to new ones."""
        references = {
            new: p
            for old, new in names.items()
            if old in self._parameters and (p := self._parameters[old]()) is not None
        }
        hats = self.theta_hat
        return Fisher(
            tensors,
            self.n_samples,
            total_weight=self.total_weight,
            mean_grad=grad,
            theta_hat=None if hats is None else {new: hats[old] for old, new in names.items()},
            report=report,
            metadata=self.metadata,
            parameters=references,
            reduced=self.reduced,
        )


def _common(first: Mapping[str, Tensor] | None, second: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    """Return the parameters' values that belong to two Fishers: those of the one that has some.

    Raises:
        ValueError: if they differ.
    """
    if first is None or second is None:
        return second if first is None else first
    for name, value in first.items():
        if not torch.equal(value, second[name].to(value.device)):
            raise ValueError(f"Fishers of different models do not add up: theta_hat[{name!r}] differs")
    return first
