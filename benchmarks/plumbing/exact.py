"""What a penalty should be, in float64: sums of F, F theta_hat and F theta_hat^2 over its anchors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..contenders import ALPHA, TOLERANCE, Way, WrongResultError


class Exact:
    """``ALPHA/2 sum_k F_k (theta - theta_k)^2`` by name, kept as three float64 sums for each parameter."""

    def __init__(self, theta: Mapping[str, Tensor]) -> None:
        """Begin without an anchor."""
        self.theta = theta
        zeros = (torch.zeros(3, *p.shape, dtype=torch.float64, device=p.device) for p in theta.values())
        self.sums: dict[str, Tensor] = dict(zip(theta, zeros, strict=True))

    @torch.no_grad()
    def add(
        self,
        fisher: Mapping[str, Tensor],
        theta_hat: Mapping[str, Tensor],
        decay: float = 1.0,
        replace: bool = False,
    ) -> None:
        """Consolidate the parameters that ``fisher`` names."""
        for name, f in fisher.items():
            sums, hat = self.sums[name], theta_hat[name].double()
            sums *= decay
            sums[0] += f
            if replace:
                sums[1:] = 0
            new = sums[0] if replace else f.double()
            sums[1] += new * hat
            sums[2] += new * hat.square()

    @torch.no_grad()
    def check(self, what: str, way: Way, active: Sequence[str] | None = None, tolerance: float = TOLERANCE) -> dict:
        """Return the relative errors of the value and of the gradients that a way adds to zeros.

        Args:
            what: for the error message.
            way: what to run.
            active: names that the penalty is restricted to; the gradients of others stay zeros.
            tolerance: of both errors; the gradient's is relative to a parameter's largest entry.

        Raises:
            WrongResultError: if an error is above the tolerance.
        """
        for p in self.theta.values():
            p.grad.zero_()
        with torch.enable_grad():
            value = way()
        expected, worst = 0.0, 0.0
        for name, p in self.theta.items():
            if active is not None and name not in active:
                worst = max(worst, float(p.grad.any()))
                continue
            f, fh, fhh = self.sums[name]
            theta = p.double()
            expected += ALPHA / 2 * (f * theta.square() - 2 * fh * theta + fhh).sum().item()
            gradient = ALPHA * (f * theta - fh)
            error = (p.grad - gradient).abs().max() / gradient.abs().max()
            worst = max(worst, error.nan_to_num(torch.inf).item())
        errors = {"gradient": worst}
        if value is not None:
            errors["value"] = abs(value.item() / expected - 1)
        if not all(error < tolerance for error in errors.values()):
            raise WrongResultError(f"{what}: relative errors {errors} against float64, expected < {tolerance}")
        return errors
