"""Command-line options that the experiments share, and their checks."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from .workers import default_count


class DeviceError(ValueError):
    """The device is not here; the message is one line for the user."""


def add_common(parser: argparse.ArgumentParser, seeds: int) -> None:
    """Add the options that every experiment has: device, seeds, workers, where results go."""
    add = parser.add_argument
    add("--seeds", type=positive, default=seeds, metavar="N", help="seeds 0 to N - 1; default: %(default)s")
    add("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where results go; default: %(default)s")
    add("--workers", type=count, help="processes; 0: none; default: one per core, 0 on a GPU")


def resolve(options: argparse.Namespace) -> None:
    """Check the device before anything long begins, fill in the number of workers and make the folder.

    Raises:
        DeviceError: if the device cannot be used.
        OSError: if the folder cannot be made.
    """
    check_device(options.device)
    if options.workers is None:
        options.workers = default_count(options.device)
    options.out.mkdir(parents=True, exist_ok=True)


def check_device(name: str) -> None:
    """Check that a device can be used.

    Raises:
        DeviceError: if it cannot.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"--device must be cpu or cuda[:index], got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"--device must be cpu or cuda[:index], got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here")


def positive(text: str) -> int:
    """Convert to an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def count(text: str) -> int:
    """Convert to an integer of at least 0."""
    return positive(text) if int(text) else 0


def strength(text: str) -> float:
    """Convert to a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected finite numbers above 0, got {value}")
    return value


def share(text: str) -> float:
    """Convert to a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {value}")
    return value
