"""The EWC experiment, tiny; its measures, the range of good strengths and the shift on cases worked out by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

import wplfast
from benchmarks.experiments.ewc import __main__ as ewc
from benchmarks.experiments.ewc import report, scenarios, summary, sweep, training
from benchmarks.experiments.ewc.scenarios import SCENARIOS, Setup
from benchmarks.experiments.ewc.training import ARMS, TUNED, Run

TINY = ("--iterations", "3", "--permutations", "3", "--hidden", "8", "--seeds", "1", "--workers", "0")
TINY += ("--grid", "10", "1000", "--l2-grid", "0.1", "10", "--sweep-grid", "10", "1000")
TINY += ("--batch-sizes", "8", "64", "--fisher-samples", "64")
SMALL = Setup(hidden=8, iterations=5, permutations=3, fisher_samples=64)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_smoke_run_writes_everything(tmp_path, capsys):
    assert ewc.main([*TINY, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "ewc.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ewc.json", "ewc.png", "ewc_tasks.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("ewc.png", "ewc_tasks.png"))
    assert record["scenarios"].keys() == SCENARIOS.keys()
    for scenario in record["scenarios"].values():
        assert list(scenario["arms"]) == training.arms(scenario["n_tasks"])
        for arm, values in scenario["arms"].items():
            assert len(values["accuracy"]) == len(values["forgetting"]) == scenario["n_tasks"]
            assert (values["alpha"] is not None) == (arm in TUNED)
            if arm in TUNED:
                best = max(values["grid"], key=lambda row: row["validation"])
                assert values["alpha"] == best["alpha"]
                assert len(values["grid"]) == 2
    for swept in record["sweep"].values():
        assert [(curve["kind"], curve["batch_size"]) for curve in swept["curves"]] == sweep.curves([8, 64])
        assert swept["batch_size"].keys() == {"empirical", "squared"}
        assert swept["batch_size"]["empirical"]["fisher_difference"][1] < 1e-5
        assert swept["batch_size"]["squared"]["fisher_difference"][1] > 0.1
    out = capsys.readouterr().out
    assert all(out.count(title) >= 5 for title in ("L2 anchor (F = 1)", "joint training"))
    tables = report.tables(record)
    assert all(table.text() in out for table in tables.values())
    assert all(len(row) in (1, len(table.columns)) for table in tables.values() for row in table.rows)
    assert [row[0] for row in tables["arms"].rows if len(row) == 1] == [one.title for one in SCENARIOS.values()]


def test_runs_repeat_and_arms_start_alike():
    runs = [training.run((SMALL, "split2", 0, "ewc", 100.0)) for _ in range(2)]
    training.first_task.cache_clear()
    runs.append(training.run((SMALL, "split2", 0, "ewc", 100.0)))
    assert runs[0] == runs[1] == runs[2]
    other = training.run((SMALL, "split2", 0, "none", None))
    assert other.matrix[0] == runs[0].matrix[0]


def test_a_huge_alpha_freezes_what_is_anchored_and_leaves_new_heads_free():
    start = training.first_task(SMALL, "split5", 0)
    sequence = scenarios.tasks(SMALL, "split5", 0)
    net = scenarios.network(SMALL, "split5", 64, 0)
    net.load_state_dict(start.state_dict())
    wpl = wplfast.WeightPlasticityLoss(net.anchored("split5", range(5)), 1e12)
    training.anchor(wpl, net, SMALL, "split5", sequence[0], "l2")
    training.train(net, sequence[1:2], SMALL, 1, wpl)
    moved = {name: (p - start.state_dict()[name]).abs().max().item() for name, p in net.named_parameters()}
    assert all(moved[name] == 0 for name in ("heads.0.0.weight", "heads.2.0.weight"))
    assert moved["heads.1.0.weight"] > 0.003
    assert moved["trunk.0.weight"] < moved["heads.1.0.weight"]


@pytest.mark.parametrize(("arm", "fisher", "anchors"), [("ewc", 1 + 1, 2), ("online", 0.9 * 1 + 1, 1), ("l2", 2, 2)])
def test_anchors_add_up(arm, fisher, anchors, monkeypatch):
    monkeypatch.setattr(training, "estimate", lambda kind, model, params, *_: {n: p * 0 + 1 for n, p in params.items()})
    sequence = scenarios.tasks(SMALL, "permuted", 0)
    net = scenarios.network(SMALL, "permuted", 64, 0)
    wpl = wplfast.WeightPlasticityLoss(net.anchored("permuted", [0]), 1.0)
    for task in sequence[:2]:
        training.anchor(wpl, net, SMALL, "permuted", task, arm)
    assert wpl.n_anchors == anchors
    assert all(torch.allclose(value, torch.full_like(value, fisher)) for value in wpl.fisher.values())


def test_what_is_anchored():
    net = scenarios.network(SMALL, "models", 64, 0)
    assert {name.split(".")[0] for name in net.anchored("models", [0, 1])} == {"trunk"}
    net = scenarios.network(SMALL, "split5", 64, 0)
    prefixes = {name.rsplit(".", 2)[0] for name in net.anchored("split5", [0, 3])}
    assert prefixes == {"trunk", "heads.0", "heads.3"}
    assert net.anchored("split5", range(5)).keys() == dict(net.named_parameters()).keys()


def test_tasks_hold_what_they_are_called():
    whole = scenarios.load_split(None, 1)
    pairs = scenarios.tasks(SMALL, "split5", 1)
    assert [task.head for task in pairs] == list(range(5))
    assert sum(len(task.split.test[1]) for task in pairs) == len(whole.test[1])
    assert all(set(task.split.train[1].tolist()) == {0, 1} for task in pairs)
    rows = whole.train[1] == 7
    assert torch.equal(pairs[3].split.train[0][pairs[3].split.train[1] == 1], whole.train[0][rows])
    plain, permuted, third = scenarios.tasks(SMALL, "permuted", 1)
    assert torch.equal(plain.split.train[0], whole.train[0])
    assert torch.equal(permuted.split.train[0].sort(1).values, whole.train[0].sort(1).values)
    assert not torch.equal(permuted.split.train[0], third.split.train[0])
    assert torch.equal(permuted.split.test[1], whole.test[1])


def test_measures_by_hand():
    matrix = [[0.9], [0.5, 0.8], [0.7, 0.6, 1.0]]
    assert summary.average_accuracy(matrix) == pytest.approx([0.9, 0.65, 2.3 / 3])
    # after task 2: best 0.9, now 0.5; after task 3: (0.9 - 0.7) and (0.8 - 0.6)
    assert summary.forgetting(matrix) == pytest.approx([0, 0.4, 0.2])
    assert summary.new_task_accuracy(matrix) == pytest.approx(0.9)
    # forgetting counts from the best accuracy since
    improved = [[0.5], [0.9, 0.8], [0.7, 0.8, 1.0]]
    assert summary.forgetting(improved)[-1] == pytest.approx(0.1)


def test_good_range_by_hand():
    alphas, scores = [1.0, 10.0, 100.0, 1e3, 1e4], [80.0, 88.0, 90.0, 86.0, 70.0]
    good = sweep.good_range(alphas, scores, 2.0)
    assert good["low"] == pytest.approx(10)
    assert good["high"] == pytest.approx(10**2.5, rel=1e-3)  # halfway down from 90 to 86
    assert good["decades"] == pytest.approx(1.5)
    assert not good["open_low"]
    assert not good["open_high"]
    wide = sweep.good_range(alphas, scores, 10.0)
    assert wide["open_low"]
    assert wide["low"] == 1
    assert wide["high"] == pytest.approx(10**3.375, rel=1e-3)  # 80 is 6/16 of the way from 86 to 70
    two_peaks = sweep.good_range(alphas, [90.0, 80.0, 90.5, 80.0, 90.4], 1.0)
    assert two_peaks["decades"] == pytest.approx(2 / 10.5, abs=1e-3)  # the other peaks do not count


def test_shift_finds_a_curve_moved_by_a_known_distance():
    alphas = [10 ** (half / 2) for half in range(17)]

    def curve(moved):
        return [80 + 15 * math.exp(-((math.log10(a) - 3 - moved) ** 2)) for a in alphas]

    assert sweep.shift(alphas, curve(0), curve(0)) == 0
    for moved in (-1.5, 0.9, 2.0):
        assert sweep.shift(alphas, curve(0), curve(moved)) == pytest.approx(moved, abs=0.06)
    assert sweep.shift(alphas, [5.0] * 17, [5.0] * 17) == 0
    assert sweep.slope([1, 10, 100], [0.0, 0.9, 1.8]) == pytest.approx(0.9)


def test_batch_squared_by_hand_and_the_same_as_the_right_fisher_at_batch_size_1():
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(model.weight)
    images, labels = torch.tensor([[2.0, 0.0], [0.0, 4.0], [2.0, 0.0]]), torch.tensor([0, 1, 1])
    # p = 1/2: the gradient of row c is (1/2 - [label = c]) x; the mean of two samples, then the third alone
    first, second = torch.tensor([[-0.5, 1.0], [0.5, -1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    split = scenarios.Split((images, labels), (images, labels), (images, labels))
    params = dict(model.named_parameters())
    found = training.estimate("squared", model, params, split, 2)
    torch.testing.assert_close(found["weight"], (first.square() + second.square()) / 2)
    alone, right = (training.estimate(kind, model, params, split, 1) for kind in ("squared", "empirical"))
    torch.testing.assert_close(alone["weight"], right["weight"])
    assert training.estimate("empirical", model, params, split, 2, 2).n_samples == 2


def test_summary_by_hand():
    def runs(arm, alpha, matrices, validation):
        return [Run("split2", seed, arm, alpha, matrix, validation) for seed, matrix in enumerate(matrices)]

    everything = [
        *runs("none", None, ([[0.9], [0.5, 0.9]], [[0.8], [0.6, 0.9]]), 0.7),
        *runs("ewc", 1.0, ([[0.9], [0.6, 0.9]], [[0.8], [0.7, 0.9]]), 0.8),
        *runs("ewc", 10.0, ([[0.9], [0.86, 0.88]], [[0.8], [0.78, 0.9]]), 0.85),
        *runs("l2", 0.1, ([[0.9], [0.9, 0.6]], [[0.8], [0.8, 0.6]]), 0.75),
        *runs("joint", None, ([[0.9], [0.9, 0.9]], [[0.8], [0.9, 0.9]]), 0.9),
    ]
    arms = summary.summarise("split2", everything)["arms"]
    assert list(arms) == ["none", "ewc", "l2", "joint"]
    assert arms["none"]["forgetting"][-1]["mean"] == pytest.approx(30)
    assert arms["ewc"]["alpha"] == 10
    assert arms["ewc"]["at_edge_of_grid"]
    assert arms["ewc"]["forgetting"][-1]["mean"] == pytest.approx(3)
    assert arms["ewc"]["reduction_percent"] == pytest.approx(90)
    assert arms["ewc"]["cost"]["mean"] == pytest.approx(1)
    assert arms["ewc"]["gap"]["seeds"] == pytest.approx([3, 6])
    scenario = {"title": "t", "method": "EWC", "n_tasks": 2, "arms": arms}
    assert report._arm_cells(scenario, "ewc")[1:3] == ["3.0 ± 1.4", "90 %"]
    assert report._arm_cells(scenario, "ewc")[-1] == "10 (edge)"
    arms["none"]["forgetting"][-1] = {"mean": 0.6, "std": 1.0}
    assert report._arm_cells(scenario, "ewc")[2] == ""  # no more than the seeds scatter: there is nothing to cut


def test_sweep_summary_by_hand():
    alphas = [1.0, 10.0, 100.0, 1000.0]

    def swept(kind, size, fisher, scores):
        return sweep.Sweep("split2", 0, kind, size, np.array(fisher, np.float32), scores, [s - 1 for s in scores])

    peaks = [90.0, 80.0, 70.0, 60.0], [80.0, 90.0, 80.0, 70.0]
    runs = [swept("empirical", size, [1, 3], peaks[0]) for size in (1, 10)]
    runs += [swept("squared", 1, [1, 3], peaks[0]), swept("squared", 10, [0.1, 0.3], peaks[1])]
    found = sweep.summarise(runs, alphas)
    assert [curve["best_alpha"] for curve in found["curves"]] == [1, 1, 1, 10]
    right, squared = found["batch_size"]["empirical"], found["batch_size"]["squared"]
    assert right["fisher_difference"] == [0, 0]
    assert right["shift"] == [0, 0]
    assert right["lost_points"] == 0
    assert squared["fisher_difference"] == pytest.approx([0, 0.9])
    assert squared["mean_ratio"] == pytest.approx([1, 0.1])
    assert squared["shift"] == [0, 1]
    assert squared["shift_per_decade"] == pytest.approx(1)
    assert squared["lost_points"] == pytest.approx(10)
    cells = list(report._strength_rows(found))
    assert cells[0] == [
        "right: empirical",
        "1 to 10",
        "0e+00 of its norm",
        "1/1",
        "1",
        "0.00 decades",
        "0.00",
        "0.0 points",
    ]
    assert cells[1][2:] == ["9e-01 of its norm", "1/10", "1 to 10", "1.00 decades", "1.00", "10.0 points"]


def test_bad_data_is_one_line_and_leaves_results_alone(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "ewc.json").write_text("old")
    assert ewc.main([*TINY, "--data", str(tmp_path / "none"), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert [path.read_text() for path in out.iterdir()] == ["old"]


def test_too_few_digits_of_a_task_is_one_line(tmp_path, capsys, monkeypatch):
    labels = torch.arange(40) % 6  # no 6, 7, 8, 9
    split = scenarios.Split(*(((torch.zeros(40, 4), labels),) * 3))
    monkeypatch.setattr(scenarios, "load_split", lambda folder, seed: split)
    scenarios.tasks.cache_clear()
    assert ewc.main([*TINY, "--out", str(tmp_path)]) == 2
    scenarios.tasks.cache_clear()
    assert "too few digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--permutations", "1"],
        ["--lr", "0"],
        ["--gamma", "1.5"],
        ["--fisher-type", "squared"],
        ["--sweep-grid", "10"],
        ["--l2-grid", "1"],
        ["--batch-sizes", "0", "8"],
    ],
)
def test_bad_option_exits_with_2(options, capsys):
    with pytest.raises(SystemExit) as caught:
        ewc.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_every_arm_has_a_look():
    assert report.ARM_LOOKS.keys() == ARMS.keys()
