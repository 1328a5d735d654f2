"""The Triton backend: the operators of the contract as GPU kernels.

=====================  ==============================================================================
``penalty_kernel``     value, gradient and accumulation over any number of tensors in one launch
``reduce``             deterministic sums of partial results
``tables``             address tables on the device, cached and safe for streams and CUDA graphs
``fisher_linear``      the squared per-sample gradients of a linear layer on tensor cores
``fisher_conv``        likewise of a convolution: which of the ``conv_*`` kernels serves it
``products``           what kernels on tensor cores share
``fisher_config``      which precision, tile and split a call of it gets
``split``              float32 operands as sums of bfloat16 terms, padded for wide loads
``squares``            sums of squared per-sample gradients that are already in memory
=====================  ==============================================================================

Importing it needs Triton, not a GPU. Under ``TRITON_INTERPRET=1`` every kernel also runs on CPU tensors.
"""

from .fisher_conv import fisher_conv_
from .fisher_linear import fisher_linear_
from .penalty_kernel import penalty, penalty_add_grad_, penalty_with_grad
from .squares import accumulate_squares_

__all__ = [
    "accumulate_squares_",
    "fisher_conv_",
    "fisher_linear_",
    "penalty",
    "penalty_add_grad_",
    "penalty_with_grad",
]
