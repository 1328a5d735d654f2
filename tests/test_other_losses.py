"""Losses that are no likelihood's -log p on any outputs are refused, with what differs."""

import pytest
import torch
import torch.nn.functional as F
from label_cases import IGNORED, Tokens, data
from torch import nn

import wplfast
from wplfast import losses
from wplfast.fisher.likelihood import fit

ce, fd = losses.cross_entropy, wplfast.fisher_diagonal


def margin(o, y):
    return F.multi_margin_loss(o, y, reduction="none")


def focal(o, y):
    losses_ = F.cross_entropy(o, y, reduction="none")
    return (1 - (-losses_).exp()) ** 2 * losses_


def masked_classes(o, y):
    return F.cross_entropy(o + torch.tensor([0.0, 0.0, 0.0, -torch.inf]).to(o), y.clamp_max(2), reduction="none")


def squared(o, y):
    return (o - F.one_hot(y, 4)).square().sum(1)


OTHERS = {
    "smoothing": lambda o, y: F.cross_entropy(o, y, reduction="none", label_smoothing=0.1),
    "weights": lambda o, y: F.cross_entropy(o, y, torch.tensor([1.0, 2.0, 1.0, 0.5]).to(o), reduction="none"),
    "temperature": lambda o, y: ce(o / 2, y),
    "scaled": lambda o, y: ce(o, y) / len(o),
    "focal": focal,
    "margin": margin,
    "masked": masked_classes,
    "mean squared": squared,
    "regularised": lambda o, y: ce(o, y) + 0.1 * o.square().sum(1),
    "z-loss": lambda o, y: ce(o, y) + 1e-3 * o.logsumexp(1).square(),
    "nll of logits": lambda o, y: F.nll_loss(o, y, reduction="none"),
    "of probabilities": lambda o, y: F.nll_loss(o.softmax(1).log_softmax(1), y, reduction="none"),
}


