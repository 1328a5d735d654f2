"""Small modules of Lightning, their data and penalty, and what their training is, written by hand."""

from __future__ import annotations

import lightning.pytorch as pl
import pytorch_lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import wplfast

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Body:
    """A small classifier: what modules of both packages do alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.criterion = nn.CrossEntropyLoss()
        self.skipped: tuple[int, ...] = ()

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        self.log("hidden", hidden.detach().mean())
        return self.head(hidden)

    def training_step(self, batch, index):
        loss = self.criterion(self(batch[0]), batch[1])
        return None if index in self.skipped else loss

    def validation_step(self, batch, index):
        """Nothing: a checkpoint is what a test is about."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Module(Body, pl.LightningModule):
    pass


class OtherModule(Body, pytorch_lightning.LightningModule):
    pass


class TwoOptimizers(Module):
    """Manual optimisation with an optimizer for each half."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.trunk, self.head)]

    def training_step(self, batch, index):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(self.criterion(self(batch[0]), batch[1]))
        self.clip_gradients(first, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        first.step()
        second.step()


def data(n: int = 24, size: int = 6) -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 5, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (n,), generator=generator)), batch_size=size)


def penalty(module: nn.Module) -> wplfast.WeightPlasticityLoss:
    """A penalty that is strong where the parameters are not."""
    wpl = wplfast.WeightPlasticityLoss(module, alpha=3.0)
    wpl.consolidate(
        {name: torch.linspace(0, 1, p.numel()).view(p.shape) for name, p in module.named_parameters()},
        theta_hat={name: p.detach() + 0.1 for name, p in module.named_parameters()},
    )
    return wpl


def by_hand(module, add_grad_, autocast=None, scaler=None, clip=lambda parameters: None, accumulate=1) -> list[float]:
    """Train as Lightning does, with the penalty's gradient after clipping; return the penalty before each step."""
    optimizer = module.configure_optimizers()
    values = []
    for _ in range(2):
        for index, (x, y) in enumerate(data()):
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss = F.cross_entropy(module.head(torch.tanh(module.trunk(x))), y) / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
            if (index + 1) % accumulate:
                continue
            if scaler is not None:
                scaler.unscale_(optimizer)
            clip(list(module.parameters()))
            values.append(add_grad_().item())
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    return values


def assert_equal(module: nn.Module, expected: nn.Module) -> None:
    for (name, p), q in zip(module.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name
