"""The search over recurrent cells, tiny: sampler, penalty, statistics by hand; its reader with damaged files."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

import wplfast
from benchmarks.experiments.search import command, summary
from benchmarks.experiments.search.controller import Controller
from benchmarks.experiments.search.forgetting import forgetting
from benchmarks.experiments.search.kept import Kept
from benchmarks.experiments.search.loop import Run, Setup, search
from benchmarks.experiments.search.plasticity import Plasticity, Schedule
from benchmarks.experiments.search.problem import Decision
from benchmarks.experiments.search.reference import ReferencePenalty
from benchmarks.experiments.search.reinforce import Policy, Reinforce
from benchmarks.experiments.text_search import __main__ as text_search
from benchmarks.experiments.text_search import report
from benchmarks.experiments.text_search.cells import SharedCells, Sizes, decisions, describe, edges
from benchmarks.experiments.text_search.problem import Batches, Stream, TextProblem
from benchmarks.plumbing.data import DataError
from benchmarks.plumbing.text import Files, Text, columns, load_text

CELL = (0, 0, 1, 0, 3, 1, 2)  # tanh; relu and sigmoid read block 0, identity reads block 1: 2 and 3 are loose
SHORT = ("--epochs", "3", "--start", "1", "--architectures", "2", "--minibatches", "2", "--controller-steps", "2")
TINY = (
    *SHORT,
    "--seeds",
    "1",
    "--tuning-seeds",
    "1",
    "--lr",
    "1",
    "2",
    "--alpha",
    "0.1",
    "1",
    "--hidden",
    "8",
    "--batch-size",
    "4",
)
TINY += ("--length", "5", "--vocabulary", "40", "--workers", "0")


pytestmark = pytest.mark.usefixtures("one_thread")


def problem(seed=0, batch=4, cover="used"):
    generator = torch.Generator().manual_seed(1)
    parts = (torch.randint(20, (400,), generator=generator) for _ in range(3))
    text = Text(*parts, words=tuple(map(str, range(20))))
    return TextProblem(text, Sizes(20, 6, 4), Batches(batch, 5), seed, cover=cover)


def edges_in_use():
    return [f"{j}-{block}" for j, block in edges(CELL)]


def setup(**changes):
    schedule = Schedule(start=1, reset_every=2)
    small = Setup(4, 3, 2, derive=2, policy=Policy(0.01, 2), schedule=schedule)
    return replace(small, **changes)


# ---- the controller ------------------------------------------------------------------------------------------------


def test_sampler_of_an_even_controller_by_hand():
    controller = Controller([Decision("a", 4), Decision("b", 1), Decision("a", 3), Decision("b", 2)], hidden=5)
    for parameter in controller.parameters():
        torch.nn.init.zeros_(parameter)
    sample = controller.sample(4000, torch.Generator().manual_seed(0))
    expected = math.log(4 * 1 * 3 * 2)
    torch.testing.assert_close(sample.log_probabilities, torch.full((4000,), -expected))
    torch.testing.assert_close(sample.entropies, torch.full((4000,), expected))
    counts = [[sum(c[i] == option for c in sample.architectures) for option in range(n)] for i, n in ((0, 4), (2, 3))]
    assert all(abs(count - 1000) < 100 for count in counts[0])
    assert all(abs(count - 4000 / 3) < 110 for count in counts[1])


def test_later_decisions_see_earlier_ones_and_probabilities_add_up():
    controller = Controller([Decision("a", 2), Decision("b", 3)], hidden=4, temperature=0.05)
    drawn = controller.sample(300, torch.Generator().manual_seed(0))
    likely = dict(zip(drawn.architectures, drawn.log_probabilities.exp().tolist(), strict=True))
    assert len(likely) == 6
    assert sum(likely.values()) == pytest.approx(1, abs=1e-5)
    given = [
        [likely[first, second] / sum(likely[first, k] for k in range(3)) for second in range(3)] for first in (0, 1)
    ]
    assert given[0] != pytest.approx(given[1], abs=1e-3)


def test_reinforce_by_hand():
    controller = Controller([Decision("a", 2)], hidden=3)
    reinforce = Reinforce(controller, Policy(0.1, batch=1, baseline_decay=0.75), torch.Generator().manual_seed(0))
    assert reinforce.step(lambda choices: 4.0) == [4.0]
    assert reinforce.baseline == 4.0  # the first rewards are their own baseline
    assert reinforce.step(lambda choices: 8.0) == [8.0]
    assert reinforce.baseline == pytest.approx(0.75 * 4 + 0.25 * 8)


def test_reinforce_finds_what_is_rewarded():
    controller = Controller([Decision("a", 3), Decision("b", 2)], hidden=8)
    generator = torch.Generator().manual_seed(0)
    reinforce = Reinforce(controller, Policy(0.02, batch=8), generator)
    for _ in range(60):
        reinforce.step(lambda choices: float(choices == (2, 1)))
    found = controller.sample(200, generator).architectures
    assert sum(choices == (2, 1) for choices in found) > 150  # 33 by chance


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


# ---- the penalty -----------------------------------------------------------------------------------------------------


def test_schedule_by_hand():
    schedule = Schedule(start=2, reset_every=3, decay=0.5, decay_after=4)
    assert [schedule.alpha(8.0, epoch) for epoch in range(7)] == [0, 0, 8, 8, 8, 4, 2]
    assert [epoch for epoch in range(12) if schedule.resets(epoch)] == [5, 8, 11]
    assert not any(replace(schedule, reset_every=0).resets(epoch) for epoch in range(12))


def test_penalty_anchors_what_was_used_and_forgets_on_schedule():
    weights = {name: torch.ones(2, requires_grad=True) for name in "ab"}
    plasticity = Plasticity(weights, 2.0, Schedule(start=1, rate=0.5, reset_every=2, normalize=None))
    plasticity.begin_epoch(0)
    assert not plasticity.on
    plasticity.begin_epoch(1)
    assert plasticity.on
    plasticity.learn({"a": torch.tensor([2.0, 4.0])}, ["a"])
    plasticity.learn({"b": torch.tensor([8.0, 8.0])}, ["b"])
    with torch.no_grad():
        weights["a"].add_(1)
        weights["b"].add_(2)
    assert plasticity.add_grad_(["a"]).item() == pytest.approx(0.5 * 2 * (1 + 2))  # F = rate * F_new
    assert weights["a"].grad.tolist() == [2.0, 4.0]
    assert weights["b"].grad is None
    plasticity.learn({"a": torch.tensor([2.0, 4.0])}, ["a"])  # F = 0.5 [1, 2] + 0.5 [2, 4], anchored at 2
    assert plasticity.penalty.fisher["a"].tolist() == [1.5, 3.0]
    assert plasticity.penalty.theta_hat["a"].tolist() == [2.0, 2.0]
    assert plasticity.penalty.theta_hat["b"].tolist() == [1.0, 1.0]
    plasticity.begin_epoch(3)
    assert plasticity.penalty.n_anchors == 0
    assert plasticity.add_grad_(["b"]).item() == 0


def test_published_way_agrees_where_a_batch_is_one_sample():
    one = problem(batch=1)
    active = one.active(CELL)
    ours, published = Plasticity(one.weights, 3.0, Schedule(0, normalize=None)), ReferencePenalty(one.weights, 3.0, 0.9)
    ours.begin_epoch(0)
    given = one.fisher_pass(CELL)
    published.learn(given, active)
    weights = {name: one.weights[name] for name in active}
    ours.learn(wplfast.fisher_diagonal(given.model, [given.batch], given.loss_fn, params=weights), active)
    with torch.no_grad():
        for weight in one.weights.values():
            weight.add_(0.1)
    assert ours.add_grad_(active).item() == pytest.approx(published.value(active).item(), rel=1e-4)
    for name, gradient in zip(active, published.gradients(active), strict=True):
        torch.testing.assert_close(one.weights[name].grad, gradient, rtol=1e-4, atol=1e-9)


# ---- the search ------------------------------------------------------------------------------------------------------


def test_search_repeats_and_arms_differ_only_from_the_start_on():
    runs = [search(problem(), setup(), 0, 1.0, alpha) for alpha in (None, None, 10.0)]
    assert runs[0].epochs == runs[1].epochs
    assert runs[0].final == runs[1].final
    assert runs[2].epochs[0] == runs[0].epochs[0]
    assert [epoch["alpha"] for epoch in runs[2].epochs] == [0, 10, 10, 10]
    assert runs[2].epochs[1]["error_before"] != runs[0].epochs[1]["error_before"]
    timed = runs[2].times
    assert timed["penalty"]["count"] == timed["cross-entropy"]["count"] == 3 * 3 * 2
    assert timed["Fisher"]["count"] + timed["Fisher, verified"]["count"] == timed["anchor"]["count"] == 3 * 3
    assert "penalty" not in runs[0].times


def test_timing_the_published_way_changes_nothing():
    plain, compared = (search(problem(), setup(compare=compare), 0, 1.0, 1.0) for compare in (False, True))
    assert plain.epochs == compared.epochs
    assert compared.times["penalty, as published"]["count"] == compared.times["penalty"]["count"]


def test_strong_penalty_holds_the_weights():
    moved = []
    for alpha in (None, 10.0):
        one, active = problem(), edges_in_use()
        before = {name: one.weights[name].detach().clone() for name in active}
        plasticity = Plasticity(one.weights, alpha, Schedule(0))
        plasticity.begin_epoch(0)
        if plasticity.on:
            plasticity.learn({name: torch.ones_like(before[name]) for name in active}, active)
        for _ in range(20):
            one._train.position = 0  # the same gradient over and over
            one.train_loss(CELL).backward()
            if plasticity.on:
                plasticity.add_grad_(active)
            with torch.no_grad():
                for name in active:
                    one.weights[name] -= 0.1 * one.weights[name].grad
            one.model.zero_grad()
        moved.append(sum((one.weights[name] - before[name]).norm().item() for name in active))
    assert moved[1] < 0.2 * moved[0]


def test_divergence_ends_a_run():
    one = problem()
    with torch.no_grad():
        one.model.word.bias.fill_(math.nan)
    run = search(one, setup(), 0, 1.0, 1.0)
    assert run.diverged
    assert (run.epochs, run.final, summary.score(run)) == ([], {}, 0.0)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_forgetting_by_hand():
    before = [10, 60, 20, 30, 40, 50, 70]
    after = [11, 160, 22, 33, 44, 55, 70]
    assert forgetting(before, after) == {"mean": pytest.approx(115 / 7), "best5": 3.0, "max": 100.0}
    assert forgetting([3.0], [2.0]) == {"mean": -1.0, "best5": -1.0, "max": -1.0}


def curves(seed, alpha, means, reward, diverged=False, lr=1.0):
    keys = ("alpha", "loss", "error_before", "error_after")
    epochs = [{**dict.fromkeys(keys, 1.0), "mean": m, "best5": 2 * m, "max": 3 * m, "reward": reward} for m in means]
    times = {part: {"milliseconds": 2.0, "count": 1} for part in ("cross-entropy", "clipping and step")}
    if alpha is not None:
        times |= {part: {"milliseconds": 1.0, "count": 1} for part in ("penalty", "Fisher", "anchor")}
    final = {} if diverged else {"validation": 5.0, "test": 6.0, "choices": [0]}
    return Run(seed, lr, alpha, diverged, epochs, times, final)


def test_verdicts_by_hand():
    ce = [curves(0, None, [99, 10, 30], 1.0), curves(1, None, [99, 10, 50], 3.0)]
    wpl = [curves(0, 1.0, [99, 5, 18], 1.5), curves(1, 1.0, [99, 5, 2], 2.5)]
    found = summary.summarise({"ce": ce, "wpl": wpl}, 1)
    assert found["worst_epoch"] == 2  # epoch 0 is before the penalty
    assert [found["verdicts"][m]["ce"] for m in ("mean", "best5", "max")] == [40, 80, 120]
    assert [found["verdicts"][m]["reduction_percent"] for m in ("mean", "best5", "max")] == [75] * 3
    assert all(found["verdicts"][m]["reached"] for m in ("mean", "best5", "max", "reward"))
    assert found["arms"]["ce"]["after_start"]["mean"] == {"mean": 25, "std": pytest.approx(50**0.5), "seeds": [20, 30]}
    weak = summary.summarise({"ce": ce, "wpl": [curves(s, 1.0, [99, 5, 20], 1.0) for s in range(2)]}, 1)
    assert weak["verdicts"]["mean"] == {
        "ce": 40, "wpl": 20, "reduction_percent": 50, "goal_percent": 60, "reached": False,
    }  # fmt: skip
    assert weak["verdicts"]["max"]["reached"]
    assert not weak["verdicts"]["reward"]["reached"]
    nothing = summary.summarise({"ce": [curves(0, None, [9, -1, -2], 1)], "wpl": [curves(0, 1.0, [9, -3, 1], 1)]}, 1)
    assert nothing["verdicts"]["mean"]["reduction_percent"] is None


def test_the_strongest_alpha_within_a_standard_error_is_chosen():
    rewards = {1.0: (0.5, 0.7), 2.0: (0.51, 0.5), 3.0: (0.4, 0.59)}  # means 0.6, 0.505, 0.495; standard error 0.1
    runs = [curves(seed, alpha, [1], reward[seed]) for alpha, reward in rewards.items() for seed in range(2)]
    assert summary.best(runs, "alpha") == 1.0
    assert summary.best(runs, "alpha", strongest=True) == 2.0
    assert summary.grid(runs, "alpha")["chosen"] == 2.0
    alone = [curves(0, alpha, [1], reward[0]) for alpha, reward in rewards.items()]
    assert summary.best(alone, "alpha", strongest=True) == 2.0  # one seed has no scatter: the best alone


def test_runs_that_diverge_leave_both_arms_and_score_nothing():
    ce = [curves(0, None, [1, 2], 1.0), curves(1, None, [1, 4], 1.0)]
    wpl = [curves(0, 9.0, [1], 1.0, diverged=True), curves(1, 9.0, [1, 1], 1.0)]
    found = summary.summarise({"ce": ce, "wpl": wpl}, 1)
    assert found["seeds"] == 1
    assert found["arms"]["wpl"]["diverged"] == 1
    assert found["verdicts"]["mean"]["ce"] == 4
    grid = summary.grid([*wpl, curves(0, 1.0, [1, 1], 0.6), curves(1, 1.0, [1, 1], 0.6)], "alpha")
    assert grid["chosen"] == 1.0  # 0.6 against (0 + 1) / 2
    assert grid["at_edge"]
    assert [row["forgetting"] for row in grid["values"]] == [1.0, 1.0]
    assert summary.grid([curves(0, 1.0, [50, 3, 5], 1.0), curves(1, 1.0, [9], 1.0, True)], "alpha", 1)["values"] == [
        {"alpha": 1.0, "reward": 0.5, "seeds": [1.0, 0.0], "forgetting": 4.0}
    ]
    everything = summary.summarise({"ce": ce[:1], "wpl": wpl[:1]}, 1)
    assert "verdicts" not in everything
    assert "NaN" not in json.dumps(everything)


def test_report_names_verdicts_times_and_divergence():
    ce, wpl = [curves(0, None, [9, 4, 2], 1.0)], [curves(0, 1.0, [9, 1, 1], 0.5)]
    record = {
        "summary": summary.summarise({"ce": ce, "wpl": wpl}, 1),
        "words": text_search.WORDS,
        "data": {"name": "NAME", "train": 1234},
        "settings": {"task": {"cover": "cells"}, "minibatches": 2, "epochs": 3, "architectures": 4, "device": "cpu"},
        "hardware": {"cpu": "CPU"},
        "workers": 1,
        "wall_seconds": 3.0,
        "tuning": {"lr": summary.grid(ce, "lr"), "alpha": summary.grid(wpl, "alpha")},
    }
    table, section = report.table(record), report.markdown(record)
    for text in (table, section):
        assert "75 % less; goal 60 % less: reached" in text
        assert "goal: not lower: not reached" in text
        assert "penalty 17 %, Fisher 8.3 % and anchor 8.3 %" in text  # 1, 1/2, 1/2 of 4 + 2
    assert "1,234" in section
    assert "the cells' weights alone" in section
    assert "at the edge" in section
    assert report.figure(record).startswith(b"\x89PNG")
    record["summary"] = summary.summarise({"ce": ce, "wpl": [replace(wpl[0], diverged=True)]}, 1)
    assert "all runs diverged" in report.table(record)
    assert "Diverged, and left out in both arms: 1 with WPL" in report.markdown(record)
    assert report.figure(record).startswith(b"\x89PNG")


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
    assert {run["seed"] for arm in record["runs"].values() for run in arm} == {0}
    printed = capsys.readouterr().out
    assert "cross-entropy alone" in printed
    assert "As published" in printed
    assert "goal" in report.markdown(record)


def test_finished_runs_are_taken_over(tmp_path):
    calls = []

    def function(job):
        calls.append(job)
        return search(problem(job), setup(), job, 1.0, 1.0)

    first, again = (Kept(function, tmp_path, "1")(3) for _ in range(2))
    assert first == again
    assert calls == [3]
    Kept(function, tmp_path, "1")(4)
    Kept(function, tmp_path, "2")(3)
    assert calls == [3, 4, 3]


def test_resumed_comparison_gives_the_same_figures(tmp_path, monkeypatch):
    records = []
    for _ in range(2):
        assert text_search.main([*TINY, "--resume", "--out", str(tmp_path)]) == 0
        records.append(json.loads((tmp_path / "text_search.json").read_text()))
        monkeypatch.setattr(text_search, "run", lambda job: pytest.fail("all runs are there"))
    assert records[0]["summary"] == records[1]["summary"]
    assert len(list((tmp_path / "runs").iterdir())) == 2 + 2 + 2


def test_what_is_given_goes_before_the_papers_sizes():
    options = text_search._parse(["--paper", "--hidden", "32", "--dropout", "0", "0", "0.1"])
    assert (options.hidden, options.blocks, options.length, options.batch_size) == (32, 12, 35, 64)
    assert (options.dropout, options.epochs, options.controller_steps) == ([0, 0, 0.1], 150, 2000)
    assert text_search._parse([]).blocks == 4


@pytest.mark.parametrize(
    "options",
    [
        ["--seeds", "0"], ["--lr", "-1"], ["--alpha", "x"], ["--blocks", "1"], ["--normalize", "sum"],
        ["--dropout", "0.1"], ["--held-out", "x.txt"], ["--rate", "1.5"], ["--start", "-1"],
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
    assert text.train.tolist() == [1, 3, 1, 0, 2, 0, 1, 3, 2]
    assert text.validation.tolist() == [1, 0, 2]
    assert text.sizes == {"train": 9, "validation": 3, "test": 4, "vocabulary": 4}
    halves = load_text(Files(str(folder), train="valid.txt", held_out="train.txt"), 9)
    assert (len(halves.train), len(halves.validation), len(halves.test)) == (3, 4, 5)


def test_python_ships_a_text():
    text = load_text(Files(), 500)
    assert len(text.words) == 500
    assert len(text.train) > 50_000
    assert min(len(text.validation), len(text.test)) > 5_000


def test_columns_and_segments_by_hand():
    words = torch.arange(23)
    assert columns(words, 2).tolist() == [list(range(11)), list(range(11, 22))]
    stream = Stream(words, Batches(2, 4), "train")
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
    assert command._TUNING_SEED >= 1000


def test_records_name_folders_without_where_they_lie():
    settings = {"files": {"folder": "/home/someone/ptb", "train": "train.txt"}, "vocabulary": 50}
    assert command._portable(settings) == {"files": {"folder": "ptb", "train": "train.txt"}, "vocabulary": 50}
