"""Incremental fine-tuning: the sampler, the stream, one run, and the experiment, tiny."""

from __future__ import annotations

import doctest
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

import wplfast
from benchmarks.experiments.fine_tuning import __main__ as fine_tuning
from benchmarks.experiments.fine_tuning import figure, plan, report, training
from benchmarks.experiments.fine_tuning.model import GrowingNet
from benchmarks.experiments.fine_tuning.results import Scenario, difference
from benchmarks.experiments.fine_tuning.sampler import OldNewSampler
from benchmarks.experiments.fine_tuning.settings import METHODS, UNCHANGED, Arm, Condition, Run, Setup
from benchmarks.experiments.fine_tuning.stream import Sizes, make_stream, remembered
from benchmarks.experiments.fine_tuning.verdicts import verdicts
from benchmarks.plumbing.data import DataError, load_split
from benchmarks.plumbing.spread import spread

SETUP = Setup(Sizes(30, 20, 60), start_iterations=60, n_updates=3)
NEW = Condition("new", 3)
TINY = ["--updates", "1", "--iterations", "1", "--epochs", "0.2", "--start", "5", "--seeds", "2"]
TINY += ["--tuning-seeds", "1", "--workers", "0", "--width", "2"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- sampler ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("n_old", "n_new"), [(1000, 10), (10, 1000)])
def test_shares_are_binomial_whatever_the_sizes(share, n_old, n_new):
    n = 20_000
    drawn = torch.tensor(list(OldNewSampler(range(n_old), range(n_old, n_old + n_new), share, n, seeded())))
    counts = drawn.bincount(minlength=n_old + n_new)
    assert len(drawn) == n == counts.sum()
    for part, expected in (counts[:n_old], share), (counts[n_old:], 1 - share):
        assert abs(part.sum() - n * expected) <= 5 * math.sqrt(n * expected * (1 - expected))
        p = expected / len(part)  # of one sample
        assert (part - n * p).abs().max() <= 5 * math.sqrt(n * p * (1 - p)) + 5


def test_draws_are_independent_minibatches():
    sampler = OldNewSampler([5, 6], [7], 0.25, 64 * 400, seeded(1))
    old = np.array([sum(index != 7 for index in batch) for batch in BatchSampler(sampler, 64, drop_last=False)])
    assert len(old) == 400
    assert old.mean() == pytest.approx(16, abs=5 * math.sqrt(12 / 400))
    assert old.var() == pytest.approx(12, rel=0.4)  # Binomial(64, 1/4), not a fixed 16


def test_indices_are_those_given_in_any_form():
    for old, new in (([3, 9], [4]), (torch.tensor([3, 9]), (4,)), (np.array([3, 9]), range(4, 5))):
        assert set(OldNewSampler(old, new, 0.5, 100, seeded())) == {3, 4, 9}
    assert set(OldNewSampler([], [4], 0.0, 100, seeded())) == {4}
    assert set(OldNewSampler([3], torch.empty(0), 1.0, 100, seeded())) == {3}


def test_seeds_decide_and_passes_differ():
    first, second = (OldNewSampler(range(50), range(50, 60), 0.5, 100, seeded(3)) for _ in range(2))
    drawn = list(first)
    assert drawn == list(second)
    assert drawn != list(first)
    assert drawn != list(OldNewSampler(range(50), range(50, 60), 0.5, 100, seeded(4)))
    free = OldNewSampler(range(50), range(50, 60), 0.5, 100)
    torch.manual_seed(0)
    passes = list(free), list(free)
    assert passes[0] != passes[1]
    torch.manual_seed(0)
    assert passes == (list(free), list(free))


def test_length_is_the_number_of_draws():
    sampler = OldNewSampler(range(5), range(5, 9), 0.5, 17)
    assert len(sampler) == len(list(sampler)) == 17
    assert len(DataLoader(TensorDataset(torch.arange(9)), batch_size=4, sampler=sampler)) == 5


def test_workers_do_not_change_the_order():
    data = TensorDataset(torch.arange(60))
    loaded = [
        torch.cat([batch for (batch,) in DataLoader(data, batch_size=8, sampler=sampler, num_workers=workers)])
        for workers in (0, 2)
        for sampler in [OldNewSampler(range(50), range(50, 60), 0.5, 64, seeded(5))]
    ]
    assert torch.equal(*loaded)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0], [1], -0.1, 5), r"share_old must be in \[0, 1\], got -0.1"),
        (([0], [1], float("nan"), 5), "got nan"),
        (([0], [1], 0.5, 0), "num_samples must be an integer of at least 1, got 0"),
        (([0], [1], 0.5, 2.5), "got 2.5"),
        (([0], [1], 0.5, True), "got True"),
        (([], [1], 0.5, 5), "old is empty, but share_old=0.5 gives it a share of 0.5"),
        (([0], [], 0.25, 5), "new is empty, but share_old=0.25 gives it a share of 0.75"),
    ],
)
def test_bad_arguments_of_the_sampler(arguments, words):
    with pytest.raises(ValueError, match=words):
        OldNewSampler(*arguments)


