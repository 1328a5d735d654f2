"""What a callback takes as its penalty, and what it says to a Trainer of another package."""

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


def not_there(callback: Any, name: str, other: str) -> AttributeError:
    """Return the error of an attribute that a callback lacks; methods that Trainers call get a hint at another one."""
    hint = f": {other}" if name.startswith("on_") or name in ("setup", "state_key") else ""
    kind = type(callback)
    return AttributeError(f"{kind.__name__!r} object of {kind.__module__} has no attribute {name!r}{hint}")
