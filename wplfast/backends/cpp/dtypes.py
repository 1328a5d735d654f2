"""How the extension is told of tensors' types."""

from __future__ import annotations

import torch

#: Codes of storage types, as in csrc/dtype.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
