"""Run by test_pack.py in a process with a pretended GPU: launches by Triton's own driver and from a pack.

Prints one line of JSON: for each launch, what both drivers were given.
"""

from __future__ import annotations

import json
import os
import sys
import threading

import fake_cuda
import torch
import triton

from wplfast.backends.triton import kernel, launch, prepared, scale_unless_one, squares
from wplfast.backends.triton.packs import cases as precompile_cases

fake = fake_cuda.FakeCuda()
triton.knobs.compilation.disable_line_info = True  # as packs are made, so that the code is the same in bytes


def launches(notes: list[str]) -> list[list[str]]:
    """Return the parts of notes about loading and launching, without the thread's state."""
    parts = [note.split() for note in notes]
    return [p[:2] if p[0] == "load" else p for p in parts if p[0] in ("load", "launch", "attribute", "attributes")]


def by_both(run) -> dict[str, list[list[str]]]:  # type: ignore[no-untyped-def]
    """Return what Triton's driver gets from a function's launches, and what it gets from those of a pack."""
    found = {}
    for name, server in (("jit", None), ("pack", fake_cuda.server(required=True))):
        before = kernel.serve(server)
        fake.notes()
        run()
        run()
        found[name] = launches(fake.notes())
        kernel.serve(before)
    return found


def comparisons() -> dict[str, object]:
    """Launch kernels with arguments of every kind, in memory that does not move."""
    triton.runtime.driver.set_active(fake_cuda.triton_driver())
    out, grads, weights = torch.zeros(64), torch.zeros(8, 64), torch.zeros(8, dtype=torch.float64)
    square = squares.accumulate_squares_kernel
    buffer, factor = torch.zeros(4096), torch.ones(())
    found: dict[str, object] = {
        "squares": by_both(lambda: squares.accumulate_squares_(out, grads, None)),
        "weighted": by_both(lambda: squares.accumulate_squares_(out, grads, weights)),
        "unaligned": by_both(lambda: scale_unless_one.scale_unless_one_(buffer[1:], factor)),
        "scaled": by_both(lambda: scale_unless_one.scale_unless_one_(buffer, factor)),
        # A grid of three dimensions, and a number that needs 64 bits where 32 are usual.
        "wide": by_both(lambda: square[(2, 3, 4)](
            out, grads, None, 8, 1 << 33, ADD=True, HAS_WEIGHTS=False, ROWS=8, BLOCK=256, num_warps=4, **launch.OPTIONS,
        )),
    }  # fmt: skip
    return found


def relaunched() -> dict[str, object]:
    """Evaluate a prepared penalty: what is launched again goes past the table."""
    theta = [torch.nn.Parameter(torch.zeros(4096))]
    one = torch.ones((), dtype=torch.float64)
    penalty = prepared.TritonPenalty(theta, [torch.zeros(4096)], [], [torch.zeros(4096)], one, one, None)
    server = fake_cuda.server(required=True)
    kernel.serve(server)
    notes = []
    for _ in range(3):
        fake.notes()
        penalty.value()
        notes.append(launches(fake.notes()))
        server.launch = None  # not needed again
    return {"penalty": notes}


def failures() -> dict[str, str]:
    """Let the driver fail, and arguments change behind a kernel's back."""
    found = {}
    out, grads = torch.zeros(64), torch.zeros(8, 64)
    args = (out, grads, None, 8, 64, True, False, squares.ROWS, squares.BLOCK)
    server = fake_cuda.server(required=True)
    kernel.serve(server)

    def launched() -> object:
        return squares.accumulate_squares_kernel[(1, 1)](*args, num_warps=squares.WARPS, **launch.OPTIONS)

    loaded = launched()
    fake.fail("cuLaunchKernel", 700)
    for name, run in (
        ("launch", launched),
        ("again", lambda: loaded.launch((1, 1), args)),
        ("few", lambda: loaded.launch((1, 1), args[:-1])),
        ("large", lambda: loaded.launch((1, 1), (*args[:3], 1 << 40, *args[4:]))),
        ("grid", lambda: loaded.launch((1 << 33,), args)),
        ("unknown", lambda: squares.accumulate_squares_kernel[(1,)](*args, num_warps=2, **launch.OPTIONS)),
    ):
        try:
            run()
        except (RuntimeError, TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    fake.fail("", 0)
    kernel.serve(None)
    return found


def many() -> dict[str, object]:
    """Launch from threads on several devices."""
    devices, local = int(os.environ["FAKE_CUDA_DEVICES"]), threading.local()
    server = kernel.Server(True, lambda: local.device, lambda device: 100 + device, lambda device: (9, 0))
    kernel.serve(server)
    out, grads = torch.zeros(64), torch.zeros(8, 64)
    fake.notes()

    def work(device: int) -> None:
        local.device = device
        for _ in range(200):
            squares.accumulate_squares_(out, grads, None)

    threads = [threading.Thread(target=work, args=(i % devices,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    notes = [note.split() for note in fake.notes()]
    where = sorted({(p[p.index("context") + 1], p[p.index("stream") + 1]) for p in notes if p[0] == "launch"})
    return {"launches": sum(p[0] == "launch" for p in notes), "where": where}


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert precompile_cases.CASES
    parts = {"comparisons": comparisons, "relaunched": relaunched, "failures": failures, "many": many}
    print(json.dumps({name: part() for name, part in parts.items() if name in sys.argv[1:]}))
