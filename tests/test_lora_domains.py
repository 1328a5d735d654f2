"""Adapters of a language model in a row of domains, tiny; its texts, its model, and its measures by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

from benchmarks.experiments.data.digits import DataError
from benchmarks.experiments.data.domains import Domain, load_domains, split_windows, windows
from benchmarks.experiments.lora_domains import __main__ as lora_domains
from benchmarks.experiments.lora_domains import report, training
from benchmarks.experiments.lora_domains.model import Adapted, Model
from benchmarks.experiments.lora_domains.report import ROW
from benchmarks.experiments.lora_domains.training import Course, Setup
from benchmarks.experiments.row import summary
from benchmarks.experiments.row.training import Run

FOLDER = {"a first.txt": b"one two three four five. " * 300, "b.txt": b"ABCDEFGH " * 300, "c.txt": b"0 1 4 9 16 " * 300}
SIZES = {"size": 2_000, "length": 16, "width": 8, "depth": 2, "heads": 2, "rank": 2}
TINY = {**SIZES, "base_epochs": 1, "epochs": 1, "fisher_windows": 16}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a first text and two domains."""
    path = tmp_path_factory.mktemp("texts")
    for name, text in FOLDER.items():
        (path / name).write_bytes(text)
    return str(path)


@pytest.fixture(scope="module")
def begun(folder):
    """Settings, and what all arms of seed 0 begin with."""
    setup = Setup(data=folder, **TINY)
    return setup, training.start((setup, 0, ("mc", "squared 4")))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_quick_run_writes_everything(folder, tmp_path, capsys):
    options = ["--quick", "--data", folder, "--size", "2500", "--length", "16", "--out", str(tmp_path)]
    assert lora_domains.main([*options, "--width", "8"]) == 0
    names = ["lora_domains.json", "lora_domains.png", "lora_domains_alphas.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    record = json.loads((tmp_path / names[0]).read_text())
    assert record["settings"]["width"] == 8  # what is given counts, quick or not
    assert record["settings"]["depth"] == lora_domains.QUICK["depth"]
    kinds = ["none", "frozen", "l2", "mc", "empirical", "squared 32", "joint"]
    assert record["arms"].keys() == set(kinds)
    for arm, found in record["arms"].items():
        best = min(found["grid"], key=lambda row: row["validation"])
        assert found["setting"] == best["setting"]
        assert len(found["grid"]) == {"none": 1, "joint": 1, "frozen": 3}.get(arm, 2)
        if arm != "joint":
            assert np.shape(found["curve"]) == np.shape(found["curve_half_width"]) == (2, 2)
            assert found["curve"][-1] == pytest.approx([task["mean"] for task in found["tasks"]], abs=1e-4)
    assert [text["name"] for text in record["data"]["texts"]] == ["a first", "b", "c"]
    assert [text["bytes"] for text in record["data"]["texts"]] == [7500, 2500, 2500]
    out = capsys.readouterr().out
    tables = report.tables(record)
    assert all(table.text() in out for table in tables.values())
    assert [row[0] for row in tables["arms"].rows] == [ROW.title_of(arm) for arm in kinds]
    assert float(tables["alphas"].rows[0][3]) == pytest.approx(
        record["arms"]["mc"]["setting"] * record["mean_f"]["mc"], rel=1e-2
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--heads", "3", "--width", "8"], "--heads must divide --width"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--size", "100"], "expected at least"),
    ],
)
def test_what_cannot_run_is_one_line(options, said, tmp_path, capsys):
    assert lora_domains.main([*options, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_texts_on_this_machine():
    first, *row = load_domains(None, 300_000, 64_000)
    assert [domain.name for domain in row] == ["Python sources", "tables of numbers", "C++ headers"]
    assert all(len(domain.text) == 64_000 for domain in row)
    assert len(first.text) == 300_000
    assert b"#include" in row[2].text
    assert sum(byte in b"0123456789.,\r\n" for byte in row[1].text) > 0.95 * 64_000


def test_windows_follow_each_other():
    text = bytes(range(250)) * 6
    inputs, targets = windows(Domain("", text), 16)
    assert inputs.shape == targets.shape == (93, 16)
    assert bytes(inputs.flatten().tolist()) == text[: 93 * 16]
    assert bytes(targets.flatten().tolist()) == text[1 : 93 * 16 + 1]


def test_parts_share_no_window():
    numbers = np.random.default_rng(0).integers(0, 256, 16 * 400 + 1, dtype=np.uint8)
    domain = Domain("", numbers.tobytes())
    split, again, other = (split_windows(domain, 16, seed) for seed in (0, 0, 1))
    assert split.sizes == {"train": 280, "validation": 40, "test": 80}
    rows = [tuple(row) for part in (split.train, split.validation, split.test) for row in part[0].tolist()]
    assert len(set(rows)) == len(rows) == 400
    assert torch.equal(split.test[0], again.test[0])
    assert not torch.equal(split.test[0], other.test[0])


@pytest.mark.parametrize(("names", "said"), [(["a"], "at least two domains, got 1"), ([], "got 1")])
def test_folders_without_enough_texts(names, said, tmp_path):
    for name in names:
        (tmp_path / f"{name}.txt").write_bytes(b"text")
    with pytest.raises(DataError, match=said):
        load_domains(str(tmp_path), 100, 100)


# ---- the model -------------------------------------------------------------------------------------------------------


def test_adapter_by_hand():
    layer = Adapted(5, 3, 2)
    x = torch.randn(4, 5)
    assert torch.equal(layer(x), layer.base(x))
    torch.nn.init.normal_(layer.up.weight)
    weight = layer.base.weight + 2 * layer.up.weight @ layer.down.weight
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.base.bias))


