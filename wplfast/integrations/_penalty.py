"""What a callback takes as its penalty."""

from __future__ import annotations

from typing import Any

from ..penalty.loss import WeightPlasticityLoss


def check_penalty(wpl: Any) -> None:
    """Refuse what is no penalty where it is given, before any training.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(wpl, WeightPlasticityLoss):
        raise TypeError(
            f"wpl must be a wplfast.WeightPlasticityLoss, got {type(wpl).__name__}: make one with "
            "WeightPlasticityLoss(model, alpha) and consolidate a Fisher into it"
        )
