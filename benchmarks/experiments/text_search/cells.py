"""Recurrent cells that are cut from one set of shared weights, as in ENAS (Pham et al., arXiv:1802.03268)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness.options import option, positive, several
from ..search.problem import Choices, Decision

_MOST = 25.0  # the largest norm of a hidden state: cells of identities and ReLUs would explode otherwise


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": _identity,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the language models: the number of words, and what the options say.

    Dropped are entries of embedded words and of a cell's output, the same ones at all times, and weights from the last
    hidden state. A cell's output may be normalised before the decoder.
    """

    vocabulary: int = 1000
    hidden: int = option(48, positive, "width of embeddings and hidden states")
    blocks: int = option(4, several, "of a cell")
    dropout_in: float = 0.0
    dropout_out: float = 0.0
    dropout_weight: float = 0.0
    layer_norm: bool = False


def decisions(blocks: int) -> tuple[Decision, ...]:
    """Return what makes up a cell: block 0's activation, then predecessor and activation of each other block."""
    activation = Decision("activation", len(ACTIVATIONS))
    rest = (choice for block in range(1, blocks) for choice in (Decision("predecessor", block), activation))
    return (activation, *rest)


def edges(choices: Choices) -> list[tuple[int, int]]:
    """Return a cell's edges (predecessor, block), in the blocks' order."""
    return [(predecessor, block) for block, predecessor in enumerate(choices[1::2], start=1)]


def describe(choices: Choices) -> str:
    """Render a cell: for each block its activation and its predecessor."""
    names = list(ACTIVATIONS)
    words = [names[choices[0]], *(f"{names[a]}({p})" for p, a in zip(choices[1::2], choices[2::2], strict=True))]
    return " ".join(words)


class SharedCells(nn.Module):
    """One set of weights for all cells of N blocks, between a tied embedding and decoder.

    Block 0 reads the word x and the last hidden state h; block l reads its predecessor j:

        h_l = c * f(W_h h_j) + (1 - c) * h_j,    c = sigmoid(W_c h_j).

    The cell's output, and its next hidden state, is the mean of the blocks that no other block reads. W_c and W_h of
    an edge (j, l) are the halves of one matrix [2 H, H], since they multiply the same vector.
    """

    def __init__(self, sizes: Sizes) -> None:
        """Draw matrices uniformly from [-1/sqrt(H), 1/sqrt(H)], the embedding from [-0.1, 0.1]."""
        super().__init__()
        hidden, self.sizes = sizes.hidden, sizes
        self.embedding = nn.Embedding(sizes.vocabulary, hidden)
        self.bias = nn.Parameter(torch.zeros(sizes.vocabulary))
        self.word = nn.Linear(hidden, 2 * hidden)
        self.state = nn.Linear(hidden, 2 * hidden, bias=False)
        blocks = range(sizes.blocks)
        self.edges = nn.ModuleDict(
            {f"{j}-{block}": nn.Linear(hidden, 2 * hidden, bias=False) for block in blocks for j in range(block)}
        )
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, choices: Choices, words: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run a cell over a segment.

        Args:
            choices: the cell.
            words: [N, T] int64.
            state: [N, H], before the segment.

        Returns:
            Logits [N, T, V] and the state after the segment.
        """
        x = self.word(self._locked(self.embedding(words), self.sizes.dropout_in))
        recurrent = F.dropout(self.state.weight, self.sizes.dropout_weight, self.training)
        steps = [(self.edges[f"{j}-{block}"], j) for j, block in edges(choices)]
        functions = [ACTIVATIONS[name] for name in (list(ACTIVATIONS)[a] for a in choices[::2])]
        loose = sorted(set(range(len(functions))) - {j for _, j in steps})
        outputs = []
        for at_time in x.unbind(1):
            nodes = [_highway(functions[0], at_time + F.linear(state, recurrent), state)]
            for function, (matrix, j) in zip(functions[1:], steps, strict=True):
                nodes.append(_highway(function, matrix(nodes[j]), nodes[j]))
            state = nodes[loose[0]] if len(loose) == 1 else torch.stack([nodes[i] for i in loose]).mean(0)
            state = state * (_MOST / state.norm(dim=1, keepdim=True).clamp_min(_MOST))
            outputs.append(state)
        output = torch.stack(outputs, 1)
        if self.sizes.layer_norm:
            output = F.layer_norm(output, output.shape[2:])
        output = self._locked(output, self.sizes.dropout_out)
        return F.linear(output, self.embedding.weight, self.bias), state

    def _locked(self, x: Tensor, share: float) -> Tensor:
        """Drop the same entries at all times, [N, T, H]."""
        return x * F.dropout(x.new_ones(len(x), 1, x.shape[2]), share) if self.training and share else x


def _highway(function: Callable[[Tensor], Tensor], product: Tensor, source: Tensor) -> Tensor:
    """Return ``c * f(.) + (1 - c) * source`` of a product [N, 2 H] that holds c's logits and f's argument."""
    gate, candidate = product.chunk(2, 1)
    return torch.lerp(source, function(candidate), torch.sigmoid(gate))
