"""The Triton backend: the operators of the contract as GPU kernels.

=====================  ==============================================================================
``penalty_kernel``     value, gradient and accumulation over any number of tensors in one launch
``penalty_launch``     how tensors are cut into chunks for it, and its launches
``prepared``           the same over parameters that stay where they are, with tables made once
``reduce``             deterministic sums of partial results
``tables``             address tables on the device, cached and safe for streams and CUDA graphs
``fisher_linear``      the squared per-sample gradients of a linear layer on tensor cores
``fisher_conv``        Fisher of a convolution: which of the ``conv_*`` kernels serves it
``fisher_embedding``   Fisher of a table that rows are taken from: sorted uses, no atomics
``products``           what kernels on tensor cores share
``fold_tiles``         where tiles lie, and the sum of those that several programs share
``fisher_config``      which precision a call gets, and which tiles there are
``fisher_plan``        which of them it takes, and how samples are shared, by counted work
``split``              float32 operands as sums of bfloat16 terms, padded for wide loads
``scale``              per-sample gradients of an elementwise scale
``scale_unless_one``   a buffer times a factor, without a look from the host
``squares``            sums of squared per-sample gradients that are already in memory
``kernel``, ``packs/`` who serves a launch: kernels that were compiled when the wheel was built, or Triton's JIT
=====================  ==============================================================================

Importing it needs Triton, not a GPU. Under ``TRITON_INTERPRET=1`` every kernel also runs on CPU tensors.
"""

from .fisher_conv import fisher_conv_
from .fisher_embedding import fisher_embedding_
from .fisher_linear import fisher_linear_
from .penalty_launch import penalty, penalty_add_grad_, penalty_with_grad
from .prepared import TritonPenalty
from .scale import scale_grads
from .scale_unless_one import scale_unless_one_
from .squares import accumulate_squares_

__all__ = [
    "accumulate_squares_",
    "fisher_conv_",
    "fisher_embedding_",
    "fisher_linear_",
    "penalty",
    "penalty_add_grad_",
    "penalty_with_grad",
    "prepared_penalty",
    "scale_grads",
    "scale_unless_one_",
]

#: The class that evaluates penalties again and again.
prepared_penalty = TritonPenalty
