"""What the commands of the searches share: tune the learning rate, tune alpha, compare the arms."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..harness import command
from ..harness.options import OptionError, add_options, make_parser, positive, read, strength
from ..harness.runner import Runner
from . import report
from .loop import Run, Setup, search
from .problem import COVERS, Choices

#: runs with these seeds choose settings, and are not reported
TUNING_SEED = 1000


@dataclass(frozen=True)
class Space:
    """One kind of search, as its command describes it."""

    name: str  # of the experiment
    defaults: Setup
    rates: Sequence[float]  # learning rates to choose from by default
    alphas: Sequence[float]  # strengths to choose from by default
    paper: dict[str, Any]  # options that --paper stands for
    words: dict[str, str]  # what the report calls things: "title", "error", "reward"
    describe: Callable[[Choices], str]  # renders an architecture
    task: Any  # defaults of what problems are made from: a dataclass with ``device``, ``cover``, ``problem(seed)``
    extend: Callable[[Any], None]  # adds options that are no fields of the task or its parts
    prepare: Callable[[Any, argparse.Namespace], tuple[Any, dict[str, Any]]]  # completes the task; describes the data
    seeds: int = 5  # that are compared by default
    tuning_seeds: int = 2  # for each setting by default
    choice: str = "best"  # of report.CHOICES, by default


def main(space: Space, words: str, arguments: Sequence[str] | None) -> int:
    """Run a search's command and write its results; return the exit code."""
    prepare, run = partial(_prepare, space), partial(_run, space)
    experiment = command.Experiment(space.name, prepare, run, report.tables, report.figures, report.NOTES)
    return command.main(experiment, parse(space, words, arguments))


def parse(space: Space, words: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what is given there goes before ``--paper``."""
    parser = make_parser(space.name, words, seeds=space.seeds)
    add, shown = parser.add_argument, "default: %(default)s"
    add("--paper", action="store_true", help="the paper's sizes, for what is not given otherwise")
    add("--lr", type=strength, nargs="+", default=space.rates, help=f"learning rates to choose from; {shown}")
    add("--alpha", type=strength, nargs="+", default=space.alphas, help=f"strengths to choose from; {shown}")
    what = f"for each setting; {shown}"
    add("--tuning-seeds", type=positive, default=space.tuning_seeds, metavar="N", help=what)
    what = "what decides about both: the best mean reward; or, among settings at most one standard error of the best"
    what += f" one's mean below it, the smallest learning rate and the largest alpha; {shown}"
    add("--choice", choices=report.CHOICES, default=space.choice, help=what)
    what = f"all weights that an architecture uses, or its cell's alone, as published; {shown}"
    add("--cover", choices=COVERS, default=space.task.cover, help=what)
    add("--baseline", choices=("python",), help="also time a loop over parameters and squares of a batch's gradient")
    add_options(parser.add_argument_group("search"), space.defaults)
    group = parser.add_argument_group("data and models")
    add_options(group, space.task)
    space.extend(group)
    if parser.parse_known_args(arguments)[0].paper:
        parser.set_defaults(**space.paper)
    return parser.parse_args(arguments)


def do(job: tuple[Any, Setup, int, float, float | None]) -> Run:
    """Do one search: of a task, with settings, a seed, a learning rate and alpha (None: without the penalty)."""
    task, setup, seed, lr, alpha = job
    return search(task.problem(seed), setup, seed, lr, alpha)


def _prepare(space: Space, options: argparse.Namespace) -> tuple[tuple[Any, Setup], dict[str, Any]]:
    """Return the task and the settings of the search, and what the record says of the data."""
    if options.start >= options.epochs:
        raise OptionError(f"--start {options.start}: with --epochs {options.epochs} the penalty would never act")
    if options.rate <= 0:
        raise OptionError("--rate must be above 0")
    setup = read(space.defaults, options, compare=options.baseline == "python", device=options.device)
    if options.normalize == "none":
        setup = replace(setup, schedule=replace(setup.schedule, normalize=None))
    task, data = space.prepare(read(space.task, options, device=options.device, cover=options.cover), options)
    task.problem(0)  # so that data that do not suffice are found before anything long begins
    return (task, setup), data


def _run(space: Space, prepared: tuple[Any, Setup], options: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    """Tune, run both arms, and return the record's part.

    The learning rate is chosen for cross-entropy alone; the penalty takes it over, and gets a grid of its own for
    alpha. Both choices are by the same rule, from the validation reward in the end, on seeds that are not reported.
    """
    task, setup = prepared
    seeds = [TUNING_SEED + i for i in range(options.tuning_seeds)]
    rates, alphas = (sorted(set(values)) for values in (options.lr, options.alpha))

    def searches(words: str, settings: Sequence[tuple[float, float | None]], seeds: Sequence[int]) -> list[Run]:
        return runner.map(words, do, [(task, setup, seed, *one) for one in settings for seed in seeds])

    def choose(setting: str, settings: Sequence[tuple[float, float | None]]) -> dict[str, Any]:
        if len(settings) == 1:
            return {"values": [], "chosen": settings[0][setting == "alpha"], "at_edge": False}
        runs = searches(f"tuning {setting}", settings, seeds)
        return report.grid(runs, setting, setup.schedule.start, options.choice)

    lr = choose("lr", [(value, None) for value in rates])
    alpha = choose("alpha", [(lr["chosen"], value) for value in alphas])
    settings = [(lr["chosen"], None), (lr["chosen"], alpha["chosen"])]
    runs = searches("comparing", settings, range(options.seeds))
    for one in runs:
        if one.final:
            one.final["architecture"] = space.describe(one.final["choices"])
    arms = {"ce": runs[: options.seeds], "wpl": runs[options.seeds :]}
    return {
        "words": space.words,
        "settings": {"task": portable(asdict(task)), **asdict(setup), "seeds": options.seeds, "tuning_seeds": seeds}
        | {"choice": options.choice},
        "tuning": {"lr": lr, "alpha": alpha},
        "summary": report.summarise(arms, setup.schedule.start),
        "runs": {arm: [asdict(run) for run in of] for arm, of in arms.items()},
    }


def portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with folders by their names alone: where they lie is this machine's matter."""
    found = {key: portable(value) if isinstance(value, dict) else value for key, value in settings.items()}
    return {key: Path(value).name if key == "folder" and value else value for key, value in found.items()}
