"""How a Fisher pass was served, and what several passes' reports come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..capture.accumulators import SLOW_RULES


@dataclass
class Report:
    """How a Fisher pass was served.

    Attributes:
        rules: parameter name -> the rules that served its uses; empty where no loss reached the parameter.
        seconds: rule -> wall time spent in it (host time; kernels on a GPU run on).
        total_seconds: wall time of all backward passes.
        skipped_samples: samples left out by ``on_nonfinite="skip"``.
        numels: parameter name -> number of elements.
        passes_per_batch: backward passes for each forward pass: 1 in a steady batch, more where owners of rows are
            measured, gradients are verified, or a parameter takes one for each sample.
        unchecked: why it could not be checked that samples are independent, or that a sampler draws from what the
            loss describes, if it could not.
    """

    rules: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    total_seconds: float = 0.0
    skipped_samples: int = 0
    numels: dict[str, int] = field(default_factory=dict)
    passes_per_batch: float = 0.0
    unchecked: tuple[str, ...] = ()

    @property
    def unreached(self) -> tuple[str, ...]:
        """Parameters that no loss depended on; their Fisher is zero."""
        return tuple(name for name, rules in self.rules.items() if not rules)

    @property
    def slow(self) -> tuple[str, ...]:
        """Parameters that were served one sample at a time, wholly or in part."""
        return tuple(name for name, rules in self.rules.items() if SLOW_RULES & set(rules))

    @property
    def fast_share(self) -> float:
        """Share of the reached parameters' elements that fast rules served alone."""
        reached = sum(self.numels[name] for name, rules in self.rules.items() if rules)
        slow = sum(self.numels[name] for name in self.slow)
        return 1.0 - slow / reached if reached else 1.0

    @property
    def fast_time_share(self) -> float:
        """Share of the backward passes' time that was not spent in the exact per-sample path."""
        slow = sum(self.seconds.get(rule, 0.0) for rule in SLOW_RULES)
        return 1.0 - slow / self.total_seconds if self.total_seconds else 1.0

    def renamed(self, names: Mapping[str, str]) -> Report:
        """Return the report on some parameters; ``names`` maps their names to new ones."""
        return replace(
            self,
            rules={new: self.rules[old] for old, new in names.items() if old in self.rules},
            numels={new: self.numels[old] for old, new in names.items() if old in self.numels},
            seconds=dict(self.seconds),
        )

    def merged(self, other: Report, own_samples: int, other_samples: int) -> Report:
        """Return the report on two passes as if they were one.

        Args:
            other: on the same parameters, and other samples.
            own_samples: of the pass that this report is on: passes for each batch are a mean by samples.
            other_samples: likewise. A report that knows nothing of passes, as of a file, counts for nothing there.
        """
        known = own_samples * bool(self.passes_per_batch), other_samples * bool(other.passes_per_batch)
        passes = known[0] * self.passes_per_batch + known[1] * other.passes_per_batch
        return Report(
            rules={
                name: _united(self.rules.get(name, ()), other.rules.get(name, ()))
                for name in _united(self.rules, other.rules)
            },
            seconds={
                rule: self.seconds.get(rule, 0.0) + other.seconds.get(rule, 0.0)
                for rule in _united(self.seconds, other.seconds)
            },
            total_seconds=self.total_seconds + other.total_seconds,
            skipped_samples=self.skipped_samples + other.skipped_samples,
            numels={**other.numels, **self.numels},
            passes_per_batch=passes / sum(known) if sum(known) else 0.0,
            unchecked=_united(self.unchecked, other.unchecked),
        )


def _united(first: Iterable[str], second: Iterable[str]) -> tuple[str, ...]:
    """Return the different entries of two, in their order."""
    return tuple(dict.fromkeys((*first, *second)))
