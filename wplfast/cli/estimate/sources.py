"""The command line's ``--model`` and ``--data``: a folder and a file, or functions of the user's."""

from __future__ import annotations

import argparse
import fnmatch
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...params import some
from ...storage.reading import data_of
from . import folder, functions, records
from .batches import FileBatches, FunctionBatches
from .problem import Batches, Problem
from .ranks import Ranks
from .tasks import Options, Task, task_of

#: Options that say how a file's records become samples.
_OF_FILES = {
    "text_field": "--text-field",
    "label_field": "--label-field",
    "max_length": "--max-length",
    "token_reduction": "--token-reduction",
}


@dataclass
class _Parts:
    """What a folder or functions have given so far."""

    model: nn.Module
    tokenizer: Any = None
    data: Any = None
    loss: Callable[[Any, Any], Tensor] | None = None


def problem(arguments: argparse.Namespace, ranks: Ranks) -> Problem:
    """Load model, data and loss.

    Raises:
        OSError: if a file is missing.
        ValueError: if an option does not fit, or a function, folder or file is not what it must be.
        ImportError: if a package is missing.
    """
    device = ranks.device(arguments.device)
    torch.manual_seed(arguments.seed)
    parts = _model(arguments)
    if arguments.data is not None and functions.is_function(arguments.data):
        _add_data(parts, functions.call(arguments.data, "--data"), arguments.data)
    elif arguments.data is None and parts.data is None:
        raise ValueError("--data is missing: a file, or a function; --model module:function may return it, too")
    parts.model.to(device)
    identity = {
        "--model": f"{type(parts.model).__name__}, checksum {_checksum(parts.model):08x}",
        "--fisher-type": arguments.fisher_type,
        "--mc-samples": arguments.mc_samples,
        "--batch-size": arguments.batch_size,
        "--max-samples": arguments.max_samples,
        "--params": arguments.params,
        "--seed": arguments.seed,
        "the number of processes": ranks.world,
    }
    batches: Batches
    likelihood = arguments.likelihood or "categorical"
    if parts.data is None:
        task = _task(parts, arguments)
        batches, more = _of_file(arguments, task, ranks)
        loss, likelihood = parts.loss or task.loss, task.likelihood
        identity |= more
    else:
        _refuse(arguments, _OF_FILES, "for data in a file")
        what = f"--data {arguments.data}" if arguments.data is not None else f"--model {arguments.model}"
        batches = FunctionBatches(parts.data, arguments.batch_size, ranks.rank, ranks.world, arguments.seed, what)
        identity |= {"--data": what, "--likelihood": likelihood}
        if parts.loss is not None:
            loss = parts.loss
        else:
            task = _task(parts, arguments, "no loss was returned, and ")
            loss, likelihood = task.loss, arguments.likelihood or task.likelihood
    origin = {"model": arguments.model, "data": arguments.data or arguments.model}
    limit = None if parts.data is None else ranks.share(arguments.max_samples)
    return Problem(
        parts.model, _chosen(parts.model, arguments.params), batches, loss, likelihood, limit, identity, origin
    )


def _model(arguments: argparse.Namespace) -> _Parts:
    """Load the model, and whatever its function returns with it."""
    if not functions.is_function(arguments.model):
        model, tokenizer = folder.load(arguments.model, arguments.dtype)
        return _Parts(model, tokenizer)
    _refuse(arguments, {"dtype": "--dtype"}, "for a model folder; a function returns its model as it is to be used")
    found = functions.call(arguments.model, "--model")
    items = found if isinstance(found, tuple) else (found,)
    forms = "(model, data, loss), (model, loss), (model, tokenizer) or a model"
    if not items or not isinstance(items[0], nn.Module) or len(items) > 3:
        raise ValueError(f"--model {arguments.model} must return {forms}, got {_form(found)}")
    if len(items) == 3:
        if arguments.data is not None:
            raise ValueError(f"--model {arguments.model} returns data already: leave --data out")
        if not callable(items[2]):
            raise ValueError(f"--model {arguments.model} must return {forms}, got {_form(found)}")
        return _Parts(items[0], data=items[1], loss=items[2])
    if len(items) == 1:
        return _Parts(items[0])
    if hasattr(items[1], "pad_token_id"):
        return _Parts(items[0], tokenizer=items[1])
    if not callable(items[1]):
        raise ValueError(f"--model {arguments.model} must return {forms}, got {_form(found)}")
    return _Parts(items[0], loss=items[1])


