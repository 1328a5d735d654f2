"""The backward half of a pass: from the gradients that taps see to accumulated squares.

One batch's per-sample losses enter; sums of squared per-sample gradients leave, in accumulators that the caller owns.
It may import ``trace``, ``probe``, ``rules`` and ``ops``.
"""
