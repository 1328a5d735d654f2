"""Fisher and penalty of FSDP2 models on 2 and 4 ranks: what one process finds, to float64, as shards."""

from __future__ import annotations

import os

import fsdp2_cases as cases
import fsdp2_options as options
import fsdp2_penalties as penalties
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import NEEDS_GLOO, launched, start

pytestmark = NEEDS_GLOO

EXACT = 1e-12

#: What four ranks do beside what two do: three shards of uneven sizes, a rank without data, a mesh of 2 x 2.
ON_FOUR = [
    cases.each_part,
    cases.root_alone,
    cases.replicated_shards,
    options.max_samples,
    penalties.merged_and_clipped,
    penalties.saves,
]
ON_TWO = [
    *cases.WRAPPINGS,
    *cases.MODELS,
    *cases.PRECISIONS,
    *options.OPTIONS,
    *options.ERRORS,
    options.after_an_error,
    options.costs,
    *penalties.PENALTIES,
    *penalties.OTHERS,
    penalties.loads,
]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What each of four ranks found; it leaves files."""
    os.environ["WPLFAST_TEST_FOLDER"] = str(tmp_path_factory.mktemp("shared"))
    return launched(4, ON_FOUR, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def two(four, tmp_path_factory):
    """What each of two ranks found, after the four."""
    return launched(2, ON_TWO, tmp_path_factory.mktemp("two"))


def of_all(ranks, situation):
    """Each rank's value."""
    return [outcomes[situation.__name__].get() for outcomes in ranks]


def is_exact(found, n_ranks):
    """F of all ranks is that of one process, lies as the parameters, and the model is what it was."""
    assert found["off"] < EXACT
    assert found["n"] == sum(map(sum, cases.SIZES[:n_ranks]))
    assert found.get("alike", True)
    assert found.get("flags", True)
    assert found.get("step", 0.0) < EXACT


@pytest.mark.parametrize(
    "situation",
    [*cases.WRAPPINGS, *cases.MODELS, options.between_accumulated_steps, options.after_an_error],
    ids=lambda f: f.__name__,
)
def test_fisher_of_two_ranks(two, situation):
    for found in of_all(two, situation):
        is_exact(found, 2)
        expected = ("scale",) if situation is cases.unseen_function else ()
        assert found.get("slow", ()) == expected


@pytest.mark.parametrize(
    "situation",
    [cases.each_part, cases.root_alone, cases.replicated_shards],
    ids=lambda f: f.__name__,
)
def test_fisher_of_four_ranks(four, situation):
    for found in of_all(four, situation):
        is_exact(found, 4)


def test_mixed_precision(two):
    """Within twice the error of one process in bfloat16; F is in float32 as always."""
    for found in of_all(two, cases.mixed_precision):
        assert found["off"] <= 2 * found["off in one process"]
        assert found["dtypes"] == {torch.float32}
        assert found["alike"]


def test_a_function_in_half_precision_is_noticed(two):
    for found in of_all(two, cases.unseen_in_half_precision):
        assert found["off"] < 1e-5
        assert found["slow"] == ("scale",)


def test_weights_and_mean_gradient(two):
    for found in of_all(two, options.weights_and_mean_gradient):
        assert found["off"] < EXACT
        assert abs(found["weight"]) < EXACT


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_max_samples_counts_those_of_all_ranks(request, n_ranks):
    for found in of_all(request.getfixturevalue("two" if n_ranks == 2 else "four"), options.max_samples):
        assert found["counts"] == [4, 8, found["total"]]
        assert found["off"] < EXACT


def test_targets_from_the_model(two):
    for found in of_all(two, options.exact_and_drawn):
        assert found["off"] < EXACT
        assert found["n"] == 5
        assert found["finite"]


@pytest.mark.parametrize("situation", [options.losses_as_samples, options.skipping], ids=lambda f: f.__name__)
def test_samples_that_count(two, situation):
    for found in of_all(two, situation):
        assert found["off"] < EXACT
        assert found["n"] == 0


