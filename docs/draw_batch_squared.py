"""Draw docs/explanation/batch_squared.svg: what is lost when the gradient of a batch is squared.

Real gradients of a small network on scikit-learn's digits, by plain autograd: nothing here uses wplfast.
``python docs/draw_batch_squared.py``
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

BLUE, RED, GREY = "#4477aa", "#cc6677", "#777777"
SIZES = [2**power for power in range(10)]
SHOWN, BATCH = 16, 4  # gradients of one parameter, and how many make a batch


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return every sample's gradient of all parameters, [N, P]."""

    def loss(params: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(
            functional_call(model, params, (image[None],)), label[None]
        )

    found = vmap(grad(loss), (None, 0, 0))(
        dict(model.named_parameters()), images, labels
    )
    return torch.cat([g.flatten(1) for g in found.values()], 1).detach().double()


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Fit the network."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(15):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()


def batch_squared(g: Tensor, size: int) -> Tensor:
    """Return the mean over whole batches of the squared mean gradient, [P]."""
    return torch.stack(
        [part.mean(0).square() for part in g.split(size) if len(part) == size]
    ).mean(0)


def draw_samples(axes: Axes, values: Tensor) -> None:
    """Draw one parameter's gradients, and what is left of them in batches."""
    right = values.square().mean().item()
    means = values.view(-1, BATCH).mean(1)
    wrong = means.square().mean().item()
    axes.bar(
        range(SHOWN), values, color=BLUE, width=0.75, label="gradient of one sample"
    )
    for index, mean in enumerate(means.tolist()):
        first = index * BATCH - 0.5
        axes.fill_between(
            [first, first + BATCH], 0, mean, color=RED, alpha=0.45, linewidth=0
        )
        axes.plot(
            [first, first + BATCH],
            [mean, mean],
            color=RED,
            linewidth=2,
            label="mean of a batch" * (index == 0),
        )
    axes.axhline(0, color="black", linewidth=0.8)
    said = f"""mean of squared sample gradients: {right:.2g}
mean of squared batch gradients: {wrong:.2g}, {right / wrong:.1f} times less"""
    axes.set(
        xticks=range(SHOWN),
        xticklabels=[f"{n + 1}" for n in range(SHOWN)],
        xlabel=f"sample; {SHOWN} in batches of {BATCH}",
    )
    axes.set_ylabel("gradient of one parameter")
    axes.set_title(said, fontsize=10.5, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="center", bbox_to_anchor=(0.34, 0.3))


def draw_sizes(axes: Axes, name: str, g: Tensor, colour: str) -> None:
    """Draw how F shrinks with the batch size, as measured and as it must."""
    right, mean = g.square().mean(0).sum(), g.mean(0).square().sum()
    axes.plot(
        SIZES,
        [(batch_squared(g, b).sum() / right).item() for b in SIZES],
        "o",
        color=colour,
        label=name,
    )
    n = len(g)
    spread = [
        ((right - mean) * (n - b) / (n - 1) / b + mean).item() / right.item()
        for b in SIZES
    ]
    axes.plot(SIZES, spread, color=colour, linewidth=1.2)


def main() -> None:
    """Write the figure."""
    plt.rcParams |= {
        "svg.hashsalt": "wplfast",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
    }
    torch.manual_seed(0)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels))
    images, labels = images.float()[order] / 16, labels[order]
    model = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    before = gradients(model, images, labels)
    train(model, images, labels)
    after = gradients(model, images, labels)
    biases = before[
        :SHOWN, -10:
    ]  # of the classes: the parameter that comes closest to what is typical, a BATCH-th
    typical = (
        (batch_squared(biases, BATCH) * BATCH / biases.square().mean(0) - 1)
        .abs()
        .argmin()
    )

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.8), width_ratios=(1.25, 1), layout="constrained"
    )
    draw_samples(left, biases[:, typical])
    right.plot(
        SIZES,
        [1 / b for b in SIZES],
        "--",
        color=GREY,
        linewidth=1,
        label="1 / batch size",
    )
    draw_sizes(right, "before training", before, RED)
    draw_sizes(right, "after training", after, BLUE)
    right.set(
        xscale="log",
        yscale="log",
        xlabel="batch size",
        ylabel="batch-squared F over the right one",
    )
    right.set_xticks(SIZES, [f"{size}" for size in SIZES])
    right.minorticks_off()
    words = "all parameters\ndots: measured; lines: (F - μ²) / B + μ²"
    right.set_title(words, fontsize=10.5, loc="left")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path = Path(__file__).parent / "explanation" / "batch_squared.svg"
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
