"""One search: in every epoch, train sampled architectures one after the other, then the controller."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import wplfast

from ..harness.options import option, positive, strength
from ..harness.statistics import five_digits
from .controller import Controller, Policy, Reinforce
from .penalty import ReferencePenalty, Schedule
from .problem import Choices, Problem

#: how forgetting is measured, and what each is called
MEASURES = {"mean": "mean difference", "best5": "best-5 mean difference", "max": "max difference"}


def forgetting(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Return mean and maximum of after - before, and its mean over the five architectures that were best before.

    Args:
        before: errors of n >= 1 architectures, each right after its own training.
        after: of the same ones, after all others of the epoch were trained too.
    """
    first = np.asarray(before, float)
    difference = np.asarray(after, float) - first
    best = np.argsort(first, kind="stable")[:5]
    return {"mean": float(difference.mean()), "best5": float(difference[best].mean()), "max": float(difference.max())}


@dataclass(frozen=True)
class Setup:
    """Settings that a search with the penalty and one without have in common."""

    epochs: int = option(12, positive)
    architectures: int = option(10, positive, "per epoch")
    minibatches: int = option(5, positive, "per architecture")
    clip: float = option(0.25, strength, "norm of all gradients")
    lr_decay: float = 0.96  # factor of the learning rate after every epoch ...
    lr_decay_after: int = 15  # ... from this one on
    weight_decay: float = 1e-7  # plain L2 decay of all weights in use
    momentum: float = 0.0
    derive: int = 10  # architectures that the final one is chosen from, by validation error
    policy: Policy = field(default_factory=Policy)
    schedule: Schedule = field(default_factory=Schedule)
    compare: bool = False  # time the published way beside the penalty
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """What one search did."""

    seed: int
    lr: float
    alpha: float | None
    diverged: bool  # a loss was no longer finite, which ended it
    epochs: list[dict[str, float]]  # what was measured in each
    times: dict[str, dict[str, float]]  # milliseconds and counts by part, of the epochs in which the penalty may act
    final: dict[str, Any]  # validation and test error of the architecture that was chosen in the end, and its choices


