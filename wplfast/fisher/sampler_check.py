"""Does a user's sampler draw from the distribution that the loss is -log p of? Tested where that is a known one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .likelihood import fit
from .reading import Reading

#: A right sampler is refused with a probability below 2 exp(-LIMIT), about 1e-15 (8.4 standard deviations).
LIMIT = 35.0

#: Seconds that the draws may take, and how many rows times classes are looked at.
SECONDS, ELEMENTS = 0.5, 1 << 22


def check_sampler(
    sampler: Callable[[Any, torch.Generator], Any],
    loss_fn: Callable[[Any, Any], Tensor],
    outputs: Any,
    device: torch.device,
    parameters: Sequence[Tensor],
) -> tuple[Reading | None, str]:
    """Compare the draws of a sampler with the probabilities that the loss assigns to them.

    The first half of the draws tells in which direction they differ most from the outputs' distribution, the second
    half whether they do: its sum has a known mean and variance, and Bernstein's inequality bounds what chance can do.

    Args:
        sampler: ``sampler(outputs, generator) -> targets``.
        loss_fn: the per-sample loss.
        outputs: the model's outputs for a batch.
        device: of the generator that the sampler gets.
        parameters: the watched parameters.

    Returns:
        How the loss reads the draws, if it is -log p of a known likelihood, and why no comparison could be made (empty
        if it was).

    Raises:
        ValueError: if the sampler draws from another distribution, such as that of the position beside.
    """
    generator = torch.Generator(device).manual_seed(0x5EED)
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        first = sampler(outputs, generator)
        reading = _known(loss_fn, outputs, first, parameters)
        if reading is None:
            return None, "its loss is not -log p of a likelihood that is known here"
        if reading.ignored is not None:
            return reading, f"its loss ignores the class {reading.ignored:g}"
        distribution = _Distribution(reading, outputs)
        n_draws = min(1024, max(64, (1 << 14) // max(1, distribution.n_rows)))
        draws, started = [distribution.labels(first)], time.perf_counter()
        while len(draws) < n_draws and time.perf_counter() - started < SECONDS:
            draws.append(distribution.labels(sampler(outputs, generator)))
        excess = distribution.excess(draws)
    if excess > 1:
        moved = reading.alignment.dim is not None
        raise ValueError(
            f"the sampler does not draw from the distribution that loss_fn is -log p of: in {len(draws)} draws its "
            f"targets differ {excess:.3g} times as much from the {reading.likelihood} distribution of the outputs as "
            "chance could explain. "
            + ("The loss is shifted: it compares label t + 1 with position t, so draw label t + 1 from there. " * moved)
            + "Draw from what the loss describes, or use fisher_type='empirical'"
        )
    return reading, ""


class _Distribution:
    """The distribution of each row of some outputs, by a reading of the loss.

    Args:
        reading: how the loss reads outputs and targets.
        outputs: the outputs.
    """

    def __init__(self, reading: Reading, outputs: Any) -> None:
        """See the class."""
        self.reading = reading
        self.logits = reading.logits.get(outputs).detach()
        self.shape = reading.row_shape(self.logits)
        if reading.categorical:
            rows = self.logits.movedim(reading.dim, -1).reshape(-1, self.logits.shape[reading.dim])
            self.mean = rows[: max(1, ELEMENTS // rows.shape[1])].double().softmax(-1)
        else:
            values = self.logits.reshape(-1)[:ELEMENTS].double()
            self.mean = values.sigmoid() if reading.likelihood == "bernoulli" else values
        self.n_rows = len(self.mean)

    def labels(self, drawn: Any) -> Tensor:
        """Return the drawn labels of the rows, in order."""
        given = self.reading.given(self.logits, drawn)
        if given is None:
            raise ValueError("the sampler returns targets of another form from one call to the next")
        fill = -1 if self.reading.categorical else float("nan")
        return self.reading.alignment.to_rows(given, self.shape, fill).reshape(-1)[: self.n_rows]

    def excess(self, draws: list[Tensor]) -> float:
        """Return how much the draws differ from the distribution, as a multiple of what chance can explain."""
        half = len(draws) // 2
        direction = torch.zeros_like(self.mean)
        for y in draws[:half]:
            direction += self._residual(y) / half
        total, variance = 0.0, 0.0
        for y in draws[half:]:
            known = self.reading.counts(y, self.reading.n_classes(self.logits))
            if self.reading.categorical:
                mean = (self.mean * direction).sum(-1)
                at_label = direction.gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)
                part, spread = at_label - mean, (self.mean * direction.square()).sum(-1) - mean.square()
            else:
                bernoulli = self.reading.likelihood == "bernoulli"
                part = (y.double() - self.mean).nan_to_num(nan=0.0) * direction
                spread = (self.mean * (1 - self.mean) if bernoulli else 1.0) * direction.square()
            total += float(part[known].sum())
            variance += float(spread[known].sum())
        bound = 0.0 if self.reading.likelihood == "gaussian" else 2 * float(direction.abs().max()) * LIMIT / 3
        allowed = bound + math.sqrt(bound**2 + 2 * variance * LIMIT)
        excess = abs(total) / allowed if allowed else 0.0
        if self.reading.likelihood == "gaussian":
            squares = torch.cat([(y.double() - self.mean)[~y.isnan()].square() for y in draws])
            allowed = 2 * math.sqrt(len(squares) * LIMIT) + 2 * LIMIT
            excess = max(excess, abs(float(squares.sum()) - len(squares)) / allowed)
        return excess

    def _residual(self, y: Tensor) -> Tensor:
        """Return how a draw differs from the mean: zero for labels that do not count."""
        known = self.reading.counts(y, self.reading.n_classes(self.logits))
        if not self.reading.categorical:
            return torch.where(known, y.double() - self.mean, 0)
        residual = (-self.mean).scatter_add(-1, y.clamp_min(0).unsqueeze(-1), torch.ones_like(self.mean[:, :1]))
        return residual * known.unsqueeze(-1)


def _known(
    loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, parameters: Sequence[Tensor]
) -> Reading | None:
    """Return how the loss reads the targets, if it is -log p of a known likelihood."""
    for likelihood in ("categorical", "bernoulli", "gaussian"):
        try:
            reading = fit(likelihood, loss_fn, outputs, targets, parameters)
        except (ValueError, TypeError):
            continue
        if reading is not None and reading.labels is not None:
            return reading
    return None