def _add_data(parts: _Parts, found: Any, function: str) -> None:
    """Take what a data function returned: data, or data and a loss.

    Raises:
        ValueError: if it returned nothing.
    """
    if isinstance(found, tuple) and len(found) == 2 and callable(found[1]) and not isinstance(found[1], Tensor):
        parts.data, parts.loss = found
    else:
        parts.data = found
    if parts.data is None:
        raise ValueError(f"--data {function} must return batches, a Dataset, or (either, loss), got {_form(found)}")


def _task(parts: _Parts, arguments: argparse.Namespace, why: str = "") -> Task:
    """Return the task of a Hugging Face model.

    Raises:
        ValueError: if it is none, or its tokenizer is missing.
    """
    if not hasattr(parts.model, "config"):
        raise ValueError(
            f"{why}{type(parts.model).__name__} is no Hugging Face model, so its loss and batches are unknown: let the "
            "function return (model, data, loss)"
        )
    if parts.tokenizer is None:
        raise ValueError(
            f"{why}--model {arguments.model} has no tokenizer: save it into the folder with "
            "tokenizer.save_pretrained, or let the function return (model, tokenizer)"
        )
    text = None if arguments.text_field is None else tuple(arguments.text_field.split(","))
    reduction: Literal["sum", "mean"] = arguments.token_reduction or "sum"
    options = Options(text, arguments.label_field, arguments.max_length, reduction, arguments.seed)
    return task_of(parts.model, parts.tokenizer, options)


def _of_file(arguments: argparse.Namespace, task: Task, ranks: Ranks) -> tuple[FileBatches, dict[str, Any]]:
    """Read, check and divide a file's records; return them with what identifies them."""
    _refuse(arguments, {"likelihood": "--likelihood"}, f"for functions: a {task.name} model has its own")
    found = records.read(arguments.data, task.columns)
    numbered = list(enumerate(task.checked(found)))
    if arguments.max_samples is not None and arguments.max_samples < len(numbered):
        generator = torch.Generator().manual_seed(arguments.seed)
        kept = torch.randperm(len(numbered), generator=generator)[: arguments.max_samples].sort().values.tolist()
        numbered = [numbered[i] for i in kept]
    identity = {
        "--data": f"contents with the checksum {found.digest}",
        "--text-field and --label-field": ", ".join(found.columns),
        "--max-length": task.max_length,
        "--token-reduction": arguments.token_reduction or "sum",
    }
    return FileBatches(task, numbered[ranks.rank :: ranks.world], arguments.batch_size), identity


def _chosen(model: nn.Module, patterns: list[str] | None) -> dict[str, Tensor]:
    """Return the parameters that require grad and match one of the patterns.

    Raises:
        ValueError: if there are none.
    """
    names: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not names:
        raise ValueError(f"{type(model).__name__} has no parameters that require grad")
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"--params {pattern} matches no parameter that requires grad; there are {some([*names])}")
    return {
        name: parameter
        for name, parameter in names.items()
        if patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def _refuse(arguments: argparse.Namespace, options: dict[str, str], why: str) -> None:
    """Refuse options that would be ignored.

    Raises:
        ValueError: if one was given.
    """
    for name, option in options.items():
        if getattr(arguments, name) is not None:
            raise ValueError(f"{option} is {why}")


def _checksum(model: nn.Module) -> int:
    """Return the CRC-32 of a model's parameters and buffers."""
    checksum = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(data_of(tensor), checksum)
    return checksum


def _form(found: Any) -> str:
    """Describe what a function returned."""
    if isinstance(found, tuple):
        return f"({', '.join(type(item).__name__ for item in found)})"
    return type(found).__name__
