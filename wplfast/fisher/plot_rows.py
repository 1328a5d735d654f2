"""What the lines of a picture of a Fisher are: modules, or, where blocks repeat, the kinds of modules in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .spread import Spread, by_module

#: Modules that are drawn one a line; more than so many are arranged by their place in blocks.
PLAIN = 32

#: Most lines of a picture.
MOST = 44


@dataclass
class Line:
    """One line of a picture.

    Attributes:
        label: a module's name, with a * where the block's number stands.
        whole: what it comes to in all blocks.
        cells: block's number -> what it comes to there; empty for what is in no block.
        is_rest: whether it stands for all that have no line of their own.
    """

    label: str
    whole: Spread
    cells: dict[int, Spread] = field(default_factory=dict)
    is_rest: bool = False

    def quantiles(self) -> tuple[float, ...] | None:
        """Return the 5, 25, 50, 75 and 95 % quantiles of the entries that are not 0; None if all are."""
        entries = self.whole.entries
        positive = entries[entries > 0] if entries is not None else None
        if positive is None or not positive.numel():
            return None
        ordered = positive.sort().values
        return tuple(float(ordered[round(q * (len(ordered) - 1))]) for q in (0.05, 0.25, 0.5, 0.75, 0.95))

    def mean(self) -> float:
        """Return the mean of the entries that are not 0."""
        return self.whole.mean / (1 - self.zeros())

    def zeros(self) -> float:
        """Return the share of the entries that are 0."""
        entries = self.whole.entries
        return float((entries == 0).double().mean()) if entries is not None and len(entries) else 0.0


@dataclass
class Picture:
    """All lines.

    Attributes:
        lines: from top to bottom.
        columns: numbers of the blocks that repeat; empty if no line has cells.
        whole: the whole model.
    """

    lines: list[Line]
    columns: list[int]
    whole: Spread


def arranged(parts: Sequence[Spread]) -> Picture:
    """Arrange tensors as lines: a module a line if that are few; by their place in blocks, or less deep, if not."""
    parts = [part for part in parts if part.elements]
    whole = Spread.joined("", parts)
    modules = by_module(parts)
    if len(modules) <= PLAIN:
        return Picture([Line(module.name, module) for module in modules], [], whole)
    keys = _keys([module.name for module in modules])
    deepest = max(key.count(".") + 1 for key, _ in keys)
    fitting = (d for d in range(deepest, 0, -1) if len({_cut(key, d) for key, _ in keys}) <= MOST)
    depth = next(fitting, deepest)
    groups: dict[str, dict[int | None, list[Spread]]] = {}
    for module, (key, number) in zip(modules, keys, strict=True):
        label = _cut(key, depth)
        column = number if "*" in label.split(".") else None
        groups.setdefault(label, {}).setdefault(column, []).append(module)
    lines = [_line(label, columns) for label, columns in groups.items()]
    lines = _fewest(lines)
    columns = sorted({column for line in lines for column in line.cells})
    return Picture(lines, columns, whole)


def _keys(names: Sequence[str]) -> list[tuple[str, int | None]]:
    """Return each name with a * for the first of its numbers that takes several values, and that number.

    Further numbers within a block, of experts for example, become a # and are not told apart.
    """
    values: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdecimal():
                values.setdefault(".".join(parts[:i]), set()).add(part)
    found = []
    for name in names:
        parts, number = name.split("."), None
        for i, part in enumerate(parts):
            prefix = ".".join(name.split(".")[:i])
            if not part.isdecimal() or len(values[prefix]) < 2:
                continue
            if number is None:
                number, parts[i] = int(part), "*"
            elif len(values[prefix]) > 2:
                parts[i] = "#"
        found.append((".".join(parts), number))
    return found


def _cut(key: str, depth: int) -> str:
    """Return the first parts of a name."""
    return ".".join(key.split(".")[:depth])


def _line(label: str, columns: dict[int | None, list[Spread]]) -> Line:
    """Return a line, with cells if it repeats."""
    whole = Spread.joined(label, [part for parts in columns.values() for part in parts])
    cells = {c: Spread.joined(label, parts) for c, parts in columns.items() if c is not None}
    return Line(label, whole, cells)


def _fewest(lines: list[Line]) -> list[Line]:
    """Return so many lines that they can be read: those with the largest sums, and one for all others."""
    if len(lines) <= MOST:
        return lines
    by_total = sorted(range(len(lines)), key=lambda i: -lines[i].whole.total)
    chosen = set(by_total[: MOST - 1])
    others = [line.whole for i, line in enumerate(lines) if i not in chosen]
    rest = Line(f"({len(others):,} others)", Spread.joined("", others), is_rest=True)
    return [*(lines[i] for i in sorted(chosen)), rest]
