"""The sum of squared per-sample gradients with other libraries, each in the ways that might be its fastest.

Every way takes the model as it stands; nothing is rewritten for a library's sake. That decides some results:

- BackPACK 1.7 has no rule for LayerNorm, and none for parameters that a module uses itself: no decoders, no RNN.
- Opacus 1.6 takes the first axis of every layer's input for the samples, and the decoders look positions up with an
  input [T] that has no such axis: wrong for whole batches, right with one sample at a time, refused by mode "ew".
- vmap has no rule for PyTorch's fused attention on CPUs and loops over samples there; the plain formula avoids that.
- Opacus's mode "hooks" has mostly been the fastest; on the RNN it equals "functorch". Every run tries all three.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .models import Block

Step = Callable[[Tensor, Tensor], list[Tensor]]  # inputs, targets -> the sum of squares of every parameter


@dataclass(frozen=True)
class Way:
    """One setting of a library.

    Args:
        shown: what it is called.
        make: makes the step for a model; the step may take the samples a few at a time.
        samples: how many; None: one step for the whole batch.
    """

    shown: str
    make: Callable[[nn.Module], Step]
    samples: int | None = None

    def over(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], list[Tensor]]:
        """Return what computes the Fisher times the number of samples for one batch, on a copy of a model."""
        step, samples = self.make(copy.deepcopy(model)), self.samples or len(targets)

        def run() -> list[Tensor]:
            parts = zip(inputs.split(samples), targets.split(samples), strict=True)
            total = step(*next(parts))
            for part in parts:
                torch._foreach_add_(total, step(*part))
            return total

        return run

    def __str__(self) -> str:
        """Name the setting."""
        return f"{self.shown}, {self.samples} at a time" if self.samples else self.shown


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of all samples' losses: with a mean, their gradients would come out divided by N."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


def sum_of_squares(gradients: Tensor) -> Tensor:
    """Sum [N, *shape] over samples, squared; in place and with BLAS, several times as fast as ``square().sum(0)``."""
    rows = gradients.detach().flatten(1)
    rows = (rows.float() if rows.itemsize < 4 else rows).square_()
    return torch.mv(rows.t(), rows.new_ones(len(rows))).view(gradients.shape[1:])


def loop(model: nn.Module) -> Step:
    """Run every sample alone."""
    parameters = list(model.parameters())

    def step(inputs: Tensor, targets: Tensor) -> list[Tensor]:
        wide = torch.promote_types(parameters[0].dtype, torch.float32)
        total = [torch.zeros_like(p, dtype=wide) for p in parameters]
        for x, y in zip(inputs.split(1), targets.split(1), strict=True):
            gradients = [g.to(wide) for g in torch.autograd.grad(loss_of(model(x), y), parameters)]
            torch._foreach_addcmul_(total, gradients, gradients)
        return total

    return step


def torch_func(attention: SDPBackend | None, model: nn.Module) -> Step:
    """Use ``vmap(grad)``; squared part by part: vmap's own ``chunk_size`` keeps the gradients of all samples."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_of(functional_call(model, values, (x[None],)), y[None])

    gradients = vmap(grad(loss), (None, 0, 0))

    def step(inputs: Tensor, targets: Tensor) -> list[Tensor]:
        with nullcontext() if attention is None else sdpa_kernel(attention):
            return [sum_of_squares(g) for g in gradients(parameters, inputs, targets).values()]

    return step


def backpack(extension: str, model: nn.Module) -> Step:
    """Use one of BackPACK's extensions, which sums squares itself or gives all gradients."""
    from backpack import backpack, extend, extensions

    extended, quantity = extend(model), getattr(extensions, extension)()
    finish = sum_of_squares if extension == "BatchGrad" else Tensor.detach

    def step(inputs: Tensor, targets: Tensor) -> list[Tensor]:
        loss = loss_of(extended(inputs), targets)
        with backpack(quantity):
            loss.backward()
        return [finish(taken) for taken in _take(model, quantity.savefield)]

    return step


def opacus(mode: str, model: nn.Module) -> Step:
    """Use one of Opacus's modes: rules for layers, ``torch.func`` for each layer, or PyTorch's expanded weights."""
    from opacus.grad_sample.utils import wrap_model

    wrapped = wrap_model(model, mode, loss_reduction="sum")

    def step(inputs: Tensor, targets: Tensor) -> list[Tensor]:
        loss_of(wrapped(inputs), targets).backward()
        return [sum_of_squares(taken) for taken in _take(model, "grad_sample")]

    return step


def _take(model: nn.Module, attribute: str) -> Iterator[Tensor]:
    """Yield what a library left at each parameter, and clear it and the gradient.

    Raises:
        RuntimeError: if there is nothing.
    """
    for name, p in model.named_parameters():
        value, p.grad = getattr(p, attribute, None), None
        if value is None:
            raise RuntimeError(f"no {attribute} for {name}")
        setattr(p, attribute, None)
        yield value


def ways(n: int, model: nn.Module) -> dict[str, list[Way]]:
    """Return every peer's ways for a batch of ``n`` samples of a model.

    Libraries that hold the gradients of all samples at once may take fewer at a time, which often is the faster way.
    What has most often been fastest comes first, because there may not be time for all.
    """
    parts = (*dict.fromkeys(max(1, n // k) for k in (16, 64, 4)), None)
    kinds: dict[str, SDPBackend | None] = {"vmap(grad)": None}
    if any(isinstance(module, Block) for module in model.modules()):
        kinds["vmap(grad), plain attention"] = SDPBackend.MATH
    return {
        "BackPACK": [
            Way("SumGradSquared", partial(backpack, "SumGradSquared")),
            *(Way("BatchGrad", partial(backpack, "BatchGrad"), s) for s in parts),
        ],
        "Opacus": [Way(mode, partial(opacus, mode), s) for s in parts for mode in ("hooks", "ew", "functorch")],
        "torch.func": [Way(shown, partial(torch_func, kind), s) for shown, kind in kinds.items() for s in parts],
        "loop": [Way("one sample at a time", loop)],
    }
