"""Two models that share a trunk, in plain PyTorch: what training the second one costs the first, with and without."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import wplfast

ALPHA = 1e3


def task(seed, n=400):
    """Points of 20 dimensions, in 4 classes by a random map."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 20, generator=generator)
    return x, (x @ torch.randn(20, 4, generator=generator)).argmax(1)


def train(model, data, wpl=None, steps=60):
    """Train; the penalty adds its gradient after the loss's."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        if wpl is not None:
            wpl.add_grad_()  # one pass over the shared parameters, no graph
        optimizer.step()


def accuracy(model, data):
    """Return the share of right answers."""
    with torch.no_grad():
        return (model(data[0]).argmax(1) == data[1]).float().mean().item()


torch.manual_seed(0)
first, second = task(1), task(2)
trunk = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
model_a = nn.Sequential(trunk, nn.Linear(64, 4))
train(model_a, first)
batches = list(zip(first[0].split(64), first[1].split(64), strict=True))
fisher = wplfast.fisher_diagonal(model_a, batches, wplfast.losses.cross_entropy, params=trunk)
print(fisher.summary())

before = accuracy(model_a, first)
for way in ("without", "with"):
    shared, head_a = copy.deepcopy((trunk, model_a[1]))
    wpl = wplfast.WeightPlasticityLoss(shared, alpha=ALPHA)
    wpl.consolidate(fisher)  # anchored at the trunk's values after model A
    model_b = nn.Sequential(shared, nn.Linear(64, 4))
    train(model_b, second, wpl if way == "with" else None)
    after = accuracy(nn.Sequential(shared, head_a), first)
    print(f"accuracy of A {before:.3f} -> {after:.3f}, of B {accuracy(model_b, second):.3f}")
    print(f"forgetting {way} the penalty: {before - after:.3f}")
