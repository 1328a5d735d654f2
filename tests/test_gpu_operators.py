"""Every operator on the device: fresh inputs against float64, bits that repeat, streams, threads, CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import DTYPES, Graph, fresh_seed, in_threads, map_nested, on_device, poison, relative_error, same_bits
from gpu_cases import stream as new_stream
from torch import Tensor

from wplfast import ops
from wplfast.ops.layout import flat_dtype, packed_views

pytestmark = on_device

#: Relative to the norm; what is in 16 bits at the end is off by its rounding.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float64: 1e-13}
ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-13}
CONV = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


def accumulators(dtype: torch.dtype, *shape: int) -> dict[str, Tensor]:
    return {name: torch.rand(shape, dtype=flat_dtype(dtype), device="cpu") for name in ("fisher", "gradient")}


def normal(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device="cpu").to(dtype)


def linear(dtype: torch.dtype, n: int, t: int, d_in: int, d_out: int) -> dict[str, Any]:
    a, g = normal(dtype, n, t, d_in), normal(dtype, n, t, d_out)
    return {"activations": a, "grad_outputs": g, "weights": weights(n), **accumulators(dtype, d_out, d_in)}


def conv(dtype: torch.dtype, channels: int, outputs: int, groups: int) -> dict[str, Any]:
    x, g = normal(dtype, 5, 2, 9, 11, channels), normal(dtype, 5, 2, 5, 11, outputs)
    return {"inputs": x, "grad_outputs": g, **accumulators(dtype, outputs, channels // groups, 3, 3), "groups": groups}


def embedding(dtype: torch.dtype, n: int, t: int, d: int, v: int) -> dict[str, Any]:
    indices, g = torch.randint(-1, v, (n, t), device="cpu"), normal(dtype, n, t, d)
    return {"indices": indices, "grad_outputs": g, "weights": weights(n), **accumulators(dtype, v, d)}


def squares(dtype: torch.dtype, n: int, *shape: int) -> dict[str, Any]:
    return {"fisher": accumulators(dtype, *shape)["fisher"], "grads": normal(dtype, n, *shape), "weights": weights(n)}


def anchors(dtype: torch.dtype, fisher: torch.dtype | None = None) -> dict[str, Any]:
    shapes = [(5,), (37, 129), (0,), (4099,), (70_001,), (1,)]
    wide = flat_dtype(dtype)
    return {
        "theta": [normal(dtype, *s) for s in shapes],
        "theta_hat": [normal(dtype, *s) for s in shapes],
        "offset": [0.1 * normal(wide, *s) for s in shapes],
        "fisher": [normal(fisher or wide, *s).square() for s in shapes],
        "alpha": torch.rand(len(shapes), dtype=torch.float64, device="cpu"),
        "l2": torch.rand((), dtype=torch.float64, device="cpu"),
    }


def weights(n: int) -> Tensor:
    return torch.rand(n, device="cpu")


def adding(dtype: torch.dtype) -> dict[str, Any]:
    scale = torch.tensor(0.7, dtype=torch.float64, device="cpu")
    return {**anchors(dtype), "grad": anchors(dtype)["theta_hat"], "scale": scale}


#: (operator, arguments for a dtype)
CALLS = {
    "linear": ("fisher_linear_", lambda d: linear(d, 6, 70, 72, 133)),
    "linear, one step": ("fisher_linear_", lambda d: linear(d, 33, 1, 65, 24)),
    "conv": ("fisher_conv_", lambda d: conv(d, 24, 40, 1)),
    "conv, groups": ("fisher_conv_", lambda d: conv(d, 12, 18, 3)),
    "conv, depthwise": ("fisher_conv_", lambda d: conv(d, 37, 37, 37)),
    "embedding": ("fisher_embedding_", lambda d: embedding(d, 7, 90, 33, 50)),
    "squares": ("accumulate_squares_", lambda d: squares(d, 300, 33, 7)),
    "scale": ("scale_grads", lambda d: {"activations": normal(d, 5, 300, 33), "grad_outputs": normal(d, 5, 300, 33)}),
    "scale unless one": (
        "scale_unless_one_",
        lambda d: {"tensor": normal(d, 5001), "factor": torch.tensor(0.37, device="cpu")},
    ),
    "penalty": ("penalty", anchors),
    "penalty with grad": ("penalty_with_grad", anchors),
    "penalty add grad": ("penalty_add_grad_", adding),
}
INPUTS = {name: make for name, (_, make) in CALLS.items()}
WRITTEN = ("fisher", "gradient", "tensor", "grad")


def call(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """Call an operator, and return its results and copies of what it wrote to."""
    operator, _ = CALLS[name]
    arguments = dict(arguments, **(CONV if "conv" in name else {}))
    wrote = [key for key in WRITTEN if key in arguments and operator.endswith("_")]
    if operator == "penalty_add_grad_":
        wrote = ["grad"]
    for key in wrote:
        arguments[key] = map_nested(torch.clone, arguments[key])
    returned = getattr(ops, operator)(**arguments)
    if operator == "penalty_with_grad":
        return [returned[0], *packed_views(returned[1], arguments["theta"])]
    results = [] if returned is None else [returned]
    for key in wrote:
        results += arguments[key] if isinstance(arguments[key], list) else [arguments[key]]
    return results


def exact(arguments: dict[str, Any]) -> dict[str, Any]:
    return map_nested(lambda t: t.double() if t.is_floating_point() else t, arguments)


def shifted(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device, three elements off alignment, with NaN around it."""
    kept = tensor.dtype if not tensor.is_floating_point() else None
    around = -1 if kept else float("nan")
    memory = torch.full((tensor.numel() + 9,), around, dtype=tensor.dtype, device=device)
    return memory[3 : 3 + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("name", INPUTS)
def test_against_float64(name, misaligned, dtype, device):
    fresh_seed()
    inputs = INPUTS[name](dtype)
    expected = call(name, exact(inputs))
    poison()
    found = call(name, map_nested(lambda t: shifted(t, device) if misaligned and t.dim() else t.to(device), inputs))
    bounds = ROUNDED if name in ("penalty with grad", "penalty add grad", "scale unless one") else BOUND
    for index, (one, wanted) in enumerate(zip(found, expected, strict=True)):
        bound = BOUND if one.dtype == flat_dtype(dtype) else bounds
        assert one.device == device
        assert relative_error(one, wanted) <= bound[dtype], (name, index)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_the_same_bits_run_to_run_on_any_stream_and_thread(name, dtype, device):
    fresh_seed()
    inputs = map_nested(lambda t: t.to(device), INPUTS[name](dtype))
    first = call(name, inputs)
    for _ in range(3):
        poison()
        assert same_bits(call(name, inputs), first)
    with new_stream():
        again = call(name, inputs)
    assert same_bits(again, first)

    def work() -> None:
        for _ in range(3):
            assert same_bits(call(name, inputs), first)

    in_threads(work, work, work)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_in_a_cuda_graph(name, dtype, device):
    """Replays see other values in the same memory, and give the bits of an eager call."""
    fresh_seed()
    inputs = map_nested(lambda t: t.to(device), INPUTS[name](dtype))
    graph = Graph(lambda: call(name, inputs))
    for _ in range(3):
        other = map_nested(lambda t: t.to(device), INPUTS[name](dtype))
        fill(inputs, other)
        poison()
        found = [r.clone() for r in graph.replay()]
        assert same_bits(found, call(name, inputs))


def fill(to: Any, values: Any) -> None:
    """Copy tensors into nested tensors, where they are."""
    if isinstance(to, Tensor):
        to.copy_(values)
    elif isinstance(to, dict):
        for key in to:
            fill(to[key], values[key])
    elif isinstance(to, list):
        for one, value in zip(to, values, strict=True):
            fill(one, value)


EMPTY = {
    "linear": lambda: {
        "fisher": torch.ones(5, 4),
        "activations": torch.ones(0, 3, 4),
        "grad_outputs": torch.ones(0, 3, 5),
    },
    "embedding": lambda: {
        "fisher": torch.ones(5, 4),
        "indices": torch.zeros(2, 0, dtype=torch.int64),
        "grad_outputs": torch.ones(2, 0, 4),
    },
    "squares": lambda: {"fisher": torch.ones(5), "grads": torch.ones(0, 5)},
    "scale unless one": lambda: {"tensor": torch.ones(0), "factor": torch.tensor(3.0)},
}


@pytest.mark.parametrize("name", EMPTY)
def test_of_nothing(name):
    (result,) = call(name, EMPTY[name]())
    assert bool((result == 1).all())


def test_tensors_on_two_devices_are_refused(device):
    if device.type == "cpu":
        pytest.skip("the interpreter's tensors are all on the CPU")
    with pytest.raises(ValueError, match=r"must .*got .*cpu"):
        ops.fisher_linear_(torch.zeros(5, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, 5, device="cpu"))
    zero, here, there = torch.zeros((), dtype=torch.float64), torch.zeros(3), torch.zeros(3, device="cpu")
    with pytest.raises(ValueError, match=r"must .*got .*cpu"):
        ops.penalty([here], [there], [], [here], zero, zero)
    with pytest.raises(ValueError, match=r"must .*got .*cpu"):
        ops.penalty(
            [torch.zeros(3), torch.zeros(3, device="cpu")], [torch.zeros(3)] * 2, [], [torch.zeros(3)] * 2, zero, zero
        )
