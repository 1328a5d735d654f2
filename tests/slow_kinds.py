"""A pass over a model's batches, beside a loop over samples that are cut out by hand."""

from __future__ import annotations

import torch
from oracle import assert_close
from torch import nn

import wplfast
from wplfast.capture.watched import map_tensors

EXACT = {"rtol": 1e-11, "model_rtol": 1e-12}
E, K = 3, 5  # experts; outputs, where there are as many as nothing else


def squares(outputs):
    """One loss a sample: the sum of its squared outputs, and some of their cubes."""
    flat = outputs.flatten(1)
    return flat.square().sum(1) + flat.pow(3).sum(1) / 8


def check(model, batches, single, slow=False, loss=squares, masked=False, **tolerance):
    """Compare a pass over batches with the loop over ``single(batch, n)``, the batch of sample n alone.

    Args:
        model: called with the parts of a batch; copied to float64.
        batches: tuples of tensors and the number of samples of each: (parts, N).
        single: returns the parts for one sample.
        slow: whether the report is to name a slow rule; None: whatever.
        loss: outputs -> losses [N].
        masked: whether a gradient is to be masked to each sample; None: whatever.
        tolerance: of the comparison.
    """
    model = model.double().eval()
    batches = [(map_tensors(lambda t: t.double() if t.is_floating_point() else t, parts), n) for parts, n in batches]
    watched, count = {name: p for name, p in model.named_parameters() if p.requires_grad}, 0
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in watched.items()}
    mean = {name: torch.zeros_like(p) for name, p in watched.items()}
    with wplfast.FisherAccumulator(model, with_grad=True, independent=True) as acc:
        for parts, _ in batches:
            acc.backward(loss(model(*parts)))
    fisher = acc.result()
    for parts, n_samples in batches:
        for n in range(n_samples):
            model.zero_grad()
            loss(model(*single(parts, n))).sum().backward()
            for name, p in watched.items():
                if p.grad is not None:
                    total[name] += p.grad.abs().square()
                    mean[name] += p.grad
            count += 1
    assert_close(fisher, {k: v / count for k, v in total.items()}, **(tolerance or EXACT))
    for name, gradient in mean.items():
        torch.testing.assert_close(fisher.mean_grad[name], gradient / count, rtol=1e-8, atol=1e-9)
    served = {rule for rules in fisher.report.rules.values() for rule in rules}
    assert slow is None or bool(served & {"generic", "one by one"}) == slow, fisher.report.rules
    assert masked is None or ("masked" in served) == masked, fisher.report.rules
    return fisher


def rows_of(parts, n):
    """One sample of tensors that all have the samples along their first dimension."""
    return tuple(part[n : n + 1] for part in parts)


def complex_par(*shape):
    return nn.Parameter(torch.randn(shape, dtype=torch.complex128) / 2)


def complex_of(w):
    return torch.view_as_complex(w)
