"""The ways to add a penalty's gradient to ``.grad``: wplfast, the formulas people write, and ``torch.compile``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

import wplfast

ALPHA = 3.0
CHUNK, CHUNK_CUDA = 2**16, 2**26  # elements that are checked at a time: their float64 copies stay in a core's cache

#: Bytes that other ways move per fp32 parameter.
BYTES = {
    "eager": 84,  # sub 12, pow 8, mul 12, sum 4; backward 8 + 8 + 8 + 12, AccumulateGrad 12
    "cat": 92,  # cat 8, then as eager: the gradients of the pieces are views
    "foreach": 36,  # sub, mul, add: 12 each; no value
    "foreach, value": 52,  # mul into a new list, then mul 12 and sum 4
    "compile": 40,  # value 12, gradient 16, AccumulateGrad 12
}
#: How often ours move a gradient; ``add_grad_`` reads and writes one, autograd writes one and AccumulateGrad three.
GRADIENTS = {"value": 0, "value and gradient": 1, "autograd": 4, "functional": 4}

Way = Callable[[], Tensor | None]
Anchors = Sequence[Sequence[tuple[Tensor, Tensor]]]  # for each parameter, the pairs of theta_hat and F of its anchors


class WrongResultError(RuntimeError):
    """A contender's result is wrong, so its time means nothing."""


@dataclass(frozen=True)
class Kind:
    """How parameters, Fishers and anchors are kept."""

    name: str
    theta: torch.dtype = torch.float32
    fisher: torch.dtype = torch.float32
    anchors: int = 1

    def bytes(self, way: str) -> int:
        """Return what must move for a parameter; for a roof, as much as for ``add_grad_``."""
        read = 2 * self.theta.itemsize + self.fisher.itemsize + 4 * (self.anchors > 1)  # theta, theta_hat, F, offset
        return BYTES.get(way) or read + self.theta.itemsize * GRADIENTS.get(way, 2)

    @property
    def tolerance(self) -> dict[str, float]:
        """The largest errors: a gradient of bfloat16 is rounded, and a merged F of bfloat16 is rounded again."""
        merged = self.anchors > 1 and self.fisher == torch.bfloat16
        rounded = self.theta == torch.bfloat16 or merged
        return {"gradient": 1e-2 if rounded else 1e-5, "value": 5e-3 if merged else 1e-5}


FP32 = Kind("fp32")
TOLERANCE = FP32.tolerance  # against float64, relative to the largest entry: eager sums 10 M terms within 1e-6


class Case:
    """Parameters with gradients, and their anchors: lists of theta_hat and of F, of which ways use the first."""

    def __init__(
        self, name: str, shapes: Sequence[tuple[int, ...]], device: torch.device, kind: Kind = FP32, seed: int = 0
    ) -> None:
        """Draw all tensors where they are to be."""
        options = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
        self.name, self.kind = name, kind
        self.theta = [torch.randn(s, **options).to(kind.theta).requires_grad_() for s in shapes]
        self.kept: list[tuple[list[Tensor], list[Tensor]]] = []
        for _ in range(kind.anchors):
            theta_hat = [torch.randn(s, **options).to(kind.theta) for s in shapes]
            self.kept.append((theta_hat, [torch.rand(s, **options).to(kind.fisher) for s in shapes]))
        self.theta_hat, self.fisher = self.kept[0]
        self.grads = [torch.ones_like(p) for p in self.theta]  # they stay the same tensors
        for p, grad in zip(self.theta, self.grads, strict=True):
            p.grad = grad
        self.numel = sum(p.numel() for p in self.theta)

    @property
    def anchors(self) -> Anchors:
        """The anchors of each parameter."""
        return [[(hats[i], fishers[i]) for hats, fishers in self.kept] for i in range(len(self.theta))]

    def penalty(self) -> wplfast.WeightPlasticityLoss:
        """Return a penalty with all anchors."""
        wpl = wplfast.WeightPlasticityLoss(by_name(self.theta), alpha=ALPHA, fisher_dtype=self.kind.fisher)
        for theta_hat, fisher in self.kept:
            wpl.consolidate(by_name([f.float() for f in fisher]), theta_hat=by_name(theta_hat))
        return wpl


