"""What a batch may look like, and how the model is called on it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset, IterableDataset

from ..capture.watched import tensors_in
from ..errors import WplfastError
from .packing import ADVICE, packed

Unpack = Callable[[Any], tuple[Any, ...]]


@dataclass
class Batch:
    """Inputs, targets and optional sample weights of one batch, on the model's device.

    Attributes:
        inputs: what the model is called on.
        targets: what the loss gets.
        weights: [N], if there are some.
        labels_apart: the labels stood among the inputs, and were taken out of them.
    """

    inputs: Any
    targets: Any
    weights: Tensor | None
    labels_apart: bool = False

    @staticmethod
    def of(item: Any, unpack: Unpack | None, device: torch.device, samples: str = "batch") -> Batch:
        """Take a batch apart and move it.

        Raises:
            TypeError: if the batch is of no known form, or its third element cannot be weights.
            ValueError: if a row holds several documents where rows are samples, or weights are not [N].
        """
        labels_apart = unpack is None and isinstance(item, Mapping) and "labels" in item
        if unpack is not None:
            parts = unpack(item)
            if not (isinstance(parts, tuple) and len(parts) in (2, 3)):
                raise TypeError(
                    f"unpack must return (inputs, targets) or (inputs, targets, weights), got {_form(parts)}"
                )
        elif labels_apart:
            parts = ({key: value for key, value in item.items() if key != "labels"}, item["labels"])
        elif isinstance(item, (tuple, list)) and len(item) in (2, 3) and not isinstance(item, PackedSequence):
            parts = tuple(item)
        else:
            example = "unpack=lambda b: (b, b.y)"
            if isinstance(item, Mapping):
                example = 'unpack=lambda b: ({"input_ids": b["input_ids"]}, b["label"])'
            raise TypeError(
                "data must yield (inputs, targets), (inputs, targets, weights) or a dict with 'labels', "
                f"got {_form(item)}; pass unpack= for any other form, for example {example}"
            )
        inputs, targets, *rest = parts
        if type(inputs) is not Tensor and isinstance(inputs, Mapping):
            inputs = dict(inputs)
        found = packed(inputs) if samples == "batch" else None
        if found is not None:
            raise ValueError(f"a row of this batch holds several documents ({found}), so a row is no sample: {ADVICE}")
        if _are_numbers(targets):
            targets = _of_numbers(targets)
        weights = _weights(rest[0], unpack is not None) if rest else None
        return Batch(moved(inputs, device), moved(targets, device), moved(weights, device), labels_apart)

    def in_batches(self, data: Any) -> Batch:
        """Return the batch, unless it is one sample of a dataset that was given in the place of a loader.

        Raises:
            TypeError: if data is a map-style dataset, and the target is a single number.
        """
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            target = self.targets
            if isinstance(target, (int, float, np.generic)) or (isinstance(target, Tensor) and target.dim() == 0):
                raise TypeError(
                    f"data is a {type(data).__name__}, which yields one sample after the other; batches are wanted: "
                    "pass torch.utils.data.DataLoader(dataset, batch_size=64)"
                )
        return self

    @property
    def is_empty(self) -> bool:
        """Whether the batch holds no sample: many models fail on none."""
        if isinstance(self.targets, Tensor):
            if self.targets.numel():
                return False
            first = next((t for t in tensors_in(self.inputs) if t.dim()), self.targets)
            return not len(self.targets) and not first.numel()
        given = [t for t in tensors_in(self.inputs) if t.dim()]
        if not given:  # an object, whose targets may well be boxes of which there are none
            return isinstance(self.targets, (list, tuple)) and not self.targets
        return not any(len(t) for t in (*given, *tensors_in(self.targets)) if t.dim())

    @property
    def size(self) -> int | None:
        """The first size of every input, as a rule that of the batch; None if they differ, or one is no dense tensor.

        Options (numbers, names, None) among the inputs have none.
        """
        given = list(self.inputs.values()) if isinstance(self.inputs, dict) else self.inputs
        given = given if type(given) in (tuple, list) else [given]
        sizes = set()
        for part in given:
            if isinstance(part, Tensor) and part.layout == torch.strided and not part.is_nested and part.dim():
                sizes.add(len(part))
            elif not (part is None or isinstance(part, (bool, int, float, str))):
                return None
        return sizes.pop() if len(sizes) == 1 else None

    def forward(self, model: nn.Module) -> Any:
        """Call the model: a tuple is positional, a dict keywords, anything else one argument.

        Raises:
            TypeError: if it does not take that many positional arguments.
            ValueError: if it fails, and may need the labels that were taken out of its inputs.
        """
        if isinstance(self.inputs, dict):
            try:
                return model(**self.inputs)
            except (TypeError, ValueError, AttributeError, KeyError) as error:
                if isinstance(error, WplfastError) or not (self.labels_apart and _takes_keyword(model, "labels")):
                    raise
                raise ValueError(
                    f"the model fails on its inputs without the labels, which are the targets ({type(error).__name__}: "
                    f"{error}); if it needs them, as encoder-decoder models make their decoder's inputs of them, leave "
                    'them among the inputs: unpack=lambda b: (b, b["labels"])'
                ) from error
        if not isinstance(self.inputs, (tuple, list)) or isinstance(self.inputs, PackedSequence):
            return model(self.inputs)
        try:
            return model(*self.inputs)
        except TypeError as error:
            if _takes(model, len(self.inputs)):
                raise
            raise TypeError(
                f"inputs are {_form(self.inputs)}, passed as {len(self.inputs)} positional arguments, which the model "
                "does not take; if they are one argument (a list of images), pass unpack=lambda b: ((b[0],), b[1])"
            ) from error

    def check_n_losses(self, losses: Any) -> None:
        """Refuse losses per token: their number must be a size that the batch knows.

        Raises:
            ValueError: if losses is [M] with an M that is no batch size of any input or target.
        """
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            return  # the accumulator says what is wrong
        given = tensors_in((self.inputs, self.targets))
        sizes = {size for t in given for size in ([t.size(0)] if t.is_nested else t.shape[:2])}
        sizes |= {len(part) for part in (self.inputs, self.targets) if isinstance(part, list)}
        if sizes and len(losses) not in sizes:
            raise ValueError(
                f"loss_fn must return one loss per sample, shape [N], got [{len(losses)}] for a batch of "
                f"{_form(self.inputs)}: if these are losses per token, use losses.view(N, T).sum(1); if each is of a "
                "sample, whatever rows it owns (a document, a graph, a pair), pass samples='losses'"
            )


def moved(tree: Any, device: torch.device) -> Any:
    """Move all tensors of a batch, and NumPy's arrays as tensors.

    Containers keep their types; dataclasses are copied; an object with ``.to`` (a graph, a tokenizer's output, a packed
    sequence) moves itself. Anything else is passed on.
    """
    if tree is None or isinstance(tree, type):
        return tree
    if isinstance(tree, Tensor):
        if tree.is_inference():  # autograd saves none
            with torch.inference_mode(False):
                tree = tree.clone()
        return tree.detach().to(device, non_blocking=True)
    if type(tree) is dict:
        return {key: moved(value, device) for key, value in tree.items()}
    if isinstance(tree, (np.ndarray, np.generic)):
        return _of_numpy(tree).to(device, non_blocking=True) if tree.dtype.kind in "biufc" else tree
    if callable(getattr(tree, "to", None)):
        own: Any = copy.copy(tree) if isinstance(tree, Mapping) else tree  # whose .to may be in place
        return own.to(device)
    if isinstance(tree, tuple):
        items = [moved(item, device) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, list):
        return [moved(item, device) for item in tree]
    if isinstance(tree, dict):
        tree = copy.copy(tree)
        for key, value in tree.items():
            tree[key] = moved(value, device)
        return tree
    if isinstance(tree, Mapping):
        return {key: moved(value, device) for key, value in tree.items()}
    if dataclasses.is_dataclass(tree):
        tree = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(tree, field.name, moved(getattr(tree, field.name), device))
    return tree


def _of_numpy(array: Any) -> Tensor:
    """Share an array's memory where PyTorch can: not of read-only, reversed or foreign ones."""
    array = np.asarray(array)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array)


