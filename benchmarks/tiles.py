"""Every tile that the library's table has for a linear layer, beside the one that the library takes: for tuning.

    python -m benchmarks.gpu --json out/tiles.json --parts tiles

Each tile gets the plan that the library would make for it, is checked as kernels are, and left out where it cannot run.
If a tile wins by more than the quartiles on all layers of its kind, change the order or the row in
``fisher_config.py``; if the plan takes the wrong one, ``_PRODUCTS_PER_BYTE`` and ``_CLOSE`` in ``fisher_plan.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from .kernels import DTYPES, LAYERS, QUICK, Kernel, Layer, linear, measure
from .plumbing.parts import Cases

NAMES = ("3072x768", "768x3072", "4096x4096", "768x768", "1024x1024 T=16", "RNN 1000x1000 T=35", "ViT 768x768")


def plans(layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """Return the plan of each tile that a layer may get."""
    from wplfast.backends.triton import fisher_config, fisher_plan
    from wplfast.backends.triton.launch import n_processors

    operands, gpu = fisher_config.choose_operands(dtype), (fisher_config.generation(device), n_processors(device))
    form, found = fisher_plan.Layer(layer.d_out, layer.d_in, layer.n, layer.t, in_place=layer.d_in % 8 == 0), {}
    for t in fisher_config.tiles_of(gpu[0], operands, layer.t, False):
        plan = fisher_plan.plan_for(t, form, operands, False, gpu)[1]
        found[f"{t.m}x{t.n}x{t.k}-w{t.warps}-s{t.stages}-{plan.whole}+{plan.splits}"] = plan
    return found


def under(plan: object, accumulators: Sequence[Tensor], g: Tensor, a: Tensor, *more: Tensor | None) -> None:
    """Run the kernel under a plan; ``more``: weights and the accumulator of the gradient."""
    from wplfast.backends.triton import fisher_linear, fisher_plan

    with mock.patch.object(fisher_plan, "choose_plan", return_value=plan):
        fisher_linear.fisher_linear_(accumulators[0], a, g, *(more or (None, None)))


def tiled(generator: torch.Generator, layer: Layer, dtype: str) -> Kernel:
    """Return a linear layer's kernel with a variant for each tile."""
    kernel, found = linear(generator, layer, dtype), plans(layer, DTYPES[dtype], generator.device)
    kernel.others.clear()
    kernel.variants = {name: partial(under, plan) for name, plan in found.items()}
    return kernel


def cases(device: torch.device, quick: bool) -> Cases:
    """Return the layers, in bfloat16 and as float32."""
    rows = [(name, "bf16") for name in NAMES] + [(name, "fp32") for name in ("3072x768", "768x768")]
    return {
        f"{name}, {dtype}": partial(
            measure, partial(tiled, layer=QUICK if quick else LAYERS[name], dtype=dtype), device, quick
        )
        for name, dtype in rows[: 1 if quick else None]
    }
