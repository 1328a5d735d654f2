"""The command line of the searches, and the driver: tune the learning rate, tune alpha, compare the arms."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...plumbing.data import DataError
from ...plumbing.options import DeviceError, add_common, count, positive, resolve, share, strength
from ...plumbing.record import environment, write_bytes, write_json
from ...plumbing.workers import Workers
from . import report, summary
from .kept import Kept
from .loop import Run, Setup
from .plasticity import Schedule
from .problem import COVERS, Choices, Cover, Problem
from .reinforce import Policy

#: runs with these seeds choose settings, and are not reported
_TUNING_SEED = 1000


@dataclass(frozen=True)
class Job:
    """One search, as it travels to a worker.

    Args:
        task: what the search is about: all that its problem is made from.
        setup: settings of the search.
        seed: of everything that is drawn.
        lr: learning rate of the shared weights.
        alpha: strength of the penalty; None without it.
    """

    task: Any
    setup: Setup
    seed: int
    lr: float
    alpha: float | None


def add_options(
    parser: argparse.ArgumentParser, defaults: Setup, rates: Sequence[float], grid: Sequence[float], cover: Cover
) -> None:
    """Add the options that all searches have.

    Args:
        parser: takes them.
        defaults: settings of the search and of the penalty.
        rates: learning rates to choose from by default.
        grid: alphas to choose from by default.
        cover: what the penalty covers by default.
    """
    schedule, policy = defaults.schedule, defaults.policy
    add = parser.add_argument_group("search").add_argument
    add("--epochs", type=positive, default=defaults.epochs, help="default: %(default)s")
    add("--architectures", type=positive, default=defaults.architectures, help="per epoch; default: %(default)s")
    add("--minibatches", type=positive, default=defaults.minibatches, help="per architecture; default: %(default)s")
    add("--lr", type=strength, nargs="+", default=rates, help="learning rates to choose from; default: %(default)s")
    add("--clip", type=strength, default=defaults.clip, help="norm of all gradients; default: %(default)s")
    add("--controller-steps", type=count, default=policy.steps, help="per epoch; default: %(default)s")
    add("--controller-lr", type=strength, default=policy.lr, help="of Adam; default: %(default)s")
    add = parser.add_argument_group("penalty").add_argument
    add("--alpha", type=strength, nargs="+", default=grid, help="strengths to choose from; default: %(default)s")
    what = "all weights that an architecture uses, or its cell's alone, as published; default: %(default)s"
    add("--cover", choices=COVERS, default=cover, help=what)
    add("--start", type=count, default=schedule.start, help="first epoch with the penalty; default: %(default)s")
    add("--rate", type=share, default=schedule.rate, help="of the running Fisher; default: %(default)s")
    add("--reset-every", type=count, default=schedule.reset_every, help="epochs; 0: never; default: %(default)s")
    choices = ("trace", "max", "none")
    add("--normalize", choices=choices, default=schedule.normalize, help="each new F; default: %(default)s")
    add("--clip-fisher", type=strength, help="the most that the norm of one tensor's F may be; default: no limit")
    add("--alpha-decay", type=share, default=schedule.decay, help="factor per epoch; default: %(default)s")
    add("--alpha-decay-after", type=count, default=0, help="first epoch of it; default: %(default)s")
    add("--baseline", choices=("python",), help="also time a loop over parameters and squares of a batch's gradient")
    add("--tuning-seeds", type=positive, default=2, metavar="N", help="for each setting; default: %(default)s")
    add("--resume", action="store_true", help="keep finished runs in OUT/runs, and take over those that are there")
    add_common(parser, seeds=5)


@dataclass(frozen=True)
class Search:
    """One kind of search, as its command describes it.

    Args:
        name: of the experiment.
        defaults: settings that the command line does not have.
        task: makes from the command line what goes into every job, and what the record says of the data.
        make: makes a job's problem from its task and its seed.
        run: runs a job; at module level, so that workers can import it.
        words: what the report calls things: "title", "error", "reward".
        describe: renders an architecture.
    """

    name: str
    defaults: Setup
    task: Callable[[argparse.Namespace], tuple[Any, dict[str, Any]]]
    make: Callable[[Any, int], Problem]
    run: Callable[[Job], Run]
    words: dict[str, str]
    describe: Callable[[Choices], str]


def main(search: Search, options: argparse.Namespace) -> int:
    """Run a search's command and write its results; return the exit code."""
    try:
        setup = setup_of(options, search.defaults)
        resolve(options)
        task, data = search.task(options)
        search.make(task, 0)
    except (DataError, DeviceError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finish(compare(search, task, setup, options, data), options)
    return 0


def setup_of(options: argparse.Namespace, defaults: Setup) -> Setup:
    """Return the settings that the command line stands for.

    Raises:
        ValueError: if the penalty would never act.
    """
    if options.start >= options.epochs:
        raise ValueError(f"--start {options.start}: with --epochs {options.epochs} the penalty would never act")
    if options.rate <= 0:
        raise ValueError("--rate must be above 0")
    policy = Policy(options.controller_lr, options.controller_steps, defaults.policy.batch)
    schedule = Schedule(
        options.start,
        options.rate,
        options.reset_every,
        None if options.normalize == "none" else options.normalize,
        options.clip_fisher,
        options.alpha_decay,
        options.alpha_decay_after,
    )
    return Setup(
        options.epochs,
        options.architectures,
        options.minibatches,
        options.clip,
        momentum=defaults.momentum,
        policy=policy,
        schedule=schedule,
        compare=options.baseline == "python",
        device=options.device,
    )


def compare(
    search: Search, task: Any, setup: Setup, options: argparse.Namespace, data: dict[str, Any]
) -> dict[str, Any]:
    """Tune, run both arms, and return the record.

    The learning rate is chosen for cross-entropy alone; the penalty takes it over, and gets a grid of its own for
    alpha. Both choices are by the mean validation reward in the end, on seeds that are not reported.

    Args:
        search: its kind.
        task: goes into every job.
        setup: settings of the search.
        options: the command line, with ``lr``, ``alpha``, ``seeds``, ``workers`` and ``device``.
        data: what the record says of the data.
    """
    function = search.run
    place, started = environment(options.device), time.perf_counter()
    if options.resume:
        (options.out / "runs").mkdir(exist_ok=True)
        function = Kept(function, options.out / "runs", f"{search.name} {place['versions']} {place['commit']}")
    rates, alphas = (sorted(set(values)) for values in (options.lr, options.alpha))
    seeds = [_TUNING_SEED + i for i in range(options.tuning_seeds)]
    tried = sum(len(values) for values in (rates, alphas) if len(values) > 1)
    with (
        tqdm(total=tried * len(seeds) + 2 * options.seeds, unit="run") as bar,
        Workers(options.workers, bar) as workers,
    ):

        def choose(setting: str, values: Sequence[float], make: Callable[[float, int], Job]) -> dict[str, Any]:
            if len(values) == 1:
                return {"values": [], "chosen": values[0], "at_edge": False}
            bar.set_description(f"tuning {setting}")
            jobs = [make(value, seed) for value in values for seed in seeds]
            return summary.grid(workers.map(function, jobs), setting, setup.schedule.start)

        lr = choose("lr", rates, lambda value, seed: Job(task, setup, seed, value, None))
        chosen = lr["chosen"]
        alpha = choose("alpha", alphas, lambda value, seed: Job(task, setup, seed, chosen, value))
        bar.set_description("comparing")
        jobs = [Job(task, setup, seed, chosen, a) for a in (None, alpha["chosen"]) for seed in range(options.seeds)]
        runs = workers.map(function, jobs)
    for one in runs:
        if one.final:
            one.final["architecture"] = search.describe(one.final["choices"])
    arms = {"ce": runs[: options.seeds], "wpl": runs[options.seeds :]}
    return {
        "experiment": search.name,
        "words": search.words,
        "data": data,
        **place,
        "settings": {"task": _portable(asdict(task)), **asdict(setup), "seeds": options.seeds, "tuning_seeds": seeds},
        "workers": options.workers,
        "resumed": options.resume,
        "wall_seconds": round(time.perf_counter() - started, 1),
        "chosen_by": f"mean validation reward of the last epochs over {len(seeds)} tuning seeds; {len(rates)} learning "
        f"rates, {len(alphas)} alphas are tried",
        "tuning": {"lr": lr, "alpha": alpha},
        "summary": summary.summarise(arms, setup.schedule.start),
        "runs": {arm: [asdict(run) for run in of] for arm, of in arms.items()},
    }


def finish(record: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the record and the figure, and print the table."""
    name = record["experiment"]
    image = report.figure(record)
    write_json(options.out / f"{name}.json", record)
    write_bytes(options.out / f"{name}.png", image)
    print(report.table(record))
    print(f"{record['wall_seconds']:.0f} s; {options.out / name}.json, {options.out / name}.png")


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with folders by their names alone: where they lie is this machine's matter."""
    found = {key: _portable(value) if isinstance(value, dict) else value for key, value in settings.items()}
    return {key: Path(value).name if key == "folder" and value else value for key, value in found.items()}
