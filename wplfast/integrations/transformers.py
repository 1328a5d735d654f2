"""Hugging Face's ``Trainer``, and TRL's: a callback that adds the penalty's gradient, and the Fisher of its data."""

from __future__ import annotations

import logging
import os
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..fisher.diagonal import LossFn
from ..fisher.result import Fisher
from ..params import Params, device_of, is_fully_sharded, some
from ..penalty.attach import Attachment, attach
from ..penalty.loss import WeightPlasticityLoss
from . import _trainer_fisher
from ._options import check_options
from ._penalty import check_penalty, not_there
from ._ranks import agreed
from ._trainer_tasks import TokenReduction

logger = logging.getLogger(__name__)


class WPLCallback(TrainerCallback):  # type: ignore[misc]
    """Add a penalty's gradient once an optimizer step of a ``Trainer``, and keep its state with the checkpoints.

    The gradient enters as the optimizer steps, after accumulation, averaging over ranks, unscaling and clipping,
    whatever the precision; a step that a ``GradScaler`` leaves out adds nothing. The loss, ``eval_loss`` and the
    gradient's norm that the Trainer logs are those of the task alone. Do not add ``wpl()`` to the loss as well.

    Every checkpoint folder gets the anchors (``wpl.safetensors``), and ``train(resume_from_checkpoint=...)`` restores
    them. The penalty may be made before the Trainer moves, wraps or (FSDP2) shards the model, but after PEFT has
    adapted it. Several penalties, each with its own callback, may act at once; files and logs of the second one are
    called ``wpl_1``.

    Args:
        wpl: the penalty over parameters of the Trainer's model.
        log: whether the penalty is logged as ``wpl``, its mean over the steps since the last log, as the loss is.
        before_clipping: let the gradient be clipped together with the task's: it then enters before the first backward
            pass of a step.

    Raises:
        TypeError: if wpl is no penalty.
        ValueError: (as training starts) if the penalty has none of the model's parameters, or only frozen ones; if
            it is in two callbacks; if anchors or alpha differ between ranks.
        FileNotFoundError: (as training resumes) if neither the checkpoint nor the penalty has anchors.
        RankFailedError: (as training starts) if another rank raised; with its error.
        NotImplementedError: (as training starts) under DeepSpeed.

    Example:
        >>> import torch, wplfast
        >>> from wplfast.integrations.transformers import WPLCallback, trainer_fisher
        >>> model = torch.nn.Linear(2, 2)  # a transformers model
        >>> wpl = wplfast.WeightPlasticityLoss(model, alpha=60.0)
        >>> callback = WPLCallback(wpl)
        >>> # wpl.consolidate(trainer_fisher(first_trainer)); Trainer(..., callbacks=[callback]).train()
    """

    def __init__(self, wpl: WeightPlasticityLoss, log: bool = True, before_clipping: bool = False) -> None:
        """See the class."""
        super().__init__()
        check_penalty(wpl)
        self.wpl, self._log, self._before_clipping = wpl, log, before_clipping
        self._name = "wpl"
        self._handle: RemovableHandle | None = None
        self._added = _Added(wpl)
        self._optimizer: Any = None

    def __getattr__(self, name: str) -> Any:
        """Say which callback another Trainer takes, where it asks for what this one has not."""
        raise not_there(self, name, "PyTorch Lightning's Trainer takes that of wplfast.integrations.lightning")

    # ---- the gradient ----------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the anchors where training resumes, and attach to the optimizer."""
        self._detach()
        trainer, checkpoint = _of_trainer("resume_from_checkpoint")
        if trainer is not None:
            self._take_place(trainer.callback_handler)
        with agreed(self.wpl, args.world_size):
            if getattr(trainer, "is_deepspeed_enabled", False):
                raise NotImplementedError(
                    "DeepSpeed keeps gradients where no parameter's .grad is: train with FSDP2 (TrainingArguments("
                    "fsdp=..., fsdp_config={'fsdp_version': 2})) or DDP"
                )
            if is_fully_sharded(kwargs["model"]):
                self.wpl._follow()  # FSDP2 puts shards in the place of the parameters as training starts
            if state.global_step:
                self._restore(checkpoint)
            if trainer is not None:
                self._check_alone(trainer.callback_handler)
            self._check_model(kwargs["model"], getattr(trainer, "model_init", None) is not None)
            self._optimizer = kwargs["optimizer"]
            self._added = _Added(self.wpl)
            if not self._before_clipping:
                optimizer = getattr(self._optimizer, "optimizer", self._optimizer)  # accelerate wraps it
                self._added.held(optimizer)
                self._handle = attach(self.wpl, optimizer, self._added)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gradient before the first backward pass, if it is to be clipped."""
        if self._before_clipping and self._optimizer is not None:
            scaler = getattr(self._optimizer, "scaler", None)
            one = torch.ones((), device=device_of(self.wpl._groups.references.tensors()))
            self._added.add(1.0 if scaler is None else scaler.scale(one))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the optimizer stepped.

        Raises:
            RuntimeError: if it is one that steps within the backward pass.
        """
        optimizer = self._optimizer
        if self._handle is None or self._added.n_calls or getattr(optimizer, "step_was_skipped", False):
            return
        raise RuntimeError(
            f"the step() of {type(getattr(optimizer, 'optimizer', optimizer)).__name__} was not called: an optimizer "
            "that steps within the backward pass takes no penalty; use another optim"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimizer alone."""
        self._detach()

    def _detach(self) -> None:
        """Remove the hook; the optimizer is used again when ``train`` is called again."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._optimizer = None

    def _check_alone(self, handler: CallbackHandler) -> None:
        """Refuse a penalty that two callbacks add.

        Raises:
            ValueError: if there is another one, or the same one twice.
        """
        with_it = [c for c in handler.callbacks if isinstance(c, WPLCallback) and c.wpl is self.wpl]
        if len(with_it) > 1:
            raise ValueError(
                f"{len(with_it)} of the Trainer's callbacks are WPLCallbacks of this penalty: its gradient would be "
                f"added {len(with_it)} times; give the Trainer one"
            )

    def _check_model(self, model: Any, is_made_anew: bool) -> None:
        """Refuse a penalty that nothing would come of.

        Args:
            model: that is trained.
            is_made_anew: the Trainer has made it as training started.

        Raises:
            ValueError: if it has none of the model's parameters, or only frozen ones.
            StaleParameterError: if a parameter was replaced.
        """
        references = self.wpl._groups.references
        held = {id(p) for p in model.parameters()}
        own = [p for p in references.tensors() if id(p) in held]
        if not own:
            cure = "make it of this model, WeightPlasticityLoss(trainer.model)"
            if is_made_anew:
                cure = "model_init makes it anew as training starts: call wpl.rebind(model) at the end of model_init"
            raise ValueError(
                f"none of the penalty's {len(references)} parameters {some(references.names)} is one of the Trainer's "
                f"model, a {type(model).__name__}: {cure}"
            )
        if not any(p.requires_grad for p in own):
            raise ValueError(
                f"all of the penalty's {len(references)} parameters {some(references.names)} are frozen: if PEFT has "
                "adapted the model since, make the penalty of the adapters, WeightPlasticityLoss(trainer.model)"
            )

    # ---- logs ------------------------------------------------------------------------------------------------------

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Put the penalty into the logs of training."""
        if not self._log or logs is None or "loss" not in logs:
            return
        mean = self._added.take_mean()
        if mean is not None:
            logs[self._name] = mean
            if state.log_history and "loss" in state.log_history[-1]:  # it was copied from the logs before
                state.log_history[-1][self._name] = mean

    def _take_place(self, handler: CallbackHandler) -> None:
        """Move before the callbacks that report, among which ``report_to`` puts its own first; find a name."""
        callbacks = handler.callbacks
        place = [callback for callback in callbacks if isinstance(callback, WPLCallback)].index(self)
        callbacks.remove(self)
        callbacks.insert(place, self)
        self._name = f"wpl_{place}" if place else "wpl"

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the anchors into the checkpoint's folder; of shards all ranks do, as these are gathered."""
        if args.should_save or self.wpl._groups.references.is_sharded:
            self.wpl.save(os.path.join(_folder(args, state), f"{self._name}.safetensors"))

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the anchors before a checkpoint's folder is uploaded, which is before ``on_save``.

        Shards wait for ``on_save``: one rank alone cannot gather them.
        """
        if os.path.isdir(_folder(args, state)) and not self.wpl._groups.references.is_sharded:
            self.on_save(args, state, control)

    def _restore(self, checkpoint: Any) -> None:
        """Take over the anchors of the checkpoint that training resumes from.

        Raises:
            FileNotFoundError: if there are none, nor in the penalty.
            RuntimeError: if it is not known, and the penalty has none.
        """
        if not isinstance(checkpoint, (str, os.PathLike)):
            if not self.wpl.n_anchors:
                raise RuntimeError(
                    "training resumes, but no transformers.Trainer is seen that says from which checkpoint, and the "
                    "penalty has no anchors: call wpl.load(os.path.join(checkpoint, 'wpl.safetensors')) before train()"
                )
            logger.warning(
                "training resumes from a checkpoint that is not known here: the penalty keeps the %d anchors it has",
                self.wpl.n_anchors,
            )
            return
        path = os.path.join(checkpoint, f"{self._name}.safetensors")
        if os.path.isfile(path):
            self.wpl.load(path)
        elif self.wpl.n_anchors:
            logger.warning("%s is not there: the penalty keeps the %d anchors it has", path, self.wpl.n_anchors)
        else:
            raise FileNotFoundError(
                f"{path} is not there, and the penalty has no anchors: the checkpoint was saved without this callback; "
                "consolidate the penalty, or wpl.load(path), before train(resume_from_checkpoint=...)"
            )


class _Added(Attachment):
    """Adds the gradient, and sums up the penalty's values on their device."""

    def __init__(self, penalty: WeightPlasticityLoss) -> None:
        """Refer to a penalty."""
        super().__init__(penalty)
        self.n_calls = 0  # since training began
        self._sum: Tensor | None = None
        self._n_values = 0

    def add(self, scale: float | Tensor) -> None:
        """Add the gradient times a loss scale, whatever an optimizer holds."""
        self._count(self.penalty.add_grad_(scale))

    def take_mean(self) -> float | None:
        """Return the mean value since it was taken last; None if there is none."""
        if self._sum is None:
            return None
        mean = self._sum.item() / self._n_values
        self._sum, self._n_values = None, 0
        return mean

    def _add_grad_(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Add the gradient and note the value."""
        value = super()._add_grad_(optimizer)
        self._count(value)
        return value

    def _count(self, value: Tensor) -> None:
        """Note a value."""
        self.n_calls += 1
        self._n_values += 1
        if self._sum is None:
            self._sum = value.detach().clone()
        else:
            self._sum += value.detach()


def trainer_fisher(
    trainer: Trainer,
    dataset: Any = None,
    *,
    max_samples: int | None = None,
    params: Params | None = None,
    token_reduction: TokenReduction = "sum",
    loss_fn: LossFn | None = None,
    **options: Any,
) -> Fisher:
    """Estimate the diagonal Fisher of a Trainer's model on its data, as :func:`wplfast.fisher_diagonal` does.

    Data are collated by the Trainer's collator, without the columns that its model does not take, in batches of its
    ``per_device_train_batch_size`` and its mixed precision; in eval mode, on the device that the model is on. Each
    process takes its part, every sample once, and all get the same Fisher, of an FSDP2 model its shards; one that fails
    ends it on all. Documents that are packed into rows (TRL's packing, ``DataCollatorWithFlattening``) are samples of
    their own. The Trainer is afterwards as it was.

    The loss of a sample is -log p of all its labels, told by the model's class: causal (shifted) and masked language
    models, encoder-decoders, classifiers of sequences, images or sounds (one label, several, or regression, by
    ``config.problem_type``), of tokens, and spans of answers. It is compared with ``trainer.compute_loss`` first. Where
    that is another loss (label smoothing, ``compute_loss_func``, a ``compute_loss`` of one's own, DPO's of pairs), it
    is asked for its loss of one sample (a pair) at a time, and F is that of this loss; the log says so.

    Args:
        trainer: a ``Trainer``, before or after training.
        dataset: prepared as the Trainer's own are; default: its ``train_dataset``.
        max_samples: estimate on so many samples, of all processes together, drawn at random (of a stream: the first);
            the same ones on any number of processes.
        params: what to estimate for; default: all of the model's parameters that require grad, so of a PEFT model its
            adapters.
        token_reduction: ``"sum"``: -log p, which the Fisher information is defined with. ``"mean"``: what the model
            itself returns for a sample alone: a mean over tokens or labels, for regression the squared error (twice
            -log p), for spans half. The choice changes F by the square of the ratio, for tokens by up to T^2.
        loss_fn: ``loss_fn(outputs, labels)`` with one loss for each sample, in place of all this.
        options: of :func:`wplfast.fisher_diagonal`: ``fisher_type``, ``with_grad``, ``verify``, ``progress``, ...

    Returns:
        The Fisher; its names are those of ``trainer.model``, or of ``params``.

    Raises:
        TypeError: if it is no Trainer, or an option is unknown.
        ValueError: if there is no data; if the Trainer's loss of several samples is not the mean of theirs (class
            weights), or labels are to be drawn for a loss of its own: pass loss_fn; on all processes, if their data
            or models differ; and what ``fisher_diagonal`` finds.
        RankFailedError: if another process failed; with its error.

    Example:
        >>> from wplfast.integrations.transformers import trainer_fisher
        >>> # trainer.train(); wpl.consolidate(trainer_fisher(trainer, max_samples=1000))

    Source: arXiv:1612.00796, arXiv:1902.08232; see :func:`wplfast.fisher_diagonal`.
    """
    check_options(trainer_fisher, options)
    if not isinstance(trainer, Trainer):
        hint = ": use wplfast.fisher_diagonal"
        if isinstance(dataset, Trainer):
            hint = ", and dataset is one: the order is trainer_fisher(trainer, dataset)"
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}{hint}")
    return _trainer_fisher.estimate(trainer, dataset, max_samples, params, token_reduction, loss_fn, options)


def _of_trainer(local: str) -> tuple[Any, Any]:
    """Return the Trainer that calls a callback, and a local variable of its method; None for both if there is none.

    Callbacks are told neither the Trainer nor the checkpoint that it resumes from.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals
        if local in found and isinstance(found.get("self"), Trainer):
            return found["self"], found[local]
        frame = frame.f_back
    return None, None


def _folder(args: Any, state: Any) -> str:
    """Return the folder of the checkpoint of this step: in a search for hyperparameters, of this trial."""
    trainer, trial = _of_trainer("trial")
    root = args.output_dir if trainer is None else trainer._get_output_dir(trial)
    return os.path.join(root, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