def test_the_model_does_not_look_ahead():
    torch.manual_seed(0)
    model = Model(width=8, depth=2, heads=2, rank=2, length=6)
    x = torch.randint(0, 256, (1, 6))
    other = x.clone()
    other[0, 4] = (other[0, 4] + 1) % 256
    changed = (model(x) != model(other)).any(2)[0]
    assert changed.tolist() == [False] * 4 + [True] * 2


def test_only_adapters_are_trained(begun):
    setup, start = begun
    model = Course(setup, 0, start).begin()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * setup.depth
    assert trained == start.learnt.keys()
    after = training.state_of(Course(setup, 0, start).first()[0])
    same = {name for name, value in start.base.items() if np.array_equal(value, after[name])}
    assert same == start.base.keys() - trained


def test_bits_by_hand(begun):
    setup, start = begun
    course = Course(setup, 0, start)
    model, part = course.begin(), course.tasks[1].test
    expected = []
    for x, y in zip(*part, strict=True):
        p = model(x[None])[0].softmax(1)
        expected += [-math.log2(p[t, byte].item()) for t, byte in enumerate(y)]
    assert training.bits(model, part, at_once=3) == pytest.approx(np.mean(expected), rel=1e-5)
    assert start.base_bits[2] == pytest.approx(np.mean(expected), rel=1e-5)


# ---- sequences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arm", "setting"), [("mc", 100.0), ("frozen", "2"), ("joint", None)])
def test_runs_repeat_and_begin_alike(begun, arm, setting):
    setup, start = begun
    first = training.run((setup, start, arm, setting))
    assert training.run((setup, start, arm, setting)) == first
    assert training.start((setup, 0, ())).curve == start.curve
    if arm != "joint":
        assert first.curve[: setup.epochs] == start.curve


def test_a_huge_alpha_and_frozen_blocks_keep_the_first_domain_as_it_was(begun):
    setup, start = begun
    frozen = training.run((setup, start, "frozen", "1+2"))
    assert frozen.curve[-1] == pytest.approx(frozen.curve[0], rel=1e-6)
    free, held = (training.run((setup, start, *arm)).curve[-1] for arm in (("none", None), ("l2", 1e9)))
    moved = np.abs(np.subtract([free, held], frozen.curve[-1])).max(1)
    assert moved[1] < moved[0] / 5  # Adam's first step, which knows of no penalty yet, is as long as any


@pytest.mark.parametrize("arm", ["empirical", "squared 4"])
def test_importance_is_of_windows(begun, arm):
    setup, start = begun
    course = Course(setup, 0, start)
    model = course.first()[0]
    found = course.importance(arm, model, course.tasks[0].train)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) for name, p in trained.items()}
    x, y = (tensor[: setup.fisher_windows] for tensor in course.tasks[0].train)
    parts = torch.arange(len(x)).split(4 if arm == "squared 4" else 1)
    for rows in parts:
        loss = F.cross_entropy(model(x[rows]).flatten(0, 1), y[rows].flatten(), reduction="sum") / len(rows)
        for name, gradient in zip(expected, torch.autograd.grad(loss, list(trained.values())), strict=True):
            expected[name] += gradient.square() / len(parts)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-7)
    if arm in start.mean_f:
        mean = torch.cat([value.flatten() for value in expected.values()]).mean().item()
        assert start.mean_f[arm] == pytest.approx(mean, rel=1e-3)


def test_fewer_bits_are_better():
    ends = {1.0: ([2.0, 1.0], [2.2, 1.0]), 10.0: ([1.5, 1.2], [1.3, 1.2]), 100.0: ([1.2, 1.9], [1.2, 2.1])}
    runs = [
        Run(seed, "mc", alpha, [[1.1, 4.0], end], sum(end) / 2)
        for alpha, both in ends.items()
        for seed, end in enumerate(both)
    ]
    found = summary.summarise(runs, ROW, epochs=1)["mc"]
    assert found["setting"] == 10
    assert not found["at_edge_of_grid"]
    assert found["bits"]["seeds"] == pytest.approx([1.35, 1.25])
    assert found["forgetting"]["seeds"] == pytest.approx([0.4, 0.2])
    assert found["new_tasks"]["mean"] == pytest.approx(1.2)
    assert not found["good"]["open_low"]
    assert 1 < found["good"]["low"] < 10 < found["good"]["high"] < 100
