"""The search over convolution cells, tiny: cells by hand, what they use, their Fisher; damaged CIFAR-10 files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

import wplfast
from benchmarks.experiments.data.digits import DataError, Split
from benchmarks.experiments.data.images import load_images, read_cifar
from benchmarks.experiments.image_search import __main__ as image_search
from benchmarks.experiments.image_search.cells import SharedCells, Sizes, decisions, describe, edges
from benchmarks.experiments.image_search.problem import Batches, ImageProblem, Task
from benchmarks.experiments.search import report
from benchmarks.experiments.search.controller import Policy
from benchmarks.experiments.search.loop import Setup, search
from benchmarks.experiments.search.penalty import Schedule

# Node 2: sep3 of input 0 and max3 of input 1; node 3: sep5 of node 2 and identity of input 0. Only node 3 is loose.
CELL = (0, 0, 1, 3, 2, 1, 0, 4)
POOLS = (0, 2, 1, 3, 0, 4, 1, 4)  # no weights at all
SIZES = Sizes(1, channels=8, nodes=2, cells=2, stages=2, classes=10)
TINY = ("--epochs", "3", "--start", "1", "--architectures", "2", "--minibatches", "2", "--controller-steps", "2")
TINY += ("--seeds", "1", "--lr", "0.05", "--alpha", "0.1", "1", "--channels", "4", "--nodes", "2", "--batch-size", "8")
TINY += ("--evaluate", "20", "--workers", "0")


pytestmark = pytest.mark.usefixtures("one_thread")


def problem(batch=8, cover="used"):
    generator = torch.Generator().manual_seed(1)
    parts = [
        (torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator))
        for n in (40, 20, 20)
    ]
    return ImageProblem(Task(None, SIZES, Batches(batch, 20), cover=cover), Split(*parts, name="noise"), 0)


def test_decisions_and_edges_of_a_cell():
    assert [(d.kind[0], d.options) for d in decisions(2)] == [("i", 2), ("o", 5)] * 2 + [("i", 3), ("o", 5)] * 2
    assert edges(CELL) == [(0, 0, "sep3"), (0, 1, "max3"), (1, 2, "sep5"), (1, 0, "identity")]
    assert describe(CELL) == "sep3(0)+max3(1) sep5(2)+identity(0)"


def test_network_by_hand():
    torch.manual_seed(0)
    cells = SharedCells(SIZES)
    images = torch.randn(3, 1, 8, 8)
    last = current = cells.stem(images)
    for cell in range(2):
        if cell == 1:
            last, current = F.avg_pool2d(last, 2), F.avg_pool2d(current, 2)
        node2 = cells.operations[f"{cell}-0-0-sep3"](last) + F.max_pool2d(current, 3, 1, 1)
        node3 = cells.operations[f"{cell}-1-2-sep5"](node2) + last
        last, current = current, F.group_norm(node3, 2)
    torch.testing.assert_close(cells(CELL, images), cells.head(current.relu().mean((2, 3))))


def test_samples_do_not_mix():
    cells, images = SharedCells(SIZES), torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(cells(CELL, images)[1:2], cells(CELL, images[1:2]))


def test_the_penalty_covers_what_all_architectures_use():
    cells, used = problem(cover="cells"), problem()
    common = {"stem.0.weight", "stem.1.weight", "stem.1.bias", "head.weight", "head.bias"}
    assert used.weights.keys() - cells.weights.keys() == common == set(used.active(POOLS))
    assert {id(weight) for weight in used.weights.values()} == {id(p) for p in used.model.parameters()}
    used.train_loss(CELL).backward()
    assert {name for name, weight in used.weights.items() if weight.grad is not None} == set(used.active(CELL))


def test_only_operations_in_use_get_gradients():
    one = problem(cover="cells")
    one.train_loss(CELL).backward()
    used = {name for name, weight in one.weights.items() if weight.grad is not None}
    assert used == set(one.active(CELL))
    assert {name.split(".")[0] for name in used} == {
        f"{cell}-{key}" for cell in "01" for key in ("0-0-sep3", "1-2-sep5")
    }
    assert one.active(POOLS) == []
    passing = (0, 0, 0, 3, 2, 1, 0, 4)  # reads input 0 alone: the last cell takes the first convolution's output
    one.model.zero_grad()
    one.train_loss(passing).backward()
    assert {name for name, weight in one.weights.items() if weight.grad is not None} == set(one.active(passing))
    assert {name[0] for name in one.active(passing)} == {"1"}
    twice = (0, 0, 0, 0, 1, 4, 1, 4)  # one operation on one input, two times: listed once
    assert len(one.active(twice)) == len(set(one.active(twice))) == 2 * 4


def test_fisher_of_a_cell_is_that_of_single_samples():
    one = problem()
    given = one.fisher_pass(CELL)
    images, labels = given.batch
    weights = {name: one.weights[name] for name in one.active(CELL)}
    found = wplfast.fisher_diagonal(given.model, [given.batch], given.loss_fn, params=weights)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for n in range(len(images)):
        loss = F.cross_entropy(given.model(images[n : n + 1]), labels[n : n + 1])
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += gradient.square() / len(images)
    for name in weights:
        torch.testing.assert_close(found[name], total[name], rtol=1e-3, atol=1e-8)


def test_search_passes_over_cells_without_weights():
    one = problem()
    one.active = lambda choices: []
    setup = Setup(2, 2, 2, schedule=Schedule(0), policy=Policy(0.01, 1), derive=1, compare=True)
    run = search(one, setup, 0, 0.05, 1.0)
    assert not run.diverged
    assert not {"Fisher", "Fisher, verified", "penalty"} & set(run.times)


def test_error_and_reward_by_hand():
    one = problem()
    with torch.no_grad():
        one.model.head.weight.zero_()
        one.model.head.bias.copy_(torch.arange(10.0))
    share = (one._measured[1] == 9).double().mean().item()
    assert one.error(CELL) == pytest.approx(100 * (1 - share))
    assert 0 <= one.reward(CELL) <= 1


def test_smoke_run_writes_everything(tmp_path, capsys):
    assert image_search.main([*TINY, "--baseline", "python", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "image_search.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image_search.json", "image_search.png"]
    assert (tmp_path / "image_search.png").read_bytes().startswith(b"\x89PNG")
    assert record["data"] == {"name": "scikit-learn digits", "train": 1258, "validation": 180, "test": 359}
    assert record["tuning"]["lr"] == {"values": [], "chosen": 0.05, "at_edge": False}
    assert all(0 <= e["reward"] <= 1 for arm in record["runs"].values() for run in arm for e in run["epochs"])
    assert "with WPL" in capsys.readouterr().out
    assert report.tables(record)["goals"].rows[0][0] == "convolution cells, scikit-learn digits"


@pytest.mark.parametrize("options", [["--nodes", "0"], ["--lr", "inf"], ["--baseline", "x"]])
def test_bad_option_exits_with_2(options, capsys):
    with pytest.raises(SystemExit) as caught:
        image_search.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


def cifar(count, label=3, seed=0):
    rng = np.random.default_rng(seed)
    return b"".join(bytes([label]) + rng.integers(0, 256, 3072, dtype=np.uint8).tobytes() for _ in range(count))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "cifar"
    root.mkdir()
    for index in (1, 2):
        (root / f"data_batch_{index}.bin").write_bytes(cifar(10, index, index))
    (root / "test_batch.bin").write_bytes(cifar(5, 9))
    return root


def test_cifar_by_hand(folder):
    images, labels = read_cifar(folder / "data_batch_1.bin")
    content = (folder / "data_batch_1.bin").read_bytes()
    assert labels.tolist() == [1] * 10
    assert images[1, 2, 31, 0] == content[3073 + 1 + 2 * 1024 + 31 * 32]
    split = load_images(str(folder), 0)
    assert split.sizes == {"train": 18, "validation": 2, "test": 5}
    assert split.shape == (3, 32, 32)
    assert split.name == "CIFAR-10"
    assert split.test[1].tolist() == [9] * 5
    together = torch.cat([split.train[1], split.validation[1]])
    assert sorted(together.tolist()) == [1] * 10 + [2] * 10
    torch.testing.assert_close(split.train[0].mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(split.train[0].std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def remove_test(root):
    (root / "test_batch.bin").unlink()


def truncate(root):
    (root / "data_batch_2.bin").write_bytes(cifar(2)[:-1])


def empty(root):
    (root / "data_batch_2.bin").write_bytes(b"")


def wrong_label(root):
    (root / "data_batch_2.bin").write_bytes(cifar(2, label=10))


def pickles(root):
    for path in root.iterdir():
        path.rename(path.with_suffix(""))


def nothing(root):
    for path in root.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_test, "without test_batch.bin"),
        (truncate, "expected records of 3,073 bytes, got 6,145"),
        (empty, "got 0 bytes"),
        (wrong_label, "expected labels 0 to 9, got 10"),
        (pickles, "got Python pickles"),
        (nothing, "found none"),
    ],
)
def test_damaged_cifar_is_one_line_and_leaves_results_alone(folder, tmp_path, capsys, damage, words):
    damage(folder)
    with pytest.raises(DataError, match=words):
        load_images(str(folder), 0)
    out = tmp_path / "out"
    out.mkdir()
    (out / "image_search.json").write_text("old")
    assert image_search.main([*TINY, "--data", str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [path.read_text() for path in out.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--channels", "6"], "--channels: expected a multiple of 4"),
        (["--stages", "3"], "--stages: expected at most --cells 2"),
        (["--cells", "4", "--stages", "4"], "too small"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(options, words, tmp_path, capsys):
    assert image_search.main([*TINY, *options, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
