"""What all searches share, tiny: controller, penalty, loop, statistics by hand."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from search_cases import CELL, edges_in_use, problem, setup

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

import wplfast
from benchmarks.experiments.harness.statistics import within_noise
from benchmarks.experiments.search import report
from benchmarks.experiments.search.controller import Controller, Policy, Reinforce
from benchmarks.experiments.search.loop import Run, forgetting, search
from benchmarks.experiments.search.penalty import ReferencePenalty, Schedule
from benchmarks.experiments.search.problem import Decision
from benchmarks.experiments.text_search import __main__ as text_search

pytestmark = pytest.mark.usefixtures("one_thread")


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


# ---- the penalty -----------------------------------------------------------------------------------------------------


def test_schedule_by_hand():
    schedule = Schedule(start=2, reset_every=3, decay=0.5, decay_after=4)
    assert [schedule.alpha(8.0, epoch) for epoch in range(7)] == [0, 0, 8, 8, 8, 4, 2]
    assert [epoch for epoch in range(12) if schedule.resets(epoch)] == [5, 8, 11]
    assert not any(replace(schedule, reset_every=0).resets(epoch) for epoch in range(12))


def test_penalty_anchors_what_was_used_and_forgets_on_schedule():
    weights = {name: torch.ones(2, requires_grad=True) for name in "ab"}
    wpl, schedule = wplfast.WeightPlasticityLoss(weights, 2.0), Schedule(1, 0.5, 2, None)
    assert [schedule.begin_epoch(wpl, 2.0, epoch) for epoch in (0, 1)] == [0, 2]
    assert wpl.alpha.item() == 2
    schedule.learn(wpl, {"a": torch.tensor([2.0, 4.0])}, ["a"])
    schedule.learn(wpl, {"b": torch.tensor([8.0, 8.0])}, ["b"])
    with torch.no_grad():
        weights["a"].add_(1)
        weights["b"].add_(2)
    assert wpl.add_grad_(active=["a"]).item() == pytest.approx(0.5 * 2 * (1 + 2))  # F = rate * F_new
    assert weights["a"].grad.tolist() == [2.0, 4.0]
    assert weights["b"].grad is None
    schedule.learn(wpl, {"a": torch.tensor([2.0, 4.0])}, ["a"])  # F = 0.5 [1, 2] + 0.5 [2, 4], anchored at 2
    assert wpl.fisher["a"].tolist() == [1.5, 3.0]
    assert wpl.theta_hat["a"].tolist() == [2.0, 2.0]
    assert wpl.theta_hat["b"].tolist() == [1.0, 1.0]
    schedule.begin_epoch(wpl, 2.0, 3)
    assert wpl.n_anchors == 0
    assert wpl.add_grad_(active=["b"]).item() == 0


def test_published_way_agrees_where_a_batch_is_one_sample():
    one = problem(batch=1)
    active = one.active(CELL)
    ours, published = wplfast.WeightPlasticityLoss(one.weights, 3.0), ReferencePenalty(one.weights, 3.0, 0.9)
    given = one.fisher_pass(CELL)
    published.learn(given, active)
    weights = {name: one.weights[name] for name in active}
    fisher = wplfast.fisher_diagonal(given.model, [given.batch], given.loss_fn, params=weights)
    Schedule(0, normalize=None).learn(ours, fisher, active)
    with torch.no_grad():
        for weight in one.weights.values():
            weight.add_(0.1)
    assert ours.add_grad_(active=active).item() == pytest.approx(published.value(active).item(), rel=1e-4)
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
    for alpha in (0.0, 10.0):
        one, active = problem(), edges_in_use()
        before = {name: one.weights[name].detach().clone() for name in active}
        wpl = wplfast.WeightPlasticityLoss(one.weights, alpha)
        Schedule(0).learn(wpl, {name: torch.ones_like(before[name]) for name in active}, active)
        for _ in range(20):
            one._train.position = 0  # the same gradient over and over
            one.train_loss(CELL).backward()
            wpl.add_grad_(active=active)
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
    assert (run.epochs, run.final, report.score(run)) == ([], {}, 0.0)


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


def test_goals_by_hand():
    ce = [curves(0, None, [99, 10, 30], 1.0), curves(1, None, [99, 10, 50], 3.0)]
    wpl = [curves(0, 1.0, [99, 5, 18], 1.5), curves(1, 1.0, [99, 5, 2], 2.5)]
    found = report.summarise({"ce": ce, "wpl": wpl}, 1)
    assert found["worst_epoch"] == 2  # epoch 0 is before the penalty
    assert [found["arms"]["ce"]["curves"][m]["mean"][2] for m in ("mean", "best5", "max")] == [40, 80, 120]
    assert report._goals(found) == [
        "40 to 10 (75 % less) *", "80 to 20 (75 % less) *", "120 to 30 (75 % less) *", "2 to 2 *",
    ]  # fmt: skip
    assert found["arms"]["ce"]["after_start"]["mean"] == {"mean": 25, "std": pytest.approx(50**0.5), "seeds": [20, 30]}
    weak = report.summarise({"ce": ce, "wpl": [curves(s, 1.0, [99, 5, 20], 1.0) for s in range(2)]}, 1)
    assert report._goals(weak) == [
        "40 to 20 (50 % less)", "80 to 40 (50 % less) *", "120 to 60 (50 % less) *", "2 to 1",
    ]  # fmt: skip
    nothing = report.summarise({"ce": [curves(0, None, [9, -1, -2], 1)], "wpl": [curves(0, 1.0, [9, -3, 1], 1)]}, 1)
    assert report._goals(nothing)[0] == "-1 to -3 (nothing forgotten)"


def test_runs_that_diverge_leave_both_arms_and_score_nothing():
    ce = [curves(0, None, [1, 2], 1.0), curves(1, None, [1, 4], 1.0)]
    wpl = [curves(0, 9.0, [1], 1.0, diverged=True), curves(1, 9.0, [1, 1], 1.0)]
    found = report.summarise({"ce": ce, "wpl": wpl}, 1)
    assert found["seeds"] == 1
    assert found["arms"]["wpl"]["diverged"] == 1
    assert found["arms"]["ce"]["curves"]["mean"]["mean"][found["worst_epoch"]] == 4
    grid = report.grid([*wpl, curves(0, 1.0, [1, 1], 0.6), curves(1, 1.0, [1, 1], 0.6)], "alpha")
    assert grid["chosen"] == 1.0  # 0.6 against (0 + 1) / 2
    assert grid["at_edge"]
    assert [row["forgetting"] for row in grid["values"]] == [1.0, 1.0]
    assert report.grid([curves(0, 1.0, [50, 3, 5], 1.0), curves(1, 1.0, [9], 1.0, True)], "alpha", 1)["values"] == [
        {"alpha": 1.0, "reward": 0.5, "seeds": [1.0, 0.0], "forgetting": 4.0}
    ]
    everything = report.summarise({"ce": ce[:1], "wpl": wpl[:1]}, 1)
    assert "worst_epoch" not in everything
    assert "NaN" not in json.dumps(everything)


def record_of(ce, wpl, cover="cells", layer_norm=False):
    return {
        "summary": report.summarise({"ce": ce, "wpl": wpl}, 1),
        "words": text_search.WORDS,
        "data": {"name": "NAME"},
        "settings": {"task": {"cover": cover, "sizes": {"layer_norm": layer_norm}}, "minibatches": 2},
        "workers": 1,
        "tuning": {"lr": report.grid(ce, "lr"), "alpha": report.grid(wpl, "alpha")},
    }


def test_tables_by_hand():
    ce, wpl = [curves(0, None, [9, 4, 2], 1.0)], [curves(0, 1.0, [9, 1, 1], 0.5)]
    record = record_of(ce, wpl)
    tables = report.tables(record)
    results = {row[0]: row[1:] for row in tables["results"].rows}
    assert results["mean difference, epoch 2"] == ["4.00 ± 0.00", "1.00 ± 0.00", ""]  # this epoch was picked
    assert results["best-5 mean difference, epochs 2 on"] == ["6.00 ± 0.00", "2.00 ± 0.00", "-4.00"]
    assert results["mean reward, last epochs"] == ["1.00 ± 0.00", "0.50 ± 0.00", "-0.50"]
    assert results["test perplexity, chosen at the end"] == ["6.00 ± 0.00", "6.00 ± 0.00", "+0.00"]
    goals = ["4 to 1 (75 % less) *", "8 to 2 (75 % less) *", "12 to 3 (75 % less) *", "1 to 0.5"]
    assert tables["goals"].rows == [["recurrent cells, NAME", "cells, alpha 1", *goals]]
    tried = ["1 (edge)", "1 (1, 5)", "1 (edge)", "1 (0.5, 3.67)"]
    assert tables["tuning"].rows == [["recurrent cells, NAME", "cells, alpha 1", *tried]]
    assert tables["times"].rows[0][2:] == ["2", "2", "1", "1", "1", "", ""]
    assert report.figures(record)[""].startswith(b"\x89PNG")


def test_change_is_paired_by_seed():
    ce = [curves(seed, None, [9, 10 + 20 * seed], 1.0) for seed in range(3)]
    wpl = [curves(seed, 1.0, [9, 10 + 19 * seed], 1.0) for seed in range(3)]
    results = {row[0]: row[1:] for row in report.tables(record_of(ce, wpl))["results"].rows}
    # 0, -1, -2: mean -1, standard deviation 1, 4.303 / sqrt(3) = 2.484
    assert results["mean difference, epochs 2 on"] == ["30.0 ± 20.0", "29.0 ± 19.0", "-1.00 ± 2.48"]


def test_settings_within_noise_by_hand():
    # means 2, 1.9, 1.6, 2; the first one's standard error is 0.5 / sqrt(4) = 0.25 (deviations +-0.433, n - 1 = 3)
    scores = {"a": [1.567, 2.433, 1.567, 2.433], "b": [1.9] * 4, "c": [1.6] * 4, "d": [1.9, 2.1, 1.9, 2.0]}
    assert within_noise(scores) == ["a", "b", "d"]
    assert within_noise({"a": [1.0], "b": [0.999], "c": [1.0]}) == ["a", "c"]


@pytest.mark.parametrize(("setting", "calmest"), [("lr", 0.5), ("alpha", 2.0)])
def test_choice_within_noise_is_the_one_that_moves_least(setting, calmest):
    rewards = {0.1: (0.1, 0.3), 0.5: (1.0, 1.4), 1.0: (1.1, 1.7), 2.0: (1.2, 1.2), 9.0: (0.5, 0.5)}
    runs = [
        curves(seed, **{"alpha": None, setting: value}, means=[1, 1], reward=rewards[value][seed])
        for value in rewards
        for seed in range(2)
    ]
    assert report.grid(runs, setting)["chosen"] == 1.0
    grid = report.grid(runs, setting, choice="one-se")  # 1.4 - 0.3: 0.5, 1.0 and 2.0 remain
    assert (grid["chosen"], grid["at_edge"]) == (calmest, False)
    assert grid["values"] == report.grid(runs, setting)["values"]


def test_tables_name_what_differs_and_what_got_worse():
    ce = [curves(seed, None, [9, 4 + seed, 2], 1.0 + seed) for seed in range(2)]
    bad = [curves(seed, 1.0, [9, 9, 4], 1.5 + seed) for seed in range(2)]
    (row,) = report.tables(record_of(ce, bad, "used", True))["goals"].rows
    assert row[:3] == ["recurrent cells, NAME, outputs normalised", "all in use, alpha 1", "4.5 to 9 (100 % more)"]
    assert row[-1] == "1.5 to 2 *"
    record = record_of(ce, bad)
    record["settings"]["choice"] = "one-se"
    assert report.tables(record)["goals"].rows[0][0] == "recurrent cells, NAME, one-standard-error rule"


def test_tables_of_runs_that_diverged():
    ce, lost = [curves(0, None, [9, 4, 2], 1.0)], [curves(0, 1.0, [9, 1, 1], 0.5, diverged=True)]
    record = record_of(ce, lost)
    tables = report.tables(record)
    assert tables["results"].rows == [["runs that diverged, left out in both arms", "0", "1", ""]]
    assert tables.keys() == {"results", "tuning"}
    assert report.figures(record)[""].startswith(b"\x89PNG")