def search(problem: Problem, setup: Setup, seed: int, lr: float, alpha: float | None) -> Run:
    """Search; nothing but the penalty differs between runs of one seed, also the problem's, and learning rate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _Search(problem, setup, seed, lr, alpha).run()


class _Search:
    """The state of a search."""

    def __init__(self, problem: Problem, setup: Setup, seed: int, lr: float, alpha: float | None) -> None:
        """Make the controller and the optimizers."""
        self.problem, self.setup, self.seed, self.lr, self.alpha = problem, setup, seed, lr, alpha
        self.generator = torch.Generator().manual_seed(seed)
        self.controller = Controller(problem.decisions)
        self.reinforce = Reinforce(self.controller, setup.policy, self.generator)
        self.parameters = list(problem.model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr, setup.momentum, weight_decay=setup.weight_decay)
        self.wpl = self.published = None
        self.strength = 0.0  # alpha in the present epoch
        if alpha is not None:
            self.wpl = wplfast.WeightPlasticityLoss(problem.weights, alpha)
            if setup.compare:
                self.published = ReferencePenalty(problem.weights, alpha, setup.schedule.rate)
        self.clock = _Clock(setup.device)
        self.verified = False

    def run(self) -> Run:
        """Run all epochs."""
        epochs: list[dict[str, float]] = []
        here = multiprocessing.parent_process() is None  # workers would draw over each other
        for epoch in tqdm(range(self.setup.epochs), "epochs", leave=False, disable=None if here else True):
            measured = self._epoch(epoch)
            if measured is None:
                return Run(self.seed, self.lr, self.alpha, True, epochs, self.clock.milliseconds(), {})
            epochs.append({key: five_digits(value) for key, value in measured.items()})
        return Run(self.seed, self.lr, self.alpha, False, epochs, self.clock.milliseconds(), self._derive())

    def _epoch(self, epoch: int) -> dict[str, float] | None:
        """Train architectures, measure what they forgot, train the controller; None if a loss was not finite."""
        setup = self.setup
        if epoch == setup.schedule.start:
            self.clock = _Clock(setup.device)  # both arms are timed over the same epochs
        if self.wpl is not None:
            self.strength = setup.schedule.begin_epoch(self.wpl, self.alpha, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * setup.lr_decay ** max(0, epoch - setup.lr_decay_after)
        trained: list[Choices] = []
        before, losses = [], []
        for _ in range(setup.architectures):
            with torch.no_grad():
                choices = self.controller.sample(1, self.generator).architectures[0]
            loss = self._train(choices)
            if not math.isfinite(loss):
                return None
            trained.append(choices)
            losses.append(loss)
            with self.clock.part("evaluation"):
                before.append(self.problem.error(choices))
            if self.strength and not self._consolidate(choices):
                return None
        with self.clock.part("evaluations at the epoch's end"):
            after = [self.problem.error(choices) for choices in trained]
        with self.clock.part("controller"):
            rewards = [r for _ in range(setup.policy.steps) for r in self.reinforce.step(self.problem.reward)]
        return {
            "alpha": self.strength,
            "loss": sum(losses) / len(losses),
            "error_before": sum(before) / len(before),
            "error_after": sum(after) / len(after),
            **forgetting(before, after),
            "reward": sum(rewards) / len(rewards),
        }

    def _train(self, choices: Choices) -> float:
        """Train an architecture; return its mean loss without the penalty.

        The penalty enters before gradients are clipped, as it was published: with a learning rate of 20, a penalty that
        nothing bounds would overshoot its own minimum wherever ``lr * alpha * F > 2``.
        """
        active = self.problem.active(choices)
        losses = []
        for _ in range(self.setup.minibatches):
            with self.clock.part("cross-entropy"):
                self.optimizer.zero_grad()
                loss = self.problem.train_loss(choices)
                loss.backward()
            if self.strength and active:
                if self.published is not None:
                    with self.clock.part("penalty, as published"):
                        self.published.gradients(active)
                with self.clock.part("penalty"):
                    self.wpl.add_grad_(active=active)
            with self.clock.part("clipping and step"):
                torch.nn.utils.clip_grad_norm_(self.parameters, self.setup.clip)
                self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()

    def _consolidate(self, choices: Choices) -> bool:
        """Estimate the architecture's Fisher and move the anchor of its weights; False if it is not finite.

        The first estimate is verified; the cells that follow are made of the same operations.
        """
        active = self.problem.active(choices)
        if not active:
            return True
        given = self.problem.fisher_pass(choices)
        if self.published is not None:
            with self.clock.part("Fisher, as published"):
                self.published.learn(given, active)
        try:
            with self.clock.part("Fisher" if self.verified else "Fisher, verified"):
                more = {"params": self.wpl.subset(active), "verify": not self.verified}
                fisher = wplfast.fisher_diagonal(given.model, [given.batch], given.loss_fn, **more)
            self.verified = True
            with self.clock.part("anchor"):
                self.setup.schedule.learn(self.wpl, fisher, active)
        except wplfast.errors.NonFiniteError:
            return False
        return True

    def _derive(self) -> dict[str, Any]:
        """Choose the best of some architectures by validation error, and measure it on the test part."""
        with torch.no_grad():
            found = self.controller.sample(self.setup.derive, self.generator).architectures
        errors = [self.problem.error(choices) for choices in found]
        best = min(range(len(found)), key=errors.__getitem__)
        test = self.problem.test_error(found[best])
        return {"validation": five_digits(errors[best]), "test": five_digits(test), "choices": list(found[best])}


class _Clock:
    """Adds up times by part; on a GPU a part ends when its kernels have."""

    def __init__(self, device: str) -> None:
        """Start at zero."""
        self._wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done inside."""
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self._seconds[name].append(time.perf_counter() - started)

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Return the mean time of one, and how many there were, by part."""
        parts = self._seconds.items()
        return {name: {"milliseconds": round(1e3 * sum(s) / len(s), 4), "count": len(s)} for name, s in parts}
