"""A tiny search of architectures that share weights: children that train one after the other undo each other's work.

A child chooses an activation for every layer, and all children use the same weights. What a child needs of them is
consolidated after its training; those that follow are held to it.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

import wplfast

ALPHA, LAYERS, WIDTH, CHILDREN = 20.0, 3, 24, 6
ACTIVATIONS = (torch.tanh, F.relu, torch.cos, torch.square)


class Supernet(nn.Module):
    """The weights that all children share; a child is a choice of activations."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.child = [0] * LAYERS

    def forward(self, x):
        """Run the chosen child."""
        x = self.stem(x)
        for layer, choice in zip(self.layers, self.child, strict=True):
            x = x + ACTIVATIONS[choice](layer(x))
        return self.head(x)


def search(x, y, children, alpha):
    """Train children one after the other; return how much each lost from its own training to the end."""
    torch.manual_seed(0)
    net = Supernet()
    wpl = wplfast.WeightPlasticityLoss(net, alpha=alpha)
    learned = []
    for child in children:
        net.child = child
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            if wpl.n_anchors:
                wpl.add_grad_()
            optimizer.step()
        learned.append((net(x).argmax(1) == y).float().mean().item())
        fisher = wplfast.fisher_diagonal(net, [(x, y)], wplfast.losses.cross_entropy)
        wpl.consolidate(fisher)  # exact for any number of children, at the price of one
    lost = []
    for child, accuracy in zip(children, learned, strict=True):
        net.child = child
        lost.append(accuracy - (net(x).argmax(1) == y).float().mean().item())
    return sum(lost[:-1]) / (len(lost) - 1), sum(learned) / len(learned), (sum(learned) - sum(lost)) / len(learned)


generator, choices = torch.Generator().manual_seed(1), random.Random(1)
x = torch.randn(256, 16, generator=generator)
y = torch.tanh(x @ torch.randn(16, 8, generator=generator)).matmul(torch.randn(8, 4, generator=generator)).argmax(1)
children = [[choices.randrange(len(ACTIVATIONS)) for _ in range(LAYERS)] for _ in range(CHILDREN)]
for way, alpha in (("without", 0.0), ("with", ALPHA)):
    forgotten, learned, final = search(x, y, children, alpha)
    print(f"accuracy of children when they were trained {learned:.3f}, in the end {final:.3f}")
    print(f"forgetting {way} the penalty: {forgotten:.3f}")
