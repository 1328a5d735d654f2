"""Several anchors, active sets, narrow Fishers and consolidation itself, on the parameters of a network."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

import wplfast

from .contenders import ALPHA, TOLERANCE, Case, Way, by_name, foreach_value, formula, net_shapes
from .penalty import TENSORS
from .plumbing.exact import Exact
from .plumbing.malloc import give_back
from .plumbing.progress import progress
from .timing import Contender, Spread, interleave, ratio

COUNTS = (1, 2, 5, 10, 20, 50)
QUICK_COUNTS = (1, 2, 3)
SHARES = (0.1, 0.25, 0.5, 1.0)
CONSOLIDATED = 0.1  # share of the parameters of the smaller consolidations
STEP = 0.1  # how far parameters walk from anchor to anchor, in standard deviations of their own
NARROW = 2.0**-8  # what F in bfloat16 may cost: 8 bits, rounded


class Walk:
    """Parameters of a network that walk from anchor to anchor, and the anchors left behind."""

    def __init__(self, numel: int, device: torch.device) -> None:
        """Draw the parameters."""
        self.theta = Case.of("anchors", net_shapes(numel, TENSORS), device).theta
        self.named = by_name(self.theta)
        self.grads = [p.grad for p in self.theta]
        self.anchors: list[tuple[list[Tensor], list[Tensor]]] = []  # theta_hat and F
        self._generator = torch.Generator(device).manual_seed(2)

    @torch.no_grad()
    def step(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Leave an anchor behind and walk on; return its F and theta_hat by name."""
        theta_hat = [p.detach().clone() for p in self.theta]
        fisher = [torch.empty_like(p).uniform_(generator=self._generator) for p in self.theta]
        for p in self.theta:
            p.add_(torch.empty_like(p).normal_(0, STEP, generator=self._generator))
        self.anchors.append((theta_hat, fisher))
        return by_name(fisher), by_name(theta_hat)

    def loop(self, count: int) -> Tensor:
        """Add up the penalties of the first anchors as Avalanche does: a loop over them, and one over parameters."""
        value = torch.zeros((), device=self.theta[0].device)
        for theta_hat, fisher in self.anchors[:count]:
            value = value + formula(self.theta, theta_hat, fisher)
        value.backward()
        return value

    def foreach(self, count: int) -> Tensor:
        """Add them up with one list of tensors per anchor, without a graph."""
        return torch.stack([foreach_value(self.theta, *anchor, self.grads) for anchor in self.anchors[:count]]).sum()

    def penalty(self, **options: object) -> wplfast.WeightPlasticityLoss:
        """Return a penalty over the parameters without an anchor."""
        return wplfast.WeightPlasticityLoss(self.named, alpha=ALPHA, **options)


def backward_of(penalty: Callable[[], Tensor]) -> Way:
    """Return what evaluates a penalty and runs backward."""

    def run() -> Tensor:
        value = penalty()
        value.backward()
        return value

    return run


def share_of(walk: Walk, share: float) -> list[str]:
    """Return names of weights and their biases that hold about a share of the elements and of the tensors."""
    layers = sorted(range(0, len(walk.theta), 2), key=lambda i: walk.theta[i].numel())
    chosen = [i for place, i in enumerate(layers) if int((place + 1) * share + 0.5) > int(place * share + 0.5)]
    return [str(i + part) for i in sorted(chosen) for part in (0, 1)]


def _timed(
    runs: Mapping[str, Callable[[], object]],
    bases: Mapping[str, str],
    device: torch.device,
    rounds: int,
    seconds: float,
) -> dict[str, dict]:
    """Time runs interleaved, and summarise those that have a base with their ratio to it, round by round."""
    cap = 2 * seconds / len(runs)
    contenders = {n: Contender(run, seconds=math.inf if n in bases.values() else cap) for n, run in runs.items()}
    times = interleave(contenders, rounds, seconds, device)
    return {
        name: {
            "milliseconds": asdict(Spread.of(times[name], 1e3)),
            "over_base": asdict(ratio(times[name], times[base][: len(times[name])])),
            "rounds": len(times[name]),
        }
        for name, base in bases.items()
    }


