"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ranks:
    """A process among others.

    Attributes:
        rank: its number.
        world: how many there are.
        local: its number on its machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    def device(self, asked: str | None) -> torch.device:
        """Return the device of this process: a GPU of its own where there is one.

        Raises:
            RuntimeError: if there is no such kind of device.
            ValueError: if there is no such GPU.
        """
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type != "cuda":
            return device
        if ":" not in str(device):
            device = torch.device("cuda", self.local)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: torch sees {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
        return device

    def share(self, count: int | None) -> int | None:
        """Return this process's part of a number."""
        return None if count is None else count // self.world + (self.rank < count % self.world)

    def all_say(self, own: Any) -> list[Any]:
        """Return what every process says."""
        if self.world == 1:
            return [own]
        from ...distributed.agreement import gathered  # only where there is a group

        return gathered(own)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes that torchrun started, if it did.

    Processes wait for each other for as long as it takes: torchrun ends all where one fails.

    Raises:
        RuntimeError: if they cannot be reached.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    dist.init_process_group(backend, timeout=datetime.timedelta(days=30))
    try:
        yield Ranks(dist.get_rank(), world, local)
    finally:
        dist.destroy_process_group()