def by_name(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return tensors, one per parameter, by the names that penalties know the parameters by."""
    return {str(i): tensor for i, tensor in enumerate(tensors)}


def net_shapes(numel: int, n_tensors: int = 160) -> list[tuple[int, ...]]:
    """Return weight matrices and bias vectors, half each, with about so many elements; sides differ by up to 6.

    One tensor is one vector.
    """
    if n_tensors == 1:
        return [(numel,)]
    generator = torch.Generator().manual_seed(1)
    sides = torch.exp(math.log(6) * torch.rand(n_tensors // 2, 2, generator=generator, dtype=torch.float64))
    areas, rows = sides.prod(1).sum().item(), sides[:, 0].sum().item()
    sides *= (math.sqrt(rows**2 + 4 * areas * numel) - rows) / (2 * areas)  # areas s^2 + rows s = numel
    rounded = [[max(1, round(side)) for side in pair] for pair in sides.tolist()]
    return [shape for rows, columns in rounded for shape in ((rows, columns), (rows,))]


def backward_of(penalty: Callable[[], Tensor]) -> Way:
    """Return what evaluates a penalty and runs backward."""

    def run() -> Tensor:
        value = penalty()
        value.backward()
        return value

    return run


def ours(case: Case) -> dict[str, Way]:
    """Return wplfast's two ways of a penalty with state: in place, and through autograd."""
    return ways_of(case.penalty())


def ways_of(penalty: wplfast.WeightPlasticityLoss) -> dict[str, Way]:
    """Return both ways to evaluate a penalty, or an active set of one."""
    return {"add_grad_": penalty.add_grad_, "autograd": backward_of(penalty)}


def functional(case: Case) -> dict[str, Way]:
    """Return wplfast's function without state."""
    tensors = case.theta, case.theta_hat, case.fisher
    return {"functional": backward_of(lambda: wplfast.functional.wpl_penalty(*tensors, ALPHA))}


def kernels(case: Case) -> dict[str, Way]:
    """Return them with what is launched for a value, for a gradient left in the graph, and for ``add_grad_``."""
    penalty = case.penalty()
    alone = {
        "value": torch.no_grad()(lambda: penalty()),
        "value and gradient": penalty,
        "accumulate": penalty.add_grad_,
    }
    return ways_of(penalty) | alone


def graph(case: Case) -> dict[str, Way]:
    """Return the replay of ``add_grad_`` captured in a CUDA graph."""
    penalty, side = case.penalty(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            penalty.add_grad_()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        penalty.add_grad_()
    return {"graph": captured.replay}


def formula(theta: Sequence[Tensor], theta_hat: Sequence[Tensor], fisher: Sequence[Tensor]) -> Tensor:
    """Return the penalty as most implementations write it: a loop over tensors."""
    return sum(
        (ALPHA / 2 * (f * (p - p_hat) ** 2).sum() for p, p_hat, f in zip(theta, theta_hat, fisher, strict=True)),
        torch.zeros((), device=theta[0].device),
    )


@torch.no_grad()
def foreach_value(
    theta: Sequence[Tensor], theta_hat: Sequence[Tensor], fisher: Sequence[Tensor], grads: Sequence[Tensor]
) -> Tensor:
    """Add the gradient with ``torch._foreach_*`` and return the value."""
    d = torch._foreach_sub(theta, theta_hat)
    gradient = torch._foreach_mul(d, fisher)
    torch._foreach_add_(grads, gradient, alpha=ALPHA)
    torch._foreach_mul_(d, gradient)
    return ALPHA / 2 * torch.stack([terms.sum() for terms in d]).sum()


def plain(case: Case) -> dict[str, Way]:
    """Return the loop over tensors, and lists of them, without and with the value."""

    @torch.no_grad()
    def foreach() -> None:
        gradient = torch._foreach_sub(case.theta, case.theta_hat)
        torch._foreach_mul_(gradient, case.fisher)
        torch._foreach_add_(case.grads, gradient, alpha=ALPHA)

    return {
        "eager": backward_of(lambda: formula(case.theta, case.theta_hat, case.fisher)),
        "foreach": foreach,
        "foreach, value": lambda: foreach_value(case.theta, case.theta_hat, case.fisher, case.grads),
    }


def flat(case: Case) -> dict[str, Way]:
    """Return the formula over one vector: the parameters are concatenated in each step, the rest was before."""
    theta_hat, fisher = parameters_to_vector(case.theta_hat), parameters_to_vector(case.fisher)
    return {
        "cat": backward_of(lambda: ALPHA / 2 * (fisher * (parameters_to_vector(case.theta) - theta_hat) ** 2).sum())
    }


def compiled(case: Case) -> dict[str, Way]:
    """Return the loop over tensors, compiled for this case: nothing is taken over from others or from a cache."""
    torch._dynamo.reset()
    function = torch.compile(formula, fullgraph=True, dynamic=False)
    run = backward_of(lambda: function(case.theta, case.theta_hat, case.fisher))
    with warnings.catch_warnings(), torch._inductor.config.patch(force_disable_caches=True):
        warnings.simplefilter("ignore")  # that caches are disabled
        run()
    return {"compile": run}


#: What makes the ways that are compared.
MAKERS: Mapping[str, Callable[[Case], dict[str, Way]]] = {
    "ours": ours, "functional": functional, "plain": plain, "flat": flat, "compiled": compiled, "kernels": kernels,
    "graph": graph,
}  # fmt: skip
KERNELS = ("value", "value and gradient", "accumulate")  # timed without the host, on a GPU; not checked themselves


def errors_of(theta: Sequence[Tensor], anchors: Anchors, way: Way) -> dict[str, float]:
    """Return the relative errors of a penalty's value and of the gradients that it adds to gradients of 1.

    Expected is ``ALPHA/2 sum_k F_k (theta - theta_k)^2`` over each parameter's anchors, in float64. The gradient's
    error is relative to a parameter's largest entry. Gradients of parameters without anchors must stay as they are.
    """
    for p in theta:
        p.grad.fill_(1)
    with torch.enable_grad():
        value = way()
    expected = worst = 0.0
    for p, pairs in zip(theta, anchors, strict=True):
        error, largest, chunk = 0.0, 0.0, CHUNK_CUDA if p.is_cuda else CHUNK
        for start in range(0, p.numel(), chunk):
            x, grad, *rest = (
                tensor.detach().reshape(-1)[start : start + chunk].double()
                for tensor in (p, p.grad, *(tensor for pair in pairs for tensor in pair))
            )
            gradient = torch.ones_like(x)
            for theta_hat, fisher in zip(rest[::2], rest[1::2], strict=True):
                d = x - theta_hat
                fisher.mul_(d)
                expected += ALPHA / 2 * torch.dot(fisher, d).item()
                gradient.add_(fisher, alpha=ALPHA)
            largest = max(largest, gradient.abs().max().item())
            error = max(error, grad.sub_(gradient).abs().max().nan_to_num(torch.inf).item())
        worst = max(worst, error / largest if largest else 0.0)
    return {"gradient": worst} if value is None else {"gradient": worst, "value": abs(value.item() / expected - 1)}


def check(
    what: str, theta: Sequence[Tensor], anchors: Anchors, way: Way, tolerance: Mapping[str, float] = TOLERANCE
) -> dict[str, float]:
    """Return the errors of a way to add a penalty's gradient.

    Raises:
        WrongResultError: if one is above the tolerance.
    """
    errors = errors_of(theta, anchors, way)
    if not all(error < tolerance[key] for key, error in errors.items()):
        raise WrongResultError(f"{what}: relative errors {errors} against float64, expected < {tolerance}")
    return errors