def merged(walk: Walk, counts: Sequence[int], device: torch.device, rounds: int, seconds: float) -> Iterator[dict]:
    """Measure K anchors, merged into one and kept apart; each over the same way with K = 1."""
    exact, whole, first = Exact(walk.named), walk.penalty(), walk.penalty()
    for count in counts:
        while len(walk.anchors) < count:
            fisher, theta_hat = walk.step()
            whole.consolidate(fisher, theta_hat=theta_hat)
            exact.add(fisher, theta_hat)
            if not first.n_anchors:
                first.consolidate(fisher, theta_hat=theta_hat)
        runs = {
            "add_grad_": (whole.add_grad_, first.add_grad_),
            "autograd": (backward_of(whole), backward_of(first)),
            "apart, loop": (partial(walk.loop, count), partial(walk.loop, 1)),
            "apart, foreach": (partial(walk.foreach, count), partial(walk.foreach, 1)),
        }
        errors = {name: exact.check(f"{count} anchors, {name}", run) for name, (run, _) in runs.items()}
        both = {name: run for name, (run, _) in runs.items()} | {f"{name}, 1": one for name, (_, one) in runs.items()}
        results = _timed(both, {name: f"{name}, 1" for name in runs}, device, rounds, seconds)
        yield {
            "anchors": count,
            "results": {name: {**result, "relative_error": errors[name]} for name, result in results.items()},
        }


def active(walk: Walk, device: torch.device, rounds: int, seconds: float) -> list[dict]:
    """Measure ``subset(names)`` over the whole penalty with one anchor."""
    penalty, exact = walk.penalty(), Exact(walk.named)
    fisher, theta_hat = walk.step()
    penalty.consolidate(fisher, theta_hat=theta_hat)
    exact.add(fisher, theta_hat)
    chosen = {share: share_of(walk, share) for share in SHARES}
    runs: dict[str, Way] = {"add_grad_": penalty.add_grad_, "autograd": backward_of(penalty)}
    bases, errors = {}, {}
    for share, names in chosen.items():
        subset = penalty.subset(names)
        for name, run in (("add_grad_", subset.add_grad_), ("autograd", backward_of(subset))):
            key = f"{name}, {share:.0%}"
            runs[key], bases[key] = run, name
            errors[key] = exact.check(f"an active set of {share:.0%}, {name}", run, names)
    results = _timed(runs, bases, device, rounds, seconds)
    total = sum(p.numel() for p in walk.theta)
    return [
        {
            "share": share,
            "elements": sum(walk.named[name].numel() for name in names) / total,
            "tensors": len(names) / len(walk.theta),
            "results": {
                name: {**results[key], "relative_error": errors[key]}
                for name in ("add_grad_", "autograd")
                for key in [f"{name}, {share:.0%}"]
            },
        }
        for share, names in chosen.items()
    ]


def consolidation(walk: Walk, device: torch.device, rounds: int, seconds: float) -> dict[str, dict]:
    """Measure a second ``consolidate``, of all parameters and of an active set, over that of all."""
    (old, old_hat), names = walk.step(), share_of(walk, CONSOLIDATED)
    fisher, theta_hat = walk.step()
    runs, bases, errors = {}, {}, {}
    for how in ("merge", "replace"):
        for key, which in ((how, None), (f"{how}, active", names)):
            penalty, exact = walk.penalty(), Exact(walk.named)
            runs[key] = partial(
                penalty.consolidate, fisher, theta_hat=theta_hat, decay=0.5, anchor=how, active=which
            )  # F stays bounded in repetitions, as each one halves what was there
            penalty.consolidate(old, theta_hat=old_hat)
            exact.add(old, old_hat)
            runs[key]()
            exact.add({name: fisher[name] for name in which or fisher}, theta_hat, 0.5, how == "replace")
            errors[key] = exact.check(f"consolidate, {key}", penalty.add_grad_)
            bases[key] = how
    results = _timed(runs, bases, device, rounds, seconds)
    share = sum(walk.named[name].numel() for name in names) / sum(p.numel() for p in walk.theta)
    return {"active_elements": share} | {
        name: {**result, "relative_error": errors[name]} for name, result in results.items()
    }


