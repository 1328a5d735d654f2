"""A search over tiny recurrent cells on random words, as problem, settings and command line."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

from benchmarks.experiments.data.text import Text
from benchmarks.experiments.search.controller import Policy
from benchmarks.experiments.search.loop import Setup
from benchmarks.experiments.search.penalty import Schedule
from benchmarks.experiments.text_search.cells import Sizes, edges
from benchmarks.experiments.text_search.problem import Batches, Task, TextProblem

CELL = (0, 0, 1, 0, 3, 1, 2)  # tanh; relu and sigmoid read block 0, identity reads block 1: 2 and 3 are loose
SHORT = ("--epochs", "3", "--start", "1", "--architectures", "2", "--minibatches", "2", "--controller-steps", "2")
TINY = (*SHORT, "--seeds", "1", "--tuning-seeds", "1", "--lr", "1", "2", "--alpha", "0.1", "1")
TINY += ("--hidden", "8", "--batch-size", "4")
TINY += ("--length", "5", "--vocabulary", "40", "--workers", "0")


def problem(seed=0, batch=4, cover="used"):
    generator = torch.Generator().manual_seed(1)
    parts = {name: torch.randint(20, (400,), generator=generator) for name in ("train", "validation", "test")}
    task = Task(sizes=Sizes(20, 6, 4), batches=Batches(batch, 5), cover=cover)
    return TextProblem(task, Text(parts, tuple(map(str, range(20)))), seed)


def edges_in_use():
    return [f"{j}-{block}" for j, block in edges(CELL)]


def setup(**changes):
    schedule = Schedule(start=1, reset_every=2)
    small = Setup(4, 3, 2, derive=2, policy=Policy(0.01, 2), schedule=schedule)
    return replace(small, **changes)
