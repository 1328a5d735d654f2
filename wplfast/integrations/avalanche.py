"""Avalanche: a plugin with the arguments of ``EWCPlugin``, the exact Fisher, and a penalty that is one kernel."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.models.utils import is_multi_task_module
from avalanche.training.plugins import EWCPlugin
from avalanche.training.utils import ParamData, copy_params_dict, zerolike_params_dict
from torch import nn
from torch.utils.data import DataLoader

from ..errors import StaleParameterError
from ..fisher.diagonal import LossFn, fisher_diagonal
from ..penalty.loss import WeightPlasticityLoss
from ._criterion import per_sample


class WPLPlugin(EWCPlugin):  # type: ignore[misc]
    """EWC with ``F = 1/N sum_n g_n^2`` over samples, where ``EWCPlugin`` squares the mean gradient of each batch.

    The loss gets ``ewc_lambda * sum_k F_k (theta - theta_k)^2`` as from ``EWCPlugin`` (without a half), whose F and
    penalty these are at batches of one sample. Other batches make no difference here, so ``ewc_lambda`` means the same
    for all of them; one that was tuned for ``EWCPlugin`` at batches of B is up to B times too large. The penalty of any
    number of experiences costs what that of one does.

    Parameters are followed by name: heads that grow (new units are free), heads and modules of later experiences, and
    task labels, which a ``MultiTaskModule`` is given. Checkpoints of Avalanche hold the plugin.

    Args:
        ewc_lambda: strength of the penalty.
        mode: ``"separate"``: the sum over all earlier experiences, each with its own anchor. ``"online"``: F decays and
            adds up, and the newest anchor counts.
        decay_factor: of F from one experience to the next, in mode "online".
        keep_importance_data: whether ``importances`` and ``saved_params`` of all experiences are kept for reading, and
            not the newest alone; always so in mode "separate". The penalty does not need them.
        loss_fn: ``loss_fn(outputs, targets)`` returns one loss per sample, [N]. Default: what the strategy's criterion
            gives for a batch of that sample alone.
        options: of :func:`wplfast.fisher_diagonal`: ``fisher_type``, ``max_samples``, ``verify``, ``progress``, ...

    Attributes:
        wpl: the :class:`wplfast.WeightPlasticityLoss`, from the end of the first experience on.
        importances: F by experience and name, as ``ParamData``.
        saved_params: anchors by experience and name, as ``ParamData``.

    Raises:
        AssertionError: if the arguments do not fit together, as EWCPlugin raises it.

    Example:
        >>> # plugin = WPLPlugin(ewc_lambda=0.4)  in place of EWCPlugin(ewc_lambda=0.4)
        >>> # strategy = Naive(model=model, optimizer=optimizer, criterion=criterion, plugins=[plugin])

    Source: arXiv:1612.00796 (separate), arXiv:1805.06370 (online).
    """

    def __init__(
        self,
        ewc_lambda: float,
        mode: str = "separate",
        decay_factor: float | None = None,
        keep_importance_data: bool = False,
        *,
        loss_fn: LossFn | None = None,
        **options: Any,
    ) -> None:
        """See the class."""
        super().__init__(ewc_lambda, mode, decay_factor, keep_importance_data)
        if "params" in options:
            raise TypeError("params is not an option: all parameters that require grad count; freeze the others")
        self.wpl: WeightPlasticityLoss | None = None
        self._lambda, self._loss_fn, self._options = ewc_lambda, loss_fn, options

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalty to the loss."""
        if self.wpl is None:
            return
        if self._lambda != self.ewc_lambda:
            self.wpl.alpha, self._lambda = 2 * self.ewc_lambda, self.ewc_lambda
        try:
            penalty = self.wpl()
        except StaleParameterError:  # the model was adapted to an experience, or comes from a checkpoint
            self._follow(strategy.model)
            penalty = self.wpl()
        strategy.loss = strategy.loss + penalty

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Compute the experience's Fisher, and anchor the parameters."""
        experience = strategy.clock.train_exp_counter
        importances = self.compute_importances(
            strategy.model,
            strategy._criterion,
            strategy.optimizer,
            strategy.experience.dataset,
            strategy.device,
            strategy.train_mb_size,
            num_workers=kwargs.get("num_workers", 0),
        )
        self._consolidate(strategy.model, importances)
        self.update_importances(importances, experience)
        self.saved_params[experience] = copy_params_dict(strategy.model)
        if not self.keep_importance_data:
            self.saved_params.pop(experience - 1, None)

    def compute_importances(
        self,
        model: nn.Module,
        criterion: Any,
        optimizer: Any,
        dataset: Any,
        device: Any,
        batch_size: int,
        num_workers: int = 0,
    ) -> dict[str, ParamData]:
        """Return the diagonal Fisher of a data set, zero for parameters that do not require grad.

        The batches' size does not matter; it is what memory and speed depend on.
        """
        collate = getattr(dataset, "collate_fn", None)
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, num_workers=num_workers)
        takes_tasks = is_multi_task_module(model)

        def unpack(batch: Any) -> tuple[Any, Any]:
            return (batch[0], batch[-1]) if takes_tasks else (batch[0],), batch[1]

        options = {"unpack": unpack, **self._options}
        fisher = fisher_diagonal(model, loader, self._loss_fn or per_sample(criterion), **options)
        importances: dict[str, ParamData] = zerolike_params_dict(model)
        for name, values in fisher.items():
            importances[name] = ParamData(name, values.shape, init_tensor=values, device=values.device)
        return importances

    @torch.no_grad()
    def update_importances(self, importances: dict[str, ParamData], t: int) -> None:
        """Keep the Fisher of experience t; in mode "online" the decayed sum up to it, name by name."""
        if self.mode == "online" and t > 0:
            for name, older in self.importances[t - 1].items():
                newest = importances.get(name)
                if newest is not None:
                    decayed = self.decay_factor * older.expand(newest.shape)
                    importances[name] = ParamData(name, newest.shape, init_tensor=decayed + newest.data)
            if not self.keep_importance_data:
                del self.importances[t - 1]
        self.importances[t] = importances

    def _consolidate(self, model: nn.Module, importances: dict[str, ParamData]) -> None:
        """Anchor the parameters where they are."""
        if self.wpl is None:
            self.wpl, self._lambda = WeightPlasticityLoss(model, alpha=2 * self.ewc_lambda), self.ewc_lambda
        else:
            self._follow(model)
        fisher = {name: importance.data for name, importance in importances.items()}
        if self.mode == "separate":
            self.wpl.consolidate(fisher, extra="ignore")  # frozen parameters are in importances, with zeros
        else:
            self.wpl.consolidate(fisher, decay=self.decay_factor, anchor="replace", extra="ignore")

    def _follow(self, model: nn.Module) -> None:
        """Refer to the model's parameters as they are now: grown, joined or gone."""
        if self.wpl is not None:
            self.wpl.rebind(model, new="add", missing="drop")