def test_example_of_the_sampler():
    module = sys.modules[OldNewSampler.__module__]
    assert doctest.testmod(module) == (0, 4)


# ---- stream ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_split(None, 0).train[1]


@pytest.mark.parametrize(("scenario", "start", "classes"), [("known", 10, [10] * 10), ("new", 5, [6, 6, 7, 7, 8, 8])])
def test_stream_brings_each_sample_once_and_one_class_at_a_time(digits, scenario, start, classes):
    stream = make_stream(digits, scenario, SETUP.sizes, 0.0, 10, 0)
    assert stream.start_classes == start
    per_class = {"known": 20, "new": 60}[scenario]
    assert stream.labels[stream.start].bincount().tolist() == [per_class] * start
    assert [update.n_classes for update in stream.updates][: len(classes)] == classes
    assert all(len(update.index) == 30 and len(digits[update.index].unique()) == 1 for update in stream.updates)
    arrived = torch.cat([stream.start, *(update.index for update in stream.updates)])
    assert len(arrived.unique()) == len(arrived)
    assert torch.equal(stream.labels, stream.rank[digits])
    brought = [int(stream.labels[update.index[0]]) for update in stream.updates]
    assert sorted(brought) == (list(range(10)) if scenario == "known" else sorted([*range(5, 10)] * 2))


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
    known = training.train((SETUP, replace(NEW, scenario="known"), Arm(UNCHANGED, 0.0), 0))
    assert len(set(known.test)) == 1


def test_new_data_wait_where_lambda_is_one():
    clean, noisy = (
        training.train((SETUP, Condition("known", 3, share_old=1.0, noise=noise), Arm("none", 0.03), 0))
        for noise in (0.0, 0.4)
    )
    assert clean.test[:2] == noisy.test[:2]  # what came first was not looked at yet
    assert clean.test[2:] != noisy.test[2:]


def test_lambda_zero_does_not_touch_old_data(monkeypatch):
    asked = []

    class Spy(OldNewSampler):
        def __iter__(self):
            drawn = list(super().__iter__())
            asked.append((self._share_old, len(self._old), set(drawn)))
            yield from drawn

    training._start.cache_clear()
    monkeypatch.setattr(training, "OldNewSampler", Spy)
    stream = training._data(SETUP, "new", 0.0, 0)[1]
    training.train((SETUP, replace(NEW, share_old=0.0), Arm("none", 0.01), 0))
    assert asked[0][2] <= set(stream.start.tolist())
    for update, (_, _, drawn) in zip(stream.updates, asked[1:], strict=True):
        assert drawn <= set(update.index.tolist())
    asked.clear()
    training.train((SETUP, replace(NEW, memory=4), Arm("none", 0.01), 0))
    assert [n_old for _, n_old, _ in asked] == [20, 24, 24]  # 4 of each of 5, then of 6 classes


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
    """Stands for the workers: accuracies by arm, no training."""

    def __init__(self):
        self.jobs = []

    def map(self, function, jobs):
        self.jobs += jobs
        return [self._run(*job[1:]) for job in jobs]

    def _run(self, condition, arm, seed):
        good = {"none": 0.03, "wpl": 0.01, "l2": 0.0001, UNCHANGED: 0.0}[arm.method]
        validation = 0.9 - abs(arm.lr - good) - 0.0001 * (arm.strength or 0)
        test = 0.5 + 0.1 * (arm.method == "wpl") + 0.01 * seed - condition.noise / 10
        return Run(seed, [0.7, test], [0.7, validation], 30, False)


def test_choice_is_on_validation_and_jobs_run_once():
    workers, studies = Fake(), plan.studies("new", 30, 10.0)
    pairs = plan.keys(studies)
    outcomes, unchanged = plan.run(SETUP, pairs, 3, 2, workers)
    assert len(workers.jobs) == len(set(workers.jobs)) == plan.n_runs(pairs, 3, 2)
    assert len(unchanged) == 3
    for (condition, method), outcome in outcomes.items():
        assert outcome.arm.lr == {"none": 0.03, "wpl": 0.01, "l2": 0.0001}[method]
        assert [run.seed for run in outcome.runs] == [0, 1, 2]
        assert len(outcome.grid) == (10 if condition.noise == 0 else 0)
    shares = [condition.share_old for condition in studies["share"]]
    assert shares == [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]
    assert studies["memory"][0] == studies["share"][0]


