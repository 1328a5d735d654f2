"""One run: a model is trained on the start, then fine-tuned on each update set, warm, with or without a penalty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache

import torch
from torch import Tensor

import wplfast

from ..data.digits import Split, load_split
from ..harness.training import accuracy, step
from .model import GrowingNet
from .settings import UNCHANGED, Arm, Condition, Run, Setup
from .stream import Stream, draw, make_stream, remembered

_FISHER_BATCH = 512  # F does not depend on it; small update sets are one batch


def train(job: tuple[Setup, Condition, Arm, int]) -> Run:
    """Run one condition with one arm and one seed.

    After each update set, the penalty's F becomes the mean over all samples so far, by the running rule: the new
    samples' F enters at their share. It is anchored where the model is then. No old data are needed for it.

    Args:
        job: settings, condition, arm, seed.
    """
    setup, condition, arm, seed = job
    split, stream = _data(setup, condition.scenario, condition.noise, seed)
    model, wpl = _started(setup, condition.scenario, arm, seed)
    generator = torch.Generator().manual_seed(seed)
    run = Run(seed, [], [], 0, False)
    _evaluate(run, model, split, stream, stream.start_classes)
    seen, done = stream.start, 0
    for update in stream.updates:
        if arm.method != UNCHANGED:
            if model.grow(update.n_classes) and wpl is not None:
                wpl.rebind(model)  # the old classes keep their anchor
            old = seen if condition.memory is None else remembered(seen, stream.labels, stream.key, condition.memory)
            count = iterations(condition, len(old) + len(update.index), setup.batch_size)
            drawn = draw(old, update.index, condition.share_old, count * setup.batch_size, generator)
            _learn(setup, model, split, stream, drawn, arm.lr, wpl)
            done += count
        if not _evaluate(run, model, split, stream, update.n_classes):
            return _diverged(run, len(stream.updates), done)
        if wpl is not None:
            fisher = _fisher(model, split, stream, update.index, arm.method)
            if fisher is None:
                return _diverged(run, len(stream.updates), done)
            wpl.update(fisher, rate=len(update.index) / (len(seen) + len(update.index)))
        seen = torch.cat((seen, update.index))
    return run._replace(iterations=done)


def iterations(condition: Condition, n_samples: int, batch_size: int) -> int:
    """Return the number of SGD steps of an update: as given, or a share of an epoch of the data in reach."""
    if condition.unit == "iterations":
        return int(condition.steps)
    return max(1, math.ceil(condition.steps * n_samples / batch_size - 0.5))


@lru_cache(maxsize=2)
def _split(setup: Setup, seed: int) -> Split:
    """Return the parts of the data, on the device; jobs come ordered by seed."""
    return load_split(setup.data, seed).to(setup.device)


def _data(setup: Setup, scenario: str, noise: float, seed: int) -> tuple[Split, Stream]:
    """Return the parts of the data, and in what order the training part arrives."""
    split = _split(setup, seed)
    return split, make_stream(split.train[1].cpu(), scenario, setup.sizes, noise, setup.n_updates, seed)


def _started(
    setup: Setup, scenario: str, arm: Arm, seed: int
) -> tuple[GrowingNet, wplfast.WeightPlasticityLoss | None]:
    """Return the model after the start, and its penalty, anchored there."""
    model = deepcopy(_start(setup, scenario, seed))
    if arm.strength is None:
        return model, None
    fisher = _start_fisher(setup, scenario, arm.method, seed)
    wpl = wplfast.WeightPlasticityLoss(model, arm.strength / max(value.max().item() for value in fisher.values()))
    wpl.consolidate(fisher)
    return model, wpl


@lru_cache(maxsize=64)
def _start(setup: Setup, scenario: str, seed: int) -> GrowingNet:
    """Return the model that was trained on the start: copy it before you change it."""
    split, stream = _data(setup, scenario, 0.0, seed)
    model = GrowingNet(setup.model, *split.shape, stream.start_classes, setup.width, seed).to(setup.device)
    n, generator = setup.start_iterations * setup.batch_size, torch.Generator().manual_seed(seed)
    _learn(setup, model, split, stream, draw(stream.start, stream.start[:0], 1.0, n, generator), setup.lr_start)
    return model


@lru_cache(maxsize=64)
def _start_fisher(setup: Setup, scenario: str, method: str, seed: int) -> Mapping[str, Tensor] | None:
    """Return the start's F; a process computes it once."""
    split, stream = _data(setup, scenario, 0.0, seed)
    return _fisher(_start(setup, scenario, seed), split, stream, stream.start, method)


def _learn(
    setup: Setup,
    model: GrowingNet,
    split: Split,
    stream: Stream,
    drawn: Tensor,
    lr: float,
    wpl: wplfast.WeightPlasticityLoss | None = None,
) -> None:
    """Train on what was drawn with SGD as in the paper, with no momentum from before."""
    more = {"momentum": setup.momentum, "weight_decay": setup.weight_decay, "fused": True}
    optimizer = torch.optim.SGD(model.parameters(), lr, **more)
    for index in drawn.split(setup.batch_size):
        step(model, optimizer, *_gather(split, stream, index), wpl)


def _fisher(model: GrowingNet, split: Split, stream: Stream, index: Tensor, method: str) -> Mapping[str, Tensor] | None:
    """Return F over some samples: exact, so that wrong labels have no say; ones for the plain anchor.

    None where gradients are beyond float32, as in a model that is about to diverge.
    """
    if method == "l2":
        return {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    loader = [_gather(split, stream, part) for part in index.split(_FISHER_BATCH)]
    try:
        return wplfast.fisher_diagonal(model, loader, wplfast.losses.cross_entropy, fisher_type="exact")
    except wplfast.errors.NonFiniteError:
        return None


def _gather(split: Split, stream: Stream, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return images and labels, perhaps wrong ones, of samples of the training part."""
    images = split.train[0]
    return images[index.to(images.device)], stream.labels[index].to(images.device)


@torch.no_grad()
def _evaluate(run: Run, model: GrowingNet, split: Split, stream: Stream, n_classes: int) -> bool:
    """Append the accuracies on all classes so far, unless a logit is not finite; tell whether all were."""
    accuracies = []
    for images, digits in (split.test, split.validation):
        labels = stream.rank.to(digits.device)[digits]
        known = labels < n_classes
        logits = model(images[known])
        if not logits.isfinite().all():
            return False
        accuracies.append(accuracy(logits, labels[known]))
    run.test.append(accuracies[0])
    run.validation.append(accuracies[1])
    return True


def _diverged(run: Run, n_updates: int, done: int) -> Run:
    """Return a run whose numbers are no longer finite: nothing is right from there on."""
    lost = [0.0] * (n_updates + 1 - len(run.test))
    return Run(run.seed, run.test + lost, run.validation + lost, done, True)
