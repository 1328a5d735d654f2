"""What the on-device tests share: streams, graphs, waits, memory, and stand-ins for a rehearsal without a GPU.

A rehearsal (``--device rehearsal``, or the CPU under ``TRITON_INTERPRET=1 WPLFAST_BACKEND=triton``) runs every body
with small sizes. What only a GPU can show is then not shown: streams run one after another, a graph is run again
instead of replayed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

NAME = os.environ.get("WPLFAST_TEST_DEVICE", "cpu")
GPU = NAME == "cuda"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("WPLFAST_BACKEND") == "triton"
on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (GPU or NAME == "rehearsal" or INTERPRETED), reason="on a device alone: --device cuda"),
]
needs_gpu = pytest.mark.skipif(not GPU, reason="a rehearsal has no streams, graphs or pinned memory")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def size(large: int, small: int) -> int:
    """Return how large something is on a GPU, or in a rehearsal."""
    return large if GPU else small


def fresh_seed() -> int:
    """Seed torch with another number every time; it is printed where a test fails."""
    seed = int(os.environ.get("WPLFAST_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "little")
    print(f"WPLFAST_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed


def poison() -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    if GPU:
        blocks = [torch.full((2**k,), float("nan"), device="cuda") for k in range(8, 26)]
        del blocks


def wait() -> None:
    """Wait for the device."""
    if GPU:
        torch.cuda.synchronize()


@contextmanager
def stream() -> Iterator[None]:
    """Run in a new stream, which follows the current one and is followed by it."""
    if not GPU:
        yield
        return
    new, old = torch.cuda.Stream(), torch.cuda.current_stream()
    new.wait_stream(old)
    with torch.cuda.stream(new):
        yield
    old.wait_stream(new)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Make every wait of the host for the device an error."""
    if NAME == "cpu":
        yield
        return
    module = torch.get_device_module(NAME)
    module.synchronize()
    module.set_sync_debug_mode("error")
    try:
        yield
    finally:
        module.set_sync_debug_mode("default")


class Graph:
    """What a function does, captured in a CUDA graph after warm-ups on a stream of its own."""

    def __init__(self, function: Callable[[], Any], warm_ups: int = 3) -> None:
        self._function = function
        if not GPU:
            function()
            self.result = function()
            return
        with stream():
            for _ in range(warm_ups):
                function()
        wait()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.result = function()

    def replay(self) -> Any:
        """Do it again; return the results, in the memory of the capture."""
        if GPU:
            self._graph.replay()
        else:
            self.result = self._function()
        return self.result


def peak_of(function: Callable[[], Any]) -> int:
    """Return how many bytes a call takes at most over what was there; its result is dropped."""
    if NAME == "cpu":
        function()
        return 0
    module = torch.get_device_module(NAME)
    module.synchronize()
    before = int(module.memory_allocated())
    module.reset_peak_memory_stats()
    function()
    module.synchronize()
    return int(module.max_memory_allocated()) - before


def allocated() -> int:
    """Return the bytes of all live tensors."""
    return 0 if NAME == "cpu" else int(torch.get_device_module(NAME).memory_allocated())


def in_threads(*functions: Callable[[], None]) -> None:
    """Run functions at once, each in a thread with a stream of its own; raise the first error."""
    errors: list[BaseException] = []
    together = threading.Barrier(len(functions))

    def run(function: Callable[[], None]) -> None:
        try:
            with torch.device(NAME) if NAME != "cpu" else nullcontext(), stream():
                together.wait(60)
                function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait()
    if errors:
        raise errors[0]


def same_bits(first: Any, second: Any) -> bool:
    """Tell whether tensors, or lists of them, are equal bit for bit; NaN equals nothing."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def map_nested(function: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    """Apply a function to every tensor in nested lists, tuples and dictionaries."""
    if isinstance(arguments, Tensor):
        return function(arguments)
    if isinstance(arguments, dict):
        return {key: map_nested(function, value) for key, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(map_nested(function, value) for value in arguments)
    return arguments


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the error in norm relative to the exact tensor's, in float64."""
    difference = (found.detach().double().cpu() - exact.detach().double().cpu()).norm()
    return float(difference / exact.double().cpu().norm().clamp_min(1e-300))
