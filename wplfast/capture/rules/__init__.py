"""The rules in order of preference; the last one serves every call."""

from __future__ import annotations

from ..call import Call
from .base import Rule
from .batched import BATCHED
from .bilinear import BILINEAR
from .cat import CAT
from .conv import CONV
from .einsum import EINSUM
from .embedding import EMBEDDING
from .embedding_bag import EMBEDDING_BAG
from .generic import GENERIC
from .linear import LINEAR
from .matmul import MATMUL
from .norm import NORM
from .scale import SCALE
from .select import SELECT
from .shift import SHIFT

__all__ = ["GENERIC", "RULES", "Rule", "rule_for"]

RULES: list[Rule] = [
    LINEAR,
    SHIFT,
    SCALE,
    MATMUL,
    BATCHED,
    CONV,
    NORM,
    EMBEDDING,
    EMBEDDING_BAG,
    EINSUM,
    BILINEAR,
    CAT,
    SELECT,
    GENERIC,
]


#: Those that know of complex numbers.
COMPLEX: list[Rule] = [LINEAR, SHIFT, SCALE, BATCHED, EINSUM, GENERIC]


def rule_for(call: Call) -> Rule:
    """Return the first rule that matches a call; calls on empty tensors are left to PyTorch."""
    if not all(shape.numel() for shape in (*call.input_shapes, *(operand.value.shape for operand in call.operands))):
        return GENERIC
    return next(rule for rule in RULES if (not call.is_complex or rule in COMPLEX) and rule.matches(call))
