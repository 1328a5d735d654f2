"""What a penalty says once, in a log line: that it is not there, or may not be, though nothing fails."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

UNANCHORED = (
    "the penalty is evaluated before any consolidate: it has no anchors and protects nothing (what it adds is its l2 "
    "term, if there is one). That is as it should be during a first task; otherwise call consolidate(fisher), or load "
    "its state"
)
FROZEN = (
    "none of the penalty's parameters requires grad: it has a value, but no gradient. If they are not meant to be "
    "frozen, bind it to the parameters that are trained (a state_dict() holds tensors without grad): rebind(module)"
)
ZERO_FISHER = (
    "the Fisher of all parameters that were consolidated is zero: it anchors nothing. Does the loss reach them "
    "(fisher.report.unreached), were they frozen or detached during the pass, or is it of another model?"
)
TWICE = (
    "add_grad_() was called for a penalty that is attached to an optimizer, whose step() adds the same gradient: it "
    "counts twice. Do without one of them, or name parameters that the optimizer does not hold: add_grad_(active=...)"
)
IN_LOSS = (
    "the value of a penalty that is attached to an optimizer was differentiated, and step() adds the same gradient: if "
    "wpl() is a part of the loss, it counts twice. Leave it out of the loss, or do not attach the penalty"
)


class Said:
    """What a penalty has said already."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __contains__(self, message: str) -> bool:
        """Tell whether it was said, or need not be."""
        return message in self._said

    def hush(self, message: str) -> None:
        """Let it not be said any more."""
        self._said.add(message)

    def warn(self, message: str) -> None:
        """Log a warning unless it was said. Code that is compiled says it whenever it is traced."""
        if torch.compiler.is_compiling():
            _log(message)
        elif message not in self._said:
            self._said.add(message)
            logger.warning(message)


def _log(message: str) -> None:
    """Log a warning while tracing goes on, and leave nothing in the graph."""
    logger.warning(message)


# All that torch.compiler.assume_constant_result does, but that it imports the compiler, which takes seconds.
_log._dynamo_marked_constant = True  # type: ignore[attr-defined]
