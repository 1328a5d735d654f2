"""Every tile that the library's table has for a linear layer, beside the one that the library takes: for tuning.

    python -m benchmarks.gpu --json out/tiles.json --parts tiles

Each tile gets the plan that the library would make for it. It is checked against float64 and for equal bits in two
runs, and left out where it cannot run; the yardstick is cuBLAS's plain product of the same operands. If a tile wins by
more than the quartiles on all layers of its kind, change the order or the row in ``fisher_config.py``; if the plan
takes the wrong one of them, ``_PRODUCTS_PER_BYTE`` and ``_CLOSE`` in ``fisher_plan.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from .kernels import LAYERS, PLAIN, QUICK, Layer, check, fp32_mode, fresh, linear
from .plumbing.parts import Cases
from .timing import Budget, Contender, quartiles, ratio

DEFAULT = "default"
ROUNDS, SECONDS = 40, 5.0
NAMES = ("3072x768", "768x3072", "4096x4096", "768x768", "1024x1024 T=16", "RNN 1000x1000 T=35", "ViT 768x768")


@contextmanager
def planned(plan: object) -> Iterator[Callable[..., None]]:
    """Yield the linear layer's launcher, which takes a plan meanwhile; None: its own."""
    from wplfast.backends.triton import fisher_linear

    before = fisher_linear.choose_plan
    if plan is not None:
        fisher_linear.choose_plan = lambda *_: plan
    try:
        yield fisher_linear.fisher_linear_
    finally:
        fisher_linear.choose_plan = before


def plans(layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """Return the plan of each tile that a layer may get, and None for what the library takes by itself."""
    from wplfast.backends.triton import fisher_config, fisher_plan
    from wplfast.backends.triton.launch import n_processors

    operands, generation = fisher_config.choose_operands(dtype), fisher_config.generation(device)
    form = fisher_plan.Layer(layer.d_out, layer.d_in, layer.n, layer.t, in_place=layer.d_in % 8 == 0)
    found: dict[str, object] = {DEFAULT: None}
    for t in fisher_config.tiles_of(generation, operands, layer.t, False):
        plan = fisher_plan.plan_for(t, form, operands, False, (generation, n_processors(device)))[1]
        found[f"{t.m}x{t.n}x{t.k}-w{t.warps}-s{t.stages}-{plan.whole}+{plan.splits}"] = plan
    return found


def case(device: torch.device, quick: bool, layer: Layer, dtype: str) -> dict:
    """Check all tiles of one layer and time those that are right."""
    generator, seed = fresh(device)
    kernel = linear(generator, layer, dtype)
    operands, result = kernel.draw(), torch.zeros(layer.d_out, layer.d_in, device=device)
    contenders: dict[str, Contender] = {}
    record: dict = {**kernel.about, "seed": seed, "left_out": {}, "tiles": {}}

    def ran(plan: object) -> Callable[..., None]:
        def run(accumulators: Sequence[Tensor], g: Tensor, a: Tensor) -> None:
            with planned(plan) as launcher:
                launcher(accumulators[0], a, g, None, None)

        return run

    with fp32_mode(None):
        for name, plan in plans(layer, kernel.draw()[0].dtype, device).items():
            try:
                found = check(kernel, ran(plan), operands)
            except Exception as error:  # of the compiler or of a launch
                record["left_out"][name] = f"{type(error).__name__}: {error}"[:200]
                continue
            if found["right"] and found["same_bits_twice"]:
                contenders[name] = Contender(partial(ran(plan), [result], *operands), alone=True)
            else:
                record["left_out"][name] = f"wrong: {found}"
        contenders[PLAIN] = Contender(partial(kernel.plain, *operands), alone=True)
        times = Budget(device, 3 if quick else ROUNDS, 0.0 if quick else SECONDS).time(contenders)
    for name, taken in times.items():
        record["tiles"][name] = {"milliseconds": quartiles(taken, 1e3), "share_of_plain": ratio(times[PLAIN], taken)}
        if DEFAULT in times:
            record["tiles"][name]["gain_over_default"] = ratio(times[DEFAULT], taken)
    return record


def cases(device: torch.device, quick: bool) -> Cases:
    """Return the layers, in bfloat16 and as float32."""
    if quick:
        return {"tiny, bf16": partial(case, device, True, QUICK, "bf16")}
    rows = [(name, "bf16") for name in NAMES] + [(name, "fp32") for name in ("3072x768", "768x768")]
    return {f"{name}, {dtype}": partial(case, device, False, LAYERS[name], dtype) for name, dtype in rows}
