"""wplfast: the exact per-sample diagonal Fisher and the Weight Plasticity Loss, fused."""

from __future__ import annotations

__version__ = "0.2.0"  # before the modules that write it into what they make

from . import backends, distributed, errors, functional, losses, ops
from .fisher.accumulator import FisherAccumulator
from .fisher.diagonal import fisher_diagonal
from .fisher.result import Fisher
from .fisher.verify import verify_fisher
from .penalty.loss import WeightPlasticityLoss

__all__ = [
    "Fisher",
    "FisherAccumulator",
    "WeightPlasticityLoss",
    "__version__",
    "backends",
    "distributed",
    "errors",
    "fisher_diagonal",
    "functional",
    "losses",
    "ops",
    "verify_fisher",
]
