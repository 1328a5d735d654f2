"""What the penalty's gradient inside the optimizer's step would save: a prototype, measured.

    python -m benchmarks.fused_step --threads 1 2 --json benchmarks/results/fused_step_cpu.json

The prototype needs a C++17 compiler. Its parameters and values are compared with those of ``add_grad_`` and torch's
fused optimizer after several steps before anything is timed. It has two baselines: those two, and its own passes one
after the other, which tell the effect of fusing from that of another kernel.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .contenders import ALPHA, Case, WrongResultError, net_shapes
from .fisher import Model
from .plumbing.fused_step import FLAGS, RULES, STATE, CompilerError, OwnStep, compiler, library, torch_optimizer
from .plumbing.fused_step_check import anchored, check
from .plumbing.record import environment, write_json
from .timing import Contender, Spread, interleave, triads
from .workloads import WORKLOADS

CPU = torch.device("cpu")
#: Bytes per fp32 parameter: theta and grad read, theta written; what a rule remembers read and written.
STEP_BYTES = {"sgd": 12, "momentum": 20, "adamw": 28}
PENALTY_BYTES = 20
SAVED_BYTES = 12  # grad written and read again, theta read again
TORCH, OWN, FUSED, FREE = "add_grad_ + torch", "own penalty + own step", "fused", "torch, no penalty"
MODELS = (("mlp", None), ("cnn", None), ("decoder", None), ("mlp", 16), ("mlp", 1))  # and samples, if not all
TIMED_LR = 1e-9  # so that hundreds of steps leave the parameters where they are


def ways(rule: str, case: Case) -> dict[str, Callable[[], object]]:
    """Return all passes and sequences of passes; they share parameters, gradients, anchors and state."""
    penalty, optimizer = anchored(case.theta, case.theta_hat, case.fisher), torch_optimizer(rule, case.theta, TIMED_LR)
    optimizer.step()  # makes its state
    state = [[optimizer.state[p][name] for name in STATE[rule]] for p in case.theta]
    anchors = [*penalty.theta_hat.values()], [*penalty.fisher.values()]
    case.theta_hat, case.fisher = anchors  # lets go of the copies
    own = OwnStep(rule, case.theta, *anchors, state, ALPHA, TIMED_LR)
    return {
        TORCH: lambda: (penalty.add_grad_(), optimizer.step()),
        OWN: lambda: (own.penalty(), own.step()),
        FUSED: own.fused,
        FREE: optimizer.step,
        "own step": own.step,
        "add_grad_": penalty.add_grad_,
        "own penalty": own.penalty,
    }


def bytes_of(rule: str) -> dict[str, int]:
    """Return what each way moves per parameter."""
    step = STEP_BYTES[rule]
    both = step + PENALTY_BYTES
    alone = {FREE: step, "own step": step, "add_grad_": PENALTY_BYTES, "own penalty": PENALTY_BYTES}
    return {TORCH: both, OWN: both, FUSED: both - SAVED_BYTES} | alone


def gain(times: dict[str, list[float]], over: str, fused: str) -> dict[str, float]:
    """Summarise, round by round, the share of a time that fusing saves."""
    shares = asdict(Spread.of([1 - b / a for a, b in zip(times[over], times[fused], strict=True)]))
    return {key: shares[key] for key in ("median", "q1", "q3")}


def alone(rule: str, case: Case, rounds: int, seconds: float) -> dict:
    """Check and time optimizer and penalty alone, gradients staying where they are."""
    record = {"case": case.name, "rule": rule, "tensors": len(case.theta), "parameters": case.numel}
    record["relative_error"] = check(rule, case)
    n_bytes = {name: n * case.numel for name, n in bytes_of(rule).items()}
    contenders = {name: Contender(run) for name, run in ways(rule, case).items()}
    roof = "triad in place"
    n_bytes[roof] = n_bytes["add_grad_"]
    times = interleave(contenders | {roof: triads(n_bytes[roof], CPU)[roof]}, rounds, seconds, CPU)
    return record | {
        "rounds": len(times[FUSED]),
        "milliseconds": {name: asdict(Spread.of(measured, 1e3)) for name, measured in times.items()},
        "gigabytes_per_second": {name: n_bytes[name] / Spread.of(times[name]).median / 1e9 for name in times},
        "gain": {
            "paper": SAVED_BYTES / bytes_of(rule)[TORCH],
            "over_torch": gain(times, TORCH, FUSED),
            "over_own": gain(times, OWN, FUSED),
        },
    }


def training(rule: str, name: str, samples: int | None, quick: bool, rounds: int, seconds: float) -> dict:
    """Check and time whole training steps of a model, and their last part alone in its place after a backward pass."""
    model = Model(WORKLOADS[name], CPU, quick)
    x, y = (part[:samples] for part in model.batch)
    generator = torch.Generator().manual_seed(0)
    theta = [*model.ordinary.parameters()]
    theta_hat = [p.detach() + 0.01 * torch.randn(p.shape, generator=generator) for p in theta]
    case = Case(name, theta, theta_hat, [torch.rand(p.shape, generator=generator) for p in theta])

    def backward() -> None:
        model.clear()
        model.unit((x, y))

    def whole(tail: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            backward()
            tail()

        return run

    backward()
    shown = WORKLOADS[name].shown if samples is None else f"{WORKLOADS[name].shown.split(', N=')[0]}, N={samples}"
    record = {"case": shown, "rule": rule, "tensors": len(theta), "parameters": case.numel}
    record["relative_error"] = check(rule, case)
    contenders = {}
    found = ways(rule, case)
    for way in (TORCH, OWN, FUSED, FREE):
        contenders[f"step: {way}"] = Contender(whole(found[way]), lambda: None)
        contenders[f"tail: {way}"] = Contender(found[way], backward)
    times = interleave(contenders, rounds, seconds, CPU)
    middle = {name: Spread.of(measured).median for name, measured in times.items()}
    tails = {over: middle[f"tail: {over}"] - middle[f"tail: {FUSED}"] for over in (TORCH, OWN)}
    gains = {
        f"{part}_over_{key}": gain(times, f"{part}: {over}", f"{part}: {FUSED}")
        for part in ("tail", "step")
        for key, over in (("torch", TORCH), ("own", OWN))
    }
    for key, over in (("torch", TORCH), ("own", OWN)):
        gains[f"tail_over_{key}_of_step"] = tails[over] / middle[f"step: {over}"]
    return record | {
        "rounds": len(times[f"step: {FUSED}"]),
        "milliseconds": {name: asdict(Spread.of(measured, 1e3)) for name, measured in times.items()},
        "gain": gains,
    }


def _shown(share: dict[str, float] | float) -> str:
    """Show a share, with quartiles if it has some."""
    if isinstance(share, float):
        return f"{share:.1%}"
    return f"{share['median']:.1%} [{share['q1']:.1%}, {share['q3']:.1%}]"


def table(record: dict) -> str:
    """Return one record for people."""
    errors = ", ".join(f"{name} {error:.0e}" for name, error in record["relative_error"].items())
    title = f"{record['case']}, {record['rule']} ({record['parameters']:,} parameters), {record['rounds']} rounds"
    lines = ["", f"{title}; errors: {errors}"]
    for name, spread in record["milliseconds"].items():
        rate = record.get("gigabytes_per_second", {}).get(name)
        lines.append(f"  {name:30} {Spread(**spread)!s:>28} ms" + (f" {rate:6.1f} GB/s" if rate else ""))
    return "\n".join([*lines, *(f"  gain {name:25} {_shown(share):>28}" for name, share in record["gain"].items())])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; return the exit code."""
    options = _parse(arguments)
    before, runs = torch.get_num_threads(), []
    try:
        library()
        for threads in options.threads or [before]:
            torch.set_num_threads(threads)
            load, started, records = os.getloadavg(), time.perf_counter(), {"alone": [], "training": []}
            print(f"\n{threads} threads, load {load[0]:.1f}", flush=True)
            for rule in options.rules:
                for size in options.sizes:
                    case = Case.of(f"{size / 1e6:g} M in 160 tensors", net_shapes(int(size)), CPU)
                    records["alone"].append(alone(rule, case, options.rounds, options.seconds))
                    print(table(records["alone"][-1]), flush=True)
                for name, samples in MODELS:
                    found = training(rule, name, samples, options.quick, options.rounds, 2 * options.seconds)
                    records["training"].append(found)
                    print(table(found), flush=True)
            wall, loads = round(time.perf_counter() - started, 1), {"before": load, "after": os.getloadavg()}
            runs.append({"threads": threads, "load_average": loads, "wall_seconds": wall, **records})
    except (CompilerError, WrongResultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, WrongResultError) else 2
    finally:
        torch.set_num_threads(before)
    if options.json is not None:
        settings = {key: getattr(options, key) for key in ("quick", "rounds", "seconds")}
        built = {"command": [*compiler(), *FLAGS]}
        write_json(options.json, {**environment(), "prototype": built, "settings": settings, "fused_step": runs})
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.fused_step", description=__doc__, formatter_class=form)
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="one run each; default: PyTorch's")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--sizes", type=float, nargs="+", metavar="N", help="parameters (default 1e6 1e7 1e8)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 40)")
    parser.add_argument("--seconds", type=float, help="time cap of a case (default 10); models get twice that")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a test of this program, not a measurement")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 40)
    options.seconds = options.seconds or (0.0 if options.quick else 10.0)
    options.sizes = options.sizes or ([3e4] if options.quick else [1e6, 1e7, 1e8])
    return options


if __name__ == "__main__":
    sys.exit(main())
