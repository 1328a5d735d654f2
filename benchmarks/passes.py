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

        def unit() -> None:
            subject.clear()
            subject.unit()

        with steady(subject, strict=False) as fisher_pass:
            return {"fisher": profiled(fisher_pass, device), "unit": profiled(unit, device)}


def profiled(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Time a run, and profile another; return how busy the device was, and kernels and operators by time."""
    on_gpu = device.type == "cuda"
    wait, kind = (torch.cuda.synchronize, DeviceType.CUDA) if on_gpu else (lambda: None, DeviceType.CPU)
    for _ in range(2):  # once to warm up
        wait()
        started = time.perf_counter()
        run()
        enqueued = time.perf_counter() - started
        wait()
        wall = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        run()
        wait()
    spans, by_name = [], defaultdict(list)
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == kind and event.duration_ns() > 0 and not event.name().startswith(("Profiler", "[")):
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            by_name[event.name()].append(event.duration_ns() / 1e3)
    total = sum(map(sum, by_name.values())) or 1.0
    kernels = [
        {"name": name[:120], "calls": len(times), "us": sum(times), "share": sum(times) / total}
        for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))
    ]
    operators = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)[:ROWS]
    return {
        "wall_ms": 1e3 * wall,
        "host_ms": 1e3 * enqueued,
        "busy_ms": union(spans) / 1e6,
        "kernels": len(spans),
        "share_of_ours": sum(kernel["share"] for kernel in kernels if kernel["name"].startswith(OURS)),
        "top": kernels[:ROWS],
        "operators": [{"name": row.key[:90], "host_us": row.self_cpu_time_total} for row in operators],
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
