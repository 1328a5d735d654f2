"""The row of permuted tasks, tiny; its measures on cases worked out by hand; the demo's last lines."""

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
from benchmarks.experiments import demo
from benchmarks.experiments.harness.statistics import half_width
from benchmarks.experiments.permuted_pixels import __main__ as permuted_pixels
from benchmarks.experiments.permuted_pixels import report, training
from benchmarks.experiments.permuted_pixels.report import ROW
from benchmarks.experiments.permuted_pixels.training import Course, Setup
from benchmarks.experiments.row import report as row_report
from benchmarks.experiments.row import summary
from benchmarks.experiments.row.training import Run

TINY = ("--tasks", "3", "--epochs", "1", "--hidden", "8", "--batch-size", "256", "--workers", "0")
GRIDS = ("--grid", "10", "1000", "--l2-grid", "0.1", "10", "--batch-sizes", "64")
SMALL = Setup(tasks=3, epochs=2, hidden=8, batch_size=256)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_smoke_run_writes_everything(tmp_path, capsys):
    assert permuted_pixels.main([*TINY, *GRIDS, "--seeds", "2", "--out", str(tmp_path)]) == 0
    names = ["permuted_pixels.json", "permuted_pixels.png", "permuted_pixels_alphas.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    record = json.loads((tmp_path / names[0]).read_text())
    kinds = ["none", "frozen", "l2", "mc", "exact", "empirical", "squared 64", "joint"]
    assert record["arms"].keys() == set(kinds)
    for arm, found in record["arms"].items():
        best = max(found["grid"], key=lambda row: row["validation"])
        assert found["setting"] == best["setting"]
        assert len(found["grid"]) == {"none": 1, "joint": 1, "frozen": 7}.get(arm, 2)
        if arm != "joint":
            assert np.shape(found["curve"]) == np.shape(found["curve_half_width"]) == (3, 3)
            assert found["curve"][-1] == pytest.approx([task["mean"] for task in found["tasks"]], abs=0.01)
    out = capsys.readouterr().out
    assert report.tables(record)["arms"].text() in out
    assert [row[0] for row in report.tables(record)["arms"].rows] == [ROW.title_of(arm) for arm in kinds]


@pytest.mark.parametrize(("arm", "setting"), [("mc", 100.0), ("frozen", "2+3")])
def test_runs_repeat_and_begin_alike(arm, setting):
    first = training.run((SMALL, 0, arm, setting))
    training.first_task.cache_clear()
    assert training.run((SMALL, 0, arm, setting)) == first
    assert training.run((SMALL, 0, "none", None)).curve[: SMALL.epochs] == first.curve[: SMALL.epochs]


def test_a_huge_alpha_and_frozen_layers_keep_the_first_task_as_it_was():
    frozen = training.run((SMALL, 0, "frozen", "1+2+3"))
    assert all(after == frozen.curve[1] for after in frozen.curve[2:])
    held = training.run((SMALL, 0, "l2", 1e12))
    assert np.abs(np.subtract(held.curve[-1], frozen.curve[-1])).max() < 0.05
    assert training.run((SMALL, 0, "none", None)).curve[-1] != frozen.curve[-1]


def test_every_task_adds_an_anchor(monkeypatch):
    seen = []
    consolidate = wplfast.WeightPlasticityLoss.consolidate

    def watched(wpl, fisher):
        consolidate(wpl, fisher)
        seen.append((wpl.n_anchors, {name: value.clone() for name, value in wpl.fisher.items()}))

    monkeypatch.setattr(wplfast.WeightPlasticityLoss, "consolidate", watched)
    training.run((SMALL, 0, "l2", 1.0))
    assert [anchors for anchors, _ in seen] == [1, 2]
    assert all((value == 2).all() for value in seen[-1][1].values())


@pytest.mark.parametrize("arm", ["exact", "empirical", "squared 8"])
def test_importance_is_what_it_is_called(arm):
    model, _ = training.first_task(SMALL, 0)
    images, labels = (part[:16] for part in training.tasks(SMALL, 0)[0].train)
    found = Course(SMALL, 0).importance(arm, model, (images, labels))
    p = model(images).softmax(1)
    expected = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    parts = torch.arange(16).split(8 if arm == "squared 8" else 1)
    for rows in parts:
        for label in range(10) if arm == "exact" else [None]:
            target = labels[rows] if label is None else torch.full_like(labels[rows], label)
            weight = 1 if label is None else p[rows[0], label].item()
            gradients = torch.autograd.grad(F.cross_entropy(model(images[rows]), target), list(model.parameters()))
            for name, gradient in zip(expected, gradients, strict=True):
                expected[name] += weight * gradient.square() / len(parts)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)


def test_drawn_labels_are_those_of_the_seed():
    model, _ = training.first_task(SMALL, 0)
    part = training.tasks(SMALL, 0)[0].train

    def drawn(seed):
        return Course(SMALL, seed).importance("mc", model, part)

    found, again, other = (drawn(seed)["0.weight"] for seed in (0, 0, 1))
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    exact = Course(SMALL, 0).importance("exact", model, part)["0.weight"]
    assert found.sum().item() == pytest.approx(exact.sum().item(), rel=0.1)


