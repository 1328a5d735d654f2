"""``wplfast diff``: how alike two Fishers are, by module."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fisher.spread import even_step, module_of
from ..fisher.table import table, terminal_width
from .fisher_file import FisherFile, fisher_file

#: Most elements of a module that are ranked; of more, evenly spaced ones are: 0.001 of a rank correlation's deviation.
RANKED = 1 << 20

#: Elements that are multiplied at once.
PART = 1 << 22

#: Rows that are printed; JSON has all.
MOST = 60

_HEADER = ("module", "elements", "cosine", "rank correlation", "top 1 % shared")


class Likeness(NamedTuple):
    """How alike two Fishers are in one module.

    Attributes:
        module: its name.
        elements: number of elements.
        cosine: ``sum a b / (|a| |b|)``; NaN where one is zero.
        rank_correlation: Spearman's, with mean ranks for ties; NaN where one is constant.
        top_overlap: share of the largest 1 % of entries that both have in common.
        sampled: whether the last two are of evenly spaced entries, because there are too many.
    """

    module: str
    elements: int
    cosine: float
    rank_correlation: float
    top_overlap: float
    sampled: bool


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "diff",
        help="how alike two Fishers are, by module",
        description="Compare two Fishers by module: cosine, Spearman's rank correlation, and the share of the largest "
        "1 % of entries that they have in common.",
        epilog="example: wplfast diff empirical.safetensors mc.safetensors --depth 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("first", metavar="A", help="a file of a Fisher")
    command.add_argument("second", metavar="B", help="another one")
    command.add_argument("--depth", type=int, metavar="N", help="how many parts of a module's name count")
    command.add_argument("--json", action="store_true", help="print all rows as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    if arguments.depth is not None and arguments.depth < 0:
        raise ValueError(f"--depth must not be negative, got {arguments.depth}")
    with fisher_file(arguments.first) as first, fisher_file(arguments.second) as second:
        first.check()
        second.check()
        names, left_out = _common(first, second)
        modules: dict[str, list[str]] = {}
        for name in names:
            modules.setdefault(module_of(name, arguments.depth), []).append(name)
        whole = _Cosine()
        rows = []
        for module, members in modules.items():
            cosine = _Cosine()
            for name in members:
                cosine.add(first.get(name), second.get(name))
            whole.join(cosine)
            rows.append(_likeness(module, cosine, _entries(first, members), _entries(second, members)))
        total = _likeness("total", whole, _entries(first, names), _entries(second, names))
    if arguments.json:
        found = {
            "first": arguments.first,
            "second": arguments.second,
            "total": _plain(total),
            "modules": [_plain(row) for row in rows],
            "left_out": left_out,
        }
        print(json.dumps(found, indent=2))
        return 0
    for name, why in left_out.items():
        print(f"wplfast diff: left out {name}: {why}", file=sys.stderr)
    shown = rows
    if len(rows) > MOST:
        chosen = sorted(range(len(rows)), key=lambda i: (math.isnan(rows[i].cosine), rows[i].cosine))[:MOST]
        shown = [rows[i] for i in sorted(chosen)]
    print(table(_HEADER, [_cells(row) for row in (*shown, total)], terminal_width()))
    if len(shown) < len(rows):
        print(f"the {len(shown)} least alike by cosine of {len(rows):,} modules; --json prints all, --depth joins some")
    if any(row.sampled for row in (*shown, total)):
        print(f"~ of evenly spaced entries, at most {RANKED:,}")
    return 0


class _Cosine:
    """Sums that a cosine is made of, in float64."""

    def __init__(self) -> None:
        self.product = self.first = self.second = 0.0
        self.elements = 0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add two tensors, a part at a time."""
        for a, b in zip(first.reshape(-1).split(PART), second.reshape(-1).split(PART), strict=True):
            a, b = a.double(), b.double()
            self.product += float(a @ b)
            self.first += float(a @ a)
            self.second += float(b @ b)
            self.elements += a.numel()

    def join(self, other: _Cosine) -> None:
        """Add another module's sums."""
        self.product += other.product
        self.first += other.first
        self.second += other.second
        self.elements += other.elements

    @property
    def value(self) -> float:
        """The cosine."""
        norms = math.sqrt(self.first) * math.sqrt(self.second)
        return self.product / norms if norms else math.nan


