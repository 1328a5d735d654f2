"""A Fisher pass in portions: what is done stands in a file, from which the same command goes on after any end.

Each portion is a ``fisher_diagonal`` of its own, merged by sample counts. Draws of "mc" are seeded for each batch, so
that neither portions nor interruptions change them.
"""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from ...fisher.diagonal import fisher_diagonal
from ...fisher.report import Report
from ...fisher.result import Fisher
from .problem import Problem, Step
from .ranks import Ranks
from .stop import Stop

#: A portion is so many times as long as its first batch, which is measured and verified, so that this costs little.
_PER_FIRST_BATCH = 10

#: Key of what an unfinished file says about itself.
PARTIAL = "partial"


@dataclass
class Done:
    """What a process has done.

    Attributes:
        batches: number of batches.
        left_out: samples without a loss.
        truncated: samples that were cut.
        state: what tells these batches from others.
    """

    batches: int = 0
    left_out: int = 0
    truncated: int = 0
    state: str = ""


class InterruptedPass(Exception):  # noqa: N818, it is no error
    """A signal ended the pass; what is done is in the file.

    Attributes:
        signal: its number.
    """

    def __init__(self, signal: int, n_samples: int, path: str | None) -> None:
        kept = f"run the same command again to go on (they are in {path})" if path else "nothing was done yet"
        super().__init__(f"stopped after {n_samples:,} samples: {kept}")
        self.signal = signal


