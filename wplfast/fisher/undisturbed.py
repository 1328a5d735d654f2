"""What a Fisher pass changes beside parameters: modes of modules, random numbers, settings of the thread and process.

Settings of the process are given back by the last of all passes that run at once, in whatever threads.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from ..capture.undo import Shared, Undo

#: Whether attention of PyTorch may take its fast path.
FAST_ATTENTION: Shared[bool] = Shared(
    torch.backends.mha.get_fastpath_enabled, partial(setattr, torch.backends.mha, "_is_fastpath_enabled"), False
)

#: Whether cuDNN is used: in eval mode it has no backward pass through an RNN, and PyTorch's own kernels have.
CUDNN: Shared[bool] = Shared(torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False)


@cache
def compiler_stance() -> Shared[Any]:
    """Return what ``torch.compile`` does with calls of what it compiled: during a pass it runs them as they are."""
    frames = sys.modules["torch._dynamo.eval_frame"]
    return Shared(lambda: frames._stance, partial(setattr, frames, "_stance"), frames.DynamoStance("force_eager"))


class Undisturbed(Undo):
    """Run in eval mode (unless ``train``), with gradients on; modes and random numbers come back as they were.

    Inference mode is left meanwhile too: what is computed in it has no graph.
    """

    def __init__(self, model: nn.Module, train: bool, device: torch.device) -> None:
        """Prepare for a model whose tensors are on ``device``."""
        super().__init__()
        self._model, self._train, self._device = model, train, device

    def change(self) -> None:
        """Change all of it."""
        cuda = self._device.type == "cuda"
        self.by(torch.default_generator.set_state, [torch.get_rng_state()])
        if cuda:
            state = torch.cuda.get_rng_state(self._device)
            index = torch.cuda.current_device() if self._device.index is None else self._device.index
            self.by(torch.cuda.default_generators[index].set_state, [state])
        self.by(torch._C._set_grad_enabled, [torch.is_grad_enabled()])
        if torch.is_inference_mode_enabled():
            guard = torch._C._InferenceMode(False)
            self.by(type(guard).__exit__, [guard], [None], [None], [None])
            type(guard).__enter__(guard)
        torch.set_grad_enabled(True)
        modules = list(self._model.modules())
        if cuda and not self._train and any(isinstance(module, nn.RNNBase) for module in modules):
            CUDNN.hold(self)
        for module in modules:
            script: Any = module._c if isinstance(module, torch.jit.ScriptModule) else None
            setter = module.__dict__.__setitem__ if script is None else script.setattr
            self.by(setter, ["training"], [module.training])
        if not self._train:
            self._model.eval()