def _entries(file: FisherFile, names: Sequence[str]) -> Tensor:
    """Return the entries of some parameters, evenly spaced ones if they are too many."""
    sizes = [math.prod(file.shape(name)) for name in names]
    least = math.ceil(sum(sizes) / RANKED) or 1
    parts = (
        file.get(name).reshape(-1)[:: even_step(size, least)].to(torch.float64)
        for name, size in zip(names, sizes, strict=True)
        if size
    )
    return torch.cat([torch.zeros(0), *parts])


def _likeness(module: str, cosine: _Cosine, first: Tensor, second: Tensor) -> Likeness:
    """Compare two Fishers of one module."""
    is_sampled = len(first) < cosine.elements
    rank, top = spearman(first, second), top_overlap(first, second)
    return Likeness(module, cosine.elements, cosine.value, rank, top, is_sampled)


def spearman(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two 1-d tensors: that of their ranks, ties having their mean rank.

    Example:
        >>> import torch
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 15.0]))
        0.5
    """
    if len(first) < 2:
        return math.nan
    a, b = (ranks - ranks.mean() for ranks in (_ranks(first), _ranks(second)))
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Return ranks from 0, ties having their mean rank, float64."""
    ordered, order = values.sort()
    _, group, counts = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    mean = (2 * last - counts - 1).double() / 2
    ranks = torch.empty(len(values), dtype=torch.float64)
    ranks[order] = mean[group]
    return ranks


def top_overlap(first: Tensor, second: Tensor) -> float:
    """Return the share of the largest 1 % of entries (one at least) that two 1-d tensors have in common.

    Entries of 0 are none of the largest.
    """
    count = max(1, math.ceil(len(first) / 100))
    if not len(first):
        return math.nan
    masks = []
    for values in (first, second):
        largest, at = values.topk(count)
        mask = torch.zeros(len(values), dtype=torch.bool)
        mask[at[largest > 0]] = True
        masks.append(mask)
    most = max(int(mask.sum()) for mask in masks)
    return int((masks[0] & masks[1]).sum()) / most if most else math.nan


def _common(first: FisherFile, second: FisherFile) -> tuple[list[str], dict[str, str]]:
    """Return the names that can be compared, and why others cannot.

    Raises:
        ValueError: if there are none.
    """
    names, left_out = [], {}
    others = set(second.names)
    for name in first.names:
        if name not in others:
            left_out[name] = f"only in {first.path}"
        elif first.shape(name) != second.shape(name):
            left_out[name] = f"shapes {list(first.shape(name))} and {list(second.shape(name))}"
        else:
            names.append(name)
    held = set(first.names)
    left_out |= {name: f"only in {second.path}" for name in second.names if name not in held}
    if not names:
        name, why = next(iter(left_out.items()), ("", "no parameters"))
        raise ValueError(f"{first.path} and {second.path} have no parameters in common, such as {name}: {why}")
    return names, left_out


def _cells(row: Likeness) -> tuple[str, ...]:
    """Return a row as text."""
    about = "~" if row.sampled else ""

    def written(value: float, text: str) -> str:
        return "-" if math.isnan(value) else text

    return (
        row.module,
        f"{row.elements:,}",
        written(row.cosine, f"{row.cosine:.4f}"),
        written(row.rank_correlation, f"{about}{row.rank_correlation:.4f}"),
        written(row.top_overlap, f"{about}{100 * row.top_overlap:.1f} %"),
    )


def _plain(row: Likeness) -> dict[str, Any]:
    """Return a row as plain data: NaN is None."""
    return {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in row._asdict().items()}
