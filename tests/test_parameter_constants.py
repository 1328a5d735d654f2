"""Constants made of parameters: masks, thresholds, straight-through estimators. No sample has a part in them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, fisher_loop
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import C, classify

import wplfast

D = 16  # batches of 4, 8 and 16 samples divide it: sizes alone do not tell that a mask is no data


def quantised(w):
    scale = w.abs().max() / 3
    return (w / scale).round() * scale


def without_grad(compute):
    def run(w):
        with torch.no_grad():
            return compute(w)

    return run


def scattered(w):
    index = w.detach().abs().flatten().topk(D).indices
    return torch.zeros_like(w).flatten().scatter(0, index, 1.0).view_as(w)


def written(w):
    mask = torch.zeros_like(w)
    mask[w.detach() > 0] = 1.0
    return mask


#: What a pass sees to be computed of parameters alone.
SEEN = {
    "straight through": lambda w: w + (quantised(w) - w).detach(),
    "straight through, .data": lambda w: w + (quantised(w) - w).data,
    "detach_": lambda w: w + (quantised(w) - w).clone().detach_(),
    "sign": lambda w: w + (w.sign() * w.abs().mean(1, keepdim=True) - w).detach(),
    "mask": lambda w: w * (w.abs() > 0.5),
    "where": lambda w: torch.where(w > 0, w, 0.1 * w),
    "threshold": lambda w: w * (w.abs() >= w.abs().flatten().topk(D).values[-1]),
    "rows in order": lambda w: w[w.norm(dim=1).argsort()],
    "columns in order": lambda w: w.gather(1, w.argsort(1)),
    "weight norm": lambda w: w / (w * 1.0).norm(dim=1, keepdim=True).detach(),
    "rotated": lambda w: w @ torch.linalg.qr(w * 1.0)[0].detach(),
}
#: What it does not see, but that has the sizes of a parameter.
OF_ITS_SIZES = {
    "mask of what is detached": lambda w: w * (w.detach().abs() > 0.5),
    "norm of what is detached": lambda w: w / w.detach().norm(),
    "norms of rows": lambda w: w / w.detach().norm(dim=1, keepdim=True),
    "mask of .data": lambda w: w * (w.data.abs() > 0.5).to(w.dtype),
    "without grad": lambda w: w * without_grad(lambda w: (w.abs() > 0.5).to(w.dtype))(w),
    "chain without grad": lambda w: w + (without_grad(quantised)(w) - w).detach(),
    "scattered": lambda w: w * scattered(w),
    "written": lambda w: w * written(w),
    "of the transpose": lambda w: (w.t() * (w.detach().t() > 0)).t(),
    "masked_fill": lambda w: w.masked_fill(w.detach() < 0, 0.0),
}
ALL = SEEN | OF_ITS_SIZES


class Model(nn.Module):
    """Multiplies with what ``made`` makes of its weight."""

    def __init__(self, made, checkpointed=False):
        super().__init__()
        self.fc, self.w, self.head = nn.Linear(D, D), nn.Parameter(torch.randn(D, D)), nn.Linear(D, C)
        self.made, self.checkpointed = made, checkpointed

    def part(self, x):
        return torch.tanh(F.linear(self.fc(x), self.made(self.w)))

    def forward(self, x):
        return self.head(checkpoint(self.part, x, use_reentrant=False) if self.checkpointed else self.part(x))


def model_of(*args):
    torch.manual_seed(0)
    return Model(*args).double()


def batches(*sizes):
    return [(torch.randn(n, D, dtype=torch.float64), torch.randint(0, C, (n,))) for n in sizes]


def accumulated(model, data, **options):
    with wplfast.FisherAccumulator(model, **options) as accumulator:
        for x, y in data:
            accumulator.backward(classify(model(x), y))
    return accumulator.result()


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("sizes", [(16, 16, 9), (4, 4, 3), (5, 16)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_constants_are_no_samples(name, sizes, checkpointed):
    model, data = model_of(ALL[name], checkpointed), batches(*sizes)
    expected = fisher_loop(model, data, classify)
    found = accumulated(model, data)
    assert_close(found, expected, 1e-11, 1e-12)
    assert_close(wplfast.fisher_diagonal(model, data, classify), expected, 1e-11, 1e-12)
    if name in SEEN:
        assert not found.report.unchecked
        assert "one by one" not in found.report.rules["w"]


def test_what_may_be_a_statistic_of_the_batch_is_said_once(caplog):
    model, data = model_of(ALL["without grad"]), batches(4, 4, 4)
    (why,) = accumulated(model, data).report.unchecked
    assert "statistics of the batch" in why
    assert len([record for record in caplog.records if "statistics of the batch" in record.message]) == 1
    assert not accumulated(model, data, independent=True).report.unchecked


def test_a_constant_that_data_were_written_to_is_one_no_more():
    def gated(model, x):
        gate = (model.w[: len(x)] * 0).detach()
        gate += x
        return model.head(model.fc(gate))

    model, ((x, y),) = model_of(None), batches(8)
    model.forward = lambda x: gated(model, x)
    found = accumulated(model, [(x, y)])
    assert found.report.rules["fc.weight"] == ("linear",), "its rows are samples"
    model.forward = lambda x: model.head(model.fc(x))
    expected = fisher_loop(model, [(x, y)], classify)
    assert_close({n: found[n] for n in expected if n != "w"}, {n: e for n, e in expected.items() if n != "w"}, 1e-11)


def test_constants_are_let_go_after_their_forward_pass():
    model, data = model_of(ALL["mask"]), batches(4, 4)
    with wplfast.FisherAccumulator(model) as accumulator:
        counts = []
        for x, y in data:
            accumulator.backward(classify(model(x), y))
            counts.append(len(accumulator._session.interception._operands._constants))
        accumulator._session.release()
        assert counts[0] == counts[1] == len(accumulator._session.interception._operands._constants) + 1


def centred_rows(model, x):
    rows = model.w[:1].expand(len(x), D) * x
    return rows - rows.mean(0)


def in_batch_negatives(model, x):
    rows = model.fc(x)
    return torch.softmax(rows @ rows.t(), -1) @ rows


def centred_places(model, x):
    rows = model.w[torch.arange(len(x))] + x
    return rows - rows.mean(0)


@pytest.mark.parametrize("mixed", [centred_rows, in_batch_negatives, centred_places], ids=lambda f: f.__name__)
@pytest.mark.parametrize("n_samples", [4, 8])
def test_coupled_samples_stay_an_error(mixed, n_samples):
    """What was expanded or looked up for each sample has the sizes of the batch, not a parameter's."""
    model, ((x, y),) = model_of(None), batches(n_samples)
    with (
        wplfast.FisherAccumulator(model) as accumulator,
        pytest.raises(wplfast.errors.CoupledSamplesError, match="samples are coupled at"),
    ):
        accumulator.backward(classify(model.head(torch.tanh(mixed(model, x))), y))
