"""How the operators' checks say what they expected and what they got."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(tensor: Tensor) -> str:
    """Describe a tensor for an error message."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"


def expect(condition: bool, what: str, expected: str, tensor: Tensor) -> None:
    """Raise a ValueError that names expected and given unless the condition holds."""
    if not condition:
        raise ValueError(f"{what} must be {expected}, got {describe(tensor)}")
