"""The penalty's gradient into ``.grad``: wplfast, the plain formula, ``torch._foreach_*`` and ``torch.compile``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

import wplfast

from .timing import Contender, Spread, interleave, ratio, triads

ALPHA = 3.0
TOLERANCE = 1e-5  # fp32 against float64, relative to the largest entry: eager sums 10 M terms within 1e-6

#: Bytes that each way moves per fp32 parameter.
BYTES = {
    "add_grad_": 20,  # reads theta, theta_hat, F, grad; writes grad
    "autograd": 28,  # reads 3, writes a gradient; AccumulateGrad reads it and grad, writes grad
    "eager": 84,  # sub 12, pow 8, mul 12, sum 4; backward 8 + 8 + 8 + 12, AccumulateGrad 12
    "foreach": 36,  # sub, mul, add: 12 each; no value
    "foreach, value": 52,  # mul into a new list, then mul 12 and sum 4
    "compile": 40,  # value 12, gradient 16, AccumulateGrad 12
}
SHARES = ("share_of_triad", "share_of_triad_in_place")
NO_VALUE = {"foreach"}  # these compute the gradient alone


class WrongResultError(RuntimeError):
    """A contender's result is wrong, so its time means nothing."""


@dataclass
class Case:
    """Parameters with gradients, anchors and Fishers."""

    name: str
    theta: list[Tensor]
    theta_hat: list[Tensor] = field(default_factory=list)
    fisher: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Case:
        """Draw all tensors."""
        generator = torch.Generator().manual_seed(0)
        case = cls(name, [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes])
        case.theta_hat = [torch.randn(s, generator=generator).to(device) for s in shapes]
        case.fisher = [torch.rand(s, generator=generator).to(device) for s in shapes]
        for p in case.theta:
            p.grad = torch.ones_like(p)
        return case

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.theta)


