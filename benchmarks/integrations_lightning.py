"""A step of Lightning's Trainer with the callback, over one without and over the loop that users write.

One training run serves all ways: they take turns from batch to batch, so that a busy machine slows them alike.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import wplfast
from wplfast.integrations.lightning import WPLCallback

from .integrations import Turns, n_steps
from .models import Decoder
from .timing import Budget

VOCABULARY, LENGTH, WIDTH, BATCH = 50257, 512, 768, 2  # GPT-2-small's shapes, one layer
QUICK = (50, 16, 8, 2)


class Language(pl.LightningModule):
    """A causal language model; ``with_loop``: its loss has the penalty, parameter by parameter."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.decoder = Decoder(vocabulary, length, width, 1, tied=True)
        self.anchors: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}
        self.with_loop = False

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss."""
        logits = self.decoder(batch[0][:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())
        if self.with_loop:
            for name, p in self.named_parameters():
                loss = loss + 0.5 * (self.fisher[name] * (p - self.anchors[name]) ** 2).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-6)


class Way(pl.Callback):
    """First of all callbacks: makes each step go its way, and starts the clock."""

    def __init__(self, callback: WPLCallback, turns: Turns) -> None:
        self._callback, self._turns = callback, turns

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """Attach or detach the callback, and start."""
        way = self._turns.next()
        module.with_loop = way == "loop"
        self._callback.on_train_end(trainer, module)
        if way == "callback":
            self._callback.on_train_start(trainer, module)
        self._turns.start()


class Clock(pl.Callback):
    """Last of all callbacks: stops the clock."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Stop."""
        self._turns.stop()
        trainer.should_stop |= self._turns.are_over


def lightning_step(budget: Budget) -> dict[str, Any]:
    """Time steps, and return their milliseconds with ratios to the steps without the callback."""
    vocabulary, length, width, size = QUICK if budget.quick else (VOCABULARY, LENGTH, WIDTH, BATCH)
    torch.manual_seed(0)
    module = Language(vocabulary, length, width)
    wpl = wplfast.WeightPlasticityLoss(module, alpha=1.0)
    module.fisher = {name: torch.rand_like(p) for name, p in module.named_parameters()}
    module.anchors = {name: p.detach().clone() for name, p in module.named_parameters()}
    wpl.consolidate(module.fisher)
    turns, callback = Turns(module, wpl, budget), WPLCallback(wpl)
    steps = n_steps(budget.rounds)
    tokens = torch.randint(vocabulary, (size * steps, length))
    trainer = pl.Trainer(
        accelerator="cpu" if budget.device.type == "cpu" else "gpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[Way(callback, turns), callback, Clock(turns)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(tokens), batch_size=size))
    case = f"Lightning, decoder of one layer, d={width}, V={vocabulary}, T={length}, N={size}"
    return turns.record(case)
