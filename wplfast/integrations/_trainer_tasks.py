"""What a model of transformers predicts, told by its class: the loss of each sample, and what the model divides by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import losses
from ..losses.documents import numbered, sums
from ._model_kinds import kind_of

TokenReduction: TypeAlias = Literal["sum", "mean"]

#: Targets that do not count, in all of transformers.
IGNORED = -100

#: The least divisor of a sample that has any label: of a regression to one number.
_LEAST = 0.5


@dataclass(frozen=True)
class Task:
    """The loss of a kind of model.

    Attributes:
        total: (outputs, targets) -> -log p of all that is predicted for each sample, [N].
        divisor: targets -> what the model's own mean divides the sum over samples of ``total`` by, each sample's part.
        labels: names of the labels in a batch.
        likelihood: what ``total`` is the -log p of, as ``fisher_diagonal`` takes it.
        by_documents: samples are documents, whatever row they lie in.
    """

    total: Callable[[Any, Any], Tensor]
    divisor: Callable[[Any], Tensor]
    labels: tuple[str, ...] = ("labels",)
    likelihood: Literal["categorical", "bernoulli", "gaussian"] = "categorical"
    by_documents: bool = False

    def loss(self, reduction: TokenReduction) -> Callable[[Any, Any], Tensor]:
        """Return the loss of each sample: the sum, or the model's own mean of a sample alone."""
        if reduction == "sum":
            return self.total
        return lambda outputs, targets: self.total(outputs, targets) / self.divisor(targets).clamp_min(_LEAST)

    def model_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return what the model computes for the whole batch, 0-d."""
        return self.total(outputs, targets).sum() / self.divisor(targets).sum()


def task_of(model: Any, batch: Mapping[str, Any]) -> Task | None:
    """Return the task of a model, of which one batch shows the labels; None if it is of no known kind."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = kind_of(type(base))
    if kind is None:
        return None
    if kind == "spans":
        if not {"start_positions", "end_positions"} <= set(batch):
            return None
        return Task(
            losses.question_answering,
            lambda targets: torch.full_like(targets[0], 2, dtype=torch.float32),
            ("start_positions", "end_positions"),
        )
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return None
    if kind in ("texts", "samples"):
        return _of_samples(base, labels)
    if labels.is_floating_point():
        return None
    if kind in ("causal", "image_causal"):
        n_virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
        task = Task(partial(_next_token, n_virtual=n_virtual), lambda labels: _counted(labels[:, not n_virtual :]))
        return (
            replace(task, total=_of_documents, divisor=_counted_by_documents, by_documents=True)
            if {"position_ids", "seq_idx", "cu_seq_lens_q"} & set(batch) and not _is_padded_before(batch)
            else task
        )
    return Task(losses.seq2seq, _counted)


def _of_samples(model: Any, labels: Tensor) -> Task:
    """Return the task of a classifier: by ``config.problem_type``, told from the labels as the model itself does."""
    n_labels, problem = getattr(model.config, "num_labels", 2), getattr(model.config, "problem_type", None)
    if problem is None:
        single = not labels.is_floating_point() and n_labels > 1
        problem = "single_label_classification" if single else "multi_label_classification"
        problem = "regression" if n_labels == 1 else problem
    if problem == "regression":
        return Task(
            lambda outputs, labels: losses.mse(losses.logits_of(outputs), labels),
            lambda labels: torch.full((len(labels),), labels[0].numel() / 2, device=labels.device),
            likelihood="gaussian",
        )
    if problem == "multi_label_classification":
        return Task(
            lambda outputs, labels: losses.bernoulli(losses.logits_of(outputs), labels),
            lambda labels: torch.full((len(labels),), float(labels[0].numel()), device=labels.device),
            likelihood="bernoulli",
        )
    return Task(
        lambda outputs, labels: losses.cross_entropy(outputs, labels.reshape(-1), IGNORED),
        lambda labels: _counted(labels.reshape(-1, 1)),
    )


def _next_token(outputs: Any, labels: Tensor, n_virtual: int) -> Tensor:
    """Return the losses of rows, each of one document; a learned prompt before them predicts their first token."""
    return losses.cross_entropy(outputs, F.pad(labels, (n_virtual, 0), value=IGNORED), IGNORED, shift=True)


def _of_documents(outputs: Any, targets: Mapping[str, Tensor]) -> Tensor:
    """Return the losses of documents."""
    labels = targets["labels"]
    return losses.cross_entropy(outputs, labels, IGNORED, shift=True, sample_ids=targets["ids"])


def _is_padded_before(batch: Mapping[str, Any]) -> bool:
    """Tell whether rows of one document each are padded before it: the model predicts its first token, too.

    Rows into which documents are packed are not; where later ones are packed, the pass refuses them.
    """
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if not (isinstance(mask, Tensor) and mask.dim() == 2 and isinstance(positions, Tensor)):
        return False
    if {"seq_idx", "cu_seq_lens_q"} & set(batch) or bool((mask[:, 0] != 0).all()):
        return False
    ids = document_ids(batch)
    return all(len(row[row >= 0].unique()) <= 1 for row in ids)


def _counted(labels: Tensor) -> Tensor:
    """Return how many labels of each row count."""
    return (labels != IGNORED).reshape(len(labels), -1).sum(1)


def _counted_by_documents(targets: Mapping[str, Tensor]) -> Tensor:
    """Return how many labels of each document count, the first one not being predicted."""
    labels = targets["labels"]
    number, n_documents = numbered(targets["ids"], labels.shape)
    here = (number[:, 1:] == number[:, :-1]) & (labels[:, 1:] != IGNORED)
    return sums(here, number[:, 1:], n_documents)


def document_ids(batch: Mapping[str, Any]) -> Tensor:
    """Number the documents of a batch, [N, T]: by positions, numbers or bounds, whatever its collator gave.

    Raises:
        ValueError: if bounds do not end with the tokens.
    """
    labels, mask = batch["labels"], batch.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor):
        positions = positions[0] if positions.dim() == 3 else positions  # of text first, then of images
        return losses.sample_ids(positions, mask).expand(labels.shape)
    if isinstance(batch.get("seq_idx"), Tensor):
        rows = torch.arange(len(labels), device=labels.device)[:, None]
        numbers = batch["seq_idx"].long().expand(labels.shape)
        return torch.where(numbers < 0, -1, numbers + rows * (numbers.max() + 1))
    bounds = batch["cu_seq_lens_q"].long()
    if int(bounds[-1]) != labels.numel():
        raise ValueError(f"cu_seq_lens_q must end with the number of tokens, {labels.numel()}, got {int(bounds[-1])}")
    numbers = torch.arange(len(bounds) - 1, device=labels.device)
    return numbers.repeat_interleave(bounds.diff()).view(labels.shape)
