"""``WPLPlugin`` in Avalanche's strategies on SplitDigits: ``EWCPlugin`` at batches of one sample, and right at all."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from oracle import assert_close, fisher_loop
from sklearn.datasets import load_digits
from test_examples import EXAMPLES, run
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

STUBS = Path(__file__).parent / "stubs"
sys.path.insert(0, str(STUBS))
from absent import stood_in  # noqa: E402

with stood_in():
    from avalanche.benchmarks import nc_benchmark
    from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
    from avalanche.models import DynamicModule, IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
    from avalanche.models.utils import avalanche_forward
    from avalanche.training.plugins import EWCPlugin
    from avalanche.training.supervised import LwF, Naive, Replay

    from wplfast.integrations.avalanche import WPLPlugin


class Digits(TensorDataset):
    """Samples as Avalanche's data sets have them: a tensor and a number."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        super().__init__(x, y)
        self.targets = y.tolist()

    def __getitem__(self, index):
        return self.tensors[0][index], self.targets[index]


def split_digits(task_labels: bool, per_class: int = 6, from_zero: bool | None = None, n_experiences: int = 3):
    """SplitDigits: scikit-learn's digits, two classes an experience, from Avalanche's generator of benchmarks."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    n_classes = 2 * n_experiences
    places = [(y == label).nonzero()[:, 0] for label in range(n_classes)]
    train = torch.cat([place[:per_class] for place in places])
    later = torch.cat([place[per_class : per_class + 20] for place in places])
    sets = Digits(x[train], y[train]), Digits(x[later], y[later])
    from_zero = task_labels if from_zero is None else from_zero
    options = {"task_labels": task_labels, "class_ids_from_zero_in_each_exp": from_zero}
    return nc_benchmark(*sets, n_experiences, shuffle=False, **options)


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(64, 8), IncrementalClassifier(8)

    def forward(self, x):
        return self.head(torch.tanh(self.trunk(x)))


class MultiHead(MultiTaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(64, 8), MultiHeadClassifier(8)

    def forward(self, x, task_labels):
        return self.head(torch.tanh(self.trunk(x)), task_labels)


class Lateral(DynamicModule):
    """A module in the middle that gets another part in each experience."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()

    def adaptation(self, experience):
        if self.training:
            self.parts[str(experience.current_experience)] = nn.Linear(8, 8)

    def forward(self, x):
        return x + sum(part(x) for part in self.parts.values())


class Joining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.lateral, self.head = nn.Linear(64, 8), Lateral(), nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.lateral(torch.tanh(self.trunk(x))))


HEADS = {
    "single": lambda: nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 6)),
    "growing": Growing,
    "multi": MultiHead,
    "joining": Joining,
}


def strategy_of(head, plugin, size=1, strategy=Naive, optimizer=torch.optim.SGD, lr=0.05, **options):
    torch.manual_seed(0)
    model = HEADS[head]()
    return strategy(
        model=model,
        optimizer=optimizer(model.parameters(), lr=lr),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=size,
        plugins=[] if plugin is None else [plugin],
        evaluator=None,
        **options,
    )


def train(strategy, experiences) -> None:
    for experience in experiences:
        torch.manual_seed(experience.current_experience)  # EWCPlugin's loader draws a random number
        strategy.train(experience)


def data_of(kept) -> dict[tuple[int, str], torch.Tensor]:
    return {(t, name): entry.data for t, entries in kept.items() for name, entry in entries.items()}


