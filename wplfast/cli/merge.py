"""``wplfast merge``: the Fishers of different samples become one, by sample counts."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .. import storage
from ..fisher.files import COMPLEX, KIND, REDUCED, stamps
from ..fisher.origins import MERGED, TYPE, joined
from ..params import check_names
from .fisher_file import FisherFile, fisher_file


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "merge",
        help="make one Fisher of those of different samples",
        description="Merge Fishers of one model over different samples: the mean over all of them. Files that hold the "
        "same samples are refused.",
        epilog="example: wplfast merge part1.safetensors part2.safetensors -o F.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("files", nargs="+", metavar="F", help="files of Fishers, two or more")
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="the file to write")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Merge, a tensor at a time."""
    if len(arguments.files) < 2:
        raise ValueError("merge takes two files or more")
    with ExitStack() as stack:
        files = [stack.enter_context(fisher_file(path)) for path in arguments.files]
        for file in files:
            file.check()
        _check_apart(files)
        _check_alike(files)
        n_samples, total = sum(file.n_samples for file in files), sum(file.total_weight for file in files)
        if not total > 0:
            raise ValueError("none of the files has samples")
        tensors = {f"fisher.{name}": _mean(files, name, "fisher", total) for name in files[0].names}
        if all("mean_grad" in file.parts for file in files):
            tensors |= {f"mean_grad.{name}": _mean(files, name, "mean_grad", total) for name in files[0].names}
        tensors |= _theta_hat(files)
        metadata = reduce(joined, (file.file.metadata for file in files))
        metadata |= {MERGED: json.dumps([entry for file in files for entry in file.provenance])}
        reduced = any(file.file.metadata.get(REDUCED) == "true" for file in files)
        pairs = json.loads(files[0].file.metadata.get(COMPLEX, "[]"))
        metadata |= stamps(files[0].names, n_samples, total, reduced, pairs)
        storage.save(arguments.output, tensors, KIND, metadata)
    print(f"{arguments.output}: {n_samples:,} samples of {len(files)} files, {len(files[0].names):,} parameters")
    return 0


def _check_apart(files: Sequence[FisherFile]) -> None:
    """Refuse files that hold the same samples.

    Raises:
        ValueError: if two do, as far as their provenance tells.
    """
    seen: dict[str, str] = {}
    for file in files:
        status = os.stat(file.path)
        for entry in {f"file {status.st_dev} {status.st_ino}", *file.provenance}:
            if entry in seen:
                raise ValueError(
                    f"{file.path} holds samples that are in {seen[entry]} already: merged, they would count twice"
                )
            seen[entry] = file.path


def _check_alike(files: Sequence[FisherFile]) -> None:
    """Require names, shapes and kinds of the first file.

    Raises:
        NameMismatchError: if names differ.
        ValueError: if shapes differ, or what was computed.
    """
    first = files[0]
    for file in files[1:]:
        check_names(file.names, first.names, file.path)
        check_names(first.names, file.names, first.path)
        for name in first.names:
            if file.shape(name) != first.shape(name):
                expected, got = list(first.shape(name)), list(file.shape(name))
                raise ValueError(f"{name!r} has the shape {expected} in {first.path}, {got} in {file.path}")
        for key in (TYPE, COMPLEX):
            ours, theirs = first.file.metadata.get(key), file.file.metadata.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(f"{key} is {ours} in {first.path}, {theirs} in {file.path}: they do not add up")


def _mean(files: Sequence[FisherFile], name: str, part: str, total: float) -> storage.Deferred:
    """Return the mean of a tensor, in the widest of the files' types."""
    dtype = _widest(files, name, part)

    def make() -> Tensor:
        mean = torch.zeros(files[0].shape(name, part), dtype=torch.promote_types(dtype, torch.float32))
        for file in files:
            mean.add_(file.get(name, part).to(mean.dtype), alpha=file.total_weight / total)
        return mean.to(dtype)

    return storage.Deferred(dtype, files[0].shape(name, part), make)


def _widest(files: Sequence[FisherFile], name: str, part: str) -> torch.dtype:
    """Return the type that holds all files' values."""
    dtype = files[0].dtype(name, part)
    for file in files[1:]:
        dtype = torch.promote_types(dtype, file.dtype(name, part))
    return dtype


def _theta_hat(files: Sequence[FisherFile]) -> dict[str, storage.Deferred]:
    """Return the anchors, where files have some.

    Raises:
        ValueError: if those of two files differ.
    """
    having = [file for file in files if "theta_hat" in file.parts]
    if not having:
        return {}
    first = having[0]
    for name in first.names:
        value = first.get(name, "theta_hat")
        for file in having[1:]:
            if not torch.equal(value, file.get(name, "theta_hat")):
                raise ValueError(
                    f"Fishers of different models do not add up: theta_hat of {name!r} in {file.path} is not that in "
                    f"{first.path}"
                )

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: first.get(name, "theta_hat")

    return {
        f"theta_hat.{name}": storage.Deferred(
            first.dtype(name, "theta_hat"), first.shape(name, "theta_hat"), reader(name)
        )
        for name in first.names
    }
