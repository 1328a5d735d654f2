"""Draw docs/power_of_two.svg: how power-of-two weights of the losses tell which sample owns which row.

Real gradients of a small model, by plain autograd: nothing here uses wplfast. ``python docs/draw_power_of_two.py``
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

N, T, D = 3, 2, 4
WEIGHTS = torch.tensor([0.5, 4.0, 2.0])
COLOURS = ["#4477aa", "#cc6677", "#ddaa33"]
TEXT = ["#2f5d8a", "#a8344a", "#7a5a00"]  # the same, dark enough to be read on white


def gradients(time_first: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of the first layer's output rows [6, 3] for losses with weights 1 and with WEIGHTS."""
    torch.manual_seed(1)
    first, second = nn.Linear(D, 3), nn.Linear(3, 2)
    x = torch.randn(N, T, D)
    rows = (x.transpose(0, 1) if time_first else x).reshape(N * T, D)
    y = first(rows)
    shape = (T, N, 2) if time_first else (N, T, 2)
    losses = second(torch.tanh(y)).view(shape).square().sum((0 if time_first else 1, 2))
    plain = torch.autograd.grad(losses.sum(), y, retain_graph=True)[0]
    weighted = torch.autograd.grad((losses * WEIGHTS).sum(), y)[0]
    return plain, weighted


def draw(axes: Axes, time_first: bool) -> None:
    """Draw one layout: rows of both gradients, their ratio, and the sample that it names."""
    plain, weighted = gradients(time_first)
    ratios = weighted / plain
    axes.set_xlim(-0.3, 9.6)
    axes.set_ylim(6.2, -1.7)
    axes.axis("off")
    axes.set_title(
        "[T·N, D]: time first" if time_first else "[N·T, D]: samples first",
        loc="left",
        fontsize=11,
    )
    for left, head in (
        (0, "G with weights 1"),
        (3.5, "G with weights c"),
        (7, "ratio"),
    ):
        axes.text(left, -0.45, head, fontsize=9, color="#333333")
    for row in range(N * T):
        owner = int((WEIGHTS - ratios[row, 0]).abs().argmin())
        assert torch.equal(ratios[row], WEIGHTS[owner].expand(3)), "the ratio is exact"
        for left, values in ((0, plain[row]), (3.5, weighted[row])):
            for column, value in enumerate(values):
                box = plt.Rectangle(
                    (left + column, row),
                    0.96,
                    0.9,
                    facecolor=COLOURS[owner],
                    alpha=0.25,
                    linewidth=0,
                )
                axes.add_patch(box)
                axes.text(
                    left + column + 0.48,
                    row + 0.47,
                    f"{value:.3f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                )
        axes.text(
            7,
            row + 0.47,
            f"{ratios[row, 0]:g}",
            va="center",
            fontsize=10,
            color=TEXT[owner],
            weight="bold",
        )
        axes.text(
            7.7,
            row + 0.47,
            f"sample {owner}",
            va="center",
            fontsize=9,
            color=TEXT[owner],
        )


def main() -> None:
    """Draw both layouts side by side."""
    plt.rcParams |= {
        "svg.hashsalt": "wplfast",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.9))
    draw(left, time_first=False)
    draw(right, time_first=True)
    weights = ",  ".join(
        f"c of sample {n} = {c:g}" for n, c in enumerate(WEIGHTS.tolist())
    )
    figure.text(
        0.5,
        0.02,
        f"Losses are weighted with powers of two: {weights}",
        ha="center",
        fontsize=9.5,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(
        Path(__file__).with_name("power_of_two.svg"),
        metadata={"Date": None},
        facecolor="white",
    )


if __name__ == "__main__":
    main()
