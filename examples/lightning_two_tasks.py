"""Two tasks, one after the other, in PyTorch Lightning: digits 0 to 4, then 5 to 9, with and without the penalty."""

import logging
import warnings

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import wplfast
from wplfast.integrations.lightning import WPLCallback, module_fisher

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Digits(pl.LightningModule):
    """A classifier that tells which of the task's five digits it sees; all its weights are shared by the tasks."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return self.criterion(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def accuracy(module, data):
    """Return the share of digits that are told right."""
    with torch.no_grad():
        return (module(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean().item()


def fit(module, data, *callbacks):
    """Train on one task."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(accelerator="cpu", max_epochs=10, gradient_clip_val=1.0, callbacks=list(callbacks), **quiet)
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True))


digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
first, second = (TensorDataset(x[y // 5 == task], y[y // 5 == task] % 5) for task in (0, 1))

for name, alpha in (("without", 0.0), ("with", 300.0)):
    pl.seed_everything(0, verbose=False)
    module = Digits()
    fit(module, first)
    before = accuracy(module, first)

    wpl = wplfast.WeightPlasticityLoss(module, alpha=alpha)
    wpl.consolidate(module_fisher(module, DataLoader(first, batch_size=32)))
    fit(module, second, WPLCallback(wpl))
    after = accuracy(module, first)
    print(f"first task: {before:.3f}, then {after:.3f}; second task: {accuracy(module, second):.3f}")
    print(f"forgetting {name} the penalty: {before - after:.3f}")
