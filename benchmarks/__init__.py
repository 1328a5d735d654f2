"""Measurements and, in ``experiments``, the method at work; run them from the repository root with ``python -m``."""