def net_shapes(numel: int, n_tensors: int = 160) -> list[tuple[int, ...]]:
    """Return weight matrices and bias vectors, half each, with about so many elements; sides differ by up to 6."""
    generator = torch.Generator().manual_seed(1)
    sides = torch.exp(math.log(6) * torch.rand(n_tensors // 2, 2, generator=generator, dtype=torch.float64))
    sides *= math.sqrt(numel / sides.prod(1).sum().item())
    rounded = [[max(1, round(side)) for side in pair] for pair in sides.tolist()]
    return [shape for rows, columns in rounded for shape in ((rows, columns), (rows,))]


def small_shapes() -> list[tuple[int, ...]]:
    """Return 4 layers of 64 units."""
    return [(64, 64), (64,)] * 4


def ways(case: Case, compiled: bool) -> dict[str, Callable[[], Tensor | None]]:
    """Return what is compared; each adds the gradient to ``.grad`` and returns the value, or None."""
    named = {str(i): p for i, p in enumerate(case.theta)}
    penalty = wplfast.WeightPlasticityLoss(named, alpha=ALPHA)
    penalty.consolidate(
        {str(i): f for i, f in enumerate(case.fisher)}, theta_hat={str(i): a for i, a in enumerate(case.theta_hat)}
    )
    grads = [p.grad for p in case.theta]

    def formula(theta: list[Tensor], theta_hat: list[Tensor], fisher: list[Tensor]) -> Tensor:
        return sum(
            (ALPHA / 2 * (f * (p - p_hat) ** 2).sum() for p, p_hat, f in zip(theta, theta_hat, fisher, strict=True)),
            torch.zeros((), device=theta[0].device),
        )

    def backward_of(function: Callable[[list[Tensor], list[Tensor], list[Tensor]], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            value = function(case.theta, case.theta_hat, case.fisher)
            value.backward()
            return value

        return run

    def autograd() -> Tensor:
        value = penalty()
        value.backward()
        return value

    @torch.no_grad()
    def foreach() -> None:
        gradient = torch._foreach_sub(case.theta, case.theta_hat)
        torch._foreach_mul_(gradient, case.fisher)
        torch._foreach_add_(grads, gradient, alpha=ALPHA)

    @torch.no_grad()
    def foreach_value() -> Tensor:
        d = torch._foreach_sub(case.theta, case.theta_hat)
        gradient = torch._foreach_mul(d, case.fisher)
        torch._foreach_add_(grads, gradient, alpha=ALPHA)
        torch._foreach_mul_(d, gradient)
        return ALPHA / 2 * torch.stack([terms.sum() for terms in d]).sum()

    found = {"add_grad_": penalty.add_grad_, "autograd": autograd, "eager": backward_of(formula)}
    found |= {"foreach": foreach, "foreach, value": foreach_value}
    if compiled:
        found["compile"] = backward_of(torch.compile(formula, fullgraph=True))
    return found


def check(case: Case, name: str, way: Callable[[], Tensor | None]) -> dict[str, float]:
    """Return the relative errors of value and gradients against float64.

    Raises:
        WrongResultError: if one is above the tolerance.
    """
    before = [p.grad.clone() for p in case.theta]
    value = way()
    errors = {"gradient": 0.0}
    expected = 0.0
    for p, p_hat, f, old in zip(case.theta, case.theta_hat, case.fisher, before, strict=True):
        d = p.detach().double() - p_hat.double()
        expected += (ALPHA / 2 * f.double() * d.square()).sum().item()
        gradient = old.double() + ALPHA * f.double() * d
        error = (p.grad.double() - gradient).abs().max() / gradient.abs().max()
        errors["gradient"] = max(errors["gradient"], error.item())
        p.grad.copy_(old)
    if value is not None:
        errors["value"] = abs(value.item() / expected - 1)
    if not max(errors.values()) < TOLERANCE:
        raise WrongResultError(f"{case.name}, {name}: relative errors {errors} against float64, expected < {TOLERANCE}")
    return errors


def measure_case(case: Case, device: torch.device, rounds: int, seconds: float, compiled: bool, roof: bool) -> dict:
    """Check and time all ways on one case; return its record."""
    runs = ways(case, compiled)
    errors = {name: check(case, name, run) for name, run in runs.items()}
    n_bytes = {name: BYTES[name] * case.numel for name in runs}
    contenders = {name: Contender(run) for name, run in runs.items()}
    if roof:
        roofs = triads(n_bytes["add_grad_"], device)
        contenders |= roofs
        n_bytes |= dict.fromkeys(roofs, n_bytes["add_grad_"])
    times = interleave(contenders, rounds, seconds, device)
    results = {}
    for name, measured in times.items():
        spread = Spread.of(measured)
        results[name] = {
            "milliseconds": asdict(Spread.of(measured, 1e3)),
            "bytes": n_bytes[name],
            "gigabytes_per_second": n_bytes[name] / spread.median / 1e9,
        }
        if name in errors:
            results[name] |= {"relative_error": errors[name], "computes_value": name not in NO_VALUE}
            for baseline in ("eager", "foreach", "compile"):
                if baseline in times and baseline != name:
                    results[name][f"{baseline}_over_it"] = asdict(ratio(times[baseline], measured))
            for limit in ("triad", "triad in place", "copy") if roof else ():
                moved = n_bytes[name] / n_bytes[limit]
                share = ratio(times[limit], measured)
                results[name][f"share_of_{limit.replace(' ', '_')}"] = {
                    key: moved * value for key, value in asdict(share).items()
                }
    return {
        "case": case.name,
        "tensors": len(case.theta),
        "parameters": case.numel,
        "rounds": len(times["eager"]),
        "results": results,
    }


def run(device: torch.device, sizes: Sequence[int], rounds: int, seconds: float, compiled: bool) -> list[dict]:
    """Measure the large cases and the small one."""
    cases = [(f"{size / 1e6:g} M in 160 tensors", net_shapes(size), True) for size in sizes]
    cases.append(("8 small tensors", small_shapes(), False))
    return [
        measure_case(Case.of(name, shapes, device), device, rounds, seconds, compiled, roof)
        for name, shapes, roof in cases
    ]


def table(records: Sequence[dict]) -> str:
    """Return a table for people: medians, with quartiles in brackets."""
    lines = []
    for record in records:
        lines += ["", f"{record['case']} ({record['parameters']:,} parameters), {record['rounds']} rounds"]
        columns = f"{'ms':>24} {'GB/s':>6} {'of triad':>9} {'in place':>9}"
        lines.append(f"{'':16}{columns} {'eager / it':>20} {'foreach / it':>20} {'compile / it':>20}")
        for name, result in record["results"].items():
            shares = [f"{result[k]['median']:.0%}" if k in result else "" for k in SHARES]
            ratios = [
                str(Spread(**result[f"{b}_over_it"])) if f"{b}_over_it" in result else ""
                for b in ("eager", "foreach", "compile")
            ]
            time, rate = Spread(**result["milliseconds"]), result["gigabytes_per_second"]
            shown = f"{time!s:>24} {rate:6.1f} {shares[0]:>9} {shares[1]:>9}"
            lines.append(f"{name:16}{shown} {ratios[0]:>20} {ratios[1]:>20} {ratios[2]:>20}")
        if any(not result.get("computes_value", True) for result in record["results"].values()):
            lines.append(f"{', '.join(sorted(NO_VALUE))}: the gradient alone, no value")
    return "\n".join(lines[1:])
