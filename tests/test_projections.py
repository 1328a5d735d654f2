"""Random projections of gradients, and of the products that gradients are, without these being formed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wplfast
from wplfast.capture.rules.conv import ConvRule
from wplfast.capture.rules.linear import LinearRule
from wplfast.capture.rules.matmul import MatmulRule
from wplfast.capture.rules.projection import Directions
from wplfast.errors import VerificationError
from wplfast.losses import cross_entropy


@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 5), (4, 2), (3, 2, 3), (), (1,)])
def test_a_gradient_is_projected_as_a_matrix_between_vectors(shape: tuple[int, ...], n: int) -> None:
    parameter = torch.zeros(shape, dtype=torch.float64)
    direction, gradients = Directions([parameter])[0], torch.randn(n, *shape, dtype=torch.float64)
    matrices = gradients.reshape(n, len(direction.rows), len(direction.columns))
    expected = torch.einsum("nrc,rk,ck->nk", matrices, *direction)
    torch.testing.assert_close(direction.of(gradients), expected)


def test_a_product_is_projected_without_being_formed() -> None:
    direction = Directions([torch.zeros(4, 3, dtype=torch.float64)])[0]
    left, right = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(direction.of_products(left, right), direction.of(left.transpose(1, 2) @ right))
    assert direction.of_products(right, left) is None  # its transpose


class Products(nn.Module):
    """Convolutions, a layer, products from both sides, with and without a sum, and a layer in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 3, 2, bias=False)
        )
        self.left = nn.Parameter(torch.randn(2, 3))
        self.first, self.cell = nn.Linear(18, 5), nn.Linear(5, 5, bias=False)
        self.w = nn.Parameter(torch.randn(5, 5))
        self.bias, self.last = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        h = self.left @ self.convolutions(x).flatten(2)
        h = self.first(h.flatten(1)).tanh()
        for _ in range(3):
            h = self.cell(h).tanh()
        return torch.addmm(self.bias, h @ self.w, self.last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ordinary_gradients_of_products_are_projected(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []

    def compared(rule_class):
        projected = rule_class.projected

        def both(self, call, inputs, grads, directions):
            found = projected(self, call, inputs, grads, directions)
            if found is not None:
                ordinary = self.ordinary(call, inputs, grads)
                expected = [d.of(g.unsqueeze(0))[0] for d, g in zip(directions, ordinary, strict=True)]
                rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (0.05, 0.05)
                torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
                served.append(call.name)
            return found

        monkeypatch.setattr(rule_class, "projected", both)

    for rule_class in (ConvRule, LinearRule, MatmulRule):
        compared(rule_class)
    model = Products().to(dtype)
    batch = torch.randn(8, 2, 4, 4).to(dtype), torch.randint(3, (8,))
    wplfast.fisher_diagonal(model, [batch], cross_entropy)
    assert sorted(served) == [
        *("addmm", "conv2d", "conv_transpose2d"),
        *("linear", "linear"),
        "matmul",
    ]  # the loop's three steps are one


FAULTS = {
    "a factor": lambda g: 1.05 * g,
    "another column": lambda g: g.roll(1, -1),
    "the first sample's": lambda g: torch.cat([1.5 * g[:1], g[1:]]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rule_class", [ConvRule, LinearRule, MatmulRule])
def test_what_is_compared_does_not_come_from_the_rule_itself(rule_class, fault, monkeypatch) -> None:
    serve = rule_class.serve

    def faulty(self, call, inputs, gradient, layout):
        uses = serve(self, call, inputs, gradient, layout)
        for use in uses or ():
            if hasattr(use, "grad_outputs"):
                use.grad_outputs = FAULTS[fault](use.grad_outputs)
        return uses

    model, batch = Products(), (torch.randn(6, 2, 4, 4), torch.randint(3, (6,)))
    monkeypatch.setattr(rule_class, "serve", faulty)
    for options in ({}, {"samples": "losses"}):
        with pytest.raises(VerificationError, match="this is a bug in wplfast"):
            wplfast.fisher_diagonal(model, [batch], cross_entropy, **options)
    with wplfast.FisherAccumulator(model) as accumulator, pytest.raises(VerificationError):
        accumulator.backward(cross_entropy(model(batch[0]), batch[1]))