@pytest.mark.parametrize(
    ("situation", "text"),
    [
        (options.loss_fails, "BrokenError: the loss is broken"),
        (options.loss_fails_later, "BrokenError: the loss is broken"),
        (options.loader_fails, "BrokenError: the loader is broken"),
        (options.gradient_is_nan, "NonFiniteError: a gradient of"),
        (options.samples_are_coupled, "CoupledSamplesError: samples are coupled at linear in head"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rank_that_fails_ends_all(two, situation, text):
    """With its error, and before any timeout."""
    for rank, outcomes in enumerate(two):
        outcome = outcomes[situation.__name__]
        assert text in outcome.error
        assert outcome.error.startswith("RankFailedError: fisher_diagonal ended: rank 1 failed with") == (rank != 1)
        assert outcome.seconds < 10


def test_a_rank_that_fails_inside_of_the_model(tmp_path):
    """It cannot meet the others, which wait for what FSDP2 gathers: they learn of it when its process ends."""
    start(options.fails_inside, (str(tmp_path),), 2)
    seconds, text = (tmp_path / "told.0").read_text().split(" ", 1)
    assert text.startswith("RankFailedError: fisher_diagonal ended: rank 1 failed inside of the model with BrokenError")
    assert float(seconds) < 30
    assert (tmp_path / "told.1").read_text().endswith("BrokenError: the model is broken")


def test_a_pass_sends_what_a_step_sends(two):
    """One reduce-scatter a block, of F where a step has one of gradients; squares of one block are there at a time."""
    for found in of_all(two, options.costs):
        assert found["pass"] == found["step"]
        assert [what for what, _ in found["pass"]].count("reduce-scatter") == 5
        assert found["most"] == found["block"] < found["parameters"] / 2


def test_what_cannot_be_had(two):
    for outcomes in two:
        assert "data is empty on all 2 ranks" in outcomes["no_data_at_all"].error
        assert "reduce=False cannot be had" in outcomes["local_alone"].error
        assert "call fisher_diagonal(model, data, loss_fn)" in outcomes["own_accumulator"].error


@pytest.mark.parametrize("situation", penalties.PENALTIES, ids=lambda f: f.__name__)
def test_penalty_of_shards(two, situation):
    for found in of_all(two, situation):
        assert found["off"] < EXACT
        assert found["placed"]
        assert found["anchors"] == 0


def test_penalty_on_four_ranks(four):
    for found in of_all(four, penalties.merged_and_clipped):
        assert found["off"] < EXACT


@pytest.mark.parametrize(
    "situation",
    [penalties.own_fisher_as_shards, penalties.parts_and_prefixes, penalties.trained, penalties.states],
    ids=lambda f: f.__name__,
)
def test_a_penalty_does_what_one_of_one_process_does(two, situation):
    for found in of_all(two, situation):
        assert found["off"] < EXACT
        assert found.get("again", 0.0) < EXACT
        assert found.get("keys", True)


def test_parameters_may_be_gathered_meanwhile(two):
    for found in of_all(two, penalties.while_gathered):
        assert found["gathered"]
        assert found["off"] < EXACT
        assert found["placed"]


def test_all_ranks_consolidate_or_none(two):
    for rank, found in enumerate(of_all(two, penalties.one_rank_fails_to_consolidate)):
        assert found["error"].startswith("NonFiniteError" if rank == 1 else "RankFailedError")
        assert "fisher['head.weight'] has NaN or inf" in found["error"]
        assert found["off"] == 0.0


def test_training_with_accelerate(two):
    """The state that its checkpoint keeps is whole or refused on all ranks: that of rank 0 has rank 0's shards."""
    for rank, found in enumerate(of_all(two, penalties.accelerated)):
        assert found["kind"].startswith("FSDP")
        assert max(found["F"], found["off"]) < EXACT
        assert found["whole"] == 0.0
        assert found["error"].startswith("loading a penalty ended: rank 1 failed" if rank == 0 else "a DTensor of")
        assert "register wplfast.distributed.WholeState(penalty)" in found["error"]


def test_all_ranks_load_a_state_or_none(two):
    for rank, found in enumerate(of_all(two, penalties.one_part_of_a_state_is_bad)):
        assert ("rank 1: " in found["error"]) == (rank == 0)
        assert "fisher['head.weight'] must be finite and not negative" in found["error"]
        assert found["off"] == 0.0


def test_all_ranks_hear_of_a_file_that_cannot_be_written(two):
    first, other = of_all(two, penalties.disk_is_missing)
    assert first.startswith("FileNotFoundError")
    assert other.startswith("WplfastError: rank 0 could not write the file: FileNotFoundError")


def test_saved_on_four_ranks_loaded_on_two(four, two):
    assert all(of_all(four, penalties.saves))
    for found in of_all(two, penalties.loads):
        are_what_was_saved(found)


def test_saved_on_four_ranks_loaded_in_one_process(four):
    model = cases.model()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=penalties.folder() / "checkpoint", no_dist=True)
    are_what_was_saved(penalties.loaded(model))


def are_what_was_saved(found):
    assert max(found["values"]) < EXACT
    assert found["F"] == found["theta_hat"] == 0.0
    assert found["n"] == 0
    assert found["anchors"] == 2
