"""Try candidates for the GPU kernels' tiles, blocks and plans, beside what the library takes by itself.

    python -m benchmarks.tiles --device cuda --seconds 120 --json tiles.json
    TRITON_INTERPRET=1 python -m benchmarks.tiles --quick     # a test of this program on a CPU, no measurement

Each candidate is checked against float64 and for equal bits in two runs; one that fails is recorded and left out. All
candidates of a case are timed in every round, beside a yardstick: cuBLAS's plain product of the same operands, cuDNN's
weight gradient, or a copy of as many bytes. ``NOTES.md`` says what each was expected to gain, and how a result becomes
the default.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from .plumbing.record import environment, write_json

#: Cases of the kernels that wait for memory get this share of a matrix case's time.
STREAM_SHARE = 0.5
ROUNDS = 40


def cases(device: torch.device, quick: bool) -> list[tuple[float, Callable[[], object]]]:
    """Return what makes each case, with its share of the time."""
    from .candidates import matrices, streams

    if quick:
        shapes = [(136, 72, 3, 40, torch.bfloat16), (72, 136, 3, 16, torch.float32)]
        made: list[Callable[[], object]] = [partial(matrices.linear, *shape, device) for shape in shapes]
        made += [partial(matrices.convolution, 16, 5, 2, device)]
        small = [(streams.penalty, (5000,)), (streams.embedding, (11, 40, 2, 9)), (streams.scaled, (40, 2, 9))]
    else:
        made = [partial(matrices.linear, *shape, device) for shape in matrices.LINEAR]
        made += [partial(matrices.convolution, *shape, 64, device) for shape in matrices.CONVOLUTIONS]
        small = [
            (streams.penalty, (64 * 10**6,)), (streams.penalty, (10**9,)), (streams.embedding, (50304, 768, 8, 512)),
            (streams.scaled, (768, 8, 512)), (streams.scaled, (768, 64, 512)),
        ]  # fmt: skip
    return [(1.0, make) for make in made] + [(STREAM_SHARE, partial(make, *shape, device)) for make, shape in small]


def run(device: torch.device, seconds: float, quick: bool = False) -> dict:
    """Measure all cases in about so many seconds and return the record; a case that cannot run says why."""
    import triton

    from wplfast.backends.triton import fisher_linear
    from wplfast.backends.triton.conv_taps import add_taps

    from .candidates.contest import compile_all, hold
    from .candidates.overrides import installed

    conv_taps = sys.modules[add_taps.__module__]
    started, found = time.perf_counter(), cases(device, quick)
    weights = sum(share for share, _ in found)
    records = []
    places = [(fisher_linear, "choose_plan"), (fisher_linear, "choose_operands"), (conv_taps, "choose_plan")]
    with installed(*places):
        for share, make in found:
            torch.manual_seed(len(records))
            begun = time.perf_counter()
            try:
                contest = make()
                if quick:  # the first, one with tensor descriptors if there is one, and the default
                    few = [*list(contest.ways)[:2], *[name for name in contest.ways if name.endswith("tma")][:1]]
                    contest.ways = {name: contest.ways[name] for name in few}
                compile_all(contest)
                compiled = time.perf_counter() - begun
                left = max(0.0, seconds - (begun - started))
                record = hold(contest, 3 if quick else ROUNDS, max(0.0, share * left / weights - compiled))
                record["seconds"] = {"compiling": round(compiled, 1), "all": round(time.perf_counter() - begun, 1)}
            except Exception as problem:
                record = {"case": str(getattr(make, "args", "")), "problem": f"{type(problem).__name__}: {problem}"}
            contest = None
            weights -= share
            records.append(record)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            print(table({"cases": [record]}), flush=True)
    place = environment(device.type)
    place["versions"]["triton"] = triton.__version__
    return {**place, "seconds": seconds, "wall_seconds": round(time.perf_counter() - started, 1), "cases": records}


def table(record: dict) -> str:
    """Return the best candidates of each case beside the default: time, share of the yardstick's rate, gain."""
    from .candidates.contest import DEFAULT

    lines = []
    for case in record["cases"]:
        if "problem" in case:
            lines.append(f"{case['case']}: {case['problem'][:300]}")
            continue
        results = case["results"]
        ways = sorted(
            (name for name in results if "relative_error" in results[name]),
            key=lambda name: results[name]["microseconds"]["median"],
        )
        lines.append(f"{case['case']}: {len(ways)} right, {len(case['left_out'])} left out")
        for name in dict.fromkeys([*ways[:3], *(name for name in ways if name == DEFAULT), case["yardstick"]]):
            if name not in results:
                continue
            result = results[name]
            spread = result["microseconds"]
            text = f"  {name:44} {spread['median']:9.1f} us [{spread['q1']:.1f}, {spread['q3']:.1f}]"
            if name in ways:
                text += f"  {result['share_of_yardstick']:6.1%} of the {case['yardstick']}"
                text += f", {result['gain_over_default']:.2f}x the default" if "gain_over_default" in result else ""
            lines.append(text)
        for name, reason in list(case["left_out"].items())[:3]:
            lines.append(f"  left out: {name}: {reason[:120]}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.tiles", description=__doc__, formatter_class=form)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=120.0, help="for all cases together (default 120)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a test of this program, not a measurement")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device is available", file=sys.stderr)
        return 2
    if options.device == "cpu" and not options.quick:
        print("error: on a CPU there is nothing to measure; --quick tests the program", file=sys.stderr)
        return 2
    record = run(torch.device(options.device), options.seconds, options.quick)
    print(f"{record['wall_seconds']} s in all")
    if options.json is not None:
        write_json(options.json, record)
    problems = [case for case in record["cases"] if "problem" in case or not case["results"]]
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
