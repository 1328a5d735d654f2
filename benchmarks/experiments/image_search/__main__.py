"""Architecture search for image classifiers on shared weights, without and with the penalty.

A controller samples convolution cells from one set of weights; each is trained for a few minibatches and measured, and
again at the end of the epoch, after the others were trained: what did it forget? Then the controller is trained with
accuracies. Once with cross-entropy alone, once with WPL over all weights that an architecture uses.

    python -m benchmarks.experiments.image_search                              # the digits that scikit-learn ships
    python -m benchmarks.experiments.image_search --data DIR                   # MNIST's IDX files
    python -m benchmarks.experiments.image_search --data DIR --paper --device cuda    # CIFAR-10's data_batch_*.bin

Writes image_search.json and image_search.png; prints a table. Setting: arXiv:1902.08232, section on convolution cells,
with one kind of cell where the micro space of ENAS (Pham et al., arXiv:1802.03268) has two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..data.images import load_images
from ..harness.options import OptionError, positive
from ..search import command
from ..search.controller import Policy
from ..search.loop import Setup
from ..search.penalty import Schedule
from .cells import describe
from .problem import Task

RATES = (0.01, 0.02, 0.05)
ALPHAS = (0.1, 0.5, 2.5)  # the mean entry of alpha F
SMALL = Setup(6, 24, 10, clip=5.0, momentum=0.9, schedule=Schedule(start=2), policy=Policy(3.5e-3, 20))
#: sizes of the published code's command line; its cells of the second kind, which halve the images, are left out
PAPER = {
    "channels": 48,
    "nodes": 5,
    "cells": 15,
    "stages": 3,
    "stride": 1,
    "batch_size": 32,
    "epochs": 310,
    "architectures": 50,
    "start": 5,
    "cover": "cells",
    "reset_every": 3,
    "controller_steps": 1500,
    "controller_lr": 3.5e-4,
    "lr": [0.05],
    "seeds": 1,
    "tuning_seeds": 1,
}
WORDS = {"error": "error (%)", "reward": "reward (accuracy)", "title": "Search for convolution cells"}
_LARGE = 16  # images of more pixels in height are halved at once where nothing else is asked for


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    return command.main(SPACE, __doc__, arguments)


def _extend(parser: Any) -> None:
    """Add what is no field of settings."""
    words = f"of the first convolution; default: 2 above {_LARGE} pixels, else 1"
    parser.add_argument("--stride", type=positive, help=words)


def _prepare(task: Task, options: argparse.Namespace) -> tuple[Task, dict[str, Any]]:
    """Complete the sizes, and return what the record says of the images."""
    if options.channels % 4:
        raise OptionError(f"argument --channels: expected a multiple of 4, got {options.channels}")
    if options.stages > options.cells:
        raise OptionError(f"argument --stages: expected at most --cells {options.cells}, got {options.stages}")
    split = load_images(task.folder, 0)
    channels, height, _ = split.shape
    sizes = replace(task.sizes, inputs=channels, stride=options.stride or (2 if height > _LARGE else 1))
    return replace(task, sizes=sizes), {"name": split.name, **split.sizes}


SPACE = command.Space("image_search", SMALL, RATES, ALPHAS, PAPER, WORDS, describe, Task(), _extend, _prepare)

if __name__ == "__main__":
    sys.exit(main())
