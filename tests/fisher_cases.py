"""Small models, their data and their loss: what tests of Fishers are about where the model does not matter."""

from __future__ import annotations

import torch
from torch import nn

import wplfast

ce = wplfast.losses.cross_entropy


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).to(dtype)


def batches(sizes=(5, 5, 2), dtype=torch.float32):
    return [(torch.randn(n, 6, dtype=dtype), torch.randint(0, 4, (n,))) for n in sizes]


class Lstm(nn.Module):
    """A word-level language model with two LSTM layers."""

    def __init__(self, vocabulary=50, width=24):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.rnn = nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        return self.head(self.rnn(self.embedding(tokens))[0])


def tokens(n, t):
    return torch.randint(0, 50, (n, t)), torch.randint(0, 50, (n, t))


def state_of(model):
    return {
        n: (type(p), id(p), p.detach().clone(), p.requires_grad, p.grad if p.grad is None else p.grad.clone())
        for n, p in model.named_parameters()
    }


def assert_same_state(model, before):
    for name, p in model.named_parameters():
        cls, identity, value, requires_grad, grad = before[name]
        assert type(p) is cls
        assert id(p) == identity
        assert torch.equal(p, value)
        assert p.requires_grad == requires_grad
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
