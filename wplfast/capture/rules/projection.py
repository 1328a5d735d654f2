"""Random projections of gradients: a few numbers for each parameter, by which two ways to compute them are compared.

A gradient g, seen as a matrix [R, C], becomes ``s_k = r_k^T g c_k`` with random normal r_k and c_k: linear in g, zero
for every k only where g is zero, and with ``E s_k^2 = |g|^2``. Nothing of the parameter's size is kept, and a product
of factors is projected without being formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.layout import as_real, flat_dtype

#: Projections of each gradient.
N_DIRECTIONS = 4


class Direction(NamedTuple):
    """What a parameter's gradients are projected on."""

    rows: Tensor  # [R, k]
    columns: Tensor  # [C, k]

    def of(self, gradients: Tensor) -> Tensor:
        """Project gradients [N, ...] of R * C elements each; [N, k]."""
        matrices = gradients.to(self.rows.dtype).reshape(len(gradients), len(self.rows), len(self.columns))
        if len(self.columns) == 1:
            return (matrices.squeeze(2) @ self.rows) * self.columns
        if len(matrices) == 1:  # k rows times a matrix: five times as fast as a batch of one matrix times k columns
            return ((self.rows.t() @ matrices[0]) * self.columns.t()).sum(1).unsqueeze(0)
        return ((matrices @ self.columns) * self.rows).sum(1)

    def of_products(self, left: Tensor, right: Tensor) -> Tensor | None:
        """Project gradients that are products ``left^T right``; None where these have not the direction's shape.

        Args:
            left: [..., T, R].
            right: [..., T, C].

        Returns:
            [..., k].
        """
        if (left.shape[-1], right.shape[-1]) != (len(self.rows), len(self.columns)):
            return None
        left, right = left.to(self.rows.dtype), right.to(self.rows.dtype)
        return ((left @ self.rows) * (right @ self.columns)).sum(-2)


class Directions:
    """Those of some parameters, drawn when they are first asked for.

    Args:
        parameters: they give shapes, devices and dtypes; all is float32 or wider.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._drawn: dict[int, Direction] = {}

    def __getitem__(self, index: int) -> Direction:
        """Return that of one parameter."""
        found = self._drawn.get(index)
        if found is None:
            like = self._parameters[index]
            n_rows = len(like) if like.dim() else 1
            sizes = n_rows, like.numel() // n_rows if n_rows else 0
            generator = torch.Generator().manual_seed(index)
            drawn = torch.randn(sum(sizes), N_DIRECTIONS, generator=generator, dtype=torch.float64, device="cpu")
            rows, columns = drawn.to(like.device, flat_dtype(like.dtype)).split(sizes)
            found = self._drawn[index] = Direction(rows, columns)
        return found

    def add(self, found: dict[int, Tensor], index: int, gradient: Tensor) -> None:
        """Project a parameter's gradient, whatever its layout, and add that to what is known of it."""
        add(found, index, self[index].of(as_real(gradient.to_dense()).unsqueeze(0))[0])

    def forget(self) -> None:
        """Free their memory; the same ones are drawn again."""
        self._drawn.clear()


def add(found: dict[int, Tensor], index: int, projection: Tensor) -> None:
    """Add a projection to what is known of a parameter, if anything is."""
    found[index] = found[index] + projection if index in found else projection


def projected_affine(
    directions: Sequence[Direction],
    are_weights: Sequence[bool],
    gradient: Tensor,
    of_weight: Callable[[Direction], Tensor | None],
) -> list[Tensor] | None:
    """Project the gradients of operands of a product or convolution with a weight, to which a vector may be added.

    Args:
        directions: of the operands, which are whole parameters.
        are_weights: which are the weight; others are added.
        gradient: of the result, the vector's entries along its last dimension.
        of_weight: projects the gradient of the weight, [k]; None if it cannot.

    Returns:
        [k] for each operand; None if the weight's cannot be projected.
    """
    found: list[Tensor] = []
    for direction, is_weight in zip(directions, are_weights, strict=True):
        part = of_weight(direction) if is_weight else direction.of(rows_of(gradient).sum(0, keepdim=True))[0]
        if part is None:
            return None
        found.append(part)
    return found


def rows_of(tensor: Tensor) -> Tensor:
    """View a tensor [..., D] as rows [n, D]."""
    return tensor.reshape(-1, tensor.shape[-1])
