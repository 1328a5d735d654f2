"""Per-sample losses from a criterion that reduces a batch to one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..capture.watched import tensors_in


def per_sample(criterion: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """Return the loss function that gives what a criterion gives for each sample in a batch of its own.

    ``loss_n = criterion(outputs[n:n+1], targets[n:n+1])``, whatever the criterion's reduction, weights and smoothing:
    they mean there what they mean in a batch of one sample (``nn.CrossEntropyLoss(weight=...)`` divides by the weights
    of its batch, so they cancel). A criterion with ``reduction="none"`` is called on the whole batch.

    Args:
        criterion: ``criterion(outputs, targets)`` returns one number; outputs and targets have the samples first.

    Returns:
        A function of outputs and targets that returns losses [N].

    Raises:
        ValueError: (when called) if a batch of one sample has not one loss.

    Example:
        >>> import torch
        >>> from wplfast.integrations._criterion import per_sample
        >>> per_sample(torch.nn.CrossEntropyLoss())(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor([1.3863, 1.3863])
    """

    def losses(outputs: Any, targets: Any) -> Tensor:
        if getattr(criterion, "reduction", None) == "none":
            return criterion(outputs, targets)
        if _is_plain(criterion) and isinstance(outputs, Tensor) and outputs.dim() == 2 and targets.dim() == 1:
            return F.cross_entropy(outputs, targets, reduction="none")
        n_samples = len(next(iter(tensors_in((targets, outputs)))))
        each = [criterion(_row(outputs, n), _row(targets, n)) for n in range(n_samples)]
        for loss in each[:1]:
            if loss.numel() != 1:
                raise ValueError(
                    f"the criterion must return one loss for a batch of one sample, got {list(loss.shape)}: pass "
                    "loss_fn=, which returns one loss per sample [N]"
                )
        return torch.stack([loss.reshape(()) for loss in each])

    return losses


def _is_plain(criterion: Any) -> bool:
    """Tell whether a criterion is cross-entropy without options, for which one call does."""
    if criterion is F.cross_entropy:
        return True
    default = type(criterion) is nn.CrossEntropyLoss and criterion.weight is None
    return default and criterion.ignore_index == -100 and criterion.label_smoothing == 0


def _row(tree: Any, n: int) -> Any:
    """Return one sample of all tensors."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[n : n + 1], tree)
