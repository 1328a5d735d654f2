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

from ...plumbing.images import load_images
from ...plumbing.options import positive
from ..search import command
from ..search.loop import Setup
from ..search.plasticity import Schedule
from ..search.reinforce import Policy
from .cells import Sizes, describe
from .problem import Batches
from .task import Task, make, run

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
    search = command.Search("image_search", SMALL, _task, make, run, WORDS, describe)
    return command.main(search, _parse(arguments))


def _task(options: argparse.Namespace) -> tuple[Task, dict[str, object]]:
    """Return what problems are made from, and what the record says of the images.

    Raises:
        DataError: if they cannot be read.
    """
    split = load_images(options.data, 0)
    stride = options.stride or (2 if split.shape[1] > _LARGE else 1)
    sizes = Sizes(split.shape[0], options.channels, options.nodes, options.cells, options.stages, stride)
    batches = Batches(options.batch_size, options.evaluate)
    task = Task(options.data, sizes, batches, options.device, options.cover)
    return task, {"name": split.name, **split.sizes}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what is given there goes before --paper."""
    parser = argparse.ArgumentParser(prog="benchmarks.experiments.image_search", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--paper", action="store_true", help="the paper's sizes, for what is not given otherwise")
    files = "folder with MNIST's IDX files or CIFAR-10's data_batch_*.bin and test_batch.bin"
    add("--data", metavar="DIR", help=f"{files}; default: scikit-learn's digits")
    add("--channels", type=positive, default=12, help="a multiple of 4; default: %(default)s")
    add("--nodes", type=positive, default=3, help="of a cell; default: %(default)s")
    add("--cells", type=positive, default=2, help="default: %(default)s")
    add("--stages", type=positive, default=2, help="images are halved between them; default: %(default)s")
    add("--stride", type=positive, help=f"of the first convolution; default: 2 above {_LARGE} pixels, else 1")
    add("--batch-size", type=positive, default=64, help="default: %(default)s")
    add("--evaluate", type=positive, default=500, help="images that errors are measured on; default: %(default)s")
    command.add_options(parser, SMALL, RATES, ALPHAS, "used")
    if parser.parse_known_args(arguments)[0].paper:
        parser.set_defaults(**PAPER)
    options = parser.parse_args(arguments)
    if options.channels % 4:
        parser.error(f"argument --channels: expected a multiple of 4, got {options.channels}")
    if options.stages > options.cells:
        parser.error(f"argument --stages: expected at most --cells {options.cells}, got {options.stages}")
    return options


if __name__ == "__main__":
    sys.exit(main())
