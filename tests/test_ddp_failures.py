"""Ranks that fail, differ or are alone: one message on all of them, within seconds, and nobody waits for ever."""

from __future__ import annotations

import ddp_failures as cases
import pytest
import torch
from ddp_cases import DeepSpeedEngine, data, model
from fisher_cases import ce
from ranks import NEEDS_GLOO, launched

import wplfast
from wplfast.errors import UnsupportedParameterError

pytestmark = NEEDS_GLOO


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks came to. That there is an outcome shows that the group can be used after each situation."""
    return launched(2, cases.SITUATIONS, tmp_path_factory.mktemp("ranks"))


def name(function):
    return function.__name__


@pytest.mark.parametrize("situation", cases.ONE_FAILS, ids=name)
def test_one_rank_fails(ranks, situation):
    text = cases.ONE_FAILS[situation]
    first, second = (outcomes[situation.__name__] for outcomes in ranks)
    assert text in second.error
    assert first.error.startswith("RankFailedError: fisher_diagonal ended: rank 1 failed with ")
    assert text in first.error
    assert any("rank 1 failed in fisher_diagonal" in line for line in second.log)
    assert max(first.seconds, second.seconds) < 10  # of which most is that of a batch, on a busy machine


@pytest.mark.parametrize("situation", cases.ALL_FAIL, ids=name)
def test_all_ranks_fail_alike(ranks, situation):
    for outcomes in ranks:
        error = outcomes[situation.__name__].error
        assert all(part in error for part in cases.ALL_FAIL[situation]), error
        assert error == ranks[0][situation.__name__].error


@pytest.mark.parametrize("situation", cases.DIFFER, ids=name)
def test_penalties_that_differ(ranks, situation):
    for outcomes in ranks:
        error = outcomes[situation.__name__].error
        assert error.startswith("WplfastError: ")
        assert all(part in error for part in cases.DIFFER[situation]), error
        assert outcomes[situation.__name__].seconds < 8  # nobody waited in vain


def test_penalties_after_an_error(ranks):
    for outcomes in ranks:
        assert outcomes["goes_on"].get() == (3, 1)


def test_penalties_of_one_rank(ranks):
    for outcomes in ranks:
        assert outcomes["meant_to_differ"].get() == 1
        assert not outcomes["meant_to_differ"].log
        assert outcomes["other_models_altogether"].get() == 1
    first, second = (outcomes["one_rank_alone"] for outcomes in ranks)
    assert first.get() == [1, 1, 1]
    warnings = [line for line in first.log if "compared on 1 of 2 ranks" in line]
    assert len(warnings) == 1
    assert second.get()[0] == 1
    assert "the F of this penalty differs" in second.get()[1]


def test_penalties_of_all_after_one_rank_was_alone(ranks):
    first, second = (outcomes["together_after_one_alone"].get() for outcomes in ranks)
    assert first[:2] == second[:2] == [1, 1]
    assert "the F of this penalty differs" in second[2]


@pytest.mark.parametrize("situation", cases.ENGINES, ids=name)
def test_engines_that_are_not_served(ranks, situation):
    for outcomes in ranks:
        found = outcomes[situation.__name__].get()
        texts = found[0] if situation is cases.fsdp1 else found
        for text in texts:
            assert cases.ENGINES[situation] in text
            assert "FSDP2 (torch.distributed.fsdp.fully_shard)" in text
        if situation is cases.fsdp1:
            assert len(texts) == 6
            assert found[1]


@pytest.mark.parametrize(
    "use",
    [
        lambda model: wplfast.fisher_diagonal(model, data(0), ce),
        wplfast.FisherAccumulator,
        wplfast.WeightPlasticityLoss,
        lambda model: wplfast.WeightPlasticityLoss(dict(model.named_parameters())),
    ],
)
@pytest.mark.parametrize("engine", [False, True])
def test_zero_three(use, engine):
    """DeepSpeed marks the parameters that it partitions, and its engine knows its stage."""
    used = DeepSpeedEngine(3) if engine else model()
    for number, parameter in enumerate(used.parameters()):
        parameter.ds_id, parameter.ds_status = number, "NOT_AVAILABLE"
    with pytest.raises(UnsupportedParameterError, match=r"ZeRO-3.*FSDP2 \(torch.distributed.fsdp.fully_shard\)"):
        use(used)
    assert all(type(parameter) is torch.nn.Parameter for parameter in used.parameters())
