"""An RNN search in the shape of the reference repository's trainer, with its WPLModule replaced."""

from __future__ import annotations

import collections
import random
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from wplfast.integrations.reference import WPLModule

Node = collections.namedtuple("Node", ["id", "name"])
ACTIVATIONS = {"tanh": torch.tanh, "relu": F.relu, "sigmoid": torch.sigmoid, "identity": lambda x: x}


def dag_to_keys(dag, n_blocks: int) -> list[str]:
    return [f"{i}-{node.id}-{kind}" for i in range(n_blocks) for node in dag[i] if node.id < n_blocks for kind in "hc"]


def sample(generator: random.Random, n_blocks: int):
    """A random cell: a chain, so that all cells share their weights, with an activation for each node."""
    dag = collections.defaultdict(list)
    dag[-1] = [Node(0, "tanh")]
    for j in range(1, n_blocks):
        dag[j - 1].append(Node(j, generator.choice(list(ACTIVATIONS))))
    dag[n_blocks - 1] = [Node(n_blocks, "avg")]
    return dag


class RNN(WPLModule):
    """A shared model of all cells: a linear layer and a gate for every pair of nodes; time comes first."""

    def __init__(self, args) -> None:
        super().__init__(args)
        size = args.hidden
        self.encoder, self.decoder = nn.Embedding(args.vocabulary, size), nn.Linear(size, args.vocabulary)
        self.dropout = nn.Dropout(0.1)
        self.w_xc, self.w_xh = nn.Linear(size, size), nn.Linear(size, size)
        self.w_hc, self.w_hh = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.connections = {
            f"{i}-{j}-{kind}": nn.Linear(size, size, bias=False)
            for i in range(args.n_blocks)
            for j in range(i + 1, args.n_blocks)
            for kind in "hc"
        }
        self.registered = nn.ModuleList(self.connections.values())
        self.wpl_monitored_modules = self.connections  # and, as there, init_wpl_weights is not called

    def forward(self, inputs, dag):
        h = torch.zeros(inputs.shape[1], self.args.hidden)
        outputs = []
        for x in self.dropout(self.encoder(inputs)):
            output, h = self.cell(x, h, dag)
            outputs.append(output)
        return self.decoder(self.dropout(torch.stack(outputs)))

    def cell(self, x, h_prev, dag):
        gate = torch.sigmoid(self.w_xc(x) + self.w_hc(h_prev))
        h = {0: gate * torch.tanh(self.w_xh(x) + self.w_hh(h_prev)) + (1 - gate) * h_prev}
        leaves = []
        for i in range(self.args.n_blocks):
            for node in dag[i]:
                if node.id == self.args.n_blocks:
                    leaves.append(h[i])
                    continue
                gate = torch.sigmoid(self.connections[f"{i}-{node.id}-c"](h[i]))
                new = ACTIVATIONS[node.name](self.connections[f"{i}-{node.id}-h"](h[i]))
                h[node.id] = gate * new + (1 - gate) * h[i]
        return torch.stack(leaves, 2).mean(-1), h[self.args.n_blocks - 1]

    def update_fisher(self, dag, epoch=0):
        return super().update_fisher(dag_to_keys(dag, self.args.n_blocks), epoch=epoch)

    def compute_weight_plastic_loss_with_update_fisher(self, dag):
        return super().compute_weight_plastic_loss_with_update_fisher(dag_to_keys(dag, self.args.n_blocks))


def corpus(vocabulary: int, length: int) -> torch.Tensor:
    """Text whose next token mostly follows from the two before it."""
    generator = torch.Generator().manual_seed(3)
    following = torch.randint(0, vocabulary, (vocabulary, vocabulary), generator=generator)
    noise = torch.rand(length, generator=generator) < 0.15
    other = torch.randint(0, vocabulary, (length,), generator=generator)
    text = [0, 1]
    for n in range(2, length):
        text.append(int(other[n]) if noise[n] else int(following[text[-2], text[-1]]))
    return torch.tensor(text)


def losses_of(output, targets):
    """One loss per sequence: the mean over its tokens."""
    return F.cross_entropy(output.permute(1, 2, 0), targets.t(), reduction="none").mean(1)


def search(alpha: float, seed: int, epochs: int = 2, cells: int = 4, batches: int = 30) -> tuple[float, float]:
    """Train cells in turn; return by how much their validation loss has risen by the end of the epoch, and its mean."""
    args = SimpleNamespace(
        n_blocks=3, hidden=20, vocabulary=8, start_using_fisher=1, shared_grad_clip=0.25,
        alpha_fisher=alpha, lambda_fisher=0.9, momentum=True, fisher_clip_by_norm=10.0,
        alpha_decay=1.0, alpha_decay_after=15.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    controller = random.Random(seed)
    shared = RNN(args)
    optimizer = torch.optim.SGD(shared.parameters(), lr=10.0)
    text = corpus(args.vocabulary, 12_000)
    rows = text[: 16 * (len(text) // 16)].view(16, -1).t()  # [time, 16]
    train, valid = rows[:600], rows[600:]
    place = 0

    def batch(data, start, length=8):
        return data[start : start + length], data[start + 1 : start + length + 1]

    def validate(dag) -> float:
        shared.eval()
        with torch.no_grad():
            inputs, targets = batch(valid, 0, 100)
            value = losses_of(shared(inputs, dag), targets).mean().item()
        shared.train()
        return value

    rises, finals = [], []
    for epoch in range(epochs):
        compute_fisher = alpha > 0 and epoch >= args.start_using_fisher
        shared.set_fisher_zero()
        just_trained, dags = [], []
        for step in range(cells):
            dag = sample(controller, args.n_blocks)
            dags.append(dag)
            for _ in range(batches):
                inputs, targets = batch(train, place)
                place = (place + 8) % (len(train) - 9)
                loss = losses_of(shared(inputs, dag), targets).mean()
                if compute_fisher:
                    loss = loss + 0.5 * shared.compute_weight_plastic_loss_with_update_fisher(dag)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(shared.parameters(), args.shared_grad_clip)
                optimizer.step()
            if compute_fisher:
                inputs, targets = batch(valid, 20 * step)
                with shared.fisher_pass() as accumulator:
                    accumulator.backward(losses_of(shared(inputs, dag), targets))
                shared.update_fisher(dag, epoch)
                shared.update_optimal_weights()
            just_trained.append(validate(dag))
        after = [validate(dag) for dag in dags]
        if epoch >= args.start_using_fisher:
            rises += [now - then for now, then in zip(after, just_trained, strict=True)]
            finals += after
    return sum(rises) / len(rises), sum(finals) / len(finals)


def test_search_forgets_less():
    without, with_penalty = search(0.0, seed=1), search(60.0, seed=1)
    print(
        f"loss rises by {without[0]:.4f} without, {with_penalty[0]:.4f} with; {without[1]:.3f}, {with_penalty[1]:.3f}"
    )
    assert with_penalty[0] < without[0]
