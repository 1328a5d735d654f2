"""The CPU backend: hands the addresses of tensors to the C++ kernels of ``csrc/``.

The extension knows nothing of torch; torch must be imported before it, so that both share one OpenMP runtime. The
number of threads follows ``torch.get_num_threads()`` on each call.
"""

import wplfast._C as _C

from ..exchange import EXCHANGE
from ..reference import scale_unless_one_  # PyTorch's own product is as fast as memory
from .consolidation import CppConsolidation
from .fisher import accumulate_squares_, fisher_conv_, fisher_embedding_, fisher_linear_, scale_grads
from .kept import CppKeptPenalties
from .penalty import penalty, penalty_add_grad_, penalty_with_grad
from .prepared import CppPenalty

__all__ = [
    "ISA",
    "accumulate_squares_",
    "consolidation",
    "fisher_conv_",
    "fisher_embedding_",
    "fisher_linear_",
    "kept_penalties",
    "penalty",
    "penalty_add_grad_",
    "penalty_with_grad",
    "prepared_penalty",
    "scale_grads",
    "scale_unless_one_",
]

#: The instruction set in use; a bad WPLFAST_ISA is a ValueError here, not a backend that is silently missing.
ISA: str = _C.isa()

#: The class that evaluates penalties again and again; where PyTorch lacks the exchange API, the common one does.
prepared_penalty: type[CppPenalty] | None = CppPenalty if EXCHANGE is not None else None

#: What is kept of penalties over lists of tensors; nothing where PyTorch lacks the exchange API.
kept_penalties: CppKeptPenalties | None = CppKeptPenalties() if EXCHANGE is not None else None

#: The class by which newer anchors enter.
consolidation = CppConsolidation
