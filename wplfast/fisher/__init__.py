"""Estimating the diagonal Fisher.

A model, data and a per-sample loss enter; a :class:`Fisher`, a mapping from parameter names to diagonals, leaves. What
it squares comes from :mod:`wplfast.capture`. It may import that, ``ops``, and the modules at the package's root.
"""

from .accumulator import FisherAccumulator
from .diagonal import fisher_diagonal
from .report import Report
from .result import Fisher
from .verify import verify_fisher

__all__ = ["Fisher", "FisherAccumulator", "Report", "fisher_diagonal", "verify_fisher"]
