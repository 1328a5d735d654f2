"""Experiments and measurements; run them from the repository root, e.g. ``python -m benchmarks.two_models``."""
