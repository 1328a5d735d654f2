"""Language modelling as a search problem: truncated backpropagation, perplexity as the error, its inverse as reward."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import wplfast

from ..data.digits import DataError
from ..data.text import Files, Text, load_text
from ..harness.options import option, positive
from ..search.problem import Child, Choices, Cover, FisherPass, Problem
from .cells import SharedCells, Sizes, decisions, edges


@dataclass(frozen=True)
class Batches:
    """How the text is cut; the reward is a constant over the perplexity."""

    size: int = option(32, positive, "rows of a minibatch", flag="batch_size")
    length: int = option(16, positive, "words that gradients flow over")
    evaluate: int = option(2, positive, "minibatches that errors are measured on")
    reward: float = 80.0


@dataclass(frozen=True)
class Task:
    """What a problem is made from besides its seed."""

    files: Files = field(default_factory=Files)
    vocabulary: int = option(1000, positive, "words that are kept")
    sizes: Sizes = field(default_factory=Sizes)
    batches: Batches = field(default_factory=Batches)
    device: str = "cpu"
    cover: Cover = "cells"

    def problem(self, seed: int) -> TextProblem:
        """Make the problem of one run; raises DataError if the text cannot be read, or is too short."""
        return TextProblem(self, load_text(self.files, self.vocabulary), seed)


class Stream:
    """The segments of one part of a text, words [L] int64, in order and over again.

    Raises:
        DataError: if there are less than two.
    """

    def __init__(self, words: Tensor, batches: Batches, part: str) -> None:
        """Begin at the first segment."""
        self._rows = words[: len(words) // batches.size * batches.size].view(batches.size, -1)
        self._length = batches.length
        self.count = (self._rows.shape[1] - 1) // batches.length
        self.position = 0
        if self.count < 2:
            needed = batches.size * (2 * batches.length + 1)
            raise DataError(f"the {part} part has {len(words):,} words, expected at least {needed:,}")

    def segment(self, index: int) -> tuple[Tensor, Tensor]:
        """Return words [N, T] and the words that follow them, [N, T]."""
        start, end = index * self._length, (index + 1) * self._length
        return self._rows[:, start:end], self._rows[:, start + 1 : end + 1]

    def next(self) -> tuple[int, tuple[Tensor, Tensor]]:
        """Return the next segment with its index."""
        index, self.position = self.position, (self.position + 1) % self.count
        return index, self.segment(index)


class TextProblem(Problem):
    """Recurrent cells that model text; the seed decides the initial weights, and which minibatches give rewards.

    Beside the cells' edges there are the embedding, the recurrent matrix and biases, which all cells use.
    """

    def __init__(self, task: Task, text: Text, seed: int) -> None:
        """Make the shared weights."""
        super().__init__(task, seed, SharedCells, decisions(task.sizes.blocks))

        def stream(part: str) -> Stream:
            return Stream(text.parts[part].to(task.device), task.batches, part)

        self._train, self._validation, self._test = stream("train"), stream("validation"), stream("test")
        self._fisher = stream("validation")
        self._batches = task.batches
        self._state = self._zero = torch.zeros(task.batches.size, task.sizes.hidden, device=task.device)
        self._generator = torch.Generator().manual_seed(seed)

    def cells(self) -> dict[str, Tensor]:
        """Return the cells' edges."""
        return {name: edge.weight for name, edge in self.model.edges.items()}

    def of_cell(self, choices: Choices) -> list[str]:
        """Return the names of a cell's edges."""
        return [f"{j}-{block}" for j, block in edges(choices)]

    def train_loss(self, choices: Choices) -> Tensor:
        """Return the cross-entropy per word of the next segment; the state is carried over from the last one."""
        index, (words, targets) = self._train.next()
        self.model.train()
        state = self._zero if index == 0 else self._state
        logits, state = self.model(choices, words, state)
        self._state = state.detach()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def fisher_pass(self, choices: Choices) -> FisherPass:
        """Return the next validation segment, with the state that the cell itself reaches on the segment before it."""
        index, (words, targets) = self._fisher.next()
        before, _ = self._fisher.segment((index - 1) % self._fisher.count)
        self.model.eval()
        with torch.no_grad():
            _, state = self.model(choices, before, self._zero)
        loss = partial(wplfast.losses.cross_entropy, token_reduction="mean")
        return FisherPass(Child(self.model, choices), ((words, state), targets), loss)

    def error(self, choices: Choices) -> float:
        """Return the perplexity of the first segments of the validation part."""
        return self._perplexity(choices, self._validation, range(min(self._batches.evaluate, self._validation.count)))

    def reward(self, choices: Choices) -> float:
        """Return c / perplexity of a segment that is drawn at random."""
        index = int(torch.randint(self._validation.count, (), generator=self._generator))
        return self._batches.reward / self._perplexity(choices, self._validation, range(index, index + 1))

    def test_error(self, choices: Choices) -> float:
        """Return the perplexity of the whole test part."""
        return self._perplexity(choices, self._test, range(self._test.count))

    @torch.no_grad()
    def _perplexity(self, choices: Choices, stream: Stream, indices: range) -> float:
        """Return the perplexity of successive segments, from a state of zeros.

        One that exceeds the vocabulary counts as the vocabulary, which is what guessing evenly has: perplexities of
        millions, which a cell has that overshot, would be all that a mean over cells shows.
        """
        self.model.eval()
        state, total = self._zero, self._zero.new_zeros(())
        for index in indices:
            words, targets = stream.segment(index)
            logits, state = self.model(choices, words, state)
            total += F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss = total.item() / len(indices)
        most = math.log(self.model.sizes.vocabulary)
        return math.exp(loss if loss < most else most)  # of NaN too