def _are_numbers(items: Any) -> bool:
    """Tell whether something is a list or tuple of plain numbers."""
    numbers = (int, float, np.number, np.bool_)
    return isinstance(items, (list, tuple)) and bool(items) and all(isinstance(item, numbers) for item in items)


def _of_numbers(items: list[Any] | tuple[Any, ...]) -> Tensor:
    """Make a tensor of a list: integers become int64, floating point numbers of Python PyTorch's default."""
    if not isinstance(items[0], np.generic):
        return torch.tensor(items)
    found = torch.from_numpy(np.asarray(items))
    return found if found.is_floating_point() or found.dtype == torch.bool else found.long()


def _weights(found: Any, unpacked: bool) -> Any:
    """Check that a batch's third element is one of weights, by its type and form.

    Raises:
        TypeError: if it is not floating point.
        ValueError: if it is not one-dimensional.
    """
    if found is None:
        return None
    drop = "let unpack return (inputs, targets) alone" if unpacked else "drop it with unpack=lambda b: b[:2]"
    drop = f"if it is something else (a task id, an index, a path, a second view), {drop}"
    if _are_numbers(found):
        found = np.asarray(found)
    if isinstance(found, np.ndarray) and found.dtype.kind in "biufc":
        found = _of_numpy(found)
    if not (isinstance(found, Tensor) and found.is_floating_point()):
        got = (
            f"{str(found.dtype).removeprefix('torch.')}{list(found.shape)}"
            if isinstance(found, Tensor)
            else _form(found)
        )
        raise TypeError(
            "the third element of a batch is taken for sample weights, which must be floating point of shape [N], got "
            f"{got}: if these are weights, convert them with .float(); {drop}"
        )
    if found.dim() != 1:
        raise ValueError(
            "the third element of a batch is taken for sample weights, which must have shape [N], got "
            f"{list(found.shape)}; {drop}"
        )
    return found


def _takes(model: nn.Module, count: int) -> bool:
    """Tell whether a model's forward pass takes so many positional arguments, as far as it says."""
    try:
        inspect.signature(model.forward).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        pass
    return True


def _takes_keyword(model: nn.Module, name: str) -> bool:
    """Tell whether a model's forward pass may take a keyword argument, as far as it says."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except ValueError:  # it has no signature
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _form(item: Any) -> str:
    """Describe the form of a batch for a message."""
    if isinstance(item, Tensor):
        return f"a tensor {list(item.shape)}"
    if isinstance(item, Mapping):
        return f"a dict with {sorted(map(str, item))}"
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {len(item)}: " + ", ".join(_form(part) for part in item[:4])
    return type(item).__name__
