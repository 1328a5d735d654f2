"""Architecture search for recurrent language models on shared weights, without and with the penalty.

A controller samples recurrent cells from one set of weights; each is trained for a few minibatches and measured, and
again at the end of the epoch, after the others were trained: what did it forget? Then the controller is trained with
rewards c / perplexity. Once with cross-entropy alone, once with WPL over the cells' connections.

    python -m benchmarks.experiments.text_search                                        # a text that Python ships
    python -m benchmarks.experiments.text_search --data DIR                             # train.txt, valid.txt, test.txt
    python -m benchmarks.experiments.text_search --data DIR --train a.txt --held-out b.txt
    python -m benchmarks.experiments.text_search --data DIR --paper --device cuda               # the paper's sizes

Writes text_search.json and text_search.png; prints a table. Setting: arXiv:1902.08232, section on recurrent cells, on
top of ENAS (Pham et al., arXiv:1802.03268).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ...plumbing.options import positive, share
from ...plumbing.text import Files, load_text
from ..search import command
from ..search.loop import Setup
from ..search.plasticity import Schedule
from ..search.reinforce import Policy
from .cells import Sizes, describe
from .problem import Batches
from .task import Task, make, run

RATES = (2.5, 5.0, 10.0)
ALPHAS = (0.01, 0.03, 0.1)  # the mean entry of alpha F
SMALL = Setup(epochs=6, architectures=24, minibatches=10, schedule=Schedule(start=2), policy=Policy(3.5e-3, 20))
#: the paper's sizes, as its published command line and its code's defaults have them; alpha is chosen all the same,
#: since theirs multiplies a Fisher of another scale
PAPER = {
    "hidden": 1000,
    "blocks": 12,
    "length": 35,
    "batch_size": 64,
    "vocabulary": 10_000,
    "dropout": [0.65, 0.4, 0.5],
    "epochs": 150,
    "architectures": 60,
    "minibatches": 7,
    "start": 5,
    "controller_steps": 2000,
    "controller_lr": 3.5e-4,
    "lr": [20.0],
    "seeds": 1,
    "tuning_seeds": 1,
}
WORDS = {"error": "perplexity", "reward": "reward (80 / perplexity)", "title": "Search for recurrent cells"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit code."""
    search = command.Search("text_search", SMALL, _task, make, run, WORDS, describe)
    return command.main(search, _parse(arguments))


def _task(options: argparse.Namespace) -> tuple[Task, dict[str, object]]:
    """Return what problems are made from, and what the record says of the text.

    Raises:
        DataError: if the text cannot be read.
    """
    files = Files(options.data, options.train, options.validation, options.test, options.held_out)
    text = load_text(files, options.vocabulary)
    sizes = Sizes(len(text.words), options.hidden, options.blocks, *options.dropout, layer_norm=options.layer_norm)
    batches = Batches(options.batch_size, options.length, options.evaluate)
    name = "Python's help texts" if options.data is None else options.name
    task = Task(files, options.vocabulary, sizes, batches, options.device, options.cover)
    return task, {"name": name, **text.sizes}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what is given there goes before --paper."""
    parser = argparse.ArgumentParser(prog="benchmarks.experiments.text_search", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--paper", action="store_true", help="the paper's sizes, for what is not given otherwise")
    add("--data", metavar="DIR", help="folder of text files, words apart by blanks; default: Python's help texts")
    add("--name", default="text", help="what the record calls the data of --data; default: %(default)s")
    add("--train", default="train.txt", metavar="FILE", help="in the folder; default: %(default)s")
    add("--validation", default="valid.txt", metavar="FILE", help="default: %(default)s")
    add("--test", default="test.txt", metavar="FILE", help="default: %(default)s")
    add("--held-out", metavar="FILE", help="one file for both: its halves are validation and test part")
    add("--vocabulary", type=positive, default=1000, help="words that are kept; default: %(default)s")
    add("--hidden", type=positive, default=48, help="width; default: %(default)s")
    add("--blocks", type=positive, default=4, help="of a cell; default: %(default)s")
    add("--batch-size", type=positive, default=32, help="default: %(default)s")
    add("--length", type=positive, default=16, help="words that gradients flow over; default: %(default)s")
    add("--evaluate", type=positive, default=2, help="minibatches that errors are measured on; default: %(default)s")
    names = ("INPUT", "OUTPUT", "WEIGHT")
    add("--dropout", type=share, nargs=3, default=[0.0, 0.0, 0.0], metavar=names, help="default: %(default)s")
    add("--layer-norm", action="store_true", help="normalise a cell's output before the decoder")
    command.add_options(parser, SMALL, RATES, ALPHAS, "cells")
    if parser.parse_known_args(arguments)[0].paper:
        parser.set_defaults(**PAPER)
    options = parser.parse_args(arguments)
    if options.blocks < 2:
        parser.error("argument --blocks: expected at least 2, got 1")
    if options.data is None and options.held_out:
        parser.error("argument --held-out: needs --data")
    return options


if __name__ == "__main__":
    sys.exit(main())