class ResumablePass:
    """The part of a pass that one process runs.

    Args:
        problem: what to compute.
        ranks: this process among others.
        output: the file that the Fisher is for; unfinished ones are beside it.
        fisher_type: as ``fisher_diagonal`` takes it.
        mc_samples: likewise.
        seed: of draws.
        every: seconds between two writes of the unfinished file; 0: after every batch.

    Attributes:
        done: what was done, in this run and before.
        n_resumed: samples that were done before this run.
    """

    def __init__(
        self, problem: Problem, ranks: Ranks, output: str, fisher_type: str, mc_samples: int, seed: int, every: float
    ) -> None:
        self._problem, self._ranks, self._every, self._seed = problem, ranks, every, seed
        of_rank = "" if ranks.world == 1 else f"-{ranks.rank}-of-{ranks.world}"
        self.path = f"{output}.partial{of_rank}"
        self._device = next(iter(problem.parameters.values())).device
        self._generator = torch.Generator(self._device)
        self._options: dict[str, Any] = {
            "params": problem.parameters,
            "fisher_type": fisher_type,
            "likelihood": problem.likelihood,
            "mc_samples": mc_samples,
            "generator": self._generator,
            "reduce": False,  # in the end, of all that is done
        }
        self.done = Done()
        self._total: Fisher | None = None
        self._report = Report()
        _refuse_others(output, ranks.world)
        if os.path.exists(self.path):
            self._resume()
        self.n_resumed = self.n_samples

    @property
    def n_samples(self) -> int:
        """Samples that are done."""
        return 0 if self._total is None else self._total.n_samples

    def run(self) -> Fisher:
        """Run what is left and return the Fisher of this process: of no samples if it has none.

        Raises:
            InterruptedPass: if a signal ended it.
            ValueError: if batches that are done are others now, or data, loss or model are not what they must be.
        """
        with Stop(patient=self._ranks.world > 1) as stop, self._bar() as bar:
            steps = self._problem.batches.steps(self.done.batches, self.done.state)
            upcoming = None if self._is_full() else next(steps, None)
            while upcoming is not None:
                portion = _Portion(self, steps, upcoming, stop, bar)
                self._add(portion)
                upcoming = None if self._is_full() else portion.upcoming
                if upcoming is not None or self._ranks.world > 1:
                    self._save()
                if stop.signal is not None and upcoming is not None:
                    raise InterruptedPass(stop.signal, self.n_samples, self.path)
        if self._total is None:
            return Fisher.zeros(self._problem.parameters)
        return self._total

    def remove(self) -> None:
        """Remove the unfinished file."""
        if os.path.exists(self.path):
            os.unlink(self.path)

    @property
    def slow(self) -> tuple[str, ...]:
        """Parameters that were served one sample at a time."""
        return self._report.slow

    def reseed(self, batch: int) -> None:
        """Seed the draws of a batch."""
        mixed = (self._seed * 1_000_003 + batch) * 1_000_003 + self._ranks.rank
        self._generator.manual_seed(mixed % 2**63)

    def portion_ends(self, started: float, first_batch: float | None) -> bool:
        """Tell whether it is time to write what is done."""
        if not self._every:
            return True
        least = max(self._every, _PER_FIRST_BATCH * (first_batch or 0.0))
        return time.monotonic() - started >= least

    def _is_full(self) -> bool:
        """Tell whether enough samples are done."""
        return self._problem.limit is not None and self.n_samples >= self._problem.limit

    def _add(self, portion: _Portion) -> None:
        """Run a portion and merge it."""
        problem = self._problem
        left = None if problem.limit is None else problem.limit - self.n_samples
        done = Done(**asdict(self.done))
        if portion.advance_to_samples(done):
            fisher = fisher_diagonal(problem.model, portion, problem.loss, max_samples=left, **self._options)
            if self._total is None:
                self._total, self._report = fisher, fisher.report
            else:
                self._total = _merged(self._total, fisher)
        self.done = done

    def _save(self) -> None:
        """Write what is done."""
        if self._total is None:
            return
        said = {"identity": self._problem.identity, "done": asdict(self.done)}
        Fisher(
            dict(self._total),
            self._total.n_samples,
            total_weight=self._total.total_weight,
            metadata={**self._total.metadata, PARTIAL: json.dumps(said)},
        ).save(self.path)

    def _resume(self) -> None:
        """Take up what was done before.

        Raises:
            ValueError: if the file is damaged, or of another command, data or model.
        """
        anew = f"delete {self.path} to start anew"
        try:
            found = Fisher.load(self.path, self._device)
            said = json.loads(found.metadata.pop(PARTIAL))
            identity, done = said["identity"], Done(**said["done"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not what an interrupted run left ({error}); {anew}") from error
        own = json.loads(json.dumps(self._problem.identity))
        differing = [key for key in {**own, **identity} if own.get(key) != identity.get(key)]
        if differing:
            key = differing[0]
            was, now = identity.get(key), own.get(key)
            raise ValueError(
                f"{self.path} is of another run: {key} was {was!r}, now it is {now!r}; run that command again, choose "
                f"another -o, or {anew}"
            )
        self._total, self.done = found, done

    def _bar(self) -> tqdm[Any]:
        """Make the progress bar, which is silent where standard error is no terminal."""
        total = self._problem.batches.n_samples if self._problem.limit is None else self._problem.limit
        return tqdm(
            total=total,
            initial=self.done.left_out + self.n_samples,
            unit=" samples",
            desc="Fisher",
            disable=True if self._ranks.rank else None,
            leave=False,
        )


class _Portion:
    """Batches until it is time to write what is done."""

    def __init__(self, owner: ResumablePass, steps: Iterator[Step], first: Step, stop: Stop, bar: tqdm[Any]) -> None:
        self._owner, self._steps, self._stop, self._bar = owner, steps, stop, bar
        self.upcoming: Step | None = first
        self._done = Done()

    def advance_to_samples(self, done: Done) -> bool:
        """Count batches without samples; tell whether one with samples follows.

        Args:
            done: what is counted into, then and while the portion is iterated over.
        """
        self._done = done
        while self.upcoming is not None and self.upcoming.batch is None:
            self._count(self.upcoming)
            self.upcoming = next(self._steps, None)
        return self.upcoming is not None

    def __iter__(self) -> Iterator[Any]:
        """Yield batches; each is done when the next one is asked for, or the portion ends."""
        started, first_batch = time.monotonic(), None
        while (step := self.upcoming) is not None:
            self._owner.reseed(self._done.batches)
            self._count(step)
            self.upcoming = None  # while it is drawn
            if step.batch is not None:
                yield step.batch
                if first_batch is None:
                    first_batch = time.monotonic() - started
            self.upcoming = next(self._steps, None)
            if self._stop.signal is not None or self._owner.portion_ends(started, first_batch):
                return

    def _count(self, step: Step) -> None:
        """Count a batch."""
        self._done.batches += 1
        self._done.left_out += step.left_out
        self._done.truncated += step.truncated
        self._done.state = step.state or self._done.state
        self._bar.update(step.samples)


def _merged(total: Fisher, part: Fisher) -> Fisher:
    """Merge a portion into what is done, in its memory."""
    weight = total.total_weight + part.total_weight
    share = part.total_weight / weight
    for name, tensor in total.items():
        tensor.lerp_(part[name], share)
    return Fisher(
        dict(total), total.n_samples + part.n_samples, total_weight=weight, metadata=part.metadata, report=total.report
    )


def _refuse_others(output: str, world: int) -> None:
    """Refuse to start beside what a run with another number of processes left.

    Raises:
        ValueError: if there is such a file.
    """
    own = ".partial" if world == 1 else f"-of-{world}"
    for path in sorted(glob.glob(f"{glob.escape(output)}.partial*")):
        if not path.endswith(own):
            raise ValueError(
                f"{path} was left by a run with another number of processes, this one has {world}: run with as many "
                f"to go on, or delete {glob.escape(output)}.partial* to start anew"
            )