def test_difference_by_hand():
    a, b = {"mean": spread([3.0, 5.0, 4.0])}, {"mean": spread([1.0, 2.0, 3.0])}
    mean, half = difference(a, b)  # 2, 3, 1: mean 2, std 1
    assert mean == pytest.approx(2)
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert difference({"mean": spread([1.0])}, {"mean": spread([0.5])}) == (0.5, math.inf)


@pytest.fixture
def record():
    workers, studies = Fake(), plan.studies("new", 30, 10.0)
    outcomes, unchanged = plan.run(SETUP, plan.keys(studies), 3, 2, workers)
    settings = {"sizes": {"update": 30}, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64, "iterations": 30}
    settings |= {"epochs": 10.0, "seeds": 3, "tuning_seeds": 2, "learning_rates": plan.LEARNING_RATES}
    part = fine_tuning.summarise(studies, outcomes, unchanged)
    made = {"data": {"name": "MNIST"}, "settings": settings, "scenarios": {"new": part}}
    return json.loads(json.dumps(made))


def shift(record, title, method, points):
    """Move an outcome of the record."""
    found = record["scenarios"]["new"]["results"][title]["methods"][method]
    for key in ("mean", "final"):
        found[key] = spread([value + points + 0.01 * i for i, value in enumerate(found[key]["seeds"])])


def holds(record, words):
    (found,) = [verdict for verdict in verdicts(Scenario(record, "new")) if words in verdict.claim]
    return found.holds


USUAL = "30 iterations, lambda {}, noise 0, all old data"


@pytest.mark.parametrize(
    ("words", "title", "changes"),
    [
        ("small constant", USUAL.format(0.5), {0.0: True, -0.9: True, -1.5: False, 2.0: True}),
        ("tenth", "0.1 epochs, lambda 0.5, noise 0, all old data", {0.0: False, -0.9: False, -1.5: True}),
        ("in between", USUAL.format(0.25), {1.0: True}),
        ("in between", USUAL.format(0), {1.0: False}),
        ("in between", USUAL.format(1), {1.0: False}),
        ("lambda = 0 overfits", USUAL.format(0), {0.0: False, -5.0: True}),
        ("lambda = 1 does", USUAL.format(1), {-1.9: True, -2.5: False}),
        ("10 % wrong", "10 epochs, lambda 0.5, noise 0.1, all old data", {0.0: True, -1.0: True, -4.0: False}),
    ],
)
def test_verdicts_follow_the_figures(record, words, title, changes):
    for points, expected in changes.items():
        moved = json.loads(json.dumps(record))
        shift(moved, title, "none", points)
        assert holds(moved, words) is expected, points


def test_verdicts_on_replacement(record):
    title = "WPL with no old data replaces the step to 10 old"
    assert holds(record, title) is None  # more old data bring nothing here
    idle = json.loads(json.dumps(record))
    shift(idle, "30 iterations, lambda 0.5, noise 0, 10 old samples of a class", "none", 5)
    idle["scenarios"]["new"]["unchanged"]["mean"] = spread([60.0, 62.0, 64.0])
    assert holds(idle, title) is None  # they do, but a model that is not updated is better
    (helps,) = [v for v in verdicts(Scenario(idle, "new")) if v.claim == "WPL helps at"]
    assert "no old data (+10.0 ± 0.0, but is not clearly above no update)" in helps.figures
    shift(record, "30 iterations, lambda 0.5, noise 0, 10 old samples of a class", "none", 5)
    assert holds(record, title) is True  # 10 points gained, 5 would do
    shift(record, "30 iterations, lambda 0.5, noise 0, 10 old samples of a class", "none", 10)
    assert holds(record, title) is False  # 15 would be needed
    assert holds(record, "Without old data") is True
    assert holds(record, "L2 anchor, clearly above in 4 of 4 and clearly below in 0") is None
    shift(record, USUAL.format(0), "wpl", -12)
    assert holds(record, title) is False
    assert holds(record, "L2 anchor, clearly above in 3 of 4 and clearly below in 1") is None
    assert holds(record, "Without old data") is False
    (hurts,) = [v for v in verdicts(Scenario(record, "new")) if v.claim == "WPL hurts at"]
    assert "no old data (-2.0" in hurts.figures


def test_report_is_made_from_the_record_alone(record):
    text, page = report.table(record), report.markdown(record)
    assert "lambda = 0.25" in text
    assert "40 % wrong, 10 epochs" in text
    assert page.startswith("### Incremental fine-tuning: MNIST")
    assert page.count("\n| ") >= 18
    assert "confirmed" in page
    assert "no penalty 0 of 13, WPL 0 of 13, L2 anchor (F = 1) 4 of 4." in page
    assert figure.draw(record).startswith(b"\x89PNG")


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
    assert report.table(record) in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [["--seeds", "0"], ["--updates", "11"], ["--epochs", "-1"], ["--sizes", "1", "2"], ["--scenarios", "other"]],
)
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