def test_tasks_are_the_same_digits_in_other_orders():
    plain, second, third = training.tasks(SMALL, 1)
    assert torch.equal(plain.train[0].sort(1).values, second.train[0].sort(1).values)
    assert not torch.equal(second.train[0], third.train[0])
    assert torch.equal(plain.test[1], third.test[1])


def test_summary_by_hand():
    def runs(alpha, ends, validation):  # both tasks after each of four epochs
        curves = [[[0.1, 0.1], [0.9, 0.1], [0.7, 0.5], end] for end in ends]
        return [Run(seed, "mc", alpha, curve, validation) for seed, curve in enumerate(curves)]

    everything = runs(1.0, ([0.1, 0.9], [0.2, 0.9]), 0.5) + runs(10.0, ([0.6, 0.9], [0.8, 0.7]), 0.7)
    everything += runs(100.0, ([0.9, 0.2], [0.9, 0.4]), 0.6)
    found = summary.summarise(everything, ROW, epochs=2)["mc"]
    assert found["setting"] == 10
    assert not found["at_edge_of_grid"]
    assert found["accuracy"]["seeds"] == pytest.approx([75, 75])
    assert [task["mean"] for task in found["tasks"]] == pytest.approx([70, 80])
    assert [stage["mean"] for stage in found["stages"]] == pytest.approx([90, 75])
    assert found["forgetting"]["seeds"] == pytest.approx([30, 10])
    assert found["forgetting"]["half_width"] == pytest.approx(12.706 * 10, rel=1e-3)  # t of one degree of freedom
    assert found["new_tasks"]["mean"] == pytest.approx(80)
    assert found["grid"][0] == {"setting": 1.0, "validation": 50.0, "test": 52.5}
    alone = summary.summarise(runs(1.0, ([0.1, 0.9],), 0.5), ROW, epochs=2)["mc"]
    assert (alone["accuracy"]["half_width"], alone["curve_half_width"]) == (None, None)
    assert not alone["at_edge_of_grid"]
    assert row_report.with_interval(ROW, alone["accuracy"]) == "50.0"


def test_half_width_by_hand():
    values = np.array([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    assert half_width(values) == pytest.approx([4.3027 * 2 / 3**0.5, 0], rel=1e-4)
    assert np.isinf(half_width(np.array([1.0])))


@pytest.mark.parametrize(
    "options", [["--tasks", "1"], ["--epochs", "0"], ["--arms", "l2"], ["--arms", "fisher"], ["--l2-grid", "1"]]
)
def test_bad_option_exits_with_2(options, capsys):
    with pytest.raises(SystemExit) as caught:
        permuted_pixels.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Records that the demo's experiments are made to leave behind, and how they were called."""
    arms = {"none": 50.0, "l2": 60.0, "mc": 78.0}
    lost = {"none": 7.0, "wpl": 0.5, "l2": 0.2, "frozen": -0.0}
    tasks = {"arms": {arm: {"accuracy": {"mean": mean}, "tasks": [{"mean": mean - 5}]} for arm, mean in arms.items()}}
    models = {"panels": [{"methods": {name: {"forgetting": {"mean": mean}} for name, mean in lost.items()}}]}
    tasks["settings"] = {"tasks": 4}
    calls = []
    for experiment, record in (("permuted_pixels", tasks), ("two_models", models)):

        def main(arguments, name=experiment, record=record):
            calls.append(arguments)
            (tmp_path / f"{name}.json").write_text(json.dumps(record))
            return 0

        monkeypatch.setattr(getattr(demo, experiment), "main", main)
    return tasks, models, calls


def test_demo_says_what_it_showed(tmp_path, capsys, shown):
    calls = shown[2]
    assert demo.main(["--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "50 % of all their digits" in out
    assert "the Fisher's weights are worth 18 points" in out
    assert "7.0 points without a penalty" in out
    assert "0.5 with WPL, 0.2 with an L2 anchor, 0.0 with frozen layers: any anchor does" in out
    chosen = json.loads(demo.CHOSEN.read_text())["arms"]
    assert calls[0][-4:] == ["--grid", str(chosen["mc"]["setting"]), "--l2-grid", str(chosen["l2"]["setting"])]
    assert "has layers of its own" in out
    assert calls[1][-2:] == ["--levels", "convergence"]
    demo.main(["--out", str(tmp_path), "--all"])
    assert "--levels" not in calls[3]


def test_demo_says_where_there_is_no_difference(shown):
    tasks, models, _ = shown
    tasks["arms"]["mc"]["accuracy"]["mean"] = 61.0
    assert "the Fisher buys little here" in "".join(demo.of_tasks(tasks))
    models["panels"][0]["methods"]["l2"]["forgetting"]["mean"] = 3.5
    assert "they differ by 3 points" in "".join(demo.of_models(models))
    assert demo.of_both(tasks, models) == []
