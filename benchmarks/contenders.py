"""The ways to add a penalty's gradient to ``.grad``: wplfast, the formulas people write, and ``torch.compile``."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

import wplfast

ALPHA = 3.0
TOLERANCE = 1e-5  # fp32 against float64, relative to the largest entry: eager sums 10 M terms within 1e-6
CHUNK = 2**16  # elements that are checked at a time: their float64 copies stay in a core's cache
CHUNK_CUDA = 2**26  # on a GPU

#: Bytes that each way moves per fp32 parameter.
BYTES = {
    "add_grad_": 20,  # reads theta, theta_hat, F, grad; writes grad
    "autograd": 28,  # reads 3, writes a gradient; AccumulateGrad reads it and grad, writes grad
    "eager": 84,  # sub 12, pow 8, mul 12, sum 4; backward 8 + 8 + 8 + 12, AccumulateGrad 12
    "cat": 92,  # cat 8, then as eager: the gradients of the pieces are views
    "foreach": 36,  # sub, mul, add: 12 each; no value
    "foreach, value": 52,  # mul into a new list, then mul 12 and sum 4
    "compile": 40,  # value 12, gradient 16, AccumulateGrad 12
}
NO_VALUE = {"foreach"}  # these compute the gradient alone

Way = Callable[[], Tensor | None]


class WrongResultError(RuntimeError):
    """A contender's result is wrong, so its time means nothing."""


@dataclass
class Case:
    """Parameters with gradients, anchors and Fishers."""

    name: str
    theta: list[Tensor]
    theta_hat: list[Tensor] = field(default_factory=list)
    fisher: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        name: str,
        shapes: Sequence[tuple[int, ...]],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Case:
        """Draw all tensors where they are to be; the Fishers are float32."""
        options = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
        case = cls(name, [torch.randn(s, **options).to(dtype).requires_grad_() for s in shapes])
        case.theta_hat = [torch.randn(s, **options).to(dtype) for s in shapes]
        case.fisher = [torch.rand(s, **options) for s in shapes]
        for p in case.theta:
            p.grad = torch.ones_like(p)
        return case

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.theta)

    @property
    def grads(self) -> list[Tensor]:
        """The gradients, which stay the same tensors."""
        return [p.grad for p in self.theta if p.grad is not None]


