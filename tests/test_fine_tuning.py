"""Incremental fine-tuning: the sampler, the stream, one run, and the experiment, tiny."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

import wplfast
from benchmarks.experiments.data.digits import DataError, load_split
from benchmarks.experiments.fine_tuning import __main__ as fine_tuning
from benchmarks.experiments.fine_tuning import plan, report, training
from benchmarks.experiments.fine_tuning.model import GrowingNet
from benchmarks.experiments.fine_tuning.settings import METHODS, UNCHANGED, Arm, Condition, Run, Setup
from benchmarks.experiments.fine_tuning.stream import Sizes, draw, make_stream, remembered
from benchmarks.experiments.harness.statistics import difference, spread

SETUP = Setup(Sizes(30, 20, 60), start_iterations=60, n_updates=3)
NEW = Condition("new", 3)
TINY = ["--updates", "1", "--iterations", "1", "--epochs", "0.2", "--start", "5", "--seeds", "2"]
TINY += ["--tuning-seeds", "1", "--workers", "0", "--width", "2"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("n_old", "n_new"), [(1000, 10), (10, 1000)])
def test_shares_are_binomial_whatever_the_sizes(share, n_old, n_new):
    n = 20_000
    drawn = draw(torch.arange(n_old), torch.arange(n_old, n_old + n_new), share, n, seeded())
    counts = drawn.bincount(minlength=n_old + n_new)
    assert len(drawn) == n == counts.sum()
    for part, expected in (counts[:n_old], share), (counts[n_old:], 1 - share):
        assert abs(part.sum() - n * expected) <= 5 * math.sqrt(n * expected * (1 - expected))
        p = expected / len(part)  # of one sample
        assert (part - n * p).abs().max() <= 5 * math.sqrt(n * p * (1 - p)) + 5


def test_draws_are_independent_minibatches():
    drawn = draw(torch.tensor([5, 6]), torch.tensor([7]), 0.25, 64 * 400, seeded(1))
    old = (drawn.view(400, 64) != 7).sum(1).double()
    assert old.mean() == pytest.approx(16, abs=5 * math.sqrt(12 / 400))
    assert old.var() == pytest.approx(12, rel=0.4)  # Binomial(64, 1/4), not a fixed 16


def test_a_part_without_a_share_may_be_empty_and_seeds_decide():
    some, none = torch.tensor([3, 9]), torch.empty(0, dtype=torch.int64)
    assert set(draw(none, some, 0.0, 100, seeded()).tolist()) == {3, 9}
    assert set(draw(some, none, 1.0, 100, seeded()).tolist()) == {3, 9}
    generator = seeded(3)
    first, second = (draw(some, some + 1, 0.5, 100, generator) for _ in range(2))
    assert torch.equal(first, draw(some, some + 1, 0.5, 100, seeded(3)))
    assert not torch.equal(first, second)


# ---- stream ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_split(None, 0)


@pytest.mark.parametrize(("scenario", "start", "classes"), [("known", 10, [10] * 10), ("new", 5, [6, 6, 7, 7, 8, 8])])
def test_stream_brings_each_sample_once_and_one_class_at_a_time(digits, scenario, start, classes):
    stream = make_stream(digits, scenario, SETUP.sizes, 0.0, 10, 0)
    assert stream.start_classes == start
    per_class = {"known": 20, "new": 60}[scenario]
    assert stream.labels[stream.start].bincount().tolist() == [per_class] * start
    assert [update.n_classes for update in stream.updates][: len(classes)] == classes
    assert all(
        len(update.index) == 30 and len(digits.train[1][update.index].unique()) == 1 for update in stream.updates
    )
    arrived = torch.cat([stream.start, *(update.index for update in stream.updates)])
    assert len(arrived.unique()) == len(arrived)
    assert torch.equal(stream.labels, stream.rank[digits.train[1]])
    brought = [int(stream.labels[update.index[0]]) for update in stream.updates]
    assert sorted(brought) == (list(range(10)) if scenario == "known" else sorted([*range(5, 10)] * 2))


@pytest.mark.parametrize(("scenario", "start", "counts"), [("known", 5, [2] * 5), ("new", 2, [0, 0, 3, 3, 3])])
def test_others_never_arrive_and_the_rest_bring_as_many_update_sets_as_each_other(digits, scenario, start, counts):
    stream = make_stream(digits, scenario, SETUP.sizes, 0.0, 10, 0, n_others=5)
    whole = make_stream(digits, scenario, SETUP.sizes, 0.0, 10, 0)
    assert torch.equal(stream.rank, whole.rank)  # the same classes have the same numbers
    assert stream.start_classes == start
    per_class = {"known": 20, "new": 60}[scenario]
    assert stream.labels[stream.start].bincount().tolist() == [per_class] * start
    brought = torch.cat([stream.labels[update.index] for update in stream.updates])
    assert brought.bincount(minlength=10).tolist() == [30 * count for count in counts] + [0] * 5
    arrived = torch.cat([stream.start, *(update.index for update in stream.updates)])
    assert len(arrived.unique()) == len(arrived)


@pytest.mark.parametrize("scenario", ["known", "new"])
@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_noise_replaces_a_fixed_share_by_other_known_classes(digits, scenario, noise):
    clean, noisy = (make_stream(digits, scenario, SETUP.sizes, level, 10, 1) for level in (0.0, noise))
    assert torch.equal(clean.start, noisy.start)
    assert torch.equal(clean.labels[clean.start], noisy.labels[noisy.start])
    for a, b in zip(clean.updates, noisy.updates, strict=True):
        assert torch.equal(a.index, b.index)
        assert (clean.labels[a.index] != noisy.labels[b.index]).sum() == round(noise * 30)
        assert set(noisy.labels[b.index].tolist()) <= set(range(b.n_classes))


def test_a_class_with_too_few_samples_is_an_error(digits):
    with pytest.raises(DataError, match=r"samples of class \d, expected at least 520"):
        make_stream(digits, "known", Sizes(500, 20, 60), 0.0, 10, 0)


def test_memory_is_a_reservoir_of_each_class():
    labels, key = torch.arange(60) % 3, torch.rand(60, generator=seeded())
    seen = torch.arange(60)
    kept = remembered(seen, labels, key, 4)
    assert labels[kept].bincount().tolist() == [4, 4, 4]
    again = remembered(torch.cat((remembered(seen[:30], labels, key, 4), seen[30:])), labels, key, 4)
    assert set(kept.tolist()) == set(again.tolist())
    for label in range(3):
        same = key[labels == label]
        assert key[kept[labels[kept] == label]].max() == same.sort().values[3]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("n_pixels", [64, 784])
def test_head_grows_around_its_rows(kind, n_pixels):
    model, images = GrowingNet(kind, n_pixels, 5, 4, 0), torch.rand(3, n_pixels)
    before, head = model(images), model.head
    assert not model.grow(5)
    assert model.head is head
    assert model.grow(6)
    torch.testing.assert_close(model(images)[:, :5], before)
    other = GrowingNet(kind, n_pixels, 5, 4, 0)
    other.grow(6)
    assert torch.equal(other.head.weight, model.head.weight)


@pytest.mark.parametrize(
    ("steps", "unit", "n", "expected"),
    [
        (30, "iterations", 640, 30),
        (1, "epochs", 640, 10),
        (10, "epochs", 640, 100),
        (0.1, "epochs", 640, 1),
        (0.1, "epochs", 64, 1),
        (0.1, "epochs", 1600, 2),
    ],
)
def test_steps_of_an_update(steps, unit, n, expected):
    assert training.iterations(Condition("new", steps, unit), n, 64) == expected


@pytest.mark.parametrize("method", ["none", "wpl", "l2"])
def test_runs_repeat(method):
    arm = Arm(method, 0.01, None if method == "none" else 1.0)
    first, again = (training.train((SETUP, NEW, arm, 0)) for _ in range(2))
    assert first == again
    assert first != training.train((SETUP, NEW, arm, 1))
    assert len(first.test) == len(first.validation) == 4
    assert first.iterations == 9
    assert not first.diverged


def test_convolutions_run():
    run = training.train(
        (replace(SETUP, model="cnn", width=8, n_updates=1, start_iterations=100), NEW, Arm("wpl", 0.01, 1.0), 0)
    )
    assert run.test[0] > 0.3
    assert not run.diverged


def test_without_updates_only_old_classes_are_right():
    run = training.train((SETUP, NEW, Arm(UNCHANGED, 0.0), 0))
    assert run.iterations == 0
    assert run.test[0] > run.test[1] == run.test[2] > run.test[3]
    known = training.train((SETUP, NEW._replace(scenario="known"), Arm(UNCHANGED, 0.0), 0))
    assert len(set(known.test)) == 1


@pytest.mark.parametrize("pretraining", [150, 0])
def test_start_begins_with_what_all_samples_of_the_others_taught(digits, monkeypatch, pretraining):
    taught, teach = [], training._teach

    def spy(setup, model, stream, iterations, seed):
        before = model.features[0].weight.detach().clone()
        teach(setup, model, stream, iterations, seed)
        taught.append((before, model.features[0].weight.detach().clone(), stream, iterations))

    setup = replace(SETUP, n_others=5, pretraining=pretraining)
    monkeypatch.setattr(training, "_teach", spy)
    model = training._start(setup, "new", 0)
    assert model.head.out_features == 2
    begun, _, own, iterations = taught.pop()
    assert iterations == 60
    if not pretraining:
        assert not taught
        assert torch.equal(begun, GrowingNet("mlp", 64, 5, 64, 0).features[0].weight)
        return
    ((first, learnt, others, iterations),) = taught
    assert iterations == 150
    assert not torch.equal(first, learnt)
    assert torch.equal(begun, learnt)
    learnt_digits = digits.train[1][others.start].unique()
    assert len(learnt_digits) == 5
    assert torch.equal(others.start, torch.isin(digits.train[1], learnt_digits).nonzero().flatten())
    assert set(others.labels[others.start].tolist()) == set(range(5))
    arriving = digits.train[1][torch.cat([own.start, *(update.index for update in own.updates)])]
    assert not torch.isin(arriving, learnt_digits).any()
    assert training.pretrained_accuracy((setup, "new", 0)) > 0.9


def test_new_data_wait_where_lambda_is_one():
    clean, noisy = (
        training.train((SETUP, Condition("known", 3, share_old=1.0, noise=noise), Arm("none", 0.03), 0))
        for noise in (0.0, 0.4)
    )
    assert clean.test[:2] == noisy.test[:2]  # what came first was not looked at yet
    assert clean.test[2:] != noisy.test[2:]


def test_lambda_zero_does_not_touch_old_data(monkeypatch):
    asked = []

    def spy(old, new, share, n, generator):
        drawn = draw(old, new, share, n, generator)
        asked.append((len(old), set(drawn.tolist())))
        return drawn

    training._start.cache_clear()
    monkeypatch.setattr(training, "draw", spy)
    stream = training._stream(SETUP, "new", 0.0, 0)
    training.train((SETUP, NEW._replace(share_old=0.0), Arm("none", 0.01), 0))
    assert asked[0][1] <= set(stream.start.tolist())
    for update, (_, drawn) in zip(stream.updates, asked[1:], strict=True):
        assert drawn <= set(update.index.tolist())
    asked.clear()
    training.train((SETUP, NEW._replace(memory=4), Arm("none", 0.01), 0))
    assert [n_old for n_old, _ in asked] == [20, 24, 24]  # 4 of each of 5, then of 6 classes


def test_penalty_keeps_old_rows_and_the_model_near_its_anchor(monkeypatch):
    penalties, models = [], []

    class Spy(wplfast.WeightPlasticityLoss):
        def __init__(self, params, alpha):
            super().__init__(params, alpha)
            penalties.append(self)
            models.append(params)

        def rebind(self, params, **options):
            old = {name: value.clone() for name, value in self.fisher.items()}
            super().rebind(params, **options)
            rows = len(old["head.bias"])
            assert torch.equal(self.fisher["head.weight"][:rows], old["head.weight"])
            assert not self.fisher["head.weight"][rows:].any()

    monkeypatch.setattr(wplfast, "WeightPlasticityLoss", Spy)
    training.train((SETUP, NEW, Arm("wpl", 0.001, 1.0), 0))
    assert penalties[0].n_anchors == 1
    for name, parameter in models[0].named_parameters():
        assert torch.equal(penalties[0].theta_hat[name], parameter.detach())  # anchored after the last update
    assert penalties[0].fisher["head.weight"].shape[0] == 7
    assert all(value.isfinite().all() for value in penalties[0].fisher.values())


def test_strength_is_alpha_times_the_largest_fisher():
    for method in ("wpl", "l2"):
        wpl = training._started(SETUP, "new", Arm(method, 0.01, 5.0), 0)[1]
        largest = torch.cat([value.flatten() for value in wpl.fisher.values()]).max()
        assert wpl.alpha.item() * largest.item() == pytest.approx(5.0, rel=1e-5)


@pytest.mark.parametrize("arm", [Arm("none", 1e25), Arm("wpl", 0.1, 1e9)])
def test_diverged_runs_count_as_nothing_right(arm):
    run = training.train((SETUP, NEW, arm, 0))
    assert run.diverged
    assert len(run.test) == len(run.validation) == 4
    assert run.test[-1] == run.validation[-1] == 0


# ---- choice, statistics, report --------------------------------------------------------------------------------------


def test_every_method_has_as_many_trials():
    assert {len(plan.grid(method)) for method in METHODS} == {10}
    assert sorted({round(arm.lr * arm.strength, 6) for arm in plan.grid("wpl")}) == [0.1, 1.0]


class Fake:
    """Stands for the runner: accuracies by arm, no training."""

    def __init__(self):
        self.jobs = []

    def map(self, words, function, jobs):
        self.jobs += jobs
        return [self._run(*job[1:]) for job in jobs]

    def _run(self, condition, arm, seed):
        good = {"none": 0.03, "wpl": 0.01, "l2": 0.0001, UNCHANGED: 0.0}[arm.method]
        validation = 0.9 - abs(arm.lr - good) - 0.0001 * (arm.strength or 0)
        test = 0.5 + 0.1 * (arm.method == "wpl") + 0.01 * seed - condition.noise / 10
        return Run(seed, [0.7, test], [0.7, validation], 30, False)


@pytest.fixture
def record():
    part, _ = plan.run(SETUP, plan.studies("new", 30, 10.0), 3, 2, Fake())
    settings = {"sizes": {"update": 30}, "epochs": 10.0, "seeds": 3}
    return json.loads(json.dumps({"data": {"name": "MNIST"}, "settings": settings, "scenarios": {"new": part}}))


def test_choice_is_on_validation_and_jobs_run_once():
    runner, studies = Fake(), plan.studies("new", 30, 10.0)
    part, runs = plan.run(SETUP, studies, 3, 2, runner)
    assert len(runner.jobs) == len(set(runner.jobs)) == runs
    assert len(part["unchanged"]["curves"]) == 3
    for row in part["results"].values():
        for method, found in row["methods"].items():
            assert found["lr"] == {"none": 0.03, "wpl": 0.01, "l2": 0.0001}[method]
            assert found["mean"]["seeds"] == pytest.approx(
                [50 + 10 * (method == "wpl") + seed - 10 * row["condition"]["noise"] for seed in range(3)]
            )
            assert len(found["grid"]) == (10 if row["condition"]["noise"] == 0 else 0)
            assert found.get("lr_at_edge", False) == (method == "l2" and row["condition"]["noise"] == 0)
    shares = [condition.share_old for condition in studies["share"]]
    assert shares == [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]
    assert studies["memory"][0] == studies["share"][0]
    anchored = {name for name, row in part["results"].items() if "l2" in row["methods"]}
    assert anchored == {condition.title for condition in studies["memory"]}


def test_methods_that_are_not_asked_for_do_not_run(record):
    runner, studies = Fake(), plan.studies("new", 30, 10.0)
    part, _ = plan.run(SETUP, studies, 3, 2, runner, ["none"])
    assert {job[2].method for job in runner.jobs} == {"none", UNCHANGED}
    whole = record["scenarios"]["new"]
    for title, row in part["results"].items():
        assert row["methods"].keys() == {"none"}
        assert row["methods"]["none"]["mean"] == whole["results"][title]["methods"]["none"]["mean"]
    alone = {**record, "scenarios": {"new": json.loads(json.dumps(part))}}
    alone["settings"] = {**record["settings"], "methods": ["none"]}
    assert all(row[3:5] == ["", ""] for row in report.tables(alone)["new"].rows if len(row) > 1)
    assert report.tables(alone)["findings"] == report.tables(record)["findings"]
    assert report.figures(alone)[""].startswith(b"\x89PNG")


def test_difference_by_hand():
    mean, half = difference(spread([3.0, 5.0, 4.0]), spread([1.0, 2.0, 3.0]))  # 2, 3, 1: mean 2, std 1
    assert mean == pytest.approx(2)
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert difference(spread([1.0]), spread([0.5])) == (0.5, math.inf)


def shift(record, title, method, points):
    """Move an outcome of the record."""
    found = record["scenarios"]["new"]["results"][title]["methods"][method]
    found["mean"] = spread([value + points for value in found["mean"]["seeds"]])


def test_tables_follow_the_figures(record):
    usual = "30 iterations, lambda {}, noise 0, {}"
    shift(record, usual.format(0.5, "all old data"), "none", -3)
    shift(record, usual.format(0.75, "all old data"), "none", 2)
    shift(record, usual.format(0.5, "10 old samples of a class"), "none", 5)
    shift(record, usual.format(0, "all old data"), "wpl", -12)
    table = report.tables(record)["new"]
    assert all(len(row) in (1, len(table.columns)) for row in table.rows)
    assert table.rows[0] == ["update sets of new classes; never updated: 51.0 ± 1.0 %"]
    rows = {row[0]: row for row in table.rows if len(row) > 1}
    even = " ± 0.0"
    # iterations, three accuracies; change of no penalty; WPL against no penalty, the L2 anchor, no update
    assert rows["10 epochs"][2:] == ["51.0 ± 1.0", "61.0 ± 1.0", "", "", f"+10.0{even}", "", f"+10.0{even}"]
    assert rows["30 iterations"][5:] == [f"-3.0{even}", f"+13.0{even}", f"+10.0{even}", f"+10.0{even}"]
    assert rows["lambda = 0.75"][5:7] == ["", f"+8.0{even}"]  # the best one, which others are compared with
    assert rows["lambda = 1"][5] == f"-2.0{even}"
    assert rows["lambda = 0"][5:] == [f"-2.0{even}", f"-2.0{even}", f"-2.0{even}", f"-2.0{even}"]
    assert rows["40 % wrong, 10 epochs"][5] == f"-4.0{even}"
    assert [rows[name][5] for name in ("none", "10 of a class", "50 of a class", "all")] == [
        "", f"+5.0{even}", f"-5.0{even}", f"-3.0{even}",
    ]  # fmt: skip
    assert report.figures(record)[""].startswith(b"\x89PNG")


def test_findings_by_hand(record):
    usual, longest = "30 iterations, lambda {}, noise 0, all old data", "{} epochs, lambda 0.5, noise {}, all old data"
    as_it_is = ["no (+0.0 ± 0.0)", "no (0)", "no (+0.0 ± 0.0)", "yes (+0.0 ± 0.0)", "yes (-1.0 ± 0.0)"]
    (row,) = report.tables(record)["findings"].rows
    assert row == ["MNIST, new classes", "yes (+0.0 ± 0.0)", *as_it_is]
    shift(record, usual.format(0.5), "none", -1.5)
    shift(record, longest.format(0.1, 0), "none", -1.5)
    shift(record, usual.format(0.75), "none", 2.5)
    shift(record, longest.format(10, 0.1), "none", -2.5)
    record["settings"] |= {"n_others": 5, "pretraining": 7, "model": "cnn"}
    (row,) = report.tables(record)["findings"].rows
    assert row == [
        "MNIST, new classes, convolutions, 5 others learnt before", "no (-1.5 ± 0.0)", "yes (-1.5 ± 0.0)", "yes (0.75)",
        "yes (-2.5 ± 0.0)", "no (-2.5 ± 0.0)", "no (-3.5 ± 0.0)",
    ]  # fmt: skip
    found = record["scenarios"]["new"]["results"][longest.format(0.1, 0)]["methods"]["none"]
    found["mean"] = spread([value + more for value, more in zip(found["mean"]["seeds"], (-9, 0, 9), strict=True)])
    record["settings"]["pretraining"] = 0
    (row,) = report.tables(record)["findings"].rows
    assert row[0] == "MNIST, new classes, convolutions, 5 others left out"
    assert row[2].startswith("no (-1.5 ± 22.4")  # 9 * 4.3 / sqrt(3): not clearly less


# ---- command ---------------------------------------------------------------------------------------------------------


def test_smoke_run_writes_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "LEARNING_RATES", (0.01,))
    monkeypatch.setattr(plan, "PENALTY_RATES", (0.01,))
    monkeypatch.setattr(plan, "PULLS", {"wpl": (0.3,), "l2": (0.3,)})
    assert fine_tuning.main([*TINY, "--scenarios", "new", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine_tuning.json", "fine_tuning.png"]
    record = json.loads((tmp_path / "fine_tuning.json").read_text())
    assert (tmp_path / "fine_tuning.png").read_bytes().startswith(b"\x89PNG")
    assert record["versions"]["torch"] == torch.__version__
    assert record["data"]["train"] + record["data"]["validation"] + record["data"]["test"] == 1797
    rows = record["scenarios"]["new"]["results"].values()
    assert all({"none", "wpl"} <= row["methods"].keys() for row in rows)
    assert all(len(found["curves"]) == 2 for row in rows for found in row["methods"].values())
    printed = capsys.readouterr().out
    assert all(table.text() in printed for table in report.tables(record).values())


def test_smoke_run_with_other_classes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "LEARNING_RATES", (0.01,))
    options = ["--others", "5", "--pretraining", "100", "--methods", "--out", str(tmp_path)]
    assert fine_tuning.main([*TINY, *options]) == 0
    record = json.loads((tmp_path / "fine_tuning.json").read_text())
    assert record["settings"]["methods"] == ["none"]
    assert (record["settings"]["n_others"], record["settings"]["pretraining"]) == (5, 100)
    accuracies = [part["pretrained"]["seeds"] for part in record["scenarios"].values()]
    assert accuracies[0] == accuracies[1]  # the same network
    assert min(accuracies[0]) > 20  # of five classes, by two units a layer
    printed = capsys.readouterr().out
    assert "% of the other classes" in printed
    assert "5 others learnt before" in printed


@pytest.mark.parametrize(
    "options",
    [
        ["--seeds", "0"], ["--updates", "11"], ["--epochs", "-1"], ["--sizes", "1", "2"], ["--scenarios", "other"],
        ["--others", "1"], ["--others", "7"], ["--methods", "ewc"],
    ],
)  # fmt: skip
def test_bad_option_exits_with_2(options, capsys):
    with pytest.raises(SystemExit) as caught:
        fine_tuning.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--data", "missing"], ["--device", "nonsense"], ["--sizes", "500", "20", "60"]], ids=lambda o: o[0]
)
def test_bad_input_is_one_line_and_leaves_results_alone(tmp_path, capsys, options):
    (tmp_path / "fine_tuning.json").write_text("old")
    assert fine_tuning.main([*TINY, *options, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
