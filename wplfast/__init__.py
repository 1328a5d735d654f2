"""wplfast: the exact per-sample diagonal Fisher and the Weight Plasticity Loss, fused."""

from __future__ import annotations

from . import backends, errors, functional, losses, ops
from .accumulate import FisherAccumulator
from .estimate import fisher_diagonal
from .fisher import Fisher
from .penalty import WeightPlasticityLoss
from .verify import verify_fisher
from .version import __version__

__all__ = [
    "Fisher",
    "FisherAccumulator",
    "WeightPlasticityLoss",
    "__version__",
    "backends",
    "errors",
    "fisher_diagonal",
    "functional",
    "losses",
    "ops",
    "verify_fisher",
]