@pytest.mark.parametrize("kind", ["mc", "exact"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_are_refused(name, kind):
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4), torch.randn(6, 3), torch.randint(0, 3, (6,))
    with pytest.raises(
        ValueError, match=r"is not -log p of targets drawn for likelihood='categorical'.*Likely reasons"
    ):
        fd(model, [(x, y)], OTHERS[name], fisher_type=kind)
    if name != "scaled":  # which depends on the batch
        fd(model, [(x, y)], OTHERS[name])  # the empirical Fisher takes any loss


def test_a_mismatch_says_what_differs():
    with pytest.raises(
        ValueError, match=r"0\.1667 times -log p\): for sample \d of a test .* the loss is .*, -log p is"
    ):
        fd(nn.Linear(3, 4), [(torch.randn(6, 3), torch.zeros(6).long())], OTHERS["scaled"], fisher_type="mc")


def test_a_penalty_on_parameters_in_the_loss():
    model = nn.Linear(3, 4)
    loss = lambda o, y: ce(o, y) + model.weight.square().sum()  # noqa: E731
    with pytest.raises(ValueError, match="depends on parameters in other ways than through the outputs"):
        fd(model, [(torch.randn(6, 3), torch.zeros(6).long())], loss, fisher_type="mc")


def test_a_loss_of_other_outputs():
    model, (x, y) = Tokens(form="dict"), data()
    loss = lambda o, y: ce(o, y, IGNORED) + o["hidden"].square().sum((1, 2))  # noqa: E731
    with pytest.raises(ValueError, match="depends on outputs other than the logits"):
        fd(model, [(x, y)], loss, fisher_type="mc")


def bce(o, y):
    return F.binary_cross_entropy_with_logits(o, y, reduction="none").sum(1)


ELEMENTWISE = {
    "no half": ("gaussian", lambda o, y: (o - y).square().sum(1), r"2 times -log p"),
    "mean of dimensions": ("gaussian", lambda o, y: losses.mse(o, y, "mean"), r"0\.25 times"),
    "torch's": ("gaussian", lambda o, y: F.mse_loss(o, y, reduction="none").mean(1), r"0\.5 times"),
    "absolute": ("gaussian", lambda o, y: (o - y).abs().sum(1), "missing 1/2"),
    "mean of labels": ("bernoulli", lambda o, y: bce(o, y) / 4, r"0\.25 times"),
    "pos_weight": (
        "bernoulli",
        lambda o, y: F.binary_cross_entropy_with_logits(
            o, y, pos_weight=torch.full((4,), 2.0).to(o), reduction="none"
        ).sum(1),
        "pos_weight",
    ),
    "of probabilities": (
        "bernoulli",
        lambda o, y: F.binary_cross_entropy(o.clamp(0.01, 0.99), y, reduction="none").sum(1),
        r"for sample \d of a test .* probabilities where the likelihood takes logits",
    ),
    "plus or minus one": ("bernoulli", lambda o, y: F.softplus(-y * o).sum(1), "is not -log p"),
    "gaussian for bernoulli": ("bernoulli", losses.mse, "is not -log p"),
    "bernoulli for gaussian": ("gaussian", bce, "is not -log p"),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_other_losses_are_refused_elementwise(name):
    likelihood, loss, message = ELEMENTWISE[name]
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4), torch.randn(6, 3), torch.randint(0, 2, (6, 4)).float()
    with pytest.raises(ValueError, match=message):
        fd(model, [(x, y)], loss, fisher_type="mc", likelihood=likelihood)


def test_labels_of_one_logit_that_are_plus_or_minus_one():
    loss = lambda o, y: F.softplus(-y * o[:, 0])  # noqa: E731
    with pytest.raises(ValueError, match="is not -log p of targets drawn for likelihood='bernoulli'"):
        fd(nn.Linear(3, 1), [(torch.randn(6, 3), torch.ones(6))], loss, fisher_type="mc", likelihood="bernoulli")


def test_a_batch_without_samples():
    model, x, y = nn.Linear(3, 4), torch.randn(6, 3), torch.zeros(6).long()
    loss = lambda o, y: F.cross_entropy(o, y, reduction="none")  # noqa: E731
    for kind in ("mc", "exact"):
        assert fd(model, [(x[:0], y[:0]), (x, y)], loss, fisher_type=kind).n_samples == 6


def test_unsuitable_outputs():
    boxes = lambda o, y: torch.stack([part.get("box") for part in y])  # noqa: E731
    x = torch.randn(6, 3)
    for model in (nn.Linear(3, 1), nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))):
        with pytest.raises(ValueError, match="use likelihood='bernoulli' for one logit"):
            fd(model, [(x, torch.ones(6))], lambda o, y: o.view(-1), fisher_type="mc")
    with pytest.raises(ValueError, match="could not be evaluated on targets drawn"):
        fd(nn.Linear(3, 4), [(x, [{"box": x}] * 6)], boxes, fisher_type="mc")
    with pytest.raises(ValueError, match=r"could not be evaluated .* a part of the classes alone"):
        fd(nn.Linear(3, 4), [(x, torch.ones(6).long())], lambda o, y: ce(o[:, :2], y), fisher_type="mc")
    with pytest.raises(ValueError, match="losses must have one value per sample"):
        fd(nn.Linear(3, 4), [(x, torch.ones(6).long())], F.cross_entropy, fisher_type="mc")


def test_half_precision_outputs():
    for dtype in (torch.bfloat16, torch.float16):
        outputs, y = torch.randn(4, 5, 6).to(dtype), torch.randint(0, 6, (4, 5))
        reading = fit("categorical", lambda o, y: ce(o, y, shift=True), outputs, y)
        assert (reading.alignment.dim, reading.alignment.offset) == (1, -1)
        with pytest.raises(ValueError, match="is not -log p"):
            fit("categorical", lambda o, y: ce(o / 2, y), outputs, y)
