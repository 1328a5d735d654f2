"""``wplfast check``: is a file a whole Fisher, and does it fit a model?"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..params import some
from .fisher_file import FisherFile, fisher_file


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "check",
        help="is a file a whole Fisher, and does it fit a model?",
        description="Check a file's checksum and values, and its names and shapes against a model's. Exit code 1 if "
        "something is wrong.",
        epilog="example: wplfast check F.safetensors --model my-gpt2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("file", metavar="F", help="a file of a Fisher")
    command.add_argument("--model", metavar="DIR|MODULE:FUNCTION", help="a model that it is to fit")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what is wrong; return 1 if something is."""
    shapes = None if arguments.model is None else _shapes(arguments.model)
    about = ""
    try:
        with fisher_file(arguments.file) as file:
            problems = list(_problems(file, shapes))
            about = f"{len(file.names):,} parameters, {file.n_samples:,} samples"
            if file.file.stored_checksum is None:
                about += ", without a checksum: an older release wrote it"
    except ValueError as error:  # no whole file of a Fisher
        problems = [str(error)]
    if arguments.json:
        print(json.dumps({"file": arguments.file, "ok": not problems, "problems": problems}, indent=2))
    else:
        for problem in problems:
            print(f"WRONG {problem}")
        verdict = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "ok"
        print(f"{arguments.file}: {verdict}{f' ({about})' if about else ''}")
    return 1 if problems else 0


def _problems(file: FisherFile, shapes: dict[str, tuple[int, ...]] | None) -> Iterator[str]:
    """Yield what is wrong with a file."""
    try:
        file.file.check()
    except ValueError as error:
        yield str(error)
    for part in ("fisher", "mean_grad", "theta_hat"):
        for name in sorted(file.parts.get(part, ())):
            tensor = file.get(name, part)
            if not tensor.is_floating_point():
                yield f"{part} of {name!r} must be of a floating point type, got {tensor.dtype}"
            elif tensor.numel():
                yield from _of_values(f"{part} of {name!r}", tensor, part == "fisher")
    for part in ("mean_grad", "theta_hat"):
        held = file.parts.get(part)
        if held is not None and held != set(file.names):
            yield f"{part} holds other names than the Fisher: {sorted(held ^ set(file.names))[:6]}"
    if shapes is None:
        return
    strange = [name for name in file.names if name not in shapes]
    if strange:
        yield f"{len(strange)} of {len(file.names)} names are no parameters of the model: {some(strange)}"
    for name in file.names:
        if name in shapes and shapes[name] != file.shape(name):
            yield f"{name!r} has the shape {list(file.shape(name))}, in the model {list(shapes[name])}"


def _of_values(what: str, tensor: torch.Tensor, not_negative: bool) -> Iterator[str]:
    """Yield what is wrong with values."""
    low, high = (float(extreme) for extreme in tensor.aminmax())  # NaN where one entry is
    if math.isnan(low) or math.isnan(high):
        yield f"{what} has {int(tensor.isnan().sum()):,} entries that are NaN"
    elif math.isinf(low) or math.isinf(high):
        yield f"{what} has {int(tensor.isinf().sum()):,} entries that are infinite"
    elif not_negative and low < 0:
        yield f"{what} has {int((tensor < 0).sum()):,} negative entries, {low:g} is the least"


def _shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters.

    Raises:
        OSError: if there is no such folder.
        ValueError: if it, or the function, gives no model.
    """
    from .estimate import folder, functions

    if not functions.is_function(model):
        return folder.shapes(model)
    found = functions.call(model, "--model")
    module = found[0] if isinstance(found, tuple) and found else found
    if not isinstance(module, nn.Module):
        raise ValueError(f"--model {model} must return a model, or a tuple that starts with one")
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
