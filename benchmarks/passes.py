"""Where the time of one Fisher pass and one ordinary pass goes: kernels, the host, and gaps between kernels."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .fisher import KNOWN, Model, steady
from .plumbing.parts import Cases
from .roofs import tf32

ROWS = 12
#: What our kernels' names begin with.
OURS = (
    "fisher_", "unfold_kernel", "split_kernel", "fold_", "scale_", "accumulate_squares", "sum_partials", "penalty_"
)  # fmt: skip


def case(device: torch.device, quick: bool, name: str) -> dict:
    """Profile both passes of one workload, once warm."""
    workload = KNOWN[name]
    with tf32(workload.precision == "tf32"):
        model = Model(workload, device, quick)
        with steady(model, strict=False) as fisher_pass:
            for _ in range(2):
                fisher_pass()
            model.clear()
            model.unit()
            found = {"fisher": taken(fisher_pass, device), "unit": taken(model.unit, device)}
            found["fisher"]["host_functions"] = functions(fisher_pass, device)
    return {"shown": workload.shown, **found}


def taken(run: Callable[[], object], device: torch.device) -> dict:
    """Run once under the profiler; return kernels by time, how busy the device was, and operators by host time."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    _wait(device)
    started = time.perf_counter()
    run()
    enqueued = time.perf_counter() - started
    _wait(device)
    plain = time.perf_counter() - started
    with profile(activities=activities) as profiler:
        run()
        _wait(device)
    spans, by_name = [], defaultdict(list)
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == kind and event.duration_ns() > 0 and not event.name().startswith(("Profiler", "[")):
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            by_name[event.name()].append(event.duration_ns() / 1e3)
    busy = union(spans) / 1e3
    total = sum(map(sum, by_name.values())) or 1.0
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    ours = sum(sum(times) for name, times in ranked if is_ours(name))
    operators = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)[:ROWS]
    first, last = min((s for s, _ in spans), default=0), max((e for _, e in spans), default=0)  # none without CUPTI
    return {
        "wall_ms": 1e3 * plain,
        "host_ms": 1e3 * enqueued,
        "kernels": len(spans),
        "kernel_ms": total / 1e3,
        "busy_ms": busy / 1e3,
        "span_ms": (last - first) / 1e6,
        "gaps_in_span": 1 - busy * 1e3 / max(1, last - first),  # the profiler slows the host: an upper bound
        "gaps_in_wall": max(0.0, 1 - busy / 1e6 / plain),
        "share_of_ours": ours / total,
        "top": [_row(name, times, total) for name, times in ranked[:ROWS]],
        "top_of_ours": [_row(name, times, total) for name, times in ranked if is_ours(name)][:ROWS],
        "operators": [
            {"name": row.key[:90], "self_host_us": row.self_cpu_time_total, "calls": row.count} for row in operators
        ],
    }


def is_ours(name: str) -> bool:
    """Tell whether a kernel is one of wplfast's."""
    return name.startswith(OURS)


def _row(name: str, times: list[float], total: float) -> dict[str, Any]:
    """Return one kernel's line."""
    return {"name": name[:120], "calls": len(times), "us": sum(times), "share": sum(times) / total}


def union(spans: list[tuple[int, int]]) -> int:
    """Return the length that intervals cover together."""
    covered, end = 0, -1
    for start, stop in sorted(spans):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered


def functions(run: Callable[[], object], device: torch.device) -> list[dict]:
    """Return the Python functions that a pass spends its host time in."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    _wait(device)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    ranked = sorted(stats.items(), key=lambda item: -item[1][2])[:ROWS]
    return [
        {"function": f"{'/'.join(place.split('/')[-2:])}:{line} {name}", "calls": row[1], "self_ms": 1e3 * row[2]}
        for (place, line, name), row in ranked
    ]


def _wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured."""
    names = ("gpt2", "resnet50", "lstm", "mlp", "cell", "resnet50_fp32")
    return {name: partial(case, device, quick, name) for name in names}


def table(found: dict) -> str:
    """Return two lines for each workload, and the kernels that its Fisher pass spends most time in."""
    lines = [f"{'profile':22}{'wall ms':>8}{'host ms':>8}{'busy ms':>8}{'gaps':>6}{'kernels':>8}{'ours':>6}"]
    for name, record in found.items():
        for what in ("fisher", "unit"):
            r = record[what]
            shown = f"{r['wall_ms']:8.2f}{r['host_ms']:8.2f}{r['busy_ms']:8.2f}{r['gaps_in_wall']:6.0%}{r['kernels']:8}"
            lines.append(f"{name + ', ' + what:22}{shown}{r['share_of_ours']:6.0%}")
        for row in record["fisher"]["top"][:4]:
            lines.append(f"    {row['share']:5.1%}{row['calls']:6} x {row['name'][:80]}")
    return "\n".join(lines)


def log(found: dict) -> str:
    """Return all rows of all profiles."""
    lines = []
    for name, record in found.items():
        for what in ("fisher", "unit"):
            lines.append(f"\n{name}, {what}: {record[what]['wall_ms']:.2f} ms")
            for row in record[what]["top"]:
                lines.append(f"  {row['share']:6.1%} {row['us']:10.1f} us {row['calls']:6} x {row['name']}")
            for row in record[what]["operators"]:
                lines.append(f"  host {row['self_host_us']:10.1f} us {row['calls']:6} x {row['name']}")
        for row in record["fisher"]["host_functions"]:
            lines.append(f"  {row['self_ms']:9.2f} ms {row['calls']:6} x {row['function']}")
    return "\n".join(lines)
