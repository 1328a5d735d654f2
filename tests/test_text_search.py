"""The search over recurrent cells, tiny: cells by hand, the command; its reader with damaged files."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from search_cases import CELL, TINY, problem, setup

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

import wplfast
from benchmarks.experiments.data.digits import DataError
from benchmarks.experiments.data.text import Files, load_text
from benchmarks.experiments.harness.runner import Runner, run_kept
from benchmarks.experiments.search import command, report
from benchmarks.experiments.search.loop import search
from benchmarks.experiments.text_search import __main__ as text_search
from benchmarks.experiments.text_search.cells import SharedCells, Sizes, decisions, describe, edges
from benchmarks.experiments.text_search.problem import Batches, Stream

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- cells -----------------------------------------------------------------------------------------------------------


def test_decisions_and_edges_of_a_cell():
    assert [(d.kind[0], d.options) for d in decisions(3)] == [("a", 4), ("p", 1), ("a", 4), ("p", 2), ("a", 4)]
    assert edges(CELL) == [(0, 1), (0, 2), (1, 3)]
    assert describe(CELL) == "tanh relu(0) sigmoid(0) identity(1)"


def test_cell_by_hand():
    torch.manual_seed(0)
    cells = SharedCells(Sizes(7, 3, 4))
    words, state = torch.tensor([[1, 5], [2, 2]]), torch.randn(2, 3)
    logits, after = cells(CELL, words, state)

    def block(function, product, source):
        c = torch.sigmoid(product[:, :3])
        return c * function(product[:, 3:]) + (1 - c) * source

    weights = {name: edge.weight for name, edge in cells.edges.items()}
    for t in range(2):
        x = cells.embedding.weight[words[:, t]] @ cells.word.weight.T + cells.word.bias
        h0 = block(torch.tanh, x + state @ cells.state.weight.T, state)
        h1 = block(torch.relu, h0 @ weights["0-1"].T, h0)
        h2 = block(torch.sigmoid, h0 @ weights["0-2"].T, h0)
        h3 = block(lambda a: a, h1 @ weights["1-3"].T, h1)
        state = (h2 + h3) / 2
        torch.testing.assert_close(logits[:, t], state @ cells.embedding.weight.T + cells.bias)
    torch.testing.assert_close(after, state)


def test_hidden_states_stay_bounded():
    cells = SharedCells(Sizes(7, 3, 4))
    with torch.no_grad():
        for edge in cells.edges.values():
            edge.weight.mul_(100)
    _, state = cells((2, 0, 2, 0, 2, 0, 2), torch.zeros(2, 30, dtype=torch.int64), torch.full((2, 3), 20.0))
    assert (state.norm(dim=1) <= 25.001).all()


@pytest.mark.parametrize("cover", ["used", "cells"])
def test_active_weights_are_those_with_gradients(cover):
    one = problem(cover=cover)
    one.train_loss(CELL).backward()
    used = {name for name, weight in one.weights.items() if weight.grad is not None}
    common = {"embedding.weight", "bias", "word.weight", "word.bias", "state.weight"}
    assert used == set(one.active(CELL)) == {"0-1", "0-2", "1-3"} | (common if cover == "used" else set())
    parameters = {id(weight) for weight in one.model.parameters()}
    covered = {id(weight) for weight in one.weights.values()}
    assert covered == parameters if cover == "used" else len(covered) == len(one.model.edges)


def test_layer_norm_takes_the_scale_out_of_the_output():
    words, state = torch.zeros(2, 5, dtype=torch.int64), torch.randn(2, 6)
    plain, normal = (SharedCells(Sizes(20, 6, 4, layer_norm=on)) for on in (False, True))
    normal.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for cells in (plain, normal):
            cells.embedding.weight.copy_(torch.eye(20, 6))  # logits are the output itself
        (raw, before), (scaled, after) = plain(CELL, words, state), normal(CELL, words, state)
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(scaled[..., :6], F.layer_norm(raw[..., :6], (6,)))


def test_fisher_of_a_cell_is_that_of_single_samples():
    one = problem()
    one.fisher_pass(CELL)
    given = one.fisher_pass(CELL)
    (words, state), targets = given.batch
    assert state.abs().sum() > 0  # the cell's own, from the segment before
    weights = {name: one.weights[name] for name in one.active(CELL)}
    found = wplfast.fisher_diagonal(given.model, [given.batch], given.loss_fn, params=weights)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for n in range(len(words)):
        logits = given.model(words[n : n + 1], state[n : n + 1])
        gradients = torch.autograd.grad(F.cross_entropy(logits[0], targets[n]), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += gradient.square() / len(words)
    for name in weights:
        torch.testing.assert_close(found[name], total[name], rtol=1e-4, atol=1e-12)


def test_training_text_is_read_in_order_and_the_state_carried_over():
    one = problem()
    seen, run = [], one.model.forward
    one.model.forward = lambda choices, words, state: (seen.append((words, state)), run(choices, words, state))[1]
    for _ in range(3):
        one.train_loss(CELL)
    rows = one._train._rows
    assert torch.equal(torch.cat([words for words, _ in seen], 1), rows[:, :15])
    assert seen[0][1].abs().sum() == 0
    torch.testing.assert_close(seen[2][1], run(CELL, *seen[1])[1])


def test_errors_repeat_and_exceed_the_vocabulary_by_nothing():
    one = problem()
    assert one.error(CELL) == one.error(CELL)
    with torch.no_grad():
        one.model.bias[0] = 1e6
    assert one.error(CELL) == pytest.approx(20)
    with torch.no_grad():
        one.model.bias[0] = math.nan
    assert one.error(CELL) == pytest.approx(20)
    assert one.reward(CELL) == pytest.approx(80 / 20)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_smoke_run_writes_everything(tmp_path, capsys):
    assert (
        text_search.main([*TINY, "--baseline", "python", "--dropout", "0.1", "0.1", "0.1", "--out", str(tmp_path)]) == 0
    )
    record = json.loads((tmp_path / "text_search.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text_search.json", "text_search.png"]
    assert (tmp_path / "text_search.png").read_bytes().startswith(b"\x89PNG")
    assert record["data"]["vocabulary"] == 40
    for setting in ("lr", "alpha"):
        rows = record["tuning"][setting]["values"]
        assert record["tuning"][setting]["chosen"] == max(rows, key=lambda row: row["reward"])[setting]
    assert {run["lr"] for arm in record["runs"].values() for run in arm} == {record["tuning"]["lr"]["chosen"]}
    assert [run["alpha"] for run in record["runs"]["wpl"]] == [record["tuning"]["alpha"]["chosen"]]
    assert record["settings"]["tuning_seeds"] == [1000]
    assert record["settings"]["choice"] == "one-se"
    assert {run["seed"] for arm in record["runs"].values() for run in arm} == {0}
    printed = capsys.readouterr().out
    assert "cross-entropy alone" in printed
    assert "as published" in printed
    assert report.tables(record)["results"].text() in printed


def test_finished_runs_are_taken_over(tmp_path):
    calls = []

    def function(job):
        calls.append(job)
        return search(problem(job), setup(), job, 1.0, 1.0)

    first, again = (Runner(0, tmp_path, "1").map("", function, [3]) for _ in range(2))
    assert first == again
    assert calls == [3]
    Runner(0, tmp_path, "1").map("", function, [4])
    Runner(0, tmp_path, "2").map("", function, [3])
    assert calls == [3, 4, 3]
    assert run_kept(len, tmp_path, "1", "abc") == 3  # another function's job


def test_processes_return_results_in_order():
    with Runner(2) as runner:
        assert runner.map("", len, ["a", "bbb", "", "cc"]) == [1, 3, 0, 2]


def test_resumed_comparison_gives_the_same_figures(tmp_path, monkeypatch):
    records = []
    for _ in range(2):
        assert text_search.main([*TINY, "--resume", "--out", str(tmp_path)]) == 0
        records.append(json.loads((tmp_path / "text_search.json").read_text()))
        monkeypatch.setattr(command, "search", lambda *job: pytest.fail("all runs are there"))
    assert records[0]["summary"] == records[1]["summary"]
    assert len(list((tmp_path / "runs").iterdir())) == 2 + 2 + 2


def test_what_is_given_goes_before_the_papers_sizes():
    options = command.parse(text_search.SPACE, "", ["--paper", "--hidden", "32", "--dropout", "0", "0", "0.1"])
    assert (options.hidden, options.blocks, options.length, options.batch_size) == (32, 12, 35, 64)
    assert (options.dropout, options.epochs, options.controller_steps) == ([0, 0, 0.1], 150, 2000)
    assert command.parse(text_search.SPACE, "", []).blocks == 4


def test_default_run_has_seeds_enough_for_its_rule():
    options = command.parse(text_search.SPACE, "", [])
    assert (options.seeds, options.tuning_seeds, options.choice) == (8, 4, "one-se")
    assert command.parse(text_search.SPACE, "", ["--choice", "best"]).choice == "best"


@pytest.mark.parametrize(
    "options",
    [
        ["--seeds", "0"], ["--lr", "-1"], ["--alpha", "x"], ["--blocks", "1"], ["--normalize", "sum"],
        ["--choice", "worst"],
        ["--dropout", "0.1"], ["--rate", "1.5"], ["--start", "-1"],
    ],
)  # fmt: skip
def test_bad_option_exits_with_2(options, capsys):
    with pytest.raises(SystemExit) as caught:
        text_search.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--start", "3"], "never act"),
        (["--rate", "0"], "--rate"),
        (["--held-out", "x.txt"], "--held-out"),
        (["--device", "cuda:99"], "--device"),
        (["--data", "/nonexistent"], "no such folder"),
        (["--length", "100000"], "train part has"),
    ],
)
def test_what_cannot_run_is_one_line_and_leaves_results_alone(options, words, tmp_path, capsys):
    (tmp_path / "text_search.json").write_text("old")
    assert text_search.main([*TINY, "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# ---- the reader ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.txt").write_text("a b a <unk>\n\n c a b\n")
    (tmp_path / "valid.txt").write_text("a d\n")
    (tmp_path / "test.txt").write_text("c\nb\n")
    return tmp_path


def test_text_by_hand(folder):
    text = load_text(Files(str(folder)), 4)
    assert text.words == ("<unk>", "a", "<eos>", "b")  # by counts, equal ones by the alphabet; c does not fit
    assert text.parts["train"].tolist() == [1, 3, 1, 0, 2, 0, 1, 3, 2]
    assert text.parts["validation"].tolist() == [1, 0, 2]
    assert text.sizes == {"train": 9, "validation": 3, "test": 4, "vocabulary": 4}
    halves = load_text(Files(str(folder), train="valid.txt", held_out="train.txt"), 9)
    assert [len(part) for part in halves.parts.values()] == [3, 4, 5]


def test_python_ships_a_text():
    text = load_text(Files(), 500)
    assert len(text.words) == 500
    assert text.sizes["train"] > 50_000
    assert min(text.sizes["validation"], text.sizes["test"]) > 5_000


def test_columns_and_segments_by_hand():
    words = torch.arange(23)
    stream = Stream(words, Batches(2, 4), "train")
    assert stream._rows.tolist() == [list(range(11)), list(range(11, 22))]
    assert stream.count == 2
    assert [stream.next()[0] for _ in range(3)] == [0, 1, 0]
    inputs, targets = stream.segment(1)
    assert inputs.tolist() == [[4, 5, 6, 7], [15, 16, 17, 18]]
    assert torch.equal(targets, inputs + 1)
    with pytest.raises(DataError, match="at least 18"):
        Stream(torch.arange(17), Batches(2, 4), "train")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.txt", None, "no such file"),
        ("valid.txt", b"", "got no words"),
        ("test.txt", b" \n \n", "got no words"),
        ("train.txt", b"abc \xff\xfe", "expected UTF-8, got byte 0xff at 4"),
    ],
)
def test_damaged_text(folder, name, content, words):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_text(Files(str(folder), train="train.txt"), 10)
    assert name in str(caught.value)


def test_equal_numbers_are_tried_by_default():
    assert len(text_search.RATES) == len(text_search.ALPHAS)
    assert command.TUNING_SEED >= 1000


def test_records_name_folders_without_where_they_lie():
    settings = {"files": {"folder": "/home/someone/ptb", "train": "train.txt"}, "vocabulary": 50}
    assert command.portable(settings) == {"files": {"folder": "ptb", "train": "train.txt"}, "vocabulary": 50}