def by_name(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return tensors, one per parameter, by the names that penalties know the parameters by."""
    return {str(i): tensor for i, tensor in enumerate(tensors)}


def net_shapes(numel: int, n_tensors: int = 160) -> list[tuple[int, ...]]:
    """Return weight matrices and bias vectors, half each, with about so many elements; sides differ by up to 6."""
    generator = torch.Generator().manual_seed(1)
    sides = torch.exp(math.log(6) * torch.rand(n_tensors // 2, 2, generator=generator, dtype=torch.float64))
    areas, rows = sides.prod(1).sum().item(), sides[:, 0].sum().item()
    sides *= (math.sqrt(rows**2 + 4 * areas * numel) - rows) / (2 * areas)  # areas s^2 + rows s = numel
    rounded = [[max(1, round(side)) for side in pair] for pair in sides.tolist()]
    return [shape for rows, columns in rounded for shape in ((rows, columns), (rows,))]


def ours(case: Case) -> dict[str, Way]:
    """Return wplfast's two: in place, and through autograd."""
    penalty = wplfast.WeightPlasticityLoss(by_name(case.theta), alpha=ALPHA)
    penalty.consolidate(by_name(case.fisher), theta_hat=by_name(case.theta_hat))

    def autograd() -> Tensor:
        value = penalty()
        value.backward()
        return value

    return {"add_grad_": penalty.add_grad_, "autograd": autograd}


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
    """Return the loop over tensors, and the same with lists of them."""
    grads = case.grads

    def eager() -> Tensor:
        value = formula(case.theta, case.theta_hat, case.fisher)
        value.backward()
        return value

    @torch.no_grad()
    def foreach() -> None:
        gradient = torch._foreach_sub(case.theta, case.theta_hat)
        torch._foreach_mul_(gradient, case.fisher)
        torch._foreach_add_(grads, gradient, alpha=ALPHA)

    def valued() -> Tensor:
        return foreach_value(case.theta, case.theta_hat, case.fisher, grads)

    return {"eager": eager, "foreach": foreach, "foreach, value": valued}


def flat(case: Case) -> dict[str, Way]:
    """Return the formula over one vector: the parameters are concatenated in each step, the rest was before."""
    theta_hat, fisher = parameters_to_vector(case.theta_hat), parameters_to_vector(case.fisher)

    def cat() -> Tensor:
        value = ALPHA / 2 * (fisher * (parameters_to_vector(case.theta) - theta_hat) ** 2).sum()
        value.backward()
        return value

    return {"cat": cat}


def compiled(case: Case) -> dict[str, Way]:
    """Return the loop over tensors, compiled for this case: nothing is taken over from others or from a cache."""
    torch._dynamo.reset()
    function = torch.compile(formula, fullgraph=True, dynamic=False)

    def run() -> Tensor:
        value = function(case.theta, case.theta_hat, case.fisher)
        value.backward()
        return value

    with warnings.catch_warnings(), torch._inductor.config.patch(force_disable_caches=True):
        warnings.simplefilter("ignore")  # that caches are disabled
        run()
    return {"compile": run}


#: What is compared. What one of these makes shares memory, so that large cases can be made and freed in turn.
MAKERS: Mapping[str, Callable[[Case], dict[str, Way]]] = {
    "ours": ours,
    "plain": plain,
    "flat": flat,
    "compiled": compiled,
}
#: The names of what each makes.
WAYS = {
    "ours": ("add_grad_", "autograd"),
    "plain": ("eager", "foreach", "foreach, value"),
    "flat": ("cat",),
    "compiled": ("compile",),
}


def make(case: Case, makers: Sequence[str]) -> tuple[dict[str, Way], float | None]:
    """Make ways, and return the seconds that compiling one took, or None."""
    ways: dict[str, Way] = {}
    seconds = None
    for maker in makers:
        started = time.perf_counter()
        ways |= MAKERS[maker](case)
        if maker == "compiled":
            seconds = time.perf_counter() - started
    return ways, seconds


def check(case: Case, name: str, way: Way) -> dict[str, float]:
    """Return the relative errors of value and gradients against float64, added to gradients of 1.

    Raises:
        WrongResultError: if one is above the tolerance.
    """
    for grad in case.grads:
        grad.fill_(1)
    value = way()
    worst, expected = 0.0, 0.0
    for p, p_hat, f in zip(case.theta, case.theta_hat, case.fisher, strict=True):
        error, largest = 0.0, 0.0
        for theta, theta_hat, fisher, grad in _chunks(p, p_hat, f, p.grad):
            d = theta.sub_(theta_hat)
            gradient = fisher.mul_(d)
            expected += ALPHA / 2 * torch.dot(gradient, d).item()
            gradient.mul_(ALPHA).add_(1)
            largest = max(largest, gradient.abs().max().item())
            error = max(error, grad.sub_(gradient).abs().max().nan_to_num(torch.inf).item())
        worst = max(worst, error / largest)
    errors = {"gradient": worst}
    if value is not None:
        errors["value"] = abs(value.item() / expected - 1)
    if not all(error < TOLERANCE for error in errors.values()):
        raise WrongResultError(f"{case.name}, {name}: relative errors {errors} against float64, expected < {TOLERANCE}")
    return errors


def _chunks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield float64 copies of the tensors, some elements of all at a time."""
    chunk = CHUNK_CUDA if tensors[0].is_cuda else CHUNK
    for parts in zip(*(tensor.detach().reshape(-1).split(chunk) for tensor in tensors), strict=True):
        yield [part.double() for part in parts]
