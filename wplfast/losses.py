"""Losses that return one value per sample, as a Fisher pass needs."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from .documents import numbered, sample_ids, sums

__all__ = ["cross_entropy", "logits_of", "sample_ids"]


def logits_of(outputs: Any) -> Tensor:
    """Return the logits of a tensor, a Hugging Face ``ModelOutput`` or a dict with ``logits``.

    Raises:
        TypeError: if there are none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"outputs must be a tensor or have .logits, got {type(outputs).__name__}")
    return logits


def cross_entropy(
    outputs: Any,
    targets: Tensor,
    ignore_index: int = -100,
    token_reduction: Literal["sum", "mean"] = "sum",
    shift: bool = False,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of each sample.

    For sequences, ``loss_n = sum_t -log p(target_nt)`` over the tokens that count (or their mean). The choice changes
    the Fisher by up to T^2, where T is the number of tokens: ``"sum"`` is the log-likelihood of the sequence, which the
    Fisher information is defined with; ``"mean"`` is what language models are usually trained on.

    Args:
        outputs: logits [N, C] or [N, ..., C] (classes last), float; or an object with ``.logits``.
        targets: class indices [N] or [N, ...], int64.
        ignore_index: targets that do not count, such as padding; a sample without any other target has loss 0.
        token_reduction: how the tokens of one sample are combined.
        shift: predict token t + 1 from position t, as causal language models of Hugging Face do with their labels.
        sample_ids: where rows hold several documents, which one each token belongs to: integers of the targets' shape
            (or [1, T]: the same in each row), negative at padding, as ``losses.sample_ids`` makes them. A document is a
            sample then, ``fisher_diagonal(..., samples="losses")``, and shift predicts nothing across documents.

    Returns:
        Losses [N], in nats; with sample_ids one for each document, in the order in which they begin.

    Raises:
        TypeError: if outputs holds no logits, or sample_ids no integers.
        ValueError: if the shapes do not fit, a document lies in several rows, or token_reduction is unknown.

    Example:
        >>> import torch, wplfast
        >>> wplfast.losses.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor([1.3863, 1.3863])
    """
    logits = logits_of(outputs)
    if token_reduction not in ("sum", "mean"):
        raise ValueError(f"token_reduction must be 'sum' or 'mean', got {token_reduction!r}")
    if logits.dim() < 2 or targets.shape != logits.shape[:-1]:
        expected = f"logits [N, ..., C] and targets of shape {list(logits.shape[:-1])}"
        raise ValueError(f"expected {expected}, got logits {list(logits.shape)} and targets {list(targets.shape)}")
    number, n_documents = None, 0
    if sample_ids is not None:
        number, n_documents = numbered(sample_ids.to(targets.device), targets.shape)
        targets = targets.masked_fill(number == n_documents, ignore_index)
    if shift:
        if logits.dim() < 3 and number is None:
            raise ValueError(f"shift=True needs logits [N, T, C], got {list(logits.shape)}")
        logits, targets = logits[..., :-1, :], targets[..., 1:]
        if number is not None:
            number, following = number[..., :-1], number[..., 1:]
            targets = targets.masked_fill(number != following, ignore_index)
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=ignore_index, reduction="none"
    )
    if number is not None:
        summed = sums(losses, number, n_documents).to(losses.dtype)
        counted = sums(targets != ignore_index, number, n_documents)
        return summed / counted.clamp_min(1) if token_reduction == "mean" else summed
    losses = losses.view(len(targets), targets.shape[1:].numel()).sum(1)
    if token_reduction == "mean":
        counted = (targets != ignore_index).reshape(targets.shape[0], -1).sum(1)
        losses = losses / counted.clamp_min(1)
    return losses
