"""Several anchors, active sets, narrow Fishers and consolidation itself, on the parameters of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import wplfast

from .penalty import LARGE, QUICK, TENSORS
from .plumbing.malloc import give_back
from .plumbing.progress import progress
from .timing import Budget, Contender, quartiles, ratio
from .ways import (
    ALPHA,
    TOLERANCE,
    Anchors,
    Case,
    Way,
    backward_of,
    by_name,
    check,
    foreach_value,
    formula,
    net_shapes,
    ways_of,
)

COUNTS, QUICK_COUNTS = (1, 2, 5, 10, 20, 50), (1, 2, 3)
SHARES = (0.1, 0.25, 0.5, 1.0)
CONSOLIDATED = 0.1  # share of the parameters of the smaller consolidations
DECAY = 0.5  # of what was there: F stays bounded in repetitions
STEP = 0.1  # how far parameters walk from anchor to anchor, in standard deviations of their own
NARROW = dict.fromkeys(("gradient", "value"), 2.0**-8)  # what F in bfloat16 may cost: 8 bits, rounded


class Walk:
    """Parameters of a network that walk from anchor to anchor, and the anchors left behind."""

    def __init__(self, numel: int, device: torch.device) -> None:
        """Draw the parameters."""
        self.theta = Case("anchors", net_shapes(numel, TENSORS), device).theta
        self.named = by_name(self.theta)
        self.left: list[tuple[list[Tensor], list[Tensor]]] = []  # theta_hat and F
        self._generator = torch.Generator(device).manual_seed(2)

    @torch.no_grad()
    def step(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Leave an anchor behind and walk on; return its F and theta_hat by name."""
        theta_hat = [p.detach().clone() for p in self.theta]
        fisher = [torch.empty_like(p).uniform_(generator=self._generator) for p in self.theta]
        for p in self.theta:
            p.add_(torch.empty_like(p).normal_(0, STEP, generator=self._generator))
        self.left.append((theta_hat, fisher))
        return by_name(fisher), by_name(theta_hat)

    @property
    def anchors(self) -> Anchors:
        """All anchors left behind, by parameter."""
        return [[(hats[i], fishers[i]) for hats, fishers in self.left] for i in range(len(self.theta))]

    def apart(self, count: int) -> dict[str, Way]:
        """Return ways to add up the penalties of the first anchors.

        The first is Avalanche's, a loop over anchors and one over parameters; the second uses lists of tensors.
        """
        grads = [p.grad for p in self.theta]

        def loop() -> Tensor:
            return sum((formula(self.theta, *anchor) for anchor in self.left[:count]), self.theta[0].new_zeros(()))

        def foreach() -> Tensor:
            return torch.stack([foreach_value(self.theta, *anchor, grads) for anchor in self.left[:count]]).sum()

        return {"apart, loop": backward_of(loop), "apart, foreach": foreach}

    def part(self, names: Sequence[str]) -> float:
        """Return the share of all elements that some parameters hold."""
        return sum(self.named[name].numel() for name in names) / sum(p.numel() for p in self.theta)

    def penalty(self, **options: object) -> wplfast.WeightPlasticityLoss:
        """Return a penalty over the parameters without an anchor."""
        return wplfast.WeightPlasticityLoss(self.named, alpha=ALPHA, **options)


def share_of(walk: Walk, share: float) -> list[str]:
    """Return names of weights and their biases that hold about a share of the elements and of the tensors."""
    layers = sorted(range(0, len(walk.theta), 2), key=lambda i: walk.theta[i].numel())
    chosen = [i for place, i in enumerate(layers) if int((place + 1) * share + 0.5) > int(place * share + 0.5)]
    return [str(i + part) for i in sorted(chosen) for part in (0, 1)]


class Trials:
    """What is checked and then timed together, each over another of them or over a base that is not checked itself."""

    def __init__(self, walk: Walk, bases: Mapping[str, Callable[[], object]] | None = None) -> None:
        self.theta, self.runs, self.over, self.errors = walk.theta, dict(bases or {}), {}, {}

    def add(
        self,
        name: str,
        run: Callable[[], object],
        over: str,
        anchors: Anchors,
        tolerance: Mapping[str, float] = TOLERANCE,
        way: Way | None = None,
    ) -> None:
        """Add a run; ``way`` is what is checked, where that is not the run itself."""
        self.errors[name] = check(name, self.theta, anchors, way or run, tolerance)
        self.runs[name], self.over[name] = run, over

    def timed(self, budget: Budget) -> dict[str, dict]:
        """Time all, interleaved, and summarise each with its ratio, round by round."""
        cap = 2 * budget.seconds / len(self.runs)
        free = set(self.over.values())  # what others are measured by runs in all rounds
        times = budget.time({n: Contender(r, seconds=math.inf if n in free else cap) for n, r in self.runs.items()})
        return {
            name: {
                "milliseconds": quartiles(times[name], 1e3),
                "over_base": ratio(times[name], times[over]),
                "rounds": len(times[name]),
                "relative_error": self.errors[name],
            }
            for name, over in self.over.items()
        }


