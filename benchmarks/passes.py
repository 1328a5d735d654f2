"""Where the time of one Fisher pass and one ordinary pass goes: kernels, the host, and gaps between kernels."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .fisher import steady, subject_of
from .plumbing.parts import Cases
from .roofs import tf32
from .workloads import KNOWN

ROWS = 12
#: What our kernels' names begin with.
OURS = (
    "fisher_", "unfold_kernel", "split_kernel", "fold_", "scale_", "accumulate_squares", "sum_partials", "penalty_"
)  # fmt: skip


def case(device: torch.device, quick: bool, name: str) -> dict:
    """Profile both passes of one workload, once warm."""
    workload = KNOWN[name]
    with tf32(workload.precision == "tf32"):
        subject = subject_of(workload, device, quick)
        with steady(subject, strict=False) as fisher_pass:
            for _ in range(2):
                fisher_pass()
            subject.clear()
            subject.unit()
            return {
                "shown": workload.shown,
                "fisher": profiled(fisher_pass, device),
                "unit": profiled(subject.unit, device),
            }


def profiled(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Run once under the profiler; return kernels by time, how busy the device was, and operators by host time."""
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    kind, activities = DeviceType.CPU, [ProfilerActivity.CPU]
    if on_gpu:
        kind, activities = DeviceType.CUDA, [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    wait()
    started = time.perf_counter()
    run()
    enqueued = time.perf_counter() - started
    wait()
    wall = time.perf_counter() - started
    with profile(activities=activities) as profiler:
        run()
        wait()
    spans, by_name = [], defaultdict(list)
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == kind and event.duration_ns() > 0 and not event.name().startswith(("Profiler", "[")):
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            by_name[event.name()].append(event.duration_ns() / 1e3)
    busy, total = union(spans), sum(map(sum, by_name.values())) or 1.0
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    operators = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)[:ROWS]
    return {
        "wall_ms": 1e3 * wall,
        "host_ms": 1e3 * enqueued,
        "kernels": len(spans),
        "busy_ms": busy / 1e6,
        "gaps": max(0.0, 1 - busy / 1e9 / wall),
        "share_of_ours": sum(sum(times) for name, times in ranked if name.startswith(OURS)) / total,
        "top": [
            {"name": name[:120], "calls": len(times), "us": sum(times), "share": sum(times) / total}
            for name, times in ranked[:ROWS]
        ],
        "operators": [
            {"name": row.key[:90], "self_host_us": row.self_cpu_time_total, "calls": row.count} for row in operators
        ],
    }


def union(spans: list[tuple[int, int]]) -> int:
    """Return the length that intervals cover together."""
    covered, end = 0, -1
    for start, stop in sorted(spans):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured."""
    names = ("gpt2", "resnet50", "lstm", "mlp", "cell", "resnet50_fp32")
    return {name: partial(case, device, quick, name) for name in names}
