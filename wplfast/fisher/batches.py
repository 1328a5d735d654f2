"""What a batch may look like, and how the model is called on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.watched import map_tensors, tensors_in

Unpack = Callable[[Any], tuple[Any, ...]]


@dataclass
class Batch:
    """Inputs, targets and optional sample weights of one batch, on the model's device."""

    inputs: Any
    targets: Any
    weights: Tensor | None

    @staticmethod
    def of(item: Any, unpack: Unpack | None, device: torch.device) -> Batch:
        """Take a batch apart and move it.

        Raises:
            TypeError: if the batch is of no known form.
        """
        if unpack is not None:
            parts = unpack(item)
            if not (isinstance(parts, tuple) and len(parts) in (2, 3)):
                raise TypeError(
                    f"unpack must return (inputs, targets) or (inputs, targets, weights), got {_form(parts)}"
                )
        elif isinstance(item, Mapping) and "labels" in item:
            parts = ({key: value for key, value in item.items() if key != "labels"}, item["labels"])
        elif isinstance(item, (tuple, list)) and len(item) in (2, 3):
            parts = tuple(item)
        else:
            raise TypeError(
                "data must yield (inputs, targets), (inputs, targets, weights) or a dict with 'labels', "
                f"got {_form(item)}; pass unpack= for any other form"
            )
        if isinstance(parts[0], Mapping):
            parts = (dict(parts[0]), *parts[1:])
        inputs, targets, *rest = map_tensors(lambda t: t.detach().to(device, non_blocking=True), tuple(parts))
        return Batch(inputs, targets, rest[0] if rest else None)

    def forward(self, model: nn.Module) -> Any:
        """Call the model: a tuple is positional, a dict keywords, anything else one argument."""
        if isinstance(self.inputs, dict):
            return model(**self.inputs)
        if isinstance(self.inputs, (tuple, list)):
            return model(*self.inputs)
        return model(self.inputs)

    def check_n_losses(self, losses: Any) -> None:
        """Refuse losses per token: their number must be a size that the batch knows.

        Raises:
            ValueError: if losses is [M] with an M that is no batch size of any input or target.
        """
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            return  # the accumulator says what is wrong
        sizes = {t.shape[d] for t in tensors_in((self.inputs, self.targets)) for d in range(min(2, t.dim()))}
        sizes |= {len(part) for part in (self.inputs, self.targets) if isinstance(part, list)}
        if sizes and len(losses) not in sizes:
            raise ValueError(
                f"loss_fn must return one loss per sample, shape [N], got [{len(losses)}] for a batch of "
                f"{_form(self.inputs)}: if these are losses per token, use losses.view(N, T).sum(1)"
            )


def _form(item: Any) -> str:
    """Describe the form of a batch for a message."""
    if isinstance(item, Tensor):
        return f"a tensor {list(item.shape)}"
    if isinstance(item, Mapping):
        return f"a dict with {sorted(map(str, item))}"
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {len(item)}: " + ", ".join(_form(part) for part in item[:4])
    return type(item).__name__