WAYS = {
    "separate": {"mode": "separate"},
    "online": {"mode": "online", "decay_factor": 0.7},
    "online, all kept": {"mode": "online", "decay_factor": 0.7, "keep_importance_data": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head", ["single", "growing", "multi"])
def test_equals_ewc_at_batches_of_one(head, way):
    experiences = list(split_digits(head == "multi").train_stream)
    plugins = EWCPlugin(5.0, **WAYS[way]), WPLPlugin(5.0, **WAYS[way])
    strategies = [strategy_of(head, plugin) for plugin in plugins]
    for strategy in strategies:
        train(strategy, experiences)
    for what in ("importances", "saved_params"):
        expected, found = (data_of(getattr(plugin, what)) for plugin in plugins)
        assert list(expected) == list(found)
        for (t, name), tensor in expected.items():
            own = found[t, name]  # EWCPlugin pads in place what it keeps of a head that grew, with zeros
            padded = torch.zeros_like(tensor)
            padded[tuple(slice(size) for size in own.shape)] = own
            torch.testing.assert_close(padded, tensor, rtol=1e-3, atol=1e-5)
    for p, q in zip(*(strategy.model.parameters() for strategy in strategies), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    # The penalty alone, of the same state.
    theirs, ours = plugins
    theirs.importances, theirs.saved_params = copy.deepcopy((ours.importances, ours.saved_params))
    strategy = strategies[1]
    with torch.no_grad():
        for p in strategy.model.parameters():
            p.add_(0.1)
    values = []
    for plugin in plugins:
        strategy.loss = torch.zeros(())
        plugin.before_backward(strategy)
        gradients = torch.autograd.grad(strategy.loss, list(strategy.model.parameters()), allow_unused=True)
        values.append([strategy.loss.detach(), *gradients])
    for p, q in zip(*values, strict=True):
        torch.testing.assert_close(torch.zeros_like(q) if p is None else p, q, rtol=1e-5, atol=1e-7)
    assert values[0][0] > 0


@pytest.mark.parametrize("head", ["single", "growing", "multi"])
def test_fisher_is_right_at_any_batch_size(head):
    experience = split_digits(head == "multi").train_stream[0]
    ours, theirs = WPLPlugin(1.0), EWCPlugin(1.0)
    for plugin in (ours, theirs):
        strategy = strategy_of(head, plugin, size=5)
        train(strategy, [experience])
    model = strategy.model
    samples = [experience.dataset[i] for i in range(len(experience.dataset))]
    x, y, t = torch.stack([s[0] for s in samples]), *(torch.tensor([s[i] for s in samples]) for i in (1, 2))

    class AsOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x):
            return avalanche_forward(self.model, x, t[: len(x)])

    model.zero_grad()
    double = head != "multi"  # whose forward pass writes into a float32 tensor
    expected = fisher_loop(AsOne(), [(x, y)], lambda out, y: F.cross_entropy(out, y, reduction="none"), double=double)
    found = {f"model.{name}": entry.data for name, entry in ours.importances[0].items()}
    assert_close(found, expected, rtol=1e-4, model_rtol=1e-5)
    batched = torch.cat([entry.data.flatten() for entry in theirs.importances[0].values()])
    assert batched.sum() < 0.9 * torch.cat([f.flatten() for f in expected.values()]).sum()


def test_parameters_that_join_in_the_middle():
    """Which stop EWCPlugin in mode "online": it compares the order of names."""
    experiences = list(split_digits(False).train_stream)
    plugin = WPLPlugin(5.0, "online", 0.7)
    strategy = strategy_of("joining", plugin, size=4)
    train(strategy, experiences)
    assert set(plugin.importances[2]) == {name for name, _ in strategy.model.named_parameters()}
    assert plugin.wpl.n_anchors == 1
    for name, entry in plugin.importances[2].items():
        torch.testing.assert_close(plugin.wpl.fisher[name], entry.data)
    with pytest.raises(AssertionError, match="Error in importance computation"):
        train(strategy_of("joining", EWCPlugin(5.0, "online", 0.7), size=4), experiences)


def accuracies(strategy, stream) -> list[float]:
    """Accuracy on each experience's test data."""
    found = []
    strategy.model.eval()
    for experience in stream:
        samples = [experience.dataset[i] for i in range(len(experience.dataset))]
        x, y, t = torch.stack([s[0] for s in samples]), *(torch.tensor([s[i] for s in samples]) for i in (1, 2))
        with torch.no_grad():
            found.append((avalanche_forward(strategy.model, x, t).argmax(1) == y).float().mean().item())
    return found


STRATEGIES = {
    "Naive": (Naive, {}),
    "Replay": (Replay, {"mem_size": 6}),
    "LwF": (LwF, {"alpha": 0.5, "temperature": 2.0}),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_forget_less(name):
    """All experiences share two outputs; forgetting is what accuracy falls by after an experience's own training."""
    benchmark = split_digits(False, per_class=40, from_zero=True)
    kind, options = STRATEGIES[name]
    adam = {"optimizer": torch.optim.Adam, "lr": 0.02, "train_epochs": 10}
    forgotten = []
    for plugin in (None, WPLPlugin(1000.0)):
        strategy = strategy_of("single", plugin, size=16, strategy=kind, **adam, **options)
        history = []
        for experience in benchmark.train_stream:
            train(strategy, [experience])
            history.append(accuracies(strategy, benchmark.test_stream[: len(history) + 1]))
        forgotten.append(sum(history[t][t] - history[-1][t] for t in range(2)) / 2)
    print(f"{name}: forgetting without {forgotten[0]:.3f}, with {forgotten[1]:.3f}")
    assert forgotten[1] < forgotten[0]


@pytest.mark.parametrize("head", ["growing", "multi"])
def test_checkpoints(head, tmp_path, monkeypatch):
    """A strategy that is loaded goes on with the same bits."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # Avalanche 0.6 loads as torch 2.5 did
    # dill takes a module for an attribute of its package, and torch.optim deletes those.
    monkeypatch.setattr(torch.optim, "sgd", sys.modules["torch.optim.sgd"], raising=False)
    experiences = list(split_digits(head == "multi").train_stream)
    whole = strategy_of(head, WPLPlugin(5.0, verify=False), size=4)
    train(whole, experiences[:2])
    save_checkpoint(whole, tmp_path / "strategy.pkl")
    train(whole, experiences[2:])
    loaded, start = maybe_load_checkpoint(strategy_of(head, WPLPlugin(5.0), size=4), tmp_path / "strategy.pkl")
    assert start == 2
    train(loaded, experiences[start:])
    for p, q in zip(whole.model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(p, q)
    (plugin,) = [plugin for plugin in loaded.plugins if isinstance(plugin, WPLPlugin)]
    assert plugin.wpl.n_anchors == 3


def test_evaluation_that_grows_the_head_while_training():
    """Avalanche adapts the model to what it is evaluated on, between two steps."""
    benchmark = split_digits(False)
    plugin = WPLPlugin(5.0)
    strategy = strategy_of("growing", plugin, size=4, eval_every=1, train_epochs=2)
    for experience in benchmark.train_stream[:2]:
        strategy.train(experience, eval_streams=[benchmark.test_stream])
    assert plugin.wpl.fisher["head.classifier.weight"].shape == (6, 8)


def test_options():
    experience = split_digits(False).train_stream[0]
    plugin = WPLPlugin(1.0, fisher_type="exact", max_samples=10)
    strategy = strategy_of("single", plugin, size=4)
    strategy.model[0].weight.requires_grad_(False)
    train(strategy, [experience])
    assert not plugin.importances[0]["0.weight"].data.any()
    assert plugin.importances[0]["2.weight"].data.any()
    assert "0.weight" not in plugin.wpl.fisher
    strategy.loss = torch.zeros(())
    with torch.no_grad():
        strategy.model[2].weight.add_(1)
    plugin.before_backward(strategy)
    once = strategy.loss
    plugin.ewc_lambda, strategy.loss = 3.0, torch.zeros(())
    plugin.before_backward(strategy)
    torch.testing.assert_close(strategy.loss, 3 * once)
    with pytest.raises(TypeError, match="params is not an option"):
        WPLPlugin(1.0, params=strategy.model)
    with pytest.raises(AssertionError, match="decay_factor"):
        WPLPlugin(1.0, "online")
    own = WPLPlugin(1.0, loss_fn=lambda outputs, y: 2 * F.cross_entropy(outputs, y, reduction="none"))
    plain = WPLPlugin(1.0)
    for one in (own, plain):
        train(strategy_of("single", one, size=4), [experience])
    torch.testing.assert_close(own.wpl.fisher["0.weight"], 4 * plain.wpl.fisher["0.weight"])


def test_example(tmp_path):
    paths = os.pathsep.join([str(STUBS), str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    forgotten = run(EXAMPLES / "avalanche_split_digits.py", tmp_path, PYTHONPATH=paths)
    assert forgotten["with"] < forgotten["without"]
