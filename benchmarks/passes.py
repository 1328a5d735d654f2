"""Where the time of one Fisher pass and one ordinary pass goes: kernels, and the host."""

from __future__ import annotations

import time
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
    averages = profiler.key_averages()
    kernels = [
        {"name": row.key[:120], "calls": row.count, "us": row.self_device_time_total or row.self_cpu_time_total}
        for row in averages
        if row.device_type == kind
    ]
    hosts = [{"name": row.key[:90], "calls": row.count, "host_us": row.self_cpu_time_total} for row in averages]
    total = sum(row["us"] for row in kernels) or 1.0
    return {
        "wall_ms": 1e3 * wall,
        "host_ms": 1e3 * enqueued,
        "busy_ms": total / 1e3,
        "kernels": sum(row["calls"] for row in kernels),
        "share_of_ours": sum(row["us"] for row in kernels if row["name"].startswith(OURS)) / total,
        "top": [row | {"share": row["us"] / total} for row in sorted(kernels, key=lambda row: -row["us"])[:ROWS]],
        "operators": sorted(hosts, key=lambda row: -row["host_us"])[:ROWS],
    }


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured."""
    names = ("gpt2", "resnet50", "lstm", "mlp", "cell", "resnet50_fp32")
    return {name: partial(case, device, quick, name) for name in names}
