"""PyTorch Lightning: a callback that adds the penalty's gradient, and the Fisher of a module as it is trained.

Both packages are served, ``lightning`` (``lightning.pytorch``) and ``pytorch_lightning``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..fisher.batches import Batch
from ..fisher.diagonal import LossFn, fisher_diagonal
from ..fisher.result import Fisher
from ..params import device_of, some
from ..penalty.attach import Attachment, attach
from ..penalty.loss import WeightPlasticityLoss
from ._criterion import per_sample
from ._lightning_module import AsTrained, classes, data_of, datamodule_of
from ._options import check_options
from ._penalty import check_penalty, not_there
from ._ranks import agreed

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Callback = Any
else:
    _Callback = type("Callback", classes("Callback"), {})


class WPLCallback(_Callback):  # type: ignore[misc]
    """Add a penalty's gradient once an optimizer step, after gradients are averaged, unscaled and clipped.

    Lightning's ``on_before_optimizer_step`` comes before clipping, so the gradient enters inside ``optimizer.step``
    (:meth:`wplfast.WeightPlasticityLoss.attach`): with any precision, ``accumulate_grad_batches``, clipping, manual
    optimisation, several optimizers and strategy that steps a PyTorch optimizer. A step that Lightning leaves out
    (``training_step`` returned None, gradients overflowed) adds nothing. Do not add ``wpl()`` to the loss as well.

    The anchors are part of Lightning's checkpoints, and ``trainer.fit(ckpt_path=...)`` restores them. A checkpoint from
    before the first ``consolidate`` forgets no anchors. Several penalties, each with its own callback and name, may act
    at once.

    Args:
        wpl: the penalty over parameters of the module.
        log: whether the penalty is logged, at the batches that end with a step.
        name: what it is logged as; it also tells the callbacks of several penalties apart in a checkpoint.

    Raises:
        TypeError: if wpl is no penalty, or name no string.
        ValueError: (as training starts) if no optimizer holds a parameter of the penalty, or ranks differ in theirs.
        RankFailedError: (as training starts) if another rank raised; with its error.

    Example:
        >>> import torch, wplfast
        >>> from wplfast.integrations.lightning import WPLCallback
        >>> module = torch.nn.Linear(2, 2)  # a LightningModule
        >>> callback = WPLCallback(wplfast.WeightPlasticityLoss(module, alpha=60.0))
        >>> # Trainer(callbacks=[callback], gradient_clip_val=1.0).fit(module, second_task)
    """

    def __init__(self, wpl: WeightPlasticityLoss, log: bool = True, name: str = "wpl") -> None:
        """See the class."""
        super().__init__()
        check_penalty(wpl)
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        self.wpl, self._log, self._name = wpl, log, name
        self._steps: list[_Step] = []
        self._handles: list[RemovableHandle] = []
        self._stage: str | None = None

    def __getattr__(self, name: str) -> Any:
        """Say which callback another Trainer takes, where it asks for what this one has not."""
        raise not_there(self, name, "the Trainer of transformers takes that of wplfast.integrations.transformers")

    @property
    def state_key(self) -> str:
        """What a checkpoint has the anchors under: by the class alone, as ever, unless there is a name."""
        kind = type(self).__qualname__
        return kind if self._name == "wpl" else f"{kind}[{self._name}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remember what the Trainer is about to do: a checkpoint that is tested does not replace the anchors."""
        self._stage = stage

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizers, on all ranks or none."""
        with agreed(self.wpl, trainer.world_size):
            self._attach(trainer, pl_module)

    def _attach(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimizers."""
        self._detach()
        for optimizer in trainer.optimizers:
            step = _Step(self.wpl, pl_module.automatic_optimization)
            self._handles.append(attach(self.wpl, optimizer, step))
            self._steps.append(step)
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        references = self.wpl._groups.references
        pairs = list(zip(references.names, references.tensors(), strict=True))
        left = [name for name, p in pairs if id(p) not in held and p.requires_grad]
        if len(left) == len(pairs):
            self._detach()
            raise ValueError(
                f"the optimizers hold none of the penalty's {len(pairs)} parameters {some(left)}: was the penalty made "
                "for another module, or before configure_model replaced the parameters?"
            )
        if left:
            logger.warning("no optimizer holds %s of the penalty; their gradient is not added", some(left))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the penalty if an optimizer stepped: the sum of what each one holds."""
        values = [step.value for step in self._steps if step.value is not None]
        if values and self._log:
            pl_module.log(self._name, sum(values[1:], values[0]))
        for step in self._steps:
            step.value = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach."""
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach."""
        self._detach()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach, also after a tuner ended training early."""
        self._detach()
        self._stage = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the anchors, for a checkpoint."""
        return dict(self.wpl.state_dict())

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take the anchors of a checkpoint over, where one is resumed from.

        Raises:
            RuntimeError: if names or shapes differ.
        """
        if self._stage not in (None, "fit"):
            return
        found, before = int(state_dict["n_anchors"]), self.wpl.n_anchors
        if found < before:
            kept = "the checkpoint's are taken" if found else "the penalty keeps its own"
            logger.warning("the checkpoint holds %d anchors, the penalty %d: %s", found, before, kept)
        if found or not before:
            self.wpl.load_state_dict(state_dict)

    def _detach(self) -> None:
        """Leave the optimizers alone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._steps.clear()


def module_fisher(module: nn.Module, dataloader: Any, loss_fn: LossFn | None = None, **options: Any) -> Fisher:
    """Estimate a LightningModule's diagonal Fisher over its data, as :func:`wplfast.fisher_diagonal` does.

    The module runs as its Trainer runs it, if it has one: on its device, in its precision, with the hooks that move
    batches; ranks of a distributed Trainer are reduced. It runs in eval mode, and ``self.log`` does nothing meanwhile.

    Args:
        module: the LightningModule; ``module(inputs)`` returns the outputs.
        dataloader: yields the training step's batches: a data loader or any iterable, a LightningDataModule, or a
            Trainer that has trained.
        loss_fn: ``loss_fn(outputs, targets)`` returns one loss per sample, [N]. Default, in this order: the module's
            method ``per_sample_losses(batch)``, which returns losses [N] for a batch of any form (a training step
            without its mean); its attribute ``loss_fn`` or ``criterion``, if the training step applies that to outputs
            and targets: a sample's loss is what it gives for a batch of that sample alone.
        options: of :func:`wplfast.fisher_diagonal`: ``params``, ``unpack``, ``max_samples``, ``fisher_type``, ...

    Returns:
        F by the names of the module's parameters that require grad.

    Raises:
        TypeError: if it is no LightningModule, there is no loss function, the data are of no known form, or an option
            is unknown.
        ValueError: as fisher_diagonal raises it; if a Trainer has no data yet; or if labels are to be drawn (``"mc"``,
            ``"exact"``) for losses that the module computes itself.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> from wplfast.integrations.lightning import module_fisher
        >>> class Module(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer, self.criterion = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> module_fisher(Module(), [(torch.randn(8, 4), torch.randint(0, 3, (8,)))])
        Fisher(2 parameters, 15 elements, 8 samples)
    """
    check_options(module_fisher, options)
    if not isinstance(module, classes("LightningModule")):
        hint = ": use wplfast.fisher_diagonal" if isinstance(module, nn.Module) else ""
        if isinstance(dataloader, classes("LightningModule")):
            hint = ", and dataloader is one: the order is module_fisher(module, dataloader)"
        raise TypeError(f"module must be a LightningModule, got {type(module).__name__}{hint}")
    own = getattr(module, "per_sample_losses", None) if loss_fn is None else None
    model = AsTrained(module, datamodule_of(dataloader), module if own is None else own)
    device, unpack = device_of(module.parameters()), options.pop("unpack", None)
    if own is None:
        loss = per_sample(_criterion(module)) if loss_fn is None else loss_fn
        take = unpack or partial(_usual, device=device, samples=options.get("samples", "batch"))
    elif options.get("fisher_type", "empirical") == "empirical":
        loss, take = _losses, _whole
    else:
        raise ValueError(
            f"fisher_type={options['fisher_type']!r} draws targets, which per_sample_losses(batch) does not take: pass "
            "loss_fn, a function of outputs and targets"
        )

    def in_precision(outputs: Any, targets: Any) -> Tensor:
        with model.precision():
            return loss(outputs, targets)

    options.setdefault("params", {name: p for name, p in module.named_parameters() if p.requires_grad})
    if model.is_distributed:
        options.setdefault("reduce", True)
    with model.running():
        fisher = fisher_diagonal(
            model, data_of(dataloader), in_precision, unpack=lambda batch: take(model.transferred(batch)), **options
        )
    return fisher.to(device)


def _criterion(module: nn.Module) -> Callable[[Any, Any], Tensor]:
    """Return what a module computes its loss with, by the names that are usual.

    Raises:
        TypeError: if it has nothing of these names.
    """
    for name in ("loss_fn", "criterion"):
        found = getattr(module, name, None)
        if callable(found):
            logger.info("each sample's loss is %s.%s of its outputs and targets", type(module).__name__, name)
            return found  # type: ignore[no-any-return]
    raise TypeError(
        f"{type(module).__name__} does not say what a sample's loss is: pass loss_fn, a function of outputs and "
        "targets that returns one loss per sample [N]; or give the module a method per_sample_losses(batch) that "
        "returns them (its training_step without the mean), or an attribute loss_fn or criterion"
    )


def _whole(batch: Any) -> tuple[Any, None]:
    """Pass a whole batch on to a method that knows what to do with it."""
    return (batch,), None


def _losses(outputs: Tensor, targets: None) -> Tensor:
    """Take the losses that the module returned."""
    return outputs


def _usual(batch: Any, device: torch.device, samples: str) -> tuple[Any, ...]:
    """Take a batch of one of the usual forms apart."""
    parts = Batch.of(batch, None, device, samples)
    return (parts.inputs, parts.targets) if parts.weights is None else (parts.inputs, parts.targets, parts.weights)


class _Step(Attachment):
    """Adds the gradient of what one of a Trainer's optimizers holds, which may be nothing, and keeps the penalty."""

    def __init__(self, penalty: WeightPlasticityLoss, automatic: bool) -> None:
        """Refer to a penalty."""
        super().__init__(penalty)
        self.value: Tensor | None = None
        self._automatic = automatic

    def judge(self, names: list[str], left: list[str], n_parameters: int) -> None:
        """Say nothing: another optimizer may hold them, and parameters may join later."""

    def _add_grad_(self, optimizer: Optimizer) -> Tensor:
        """Add the gradient, unless Lightning leaves this step out."""
        names = () if self._automatic and _is_left_out(optimizer) else self.held(optimizer)
        if names == ():
            return torch.zeros((), device=self.penalty.alpha.device)
        self.value = super()._add_grad_(optimizer)
        return self.value


def _is_left_out(optimizer: Optimizer) -> bool:
    """Tell whether there are no gradients at all: ``training_step`` returned None."""
    return all(p.grad is None for group in optimizer.param_groups for p in group["params"])