def narrow(walk: Walk, device: torch.device, rounds: int, seconds: float) -> dict[str, dict] | None:
    """Measure F in bfloat16 over F in float32; None where the installed penalty has no such option."""
    if "fisher_dtype" not in inspect.signature(wplfast.WeightPlasticityLoss).parameters:
        return None
    exact = Exact(walk.named)
    fisher, theta_hat = walk.step()
    exact.add(fisher, theta_hat)
    runs, bases, errors = {}, {}, {}
    for kind, options in (("float32", {}), ("bfloat16", {"fisher_dtype": torch.bfloat16})):
        penalty = walk.penalty(**options)
        penalty.consolidate(fisher, theta_hat=theta_hat)
        for name, run in (("add_grad_", penalty.add_grad_), ("autograd", backward_of(penalty))):
            key = f"{name}, {kind}"
            runs[key], bases[key] = run, f"{name}, float32"
            errors[key] = exact.check(key, run, tolerance=NARROW if options else TOLERANCE)
    results = _timed(runs, bases, device, rounds, seconds)
    return {name: {**result, "relative_error": errors[name]} for name, result in results.items()}


def run(device: torch.device, quick: bool, rounds: int, seconds: float) -> dict:
    """Measure all four; ``seconds`` caps each case."""
    walk = Walk(10**5 if quick else 10**7, device)
    record: dict = {"parameters": sum(p.numel() for p in walk.theta), "tensors": len(walk.theta)}
    counts = QUICK_COUNTS if quick else COUNTS
    bar = progress(range(len(counts) + 3), "anchors")
    record["merged"] = [row for row, _ in zip(merged(walk, counts, device, rounds, seconds), bar, strict=False)]
    for key, part in (("active", active), ("consolidate", consolidation), ("fisher_dtype", narrow)):
        walk.anchors.clear()
        give_back()
        record[key] = part(walk, device, rounds, seconds)
        next(bar)
    return record


def table(record: dict) -> str:
    """Return tables for people: medians, with quartiles in brackets."""
    head = f"{'ms':>24} {'over base':>24} {'rel. error':>10} {'of value':>10} {'rounds':>6}"
    lines = [f"{record['parameters']:,} parameters in {record['tensors']} tensors", f"{'K anchors':28}{head}"]
    for row in record["merged"]:
        lines += [_row(f"{row['anchors']:3} {name}", result) for name, result in row["results"].items()]
    lines += ["", f"{'active set, over the whole':28}{head}"]
    for row in record["active"]:
        lines += [_row(f"{row['elements']:.1%} {name}", result) for name, result in row["results"].items()]
    share = record["consolidate"]["active_elements"]
    lines += ["", f"{f'consolidate; active: {share:.1%}':28}{head}"]
    lines += [_row(name, result) for name, result in record["consolidate"].items() if name != "active_elements"]
    if record["fisher_dtype"] is None:
        lines += ["", "F in bfloat16: left out, the installed WeightPlasticityLoss has no option fisher_dtype"]
    else:
        lines += ["", f"{'dtype of F':28}{head}"]
        lines += [_row(name, result) for name, result in record["fisher_dtype"].items()]
    return "\n".join(lines)


def _row(name: str, result: dict) -> str:
    """Return one way's line."""
    time, over, errors = Spread(**result["milliseconds"]), Spread(**result["over_base"]), result["relative_error"]
    shown = f"{errors['gradient']:10.1e} {errors['value']:10.1e} {result['rounds']:6}"
    return f"{name:28}{time!s:>24} {over!s:>24} {shown}"
