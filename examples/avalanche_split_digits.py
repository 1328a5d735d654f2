"""SplitDigits in Avalanche: five experiences of two digits each, with and without ``WPLPlugin``."""

import warnings

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from wplfast.integrations.avalanche import WPLPlugin

warnings.filterwarnings("ignore")


class Digits(TensorDataset):
    """Samples as Avalanche wants them: a tensor and a number, and all labels as ``targets``."""

    def __init__(self, x, y):
        super().__init__(x, y)
        self.targets = y.tolist()

    def __getitem__(self, index):
        return self.tensors[0][index], self.targets[index]


def accuracy(model, experience):
    """Return the share of an experience's test digits that are told right."""
    x, y, _ = zip(*(experience.dataset[i] for i in range(len(experience.dataset))), strict=True)
    with torch.no_grad():
        return (model(torch.stack(x)).argmax(1) == torch.tensor(y)).float().mean().item()


digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train, test = Digits(x[:1200], y[:1200]), Digits(x[1200:], y[1200:])
# Every experience asks which of two digits it is, and all share the model's two outputs.
benchmark = nc_benchmark(train, test, 5, task_labels=False, shuffle=False, class_ids_from_zero_in_each_exp=True)

for name, plugins in (("without", []), ("with", [WPLPlugin(ewc_lambda=1e4)])):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=5e-3),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=16,
        train_epochs=4,
        plugins=plugins,
        evaluator=None,
    )
    learned = []
    for experience, tested in zip(benchmark.train_stream, benchmark.test_stream, strict=True):
        strategy.train(experience)
        learned.append(accuracy(model, tested))
    final = [accuracy(model, tested) for tested in benchmark.test_stream]
    forgotten = sum(a - b for a, b in zip(learned[:-1], final, strict=False)) / 4
    print(f"accuracy when learned {sum(learned) / 5:.3f}, in the end {sum(final) / 5:.3f}")
    print(f"forgetting {name} the penalty: {forgotten:.3f}")
