"""The same with FSDP2: ``torchrun --nproc-per-node 2 examples/torchrun_fsdp2.py``, or alone, as one process."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import wplfast

ALPHA = 1e3


def task(seed, n=400):
    """This process's part of points of 20 dimensions, in 4 classes by a random map."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 20, generator=generator)
    y = (x @ torch.randn(20, 4, generator=generator)).argmax(1)
    return x[dist.get_rank() :: dist.get_world_size()], y[dist.get_rank() :: dist.get_world_size()]


def train(model, data, wpl=None, steps=60):
    """Train; the penalty comes after FSDP2 averaged the gradients, to this process's shards of them."""
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
model_a, model_b = (nn.Sequential(trunk, nn.Linear(64, 4)) for _ in range(2))
for part in (trunk, model_a[1], model_b[1]):
    fully_shard(part)
train(model_a, first)
wpl = wplfast.WeightPlasticityLoss(trunk, alpha=ALPHA)
wpl.consolidate(wplfast.fisher_diagonal(model_a, [first], wplfast.losses.cross_entropy, params=trunk))  # shards of F
before, folder = accuracy(model_a, first), [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
dcp.save({"a": model_a.state_dict(), "b": model_b.state_dict(), "wpl": wpl.state_dict()}, checkpoint_id=folder[0])
for way in ("without", "with"):
    state = {"a": model_a.state_dict(), "b": model_b.state_dict()}
    dcp.load(state, checkpoint_id=folder[0])  # on any number of processes
    wplfast.distributed.load_penalty(wpl, folder[0])
    train(model_b, second, wpl if way == "with" else None)
    forgotten, learned = before - accuracy(model_a, first), accuracy(model_b, second)
    if dist.get_rank() == 0:
        print(f"forgetting {way} the penalty: {forgotten:.3f}; accuracy of B {learned:.3f}")
dist.destroy_process_group()
