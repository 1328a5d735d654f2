"""Options of the command line, made from the fields of settings; and the checks of what is given."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

Settings = TypeVar("Settings")

#: default values of an option, what converts and checks one, and what they mean
Grid: TypeAlias = tuple[Sequence[Any], Callable[[str], Any], str]


class OptionError(ValueError):
    """An option that cannot be met here; the message is one line for the user."""


def option(default: Any, kind: Any, words: str = "", flag: str | None = None, **more: Any) -> Any:
    """Declare a field of a settings class that the command line may set.

    Args:
        default: of the field; settings with another value bring their own default.
        kind: converts and checks the text.
        words: what the field means, for ``--help``.
        flag: name of the option, if it is not the field's.
        more: for ``add_argument``.
    """
    return field(default=default, metadata={"kind": kind, "words": words, "flag": flag, **more})


def add_options(parser: Any, settings: Any) -> None:
    """Add an option for each field of settings that :func:`option` declares, and of settings that they hold.

    Its default is the field's value.
    """
    for one in fields(settings):
        default = getattr(settings, one.name)
        if is_dataclass(default):
            add_options(parser, default)
        elif one.metadata:
            more = dict(one.metadata)
            flag = f"--{(more.pop('flag') or one.name).replace('_', '-')}"
            words = "; ".join(filter(None, (more.pop("words"), "default: %(default)s" * (default is not None))))
            parser.add_argument(flag, type=more.pop("kind"), default=default, help=words, **more)


def add_grids(parser: argparse.ArgumentParser, grids: Mapping[str, Grid]) -> None:
    """Add options of several values each."""
    for name, (values, kind, words) in grids.items():
        words = f"{words}; default: %(default)s"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+", default=values, help=words)


def sort_grids(options: argparse.Namespace, grids: Iterable[str]) -> None:
    """Let each of these options hold its values once, in ascending order."""
    for name in grids:
        setattr(options, name, sorted(set(getattr(options, name))))


def read(settings: Settings, options: argparse.Namespace, **more: Any) -> Settings:
    """Return settings with what the command line says of their fields, and with ``more``."""
    for one in fields(settings):
        value = getattr(settings, one.name)
        if is_dataclass(value):
            more.setdefault(one.name, read(value, options))
        elif one.metadata:
            more.setdefault(one.name, getattr(options, one.metadata["flag"] or one.name))
    return replace(settings, **more)


def make_parser(name: str, words: str, seeds: int) -> argparse.ArgumentParser:
    """Return the parser of an experiment's command, described by words' first line, with the options that all have."""
    parser = argparse.ArgumentParser(prog=f"benchmarks.experiments.{name}", description=words.split("\n", 1)[0])
    add = parser.add_argument
    add("--seeds", type=positive, default=seeds, metavar="N", help="seeds 0 to N - 1; default: %(default)s")
    add("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where results go; default: %(default)s")
    add("--workers", type=count, help="processes; 0: none; default: one per core, 0 on a GPU")
    add("--resume", action="store_true", help="keep finished runs in OUT/runs, and take over those that are there")
    return parser


def check(options: argparse.Namespace) -> None:
    """Check the device before anything long begins, fill in the number of workers and make the folder.

    Raises:
        OptionError: if the device cannot be used.
        OSError: if the folder cannot be made.
    """
    try:
        device = torch.device(options.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device must be cpu or cuda[:index], got {options.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device {options.device}: there are {torch.cuda.device_count()} CUDA devices here")
    if options.workers is None:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options.workers = usable if options.device == "cpu" else 0
    (options.out / "runs" if options.resume else options.out).mkdir(parents=True, exist_ok=True)


def _number(kind: Callable[[str], Any], accepts: Callable[[Any], bool], words: str) -> Callable[[str], Any]:
    """Return what converts a text to a number, and says what was expected where it is another one."""

    def number(text: str) -> Any:
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {words}, got {value}")
        return value

    return number


positive = _number(int, lambda value: value >= 1, "at least 1")
count = _number(int, lambda value: value >= 0, "at least 0")
several = _number(int, lambda value: value >= 2, "at least 2")
strength = _number(float, lambda value: 0 < value < math.inf, "finite numbers above 0")
share = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
