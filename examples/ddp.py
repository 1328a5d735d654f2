"""The same with DistributedDataParallel: ``torchrun --nproc-per-node 2 examples/ddp.py``, or alone, as one process."""

import copy
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import wplfast

ALPHA = 1e3


def task(seed, n=400):
    """This process's part of points of 20 dimensions, in 4 classes by a random map."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 20, generator=generator)
    y = (x @ torch.randn(20, 4, generator=generator)).argmax(1)
    return x[dist.get_rank() :: dist.get_world_size()], y[dist.get_rank() :: dist.get_world_size()]


def train(model, data, wpl=None, steps=60):
    """Train; the penalty comes after DDP averaged the gradients, so that it counts once."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        if wpl is not None:
            wpl.add_grad_()
        optimizer.step()


@torch.no_grad()
def accuracy(model, data):
    """Return the share of right answers of all processes."""
    right = torch.tensor([(model(data[0]).argmax(1) == data[1]).sum(), len(data[1])])
    dist.all_reduce(right)
    return (right[0] / right[1]).item()


for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
    os.environ.setdefault(name, value)  # without torchrun
dist.init_process_group("gloo")
torch.manual_seed(0)
first, second = task(1), task(2)
trunk = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
model_a = nn.Sequential(trunk, nn.Linear(64, 4))
train(DistributedDataParallel(model_a), first)
loss = wplfast.losses.cross_entropy
fisher = wplfast.fisher_diagonal(model_a, [first], loss, params=trunk, reduce=True)  # of all processes' samples
before = accuracy(model_a, first)
for way in ("without", "with"):
    shared, head_a = copy.deepcopy((trunk, model_a[1]))
    wpl = wplfast.WeightPlasticityLoss(shared, alpha=ALPHA)
    wpl.consolidate(fisher)
    model_b = nn.Sequential(shared, nn.Linear(64, 4))
    train(DistributedDataParallel(model_b), second, wpl if way == "with" else None)
    forgotten, learned = before - accuracy(nn.Sequential(shared, head_a), first), accuracy(model_b, second)
    if dist.get_rank() == 0:
        print(f"{fisher.n_samples} samples of {dist.get_world_size()} processes; accuracy of B {learned:.3f}")
        print(f"forgetting {way} the penalty: {forgotten:.3f}")
dist.destroy_process_group()
