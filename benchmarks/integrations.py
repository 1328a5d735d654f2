"""What the integrations cost: a step with the callback over one without, and the Fisher of a Trainer's data.

Each package has a module of its own, ``benchmarks/integrations_NAME.py``, whose ``NAME_step`` times a training step
without the penalty, with the callback, and with the loop over parameters that users write into the loss.

A step's time varies by more than the penalty takes. So steps without and with the callback are neighbours, and what the
penalty takes is also timed by itself, inside of the steps, beside its roof: a triad in place that moves as many bytes.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import wplfast

from .roofs import triad_in_place
from .timing import Budget, measure, quartiles, ratio

PACKAGES = ("transformers", "lightning")
WAYS = ("without", "callback", "loop")
TURN = ("without", "callback", "callback", "without", "loop")  # in every other turn the first two ways are exchanged
WARM_UP = 1  # turns that are not counted
FEWEST = 2  # turns that are counted, however long they take
PENALTY_BYTES = 20  # of a float32 parameter: theta, theta_hat, F and .grad are read, .grad is written


def n_steps(rounds: int) -> int:
    """Return the steps of a training that measures so many pairs of steps with and without the callback."""
    return len(TURN) * (WARM_UP + math.ceil(rounds / 2))


def way_of(step: int) -> str:
    """Return the way of a step of a training in which all ways take turns."""
    turn, place = divmod(step, len(TURN))
    way = TURN[place]
    return way if turn % 2 == 0 or way == "loop" else WAYS[1 - WAYS.index(way)]


class Turns:
    """Whose turn each step of a training is, and what was measured.

    Args:
        model: that is trained.
        wpl: its penalty, whose ``add_grad_`` is timed from now on.
        budget: the device of the model, and the seconds after which no further step is to begin, but for the fewest.
    """

    def __init__(self, model: nn.Module, wpl: wplfast.WeightPlasticityLoss, budget: Budget) -> None:
        self.times: dict[str, list[float]] = {way: [] for way in WAYS}
        self.way, self.n_steps = WAYS[0], 0
        self._n_parameters = sum(p.numel() for p in model.parameters())
        self._bytes = PENALTY_BYTES * self._n_parameters
        self._device, self._started = budget.device, 0.0
        self._end = time.perf_counter() + budget.seconds
        self._roof = triad_in_place(self._bytes, budget.device)
        self._roof_times: list[float] = []
        self._penalty: list[float] = []
        wpl.add_grad_ = self._timed(wpl.add_grad_)  # type: ignore[method-assign]

    def next(self) -> str:
        """Measure the roof, go on to the next step and return its way; whoever trains is to follow it, then start."""
        self._roof_times.append(measure(self._roof, 1, self._device))
        self.way = way_of(self.n_steps)
        return self.way

    def start(self) -> None:
        """Start the clock."""
        self._started = self._now()

    def stop(self) -> None:
        """Stop the clock."""
        self.times[self.way].append(self._now() - self._started)
        self.n_steps += 1

    @property
    def are_over(self) -> bool:
        """Whether the time is up, and enough was measured."""
        return self.n_steps >= len(TURN) * (WARM_UP + FEWEST) and time.perf_counter() > self._end

    def record(self, case: str) -> dict[str, Any]:
        """Return what is recorded of a package's training step.

        Args:
            case: what was trained.
        """
        per_turn = {way: TURN.count(way) for way in WAYS}
        turns = min(len(taken) // per_turn[way] for way, taken in self.times.items())
        counted = {way: taken[per_turn[way] * WARM_UP : per_turn[way] * turns] for way, taken in self.times.items()}
        without, callback, loop = (counted[way] for way in WAYS)
        penalty = self._penalty[per_turn["callback"] * WARM_UP :][: len(callback)]
        roof = self._roof_times[len(TURN) * WARM_UP :]
        return {
            "case": case,
            "parameters": self._n_parameters,
            "rounds": len(callback),
            "milliseconds": {way: quartiles(taken, 1e3) for way, taken in counted.items()},
            "callback_over_without": ratio(callback, without),
            "loop_over_callback": ratio(loop, callback[:: per_turn["callback"]]),
            "penalty": {
                "milliseconds": quartiles(penalty, 1e3),
                "over_without": ratio(penalty, without),
                "bytes": self._bytes,
                "roof_milliseconds": quartiles(roof, 1e3),
            },
        }

    def _timed(self, add_grad_: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the method that notes how long each call takes."""

        def timed(*args: Any, **kwargs: Any) -> Tensor:
            started = self._now()
            value = add_grad_(*args, **kwargs)
            self._penalty.append(self._now() - started)
            return value

        return timed

    def _now(self) -> float:
        """Return the seconds by now, once the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def run(budget: Budget) -> dict[str, Any]:
    """Measure every package that is installed; return the records, and what is missing."""
    found: dict[str, Any] = {"steps": [], "fisher": None, "missing": []}
    for name in PACKAGES:
        try:
            part = importlib.import_module(f".integrations_{name}", __package__)
        except ImportError as error:
            found["missing"].append(f"{name}: {error}")
            continue
        found["steps"].append(getattr(part, f"{name}_step")(budget))
        if name == "transformers":
            found["fisher"] = part.fisher_epoch(budget)
    return found
