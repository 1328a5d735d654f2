"""A small language model is trained on one text; its adapters then learn a row of domains, with one arm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wplfast

from ..data.digits import Part, Split
from ..data.domains import load_domains, split_windows
from ..harness.options import option, positive, strength
from ..row import training
from ..row.arms import Setting, importance
from ..row.training import Curve, Run, epochs
from .model import Model

State = dict[str, Any]  # parameters by name, as NumPy's arrays, which travel between processes as they are


@dataclass(frozen=True)
class Setup:
    """Settings that all arms have in common: every domain is learnt with a fresh Adam at one rate."""

    data: str | None = option(
        None,
        str,
        "folder with three or more .txt files: what the model is trained on first, and after it the domains, by name;"
        " default: texts that come with Python, scikit-learn and PyTorch",
        metavar="DIR",
    )
    device: str = "cpu"
    base_size: int = option(400_000, positive, "bytes of the text that the model is trained on first")
    size: int = option(32_000, positive, "bytes of each domain")
    length: int = option(64, positive, "bytes of a window, which is a sample")
    width: int = option(64, positive, "of the model")
    depth: int = option(3, positive, "blocks of the model")
    heads: int = option(4, positive, "of attention; they divide the width")
    rank: int = option(4, positive, "of the adapters of all linear layers in the blocks")
    base_epochs: int = option(2, positive, "of that text, in which all but the adapters learn")
    base_batch_size: int = option(16, positive, "windows at once, likewise")
    base_lr: float = option(0.003, strength, "Adam's rate for it")
    epochs: int = option(2, positive, "of each domain")
    batch_size: int = option(8, positive, "of the domains' training, in windows")
    lr: float = option(0.005, strength, "Adam's rate for the adapters")
    fisher_windows: int = option(256, positive, "of the domain's training part that F is estimated on")


@dataclass(frozen=True)
class Start:
    """What all arms of a seed begin with.

    Attributes:
        seed: of everything.
        base: the model after the first text, with adapters that do nothing yet.
        learnt: the adapters after the first domain.
        curve: of the first domain.
        base_bits: bits per byte of the base model, on the held-out part of its own text and on each domain's.
        mean_f: the mean of F after the first domain, by arm.
    """

    seed: int
    base: State = field(repr=False)
    learnt: State = field(repr=False)
    curve: Curve = field(repr=False)
    base_bits: list[float] = field(repr=False)
    mean_f: dict[str, float] = field(repr=False)


class Course:
    """The domains of one seed, and the model whose adapters learn them; see :class:`..row.training.Course`."""

    def __init__(self, setup: Setup, seed: int, start: Start | None = None) -> None:
        self.setup, self.seed, self.start = setup, seed, start
        self.tasks = domains(setup, seed)

    def begin(self) -> Model:
        """Return the base model with adapters that do nothing yet."""
        assert self.start is not None
        return loaded(model_of(self.setup, self.seed), self.start.base).train_adapters(True)

    def first(self) -> tuple[Model, Curve]:
        """Return the model after the first domain, and its curve."""
        assert self.start is not None
        return loaded(self.begin(), self.start.learnt), self.start.curve

    def parts(self, model: nn.Module) -> list[nn.Module]:
        """Return the blocks, whose adapters may be frozen."""
        return list(model.blocks)

    def importance(self, arm: str, model: nn.Module, part: Part) -> Mapping[str, Tensor]:
        """Return an arm's F of a domain's training data; a sample is a window, its loss the sum over bytes."""
        few = part[0][: self.setup.fisher_windows], part[1][: self.setup.fisher_windows]
        return importance(arm, model, few, self.seed, wplfast.losses.cross_entropy, self.setup.batch_size)

    def learn(self, model: nn.Module, part: Part, seed: int, wpl: wplfast.WeightPlasticityLoss | None = None) -> Curve:
        """Learn some text; return the bits per byte of every domain's test part after each epoch."""
        setup = self.setup
        sizes = (setup.epochs, setup.batch_size, setup.lr)
        return [self.scores(model, "test") for _ in epochs(model, part, sizes, seed, per_byte, wpl)]

    def scores(self, model: nn.Module, part: str) -> list[float]:
        """Return the bits per byte of a part of each domain's text."""
        return [bits(model, getattr(task, part)) for task in self.tasks]


def start(job: tuple[Setup, int, tuple[str, ...]]) -> Start:
    """Train the base model and learn the first domain.

    Args:
        job: the settings, the seed, and the arms whose mean F is told.
    """
    setup, seed, arms = job
    text = split_windows(load_domains(setup.data, setup.base_size, setup.size)[0], setup.length, seed).to(setup.device)
    model = model_of(setup, seed).train_adapters(False)
    sizes = (setup.base_epochs, setup.base_batch_size, setup.base_lr)
    for _ in epochs(model, text.train, sizes, seed, per_byte):
        pass
    model.train_adapters(True)
    course = Course(setup, seed)
    base, base_bits = state_of(model), [bits(model, text.test), *course.scores(model, "test")]
    curve = course.learn(model, course.tasks[0].train, seed)
    found = {arm: course.importance(arm, model, course.tasks[0].train) for arm in arms}
    mean_f = {arm: torch.cat([value.flatten() for value in f.values()]).mean().item() for arm, f in found.items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    learnt = {name: value for name, value in state_of(model).items() if name in trained}
    return Start(seed, base, learnt, curve, base_bits, mean_f)


def run(job: tuple[Setup, Start, str, Setting]) -> Run:
    """Learn all domains with one arm.

    Args:
        job: the settings, what all arms of a seed begin with, the arm, and its setting.
    """
    setup, begun, arm, setting = job
    return training.run(Course(setup, begun.seed, begun), arm, setting)


def domains(setup: Setup, seed: int) -> list[Split]:
    """Return the domains' windows, dealt out by the seed."""
    row = load_domains(setup.data, setup.base_size, setup.size)[1:]
    return [split_windows(domain, setup.length, seed).to(setup.device) for domain in row]


def model_of(setup: Setup, seed: int) -> Model:
    """Build the model; the seed decides all initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(setup.width, setup.depth, setup.heads, setup.rank, setup.length).to(setup.device)


def state_of(model: nn.Module) -> State:
    """Return a copy of all parameters."""
    return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}


def loaded(model: Model, state: State) -> Model:
    """Put parameters into a model."""
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=False)
    return model


def per_byte(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of all bytes, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def bits(model: nn.Module, part: Part, at_once: int = 64) -> float:
    """Return the bits per byte of some windows."""
    pairs = zip(part[0].split(at_once), part[1].split(at_once), strict=True)
    nats = sum(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item() for x, y in pairs)
    return nats / part[1].numel() / math.log(2)
