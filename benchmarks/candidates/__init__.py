"""Variants of GPU kernels that are right but unmeasured, or measured and not better: none is part of the library."""