def merged(walk: Walk, counts: Sequence[int], budget: Budget) -> Iterator[dict]:
    """Measure K anchors, merged into one and kept apart; each over the same way with K = 1."""
    whole, first = walk.penalty(), walk.penalty()
    for count in counts:
        while len(walk.left) < count:
            fisher, theta_hat = walk.step()
            whole.consolidate(fisher, theta_hat=theta_hat)
            if not first.n_anchors:
                first.consolidate(fisher, theta_hat=theta_hat)
        runs, ones = ({**ways_of(penalty), **walk.apart(k)} for penalty, k in ((whole, count), (first, 1)))
        trials = Trials(walk, {f"{name}, 1": run for name, run in ones.items()})
        for name, run in runs.items():
            trials.add(name, run, f"{name}, 1", walk.anchors)
        yield {"anchors": count, "results": trials.timed(budget)}


def active(walk: Walk, budget: Budget) -> list[dict]:
    """Measure ``subset(names)`` over the whole penalty with one anchor."""
    penalty = walk.penalty()
    fisher, theta_hat = walk.step()
    penalty.consolidate(fisher, theta_hat=theta_hat)
    trials, chosen = Trials(walk, ways_of(penalty)), {share: share_of(walk, share) for share in SHARES}
    for share, names in chosen.items():
        anchors = [pairs if name in names else [] for name, pairs in zip(walk.named, walk.anchors, strict=True)]
        for name, way in ways_of(penalty.subset(names)).items():
            trials.add(f"{name}, {share:.0%}", way, name, anchors)
    results = trials.timed(budget)
    return [
        {
            "share": share,
            "elements": walk.part(names),
            "tensors": len(names) / len(walk.theta),
            "results": {name: results[f"{name}, {share:.0%}"] for name in ways_of(penalty)},
        }
        for share, names in chosen.items()
    ]


def consolidation(walk: Walk, budget: Budget) -> dict[str, Any]:
    """Measure a second ``consolidate``, of all parameters and of an active set, over that of all."""
    (old, old_hat), names, trials = walk.step(), share_of(walk, CONSOLIDATED), Trials(walk)
    fisher, theta_hat = walk.step()
    new = {
        "merge": {n: [(old_hat[n], DECAY * old[n]), (theta_hat[n], fisher[n])] for n in walk.named},
        "replace": {n: [(theta_hat[n], DECAY * old[n] + fisher[n])] for n in walk.named},
    }
    for how, anchors in new.items():
        for name, which in ((how, None), (f"{how}, active", names)):
            penalty = walk.penalty()
            penalty.consolidate(old, theta_hat=old_hat)
            options = {"theta_hat": theta_hat, "decay": DECAY, "anchor": how, "active": which}
            run = partial(penalty.consolidate, fisher, **options)
            run()
            found = [p if which is None or n in which else [(old_hat[n], old[n])] for n, p in anchors.items()]
            trials.add(name, run, how, found, way=penalty.add_grad_)
    return {"active_elements": walk.part(names), **trials.timed(budget)}


def narrow(walk: Walk, budget: Budget) -> dict[str, dict]:
    """Measure F in bfloat16 over F in float32."""
    (fisher, theta_hat), trials = walk.step(), Trials(walk)
    for dtype, tolerance in (("float32", TOLERANCE), ("bfloat16", NARROW)):
        penalty = walk.penalty(fisher_dtype=getattr(torch, dtype))
        penalty.consolidate(fisher, theta_hat=theta_hat)
        for name, way in ways_of(penalty).items():
            trials.add(f"{name}, {dtype}", way, f"{name}, float32", walk.anchors, tolerance)
    return trials.timed(budget)


def run(budget: Budget) -> dict:
    """Measure all four."""
    walk = Walk(QUICK if budget.quick else LARGE, budget.device)
    record: dict = {"parameters": sum(p.numel() for p in walk.theta), "tensors": len(walk.theta)}
    counts = QUICK_COUNTS if budget.quick else COUNTS
    record["merged"] = list(progress(merged(walk, counts, budget), "anchors"))
    for key, part in (("active", active), ("consolidate", consolidation), ("fisher_dtype", narrow)):
        walk.left.clear()
        give_back()
        record[key] = part(walk, budget)
    return record
