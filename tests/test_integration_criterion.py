"""Losses of samples from criteria that reduce a batch to one number."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wplfast.integrations._criterion import per_sample


@pytest.mark.parametrize(
    ("criterion", "kind"),
    [
        (nn.CrossEntropyLoss(), "classes"),
        (nn.CrossEntropyLoss(reduction="sum"), "classes"),
        (nn.CrossEntropyLoss(reduction="none"), "classes"),
        (nn.CrossEntropyLoss(), "dense"),
        (nn.MSELoss(), "real"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 1.0, 1.0])), "real"),
        (lambda out, y: F.cross_entropy(out["a"], y[0]) + out["b"].square().mean(), "tree"),
    ],
)
def test_per_sample_of_a_criterion(criterion, kind):
    """Each loss is that of a batch of one."""
    torch.manual_seed(0)
    out, y = torch.randn(5, 3), torch.randint(0, 3, (5,))
    if kind == "dense":
        out, y = torch.randn(5, 3, 4), torch.randint(0, 3, (5, 4))
    elif kind == "real":
        y = torch.rand(5, 3)
    elif kind == "tree":
        out, y = {"a": out, "b": torch.randn(5, 2)}, [y]
    losses = per_sample(criterion)(out, y)
    assert losses.shape == (5,)
    for n in range(5):
        one = slice(n, n + 1)
        each = ({k: v[one] for k, v in out.items()}, [y[0][one]]) if kind == "tree" else (out[one], y[one])
        torch.testing.assert_close(losses[n], criterion(*each).squeeze())
    with pytest.raises(ValueError, match="one loss for a batch of one sample"):
        per_sample(lambda out, y: torch.zeros(2))(torch.zeros(3, 2), torch.zeros(3))
