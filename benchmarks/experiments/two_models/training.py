"""Two models that share their first layers, trained one after the other: what does the first one forget?

Model A is ``trunk -> own layers of A``, model B ``trunk -> own layers of B``. A is trained first. Then B is trained on
the same data, which changes the trunk; A keeps its own layers, is never trained again, and is evaluated as it goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

import wplfast

from ..data.digits import DIGITS, Part, load_split
from ..harness.options import option, positive
from ..harness.training import accuracy, batch_squared, batches, hidden_layers, step

#: how B's training treats the shared layers, and what each is called in tables and figures
METHODS = {
    "none": "no penalty",
    "wpl": "WPL",
    "squared": "WPL, batch-squared F",
    "l2": "L2 anchor (F = 1)",
    "frozen": "frozen",
}
TUNED = ("wpl", "squared", "l2")
N_CLASSES = 10


@dataclass(frozen=True)
class Setup:
    """Settings that all methods have in common.

    A is trained with Adam at ``lr_a``, B with Adam from ``lr_b`` linearly down to 0: at a constant rate Adam keeps
    every penalised parameter jittering around its anchor by about the rate, and B pays for that.
    """

    data: str | None = option(None, str, DIGITS, metavar="DIR")
    device: str = "cpu"
    hidden: int = 50
    layers_a: int = 4
    layers_b: int = 6
    shared_layers: int = 3
    batch_size: int = 64
    lr_a: float = 0.001
    lr_b: float = 0.02
    iterations_a: int = option(1500, positive, "of A (at most) and of B", flag="iterations")
    iterations_b: int = 1500
    evaluate_every: int = 25
    end_evaluations: int = 5


@dataclass(frozen=True)
class Trained:
    """Model A after its training, as arrays that travel between processes, and its Fishers over the trunk."""

    level: float | None
    seed: int
    accuracy: float
    iterations: int
    state: dict[str, np.ndarray] = field(repr=False)  # follows from the rest, which tells jobs apart
    fishers: dict[str, dict[str, np.ndarray]] = field(repr=False)


@dataclass(frozen=True)
class Run:
    """One training of B. Curves start at iteration 0; validation accuracies are means over the last evaluations."""

    method: str
    seed: int
    strength: float | None
    alpha: float | None
    iterations: list[int]
    accuracy_a: list[float]
    accuracy_b: list[float]
    validation_a: float
    validation_b: float


def train_a(job: tuple[Setup, float | None, int]) -> Trained:
    """Train A to convergence, or until its validation accuracy first reaches a level, and estimate its Fishers.

    Args:
        job: the settings, the level in [0, 1] (None: all iterations), the seed.
    """
    setup, level, seed = job
    split = load_split(setup.data, seed).to(setup.device)
    model = _models(setup, split.shape[0], seed)[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=setup.lr_a, fused=True)
    done = 0
    for images, labels in islice(batches(split.train, setup.batch_size, seed), setup.iterations_a):
        step(model, optimizer, images, labels)
        done += 1
        if level is not None and accuracy(model(split.validation[0]), split.validation[1]) >= level:
            break
    loader = list(zip(*(part.split(setup.batch_size) for part in split.train), strict=True))
    fishers: dict[str, Mapping[str, Tensor]] = {
        "wpl": wplfast.fisher_diagonal(model, loader, wplfast.losses.cross_entropy, params=model[0]),
        "squared": batch_squared(model, dict(model[0].named_parameters()), loader, len(loader)),
        "l2": {name: torch.ones_like(p) for name, p in model[0].named_parameters()},
    }
    return Trained(
        level,
        seed,
        accuracy(model(split.test[0]), split.test[1]),
        done,
        {name: value.cpu().numpy() for name, value in model.state_dict().items()},
        {method: {name: value.detach().cpu().numpy() for name, value in f.items()} for method, f in fishers.items()},
    )


def train_b(job: tuple[Setup, Trained, str, float | None]) -> Run:
    """Train B on A's trunk with one method, following both accuracies on the test split.

    Args:
        job: the settings, A, the method, and for the penalties their strength alpha * mean(F).
    """
    setup, trained, method, strength = job
    split = load_split(setup.data, trained.seed).to(setup.device)
    model_a, model_b = _models(setup, split.shape[0], trained.seed)
    model_a.load_state_dict({name: torch.from_numpy(value) for name, value in trained.state.items()})
    wpl = None
    if strength is not None:
        fisher = {name: torch.from_numpy(value) for name, value in trained.fishers[method].items()}
        scale = torch.cat([value.flatten() for value in fisher.values()]).mean().item()
        wpl = wplfast.WeightPlasticityLoss(model_b[0], strength / scale)
        wpl.consolidate(fisher)
    model_b[0].requires_grad_(method != "frozen")
    optimizer = torch.optim.Adam([p for p in model_b.parameters() if p.requires_grad], lr=setup.lr_b, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, setup.iterations_b)
    iterations, test, validation = [0], [_both(model_a, model_b, split.test)], []
    drawn = islice(batches(split.train, setup.batch_size, trained.seed + 1_000_000), setup.iterations_b)
    for iteration, (images, labels) in enumerate(drawn, start=1):
        step(model_b, optimizer, images, labels, wpl)
        decay.step()
        if iteration % setup.evaluate_every == 0 or iteration == setup.iterations_b:
            iterations.append(iteration)
            test.append(_both(model_a, model_b, split.test))
            if iteration > setup.iterations_b - setup.end_evaluations * setup.evaluate_every:
                validation.append(_both(model_a, model_b, split.validation))
    curves = (list(curve) for curve in zip(*test, strict=True))
    ends = (float(np.mean(values)) for values in zip(*validation, strict=True))
    return Run(method, trained.seed, strength, wpl.alpha.item() if wpl else None, iterations, *curves, *ends)


def _models(setup: Setup, n_features: int, seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Build A and B, the layers of each's own on one trunk; the seed decides all initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = hidden_layers(n_features, setup.hidden, setup.shared_layers)
        own = []
        for depth in (setup.layers_a, setup.layers_b):
            hidden = hidden_layers(setup.hidden, setup.hidden, depth - setup.shared_layers - 1)
            own.append(hidden.append(nn.Linear(setup.hidden, N_CLASSES)))
    return nn.Sequential(trunk, own[0]).to(setup.device), nn.Sequential(trunk, own[1]).to(setup.device)


@torch.no_grad()
def _both(model_a: nn.Sequential, model_b: nn.Sequential, part: Part) -> tuple[float, float]:
    """Return both accuracies, passing the trunk once."""
    images, labels = part
    features = model_a[0](images)
    return accuracy(model_a[1](features), labels), accuracy(model_b[1](features), labels)
