"""Models of tokens, and F by summing over all labels that there can be."""

import itertools
from types import SimpleNamespace

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

IGNORED = -7


class Tokens(nn.Module):
    """Logits [N, T, C] from token ids, in one of the forms that models return them in."""

    def __init__(self, classes=3, form="tensor", dims=(0, 1, 2)):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, classes)
        self.form, self.dims = form, dims
        self.double()

    def forward(self, x):
        logits = self.head(torch.tanh(self.embedding(x))).permute(self.dims)
        return {
            "tensor": lambda: logits,
            "output": lambda: CausalLMOutput(logits=logits, hidden_states=(self.embedding(x),)),
            "dict": lambda: {"hidden": self.embedding(x), "logits": logits},
            "object": lambda: SimpleNamespace(logits=logits),
            "tuple": lambda: (self.embedding(x), logits),
            "flat": lambda: logits.flatten(0, 1),
            "virtual": lambda: torch.cat([logits[:, :2] * 0.5, logits], 1),
            "log p": lambda: logits.log_softmax(-1),
        }[self.form]()


def squares(model, value):
    """Squared gradients of a scalar."""
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g**2 for p, g in zip(model.parameters(), found, strict=True)]


def expectation(model, x, y, row_of, free):
    """Return F by summing over all labels of each sample's free positions; row_of(t) is the position that predicts t.

    Where ``free`` is "mean", the mean over the labels that count is the loss.
    """
    total = [torch.zeros_like(p) for p in model.parameters()]
    mean = free == "mean"
    for n in range(len(x)):
        logp = model.head(torch.tanh(model.embedding(x[n]))).log_softmax(-1)
        at = [t for t in range(len(y[n])) if row_of(t) is not None and y[n, t] != IGNORED]
        for labels in itertools.product(range(logp.shape[-1]), repeat=len(at)):
            value = sum(logp[row_of(t), c] for t, c in zip(at, labels, strict=True))
            if not at:
                continue
            p = value.exp().detach()
            for sum_, square in zip(total, squares(model, value / (len(at) if mean else 1)), strict=True):
                sum_ += p * square / len(x)
    return dict(zip([n for n, _ in model.named_parameters()], total, strict=True))


def data(n=3, t=3, classes=3):
    torch.manual_seed(3)
    x, y = torch.randint(0, 7, (n, t)), torch.randint(0, classes, (n, t))
    y[0, t - 1] = y[1, 1] = IGNORED
    return x, y


def close(got, want, tolerance=0.06):
    flat = [torch.cat([f[n].double().flatten() for n in want]) for f in (got, want)]
    assert (flat[0] - flat[1]).norm() <= tolerance * flat[1].norm(), flat[0] / flat[1]
