"""Losses that return one value per sample, as a Fisher pass needs: each is -log p of its targets, up to a constant.

| loss | ``likelihood`` of ``fisher_diagonal`` | targets |
|---|---|---|
| :func:`cross_entropy`, :func:`seq2seq` | "categorical" | classes, of samples or tokens |
| :func:`soft_cross_entropy` | "categorical" (drawn labels are one-hot) | probabilities of the classes |
| :func:`question_answering` | "categorical" (two labels) | first and last token of the answer |
| :func:`bernoulli` | "bernoulli" | yes or no, any number of them |
| :func:`mse` | "gaussian", unit variance | real numbers |
"""

from __future__ import annotations

from typing import Any, Literal

import torch
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
        TypeError: if outputs holds no logits, targets are no int64, or sample_ids no integers.
        ValueError: if the shapes do not fit, a document lies in several rows, or token_reduction is unknown.

    Example:
        >>> import torch, wplfast
        >>> wplfast.losses.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor([1.3863, 1.3863])
    """
    logits = logits_of(outputs)
    if token_reduction not in ("sum", "mean"):
        raise ValueError(f"token_reduction must be 'sum' or 'mean', got {token_reduction!r}")
    _check_classes(logits, targets)
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


def seq2seq(
    outputs: Any, targets: Tensor, ignore_index: int = -100, token_reduction: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """Return the cross-entropy of each target sequence, for encoder-decoder models such as T5 and BART.

    ``loss_n = sum_t -log p(target_nt)``: the decoder's inputs are shifted already, so position t predicts label t
    (:func:`cross_entropy` without shift). Likelihood: categorical.

    Args:
        outputs: the decoder's logits [N, T, C], or a Hugging Face ``Seq2SeqLMOutput``.
        targets: labels [N, T], int64; padding is ``ignore_index``.
        ignore_index: labels that do not count.
        token_reduction: how the tokens of one sample are combined, see :func:`cross_entropy`.

    Returns:
        Losses [N], in nats.

    Raises:
        TypeError: if outputs holds no logits, or targets are no int64.
        ValueError: if the shapes do not fit or token_reduction is unknown.

    Example:
        >>> import torch, wplfast
        >>> wplfast.losses.seq2seq(torch.zeros(1, 3, 4), torch.tensor([[2, 1, -100]]))
        tensor([2.7726])
    """
    return cross_entropy(outputs, targets, ignore_index, token_reduction)


def soft_cross_entropy(outputs: Any, targets: Tensor, token_reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """Return the cross-entropy of each sample with probabilities for labels (distillation, mixup, votes).

    ``loss_n = -sum_t sum_c target_ntc log p_ntc``. For one-hot targets it is -log p (likelihood: categorical). Rows of
    zeros do not count.

    Args:
        outputs: logits [N, C] or [N, ..., C] (classes last), or an object with ``.logits``.
        targets: probabilities of the logits' shape.
        token_reduction: how the tokens of one sample are combined, see :func:`cross_entropy`.

    Returns:
        Losses [N], in nats.

    Raises:
        TypeError: if outputs holds no logits, or targets are integers.
        ValueError: if the shapes differ or token_reduction is unknown.

    Example:
        >>> import torch, wplfast
        >>> wplfast.losses.soft_cross_entropy(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
        tensor([1.3863])
    """
    logits = logits_of(outputs)
    if token_reduction not in ("sum", "mean"):
        raise ValueError(f"token_reduction must be 'sum' or 'mean', got {token_reduction!r}")
    if not targets.is_floating_point():
        raise TypeError(f"soft labels must be floating point, got {targets.dtype}; use cross_entropy for classes")
    if logits.dim() < 2 or targets.shape != logits.shape:
        raise ValueError(f"expected soft labels of the logits' shape {list(logits.shape)}, got {list(targets.shape)}")
    # A class of probability 0 may have a logit of -inf.
    terms = torch.where(targets == 0, 0, targets * logits.log_softmax(-1)).sum(-1).reshape(len(logits), -1)
    if token_reduction == "sum":
        return -terms.sum(1)
    counted = (targets != 0).any(-1).reshape(len(logits), -1).sum(1)
    return -terms.sum(1) / counted.clamp_min(1)


def bernoulli(outputs: Any, targets: Tensor, ignore: float | None = None) -> Tensor:
    """Return the binary cross-entropy of each sample, for one yes-or-no label or many of them.

    ``loss_n = sum_k -log p(target_nk)`` with ``p = sigmoid(outputs)``: a sum over labels, as -log p is (a mean would
    change the Fisher by the square of their number). Likelihood: bernoulli.

    Args:
        outputs: logits [N], [N, 1] or [N, ...], or an object with ``.logits``.
        targets: 0 or 1 (or probabilities) in the shape of the logits; [N] for [N, 1].
        ignore: targets that do not count, outside of 0 to 1 (such as -1 or -100).

    Returns:
        Losses [N], in nats.

    Raises:
        TypeError: if outputs holds no logits.
        ValueError: if the shapes do not fit.

    Example:
        >>> import torch, wplfast
        >>> wplfast.losses.bernoulli(torch.zeros(2, 3), torch.tensor([[1, 0, 1], [0, 1, -1]]), ignore=-1)
        tensor([2.0794, 1.3863])
    """
    logits, labels = _paired(outputs, targets)
    ignored = torch.zeros_like(labels, dtype=torch.bool) if ignore is None else labels == ignore
    losses = F.binary_cross_entropy_with_logits(logits, labels.masked_fill(ignored, 0), reduction="none")
    return losses.masked_fill(ignored, 0).reshape(len(logits), -1).sum(1)


def mse(outputs: Any, targets: Tensor, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """Return half the squared error of each sample: -log p of a Gaussian with unit variance, up to a constant.

    ``loss_n = 1/2 sum_d (outputs_nd - targets_nd)^2``. The half belongs to it: ``F.mse_loss`` gives a Fisher four times
    as large, and a mean over D dimensions one D^2 times smaller. For a noise of variance s^2, divide F by s^4
    ("empirical") or s^2 ("mc").

    Args:
        outputs: means [N], [N, 1] or [N, ...], or an object with ``.logits``.
        targets: real numbers in the shape of the outputs; [N] for [N, 1].
        reduction: "sum" over the dimensions is -log p, which "mc" needs; "mean" divides it by their number.

    Returns:
        Losses [N], in half squared units of the targets.

    Raises:
        TypeError: if outputs is no tensor and has no ``.logits``.
        ValueError: if the shapes do not fit or reduction is unknown.

    Example:
        >>> import torch, wplfast
        >>> wplfast.losses.mse(torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
        tensor([1.0000, 4.5000])
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    means, targets = _paired(outputs, targets)
    squares = (means - targets).square().reshape(len(means), -1) / 2
    return squares.sum(1) if reduction == "sum" else squares.mean(1)


def question_answering(outputs: Any, targets: Any) -> Tensor:
    """Return the loss of each sample of extractive question answering: where the answer starts and where it ends.

    ``loss_n = -log p(start_n) - log p(end_n)``. (Hugging Face trains on half of it, which gives a quarter of this
    Fisher.) Positions outside of the T tokens do not count. Likelihood: categorical, drawn for both.

    Args:
        outputs: an object or dict with ``start_logits`` and ``end_logits`` [N, T], or a tuple that starts with them.
        targets: first and last token of the answer, int64: a tuple of two [N], a tensor [N, 2], or a dict with
            ``start_positions`` and ``end_positions``.

    Returns:
        Losses [N], in nats.

    Raises:
        TypeError: if outputs or targets are of another form.
        ValueError: if the shapes do not fit.

    Example:
        >>> import torch, wplfast
        >>> logits = torch.zeros(2, 4)
        >>> wplfast.losses.question_answering((logits, logits), torch.tensor([[0, 1], [3, 4]]))
        tensor([2.7726, 1.3863])
    """
    logits = _both(outputs, "start_logits", "end_logits")
    positions = (
        targets.unbind(-1) if isinstance(targets, Tensor) else _both(targets, "start_positions", "end_positions")
    )
    if len(positions) != 2:
        raise ValueError(f"positions must be [N, 2], got {list(targets.shape)}")
    losses = []
    for part, at in zip(logits, positions, strict=True):
        at = at.reshape(-1) if at.dim() == 2 and at.shape[1] == 1 else at
        inside = (at >= 0) & (at < part.shape[-1])
        losses.append(cross_entropy(part, at.masked_fill(~inside, -100)))
    return losses[0] + losses[1]


def _both(tree: Any, first: str, second: str) -> tuple[Tensor, Tensor]:
    """Return two tensors of a dict, an object or a tuple that starts with them.

    Raises:
        TypeError: if there are none.
    """
    if isinstance(tree, (tuple, list)):
        found = list(tree[:2])
    else:
        found = [tree.get(n) if isinstance(tree, dict) else getattr(tree, n, None) for n in (first, second)]
    if len(found) != 2 or not all(isinstance(part, Tensor) for part in found):
        raise TypeError(f"expected a tuple of two tensors, or {first} and {second}, got {type(tree).__name__}")
    return found[0], found[1]


def _paired(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets in one shape and dtype; nothing is broadcast.

    Raises:
        ValueError: if the shapes do not fit.
    """
    values = logits_of(outputs)
    if not values.dim() or targets.shape not in (values.shape, values.shape[:-1] if values.shape[-1] == 1 else None):
        raise ValueError(f"targets must have the outputs' shape {list(values.shape)}, got {list(targets.shape)}")
    return values, targets.reshape(values.shape).to(values.dtype)


def _check_classes(logits: Tensor, targets: Tensor) -> None:
    """Refuse targets that are no class indices, and name the loss that takes them.

    Raises:
        TypeError: if they are not int64 (PyTorch takes uint8, too).
    """
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"targets must be a tensor of class indices, got {type(targets).__name__}: use torch.tensor(...)"
        )
    if targets.is_floating_point():
        other = "soft_cross_entropy for probabilities of the classes" if targets.shape == logits.shape else "bernoulli"
        raise TypeError(
            f"targets must be class indices, got {targets.dtype} {list(targets.shape)} for logits "
            f"{list(logits.shape)}: use wplfast.losses.{other}, or wplfast.losses.mse for regression (.long() for "
            "classes that were stored as floats)"
        )
    if targets.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"targets must be int64 class indices, got {targets.dtype}: use targets.long()")
