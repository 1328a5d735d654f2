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
``give_way``           plain PyTorch in the place of a kernel that cannot be compiled or started
=====================  ==============================================================================

Importing it needs Triton, not a GPU. Under ``TRITON_INTERPRET=1`` every kernel also runs on CPU tensors.
"""

from . import fisher_conv, fisher_embedding, fisher_linear, penalty_launch, scale, squares
from . import scale_unless_one as scale_buffer
from .give_way import gave_way, gives_way
from .prepared import TritonPenalty

__all__ = [
    "accumulate_squares_",
    "fisher_conv_",
    "fisher_embedding_",
    "fisher_linear_",
    "gave_way",
    "penalty",
    "penalty_add_grad_",
    "penalty_with_grad",
    "prepared_penalty",
    "scale_grads",
    "scale_unless_one_",
]

accumulate_squares_ = gives_way(squares.accumulate_squares_, "fisher")
fisher_conv_ = gives_way(fisher_conv.fisher_conv_, "fisher", "gradient")
fisher_embedding_ = gives_way(fisher_embedding.fisher_embedding_, "fisher", "gradient")
fisher_linear_ = gives_way(fisher_linear.fisher_linear_, "fisher", "gradient")
penalty = gives_way(penalty_launch.penalty)
penalty_add_grad_ = gives_way(penalty_launch.penalty_add_grad_)  # adds by its last kernel that may fail
penalty_with_grad = gives_way(penalty_launch.penalty_with_grad)
scale_grads = gives_way(scale.scale_grads)
scale_unless_one_ = gives_way(scale_buffer.scale_unless_one_)

#: The class that evaluates penalties again and again.
prepared_penalty = TritonPenalty
