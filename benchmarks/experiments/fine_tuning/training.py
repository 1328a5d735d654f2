"""One run: a model is trained on the start, then fine-tuned on each update set, warm, with or without a penalty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

import wplfast

from ..data.digits import Split, load_split
from ..harness.training import accuracy, step
from .model import GrowingNet
from .settings import UNCHANGED, Arm, Condition, Run, Setup
from .stream import N_CLASSES, Stream, draw, make_stream, remembered

Penalty: TypeAlias = wplfast.WeightPlasticityLoss
_FISHER_BATCH = 512  # F does not depend on it; small update sets are one batch


def train(job: tuple[Setup, Condition, Arm, int]) -> Run:
    """Run one condition with one arm and one seed.

    After each update set, the penalty's F becomes the mean over all samples so far, by the running rule: the new
    samples' F enters at their share. It is anchored where the model is then. No old data are needed for it.

    Args:
        job: settings, condition, arm, seed.
    """
    setup, condition, arm, seed = job
    stream = _stream(setup, condition.scenario, condition.noise, seed)
    model, wpl = _started(setup, condition.scenario, arm, seed)
    generator = torch.Generator().manual_seed(seed)
    points = [_accuracies(model, stream, stream.start_classes)]
    seen, done, diverged = stream.start, 0, True
    for update in stream.updates:
        if arm.method != UNCHANGED:
            if model.grow(update.n_classes) and wpl is not None:
                wpl.rebind(model)  # the old classes keep their anchor
            old = seen if condition.memory is None else remembered(seen, stream.labels, stream.key, condition.memory)
            count = iterations(condition, len(old) + len(update.index), setup.batch_size)
            drawn = draw(old, update.index, condition.share_old, count * setup.batch_size, generator)
            _learn(setup, model, stream, drawn, arm.lr, wpl)
            done += count
        point = _accuracies(model, stream, update.n_classes)
        if point is None:
            break
        points.append(point)
        if wpl is not None:
            fisher = _fisher(model, stream, update.index, arm.method)
            if fisher is None:
                break
            wpl.update(fisher, rate=len(update.index) / (len(seen) + len(update.index)))
        seen = torch.cat((seen, update.index))
    else:
        diverged = False
    lost = [(0.0, 0.0)] * (len(stream.updates) + 1 - len(points))  # nothing is right where numbers are not finite
    test, validation = (list(curve) for curve in zip(*points, *lost, strict=True))
    return Run(seed, test, validation, done, diverged)


def iterations(condition: Condition, n_samples: int, batch_size: int) -> int:
    """Return the number of SGD steps of an update: as given, or a share of an epoch of the data in reach."""
    if condition.unit == "iterations":
        return int(condition.steps)
    return max(1, math.ceil(condition.steps * n_samples / batch_size - 0.5))


@lru_cache(maxsize=2)
def _split(setup: Setup, seed: int) -> Split:
    """Return the parts of the data, on the device; jobs come ordered by seed."""
    return load_split(setup.data, seed).to(setup.device)


def _stream(setup: Setup, scenario: str, noise: float, seed: int) -> Stream:
    """Return what arrives."""
    return make_stream(_split(setup, seed), scenario, setup.sizes, noise, setup.n_updates, seed, setup.n_others)


def _started(setup: Setup, scenario: str, arm: Arm, seed: int) -> tuple[GrowingNet, Penalty | None]:
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
    """Return the model that was trained on the start: copy it before you change it.

    It begins with the features of other classes, if there are any to learn before; its head is new.
    """
    stream = _stream(setup, scenario, 0.0, seed)
    model = _new(setup, stream, seed)
    if setup.n_others and setup.pretraining:
        model.features = _pretrained(setup, scenario, seed)[0].features
    _teach(setup, model, stream, setup.start_iterations, seed)
    return model


def pretrained_accuracy(job: tuple[Setup, str, int]) -> float:
    """Return the test accuracy, on the classes that never arrive, of the model whose features the start begins with.

    Args:
        job: settings, scenario, seed.
    """
    setup, scenario, seed = job
    accuracies = _accuracies(*_pretrained(setup, scenario, seed), setup.n_others)
    return 0.0 if accuracies is None else accuracies[0]


def _pretrained(setup: Setup, scenario: str, seed: int) -> tuple[GrowingNet, Stream]:
    """Return a model that was trained on all samples of the classes that never arrive, and the stream for it.

    In that stream these classes have the first numbers, and all their samples are the start.
    """
    stream = _stream(setup, scenario, 0.0, seed)
    rank, labels = ((numbers + setup.n_others) % N_CLASSES for numbers in (stream.rank, stream.labels))
    start = (labels < setup.n_others).nonzero().flatten()
    stream = stream._replace(rank=rank, labels=labels, start=start, start_classes=setup.n_others)
    model = _new(setup, stream, seed)
    _teach(setup, model, stream, setup.pretraining, seed)
    return model, stream


def _new(setup: Setup, stream: Stream, seed: int) -> GrowingNet:
    """Return an untrained model of the classes of a stream's start."""
    return GrowingNet(setup.model, *stream.split.shape, stream.start_classes, setup.width, seed).to(setup.device)


def _teach(setup: Setup, model: GrowingNet, stream: Stream, iterations: int, seed: int) -> None:
    """Train a model on a stream's start."""
    n, generator = iterations * setup.batch_size, torch.Generator().manual_seed(seed)
    _learn(setup, model, stream, draw(stream.start, stream.start[:0], 1.0, n, generator), setup.lr_start, None)


@lru_cache(maxsize=64)
def _start_fisher(setup: Setup, scenario: str, method: str, seed: int) -> Mapping[str, Tensor] | None:
    """Return the start's F; a process computes it once."""
    stream = _stream(setup, scenario, 0.0, seed)
    return _fisher(_start(setup, scenario, seed), stream, stream.start, method)


def _learn(setup: Setup, model: GrowingNet, stream: Stream, drawn: Tensor, lr: float, wpl: Penalty | None) -> None:
    """Train on what was drawn with SGD as in the paper, with no momentum from before."""
    more = {"momentum": setup.momentum, "weight_decay": setup.weight_decay, "fused": True}
    optimizer = torch.optim.SGD(model.parameters(), lr, **more)
    for index in drawn.split(setup.batch_size):
        step(model, optimizer, *stream.samples(index), wpl)


def _fisher(model: GrowingNet, stream: Stream, index: Tensor, method: str) -> Mapping[str, Tensor] | None:
    """Return F over some samples: exact, so that wrong labels have no say; ones for the plain anchor.

    None where gradients are beyond float32, as in a model that is about to diverge.
    """
    if method == "l2":
        return {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    loader = [stream.samples(part) for part in index.split(_FISHER_BATCH)]
    try:
        return wplfast.fisher_diagonal(model, loader, wplfast.losses.cross_entropy, fisher_type="exact")
    except wplfast.errors.NonFiniteError:
        return None


@torch.no_grad()
def _accuracies(model: GrowingNet, stream: Stream, n_classes: int) -> list[float] | None:
    """Return the accuracies on all classes so far, test and validation, or None if a logit is not finite."""
    accuracies = []
    for images, digits in (stream.split.test, stream.split.validation):
        labels = stream.rank.to(digits.device)[digits]
        known = labels < n_classes
        logits = model(images[known])
        if not logits.isfinite().all():
            return None
        accuracies.append(accuracy(logits, labels[known]))
    return accuracies
