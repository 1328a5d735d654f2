"""Exceptions that callers may want to tell apart; all other bad input is a ``ValueError`` or ``TypeError``."""

from __future__ import annotations


class WplfastError(RuntimeError):
    """Base class of the errors below."""


class CoupledSamplesError(WplfastError):
    """The loss of one sample depends on other samples of the batch, so no per-sample gradient exists."""


class NonFiniteError(WplfastError):
    """A loss, a gradient or a Fisher entry is NaN or infinite."""


class VerificationError(WplfastError):
    """The captured per-sample gradients disagree with ordinary autograd on the same graph."""


class StaleParameterError(WplfastError):
    """A parameter's storage no longer is what the penalty was built on, in a way it cannot follow."""


class UnsupportedParameterError(WplfastError, TypeError):
    """A parameter is of a tensor type whose gradients cannot be captured (DTensor, quantised, ...)."""


class NameMismatchError(WplfastError, KeyError):
    """Names of a Fisher or an anchor do not match the names of the parameters."""

    __str__ = RuntimeError.__str__  # KeyError would print the repr of the message


class RankFailedError(WplfastError):
    """Another rank of a process group failed; the message is its."""
