"""The Fisher of a Trainer's data: whose loss it is of, found out on the first samples, and the pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..fisher.batches import moved
from ..fisher.diagonal import LossFn, fisher_diagonal
from ..fisher.result import Fisher
from ..fisher.undisturbed import Undisturbed
from ..params import Params, device_of
from ._ranks import together
from ._trainer_data import TrainerData, left_alone
from ._trainer_tasks import Task, TokenReduction, document_ids, task_of

logger = logging.getLogger(__name__)

#: How many samples are looked at before the pass.
_N_FIRST = 4


class _AsEvaluated(nn.Module):
    """A model in its Trainer's mixed precision; logits leave it in float32, as from a prepared model."""

    def __init__(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Refer to a model."""
        super().__init__()
        self.model, self._autocast = model, autocast

    def forward(self, **batch: Any) -> Any:
        """Run the model."""
        with self._autocast():
            return self.model(**batch)


class _OwnLoss(nn.Module):
    """What a Trainer itself minimises, for a batch of one sample."""

    def __init__(self, trainer: Any) -> None:
        """Refer to a Trainer and its model."""
        super().__init__()
        self.model, self._trainer = trainer.model, trainer

    def forward(self, **batch: Any) -> Tensor:
        """Return the loss, [1]."""
        return _own_loss(self._trainer, batch).reshape(1)


def estimate(
    trainer: Any,
    dataset: Any,
    max_samples: int | None,
    params: Params | None,
    token_reduction: TokenReduction,
    loss_fn: LossFn | None,
    options: dict[str, Any],
) -> Fisher:
    """See :func:`wplfast.integrations.transformers.trainer_fisher`."""
    model = trainer.model
    watched = {name: p for name, p in model.named_parameters() if p.requires_grad} if params is None else params
    rank, n_ranks = trainer.args.process_index, trainer.args.world_size
    with left_alone(trainer):
        hint = "each takes its part of the same data, so give all the same data set and Trainer"
        with together(n_ranks, "trainer_fisher", hint) as told:
            if token_reduction not in ("sum", "mean"):
                raise ValueError(f"token_reduction must be 'sum' or 'mean', got {token_reduction!r}")
            data = TrainerData(trainer, dataset, shuffled=max_samples is not None)
            task = None if loss_fn is not None else _task(trainer, data)
            call, arguments = _call(trainer, task, loss_fn, token_reduction, options)
            told |= {"the number of samples": data.n_samples, "the loss": type(call).__name__}
        batch_size = 1 if isinstance(call, _OwnLoss) else trainer.args.per_device_train_batch_size
        loader = data.loader(batch_size, rank, n_ranks)
        arguments = {"params": watched, "max_samples": max_samples, "reduce": True if n_ranks > 1 else None} | arguments
        fisher = fisher_diagonal(call, loader, **arguments)
    fisher.metadata["source"] = fisher.metadata.get("source", "").replace(type(call).__name__, type(model).__name__)
    return fisher


def _task(trainer: Any, data: TrainerData) -> Task | None:
    """Return the task whose mean is what the Trainer minimises; None if the Trainer's loss is another one.

    Raises:
        ValueError: if it is so for single samples, but not for several.
    """
    with Undisturbed(trainer.model, False, device_of(trainer.model.parameters())), torch.no_grad():
        task, here, own = _losses(trainer, data.first(_N_FIRST))
        if task is None:
            _say(trainer, "its model or its labels are of no known kind")
            return None
        if _is_same(trainer, here, own):
            return task
        if not task.by_documents:
            _, alone, own_alone = _losses(trainer, data.first(1))
            if not _is_same(trainer, alone, own_alone):
                _say(trainer, f"its loss of the first sample is {own_alone.item():.6g}, the model's {alone.item():.6g}")
                return None
    raise ValueError(
        f"the Trainer's loss of the first {_N_FIRST} samples is {own.item():.6g}, the mean over what is predicted for "
        f"them {here.item():.6g}: weights of classes, another loss of packed documents, or one that depends on "
        "the batch cannot be told apart from outside; pass loss_fn(outputs, labels), one loss for each sample"
    )


def _losses(trainer: Any, batch: Mapping[str, Any]) -> tuple[Task | None, Tensor, Tensor]:
    """Return a batch's task (None: of no known kind), what the model computes for it, and the Trainer's loss."""
    model = trainer.model
    batch = moved(batch, device_of(model.parameters()))
    task = task_of(model, batch)
    if task is None:
        return None, torch.tensor(torch.nan), torch.tensor(torch.nan)
    inputs, targets = _split(model, task, batch)
    outputs = _AsEvaluated(model, trainer.accelerator.autocast)(**inputs)
    here, own = task.model_loss(outputs, targets), _own_loss(trainer, batch)
    if _takes_number(trainer) and not _is_same(trainer, here, own):  # some versions count labels that none predicts
        with suppress(TypeError):
            mean = _own_loss(trainer, batch, numbered=False)
            own = mean if _is_same(trainer, here, mean) else own
    return task, here, own


def _is_same(trainer: Any, here: Tensor, own: Tensor) -> bool:
    """Tell whether two losses of a batch are one but for rounding; what is not finite tells nothing."""
    is_exact = not trainer.accelerator.native_amp and next(trainer.model.parameters()).dtype.itemsize >= 4
    close = torch.isclose(here.float(), own.float(), rtol=1e-4 if is_exact else 0.02, atol=1e-6)
    return bool(close) or not bool(here.isfinite())


def _say(trainer: Any, why: str) -> None:
    """Say that the Trainer's own loss will be asked for one sample at a time."""
    logger.warning("%s.compute_loss is asked for one sample at a time: %s", type(trainer).__name__, why)


def _own_loss(trainer: Any, batch: Mapping[str, Any], numbered: bool = True) -> Tensor:
    """Return what a Trainer minimises for a batch, were it all of a step's: on one process, without accumulation.

    Args:
        trainer: the Trainer.
        batch: with its labels.
        numbered: give a loss that takes it the number of labels.

    Raises:
        TypeError: if its loss is to be divided by a number that is not known.
    """
    batch, given = dict(batch), {}
    averages = getattr(trainer.args, "average_tokens_across_devices", False)
    trainer.args.average_tokens_across_devices = False  # ranks may have unequal parts, and each asks for its own
    try:
        if numbered and _takes_number(trainer):
            number = trainer._get_num_items_in_batch([batch], trainer.args.device)
            given = {} if number is None else {"num_items_in_batch": number}
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss: Tensor = trainer.compute_loss(trainer.model, batch, **given)
    except TypeError as error:
        if given or "None" not in str(error):
            raise
        raise TypeError(
            f"the loss of {type(trainer).__name__} takes num_items_in_batch, which is not known for one batch: pass "
            f"loss_fn(outputs, labels), one loss for each sample ({error})"
        ) from error
    finally:
        trainer.args.average_tokens_across_devices = averages
    return loss


def _takes_number(trainer: Any) -> bool:
    """Tell whether a loss of the user's is given the number of labels to divide by; the models' own are means."""
    if not hasattr(trainer, "_get_num_items_in_batch"):
        return False
    if getattr(trainer, "compute_loss_func", None) is not None:
        return True
    own = type(trainer).compute_loss
    return own.__module__ != "transformers.trainer" and "num_items_in_batch" in signature(own).parameters


def _call(
    trainer: Any, task: Task | None, loss_fn: LossFn | None, reduction: TokenReduction, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the module to run, and arguments for ``fisher_diagonal`` with the caller's options.

    Raises:
        ValueError: if labels cannot be drawn, as the loss is the Trainer's own.
    """
    model = trainer.model
    if task is None and loss_fn is None:
        if options.get("fisher_type", "empirical") != "empirical":
            raise ValueError(
                f"fisher_type={options['fisher_type']!r} needs a loss that is -log p of labels that can be drawn, and "
                f"that of {type(trainer).__name__} is its own: pass loss_fn(outputs, labels)"
            )
        arguments: dict[str, Any] = {"loss_fn": lambda losses, _: losses, "unpack": lambda batch: (dict(batch), batch)}
        return _OwnLoss(trainer), arguments | {"samples": "losses"} | options
    arguments = {
        "loss_fn": loss_fn if task is None else task.loss(reduction),
        "unpack": lambda batch: _split(model, task, batch),
    }
    if task is not None:
        arguments |= {"likelihood": task.likelihood, "samples": "losses" if task.by_documents else "batch"}
    is_mixed = trainer.accelerator.native_amp
    return _AsEvaluated(model, trainer.accelerator.autocast) if is_mixed else model, arguments | options


def _split(model: Any, task: Task | None, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return a model's inputs and the targets: labels stay inputs where a decoder is to be given them."""
    inputs = dict(batch)
    names = ("labels",) if task is None else task.labels
    targets: Any = tuple(inputs[name] for name in names if name in inputs)
    targets = targets[0] if len(targets) == 1 else targets
    if task is not None and task.by_documents:
        targets = {"labels": targets, "ids": document_ids(batch)}
    config = getattr(model, "config", None)
    is_decoder_fed = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs
    if not is_decoder_fed:
        for name in names:
            inputs.pop(name, None)
    if getattr(config, "use_cache", None):  # a cache costs memory, and with one packed documents see each other
        inputs.setdefault("use_cache", False)
    return inputs, targets
