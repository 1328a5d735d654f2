"""Labels are drawn as the loss reads them: F against the expectation over all labels, sample by sample, in float64."""

import copy
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import CausalLMOutput, QuestionAnsweringModelOutput

import wplfast
from wplfast import losses
from wplfast.fisher.likelihood import fit
from wplfast.fisher.sampling import draw

ce, fd = losses.cross_entropy, wplfast.fisher_diagonal


class Tokens(nn.Module):
    """Logits [N, T, C] from token ids, in one of the forms that models return them in."""

    def __init__(self, classes=3, form="tensor", dims=(0, 1, 2)):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, classes)
        self.form, self.dims = form, dims
        self.double()

    def forward(self, x):
        logits = self.head(torch.tanh(self.embedding(x))).permute(self.dims)
        return {
            "tensor": lambda: logits,
            "output": lambda: CausalLMOutput(logits=logits, hidden_states=(self.embedding(x),)),
            "dict": lambda: {"hidden": self.embedding(x), "logits": logits},
            "object": lambda: SimpleNamespace(logits=logits),
            "tuple": lambda: (self.embedding(x), logits),
            "flat": lambda: logits.flatten(0, 1),
            "virtual": lambda: torch.cat([logits[:, :2] * 0.5, logits], 1),
            "log p": lambda: logits.log_softmax(-1),
        }[self.form]()


def squares(model, value):
    """Squared gradients of a scalar."""
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g**2 for p, g in zip(model.parameters(), found, strict=True)]


def expectation(model, x, y, row_of, free):
    """Return F by summing over all labels of each sample's free positions; row_of(t) is the position that predicts t.

    Where ``free`` is "mean", the mean over the labels that count is the loss.
    """
    total = [torch.zeros_like(p) for p in model.parameters()]
    mean = free == "mean"
    for n in range(len(x)):
        logp = model.head(torch.tanh(model.embedding(x[n]))).log_softmax(-1)
        at = [t for t in range(len(y[n])) if row_of(t) is not None and y[n, t] != IGNORED]
        for labels in itertools.product(range(logp.shape[-1]), repeat=len(at)):
            value = sum(logp[row_of(t), c] for t, c in zip(at, labels, strict=True))
            if not at:
                continue
            p = value.exp().detach()
            for sum_, square in zip(total, squares(model, value / (len(at) if mean else 1)), strict=True):
                sum_ += p * square / len(x)
    return dict(zip([n for n, _ in model.named_parameters()], total, strict=True))


IGNORED = -7


def data(n=3, t=3, classes=3):
    torch.manual_seed(3)
    x, y = torch.randint(0, 7, (n, t)), torch.randint(0, classes, (n, t))
    y[0, t - 1] = y[1, 1] = IGNORED
    return x, y


def close(got, want, tolerance=0.06):
    flat = [torch.cat([f[n].double().flatten() for n in want]) for f in (got, want)]
    assert (flat[0] - flat[1]).norm() <= tolerance * flat[1].norm(), flat[0] / flat[1]


def shifted(t):
    return t - 1 if t else None


def hf_shift(outputs, labels):
    """A loss that shifts and ignores by itself, as those of Hugging Face do."""
    logits, labels = outputs.logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(1)


PLAIN = {
    "tensor": lambda o, y: ce(o, y, IGNORED),
    "output": functools.partial(ce, ignore_index=IGNORED),
    "dict": lambda o, y: ce(o, y, IGNORED),
    "object": lambda o, y: ce(o.logits, y, IGNORED),
    "tuple": lambda o, y: ce(o[1], y, IGNORED),
    "flat": lambda o, y: ce(o.view(*y.shape, -1), y, IGNORED),
    "log p": lambda o, y: F.nll_loss(o.transpose(1, 2), y, ignore_index=IGNORED, reduction="none").sum(1),
}


@pytest.mark.parametrize("form", PLAIN)
def test_ignored_positions_are_kept(form):
    model, (x, y) = Tokens(form=form), data()
    close(fd(model, [(x, y)], PLAIN[form], fisher_type="mc", mc_samples=300), expectation(model, x, y, int, "sum"))


SHIFTED = {
    "tensor": lambda o, y: ce(o, y, IGNORED, shift=True),
    "output": hf_shift,
    "virtual": lambda o, y: ce(o[:, -y.shape[1] :], y, IGNORED, shift=True),
    "flat": lambda o, y: ce(o.view(*y.shape, -1), y, IGNORED, shift=True),
}


@pytest.mark.parametrize("form", SHIFTED)
def test_shifted_labels_come_from_the_position_before(form):
    model, (x, y) = Tokens(form=form), data()
    got = fd(model, [(x, y)], SHIFTED[form], fisher_type="mc", mc_samples=300)
    close(got, expectation(model, x, y, shifted, "sum"))


def test_labels_that_were_shifted_before():
    """Logits are one longer than labels, and the loss drops the last ones."""
    model, (x, y) = Tokens(), data()
    got = fd(model, [(x, y[:, 1:])], lambda o, y: ce(o[:, :-1], y, IGNORED), fisher_type="mc", mc_samples=300)
    close(got, expectation(model, x, y, shifted, "sum"))


@pytest.mark.parametrize("at", [0, -1])
def test_one_label_for_a_sequence(at):
    model, (x, y) = Tokens(), data()
    y = torch.where(y[:, :1] == IGNORED, 0, y[:, :1])
    y[1] = IGNORED
    got = fd(model, [(x, y[:, 0])], lambda o, y: ce(o[:, at], y, IGNORED), fisher_type="mc", mc_samples=300)
    close(got, expectation(model, x, y, lambda t: at % 3, "sum"))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("how", ["counted", "all"])
def test_means_over_tokens(shift, how):
    model, (x, y) = Tokens(), data()
    if how == "counted":
        loss = lambda o, y: ce(o, y, IGNORED, "mean", shift)  # noqa: E731
    else:
        loss = lambda o, y: ce(o, y, IGNORED, "sum", shift) / y.shape[1]  # noqa: E731
    want = expectation(model, x, y, shifted if shift else int, "mean" if how == "counted" else "sum")
    if how == "all":
        want = {n: f / 9 for n, f in want.items()}
    close(fd(model, [(x, y)], loss, fisher_type="mc", mc_samples=300), want)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_padding_that_is_a_class(padding, reduction):
    """An ignored class of the model's own is drawn like any other, though the loss does not count it; padding stays."""
    model, (x, y) = Tokens(), data()
    want = expectation(model, x, y, int, reduction)
    y = torch.where(y == IGNORED, padding, torch.where(y == padding, 1, y))
    got = fd(model, [(x, y)], lambda o, y: ce(o, y, padding, reduction), fisher_type="mc", mc_samples=400)
    close(got, want)


@pytest.mark.parametrize("left", [False, True])
def test_padding_that_is_a_class_and_comes_late(left):
    """No sample of the first batch is padded, and the padding is one of many classes."""
    seen = []

    def loss(outputs, targets):
        seen.append(targets)
        return ce(outputs, targets, ignore_index=70)

    torch.manual_seed(0)
    model, x = Tokens(classes=90), torch.randint(0, 7, (2, 4))
    first, second = torch.randint(0, 50, (2, 4)), torch.randint(0, 50, (2, 4))
    second[1, slice(2) if left else slice(2, None)] = 70
    fd(model, [(x, first), (x, second)], loss, fisher_type="mc", verify=False)
    last = seen[-1] == 70
    assert torch.equal(last, second == 70)


@pytest.mark.parametrize("ignored", [255, 1])
def test_exact_leaves_ignored_samples_out(ignored):
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4).double(), torch.randn(5, 3).double(), torch.tensor([0, 2, ignored, 3, ignored])
    got = fd(model, [(x, y)], lambda o, y: ce(o, y, ignored), fisher_type="exact")
    kept = y != ignored
    want = fd(model, [(x[kept], y[kept])], ce, fisher_type="exact")
    close(got, {n: f * 3 / 5 for n, f in want.items()}, 1e-9)
    assert got.n_samples == 5


def test_time_first_and_classes_in_the_middle():
    model, (x, y) = Tokens(dims=(1, 0, 2)), data()
    loss = lambda o, y: ce(o.transpose(0, 1), y.T, IGNORED)  # noqa: E731
    close(fd(model, [(x, y.T)], loss, fisher_type="mc", mc_samples=300), expectation(model, x, y, int, "sum"))
    loss = lambda o, y: ce(o.transpose(0, 1), y.T, IGNORED, shift=True)  # noqa: E731
    close(fd(model, [(x, y.T)], loss, fisher_type="mc", mc_samples=300), expectation(model, x, y, shifted, "sum"))
    for t in (3, 4):  # with as many positions as classes, shapes alone cannot tell
        model, (x, y) = Tokens(dims=(0, 2, 1)), data(t=t)
        loss = lambda o, y: F.cross_entropy(o, y, ignore_index=IGNORED, reduction="none").sum(1)  # noqa: E731
        close(fd(model, [(x, y)], loss, fisher_type="mc", mc_samples=300), expectation(model, x, y, int, "sum"))


def test_segmentation():
    """F.cross_entropy of [N, C, H, W] with 255 to ignore, and images of another size in the second batch."""
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 1).double()
    loss = lambda o, y: F.cross_entropy(o, y, ignore_index=255, reduction="none").sum((1, 2))  # noqa: E731
    batches = []
    want = [torch.zeros_like(p) for p in model.parameters()]
    for h, w in ((2, 2), (1, 3)):
        x, y = torch.randn(2, 2, h, w).double(), torch.randint(0, 3, (2, h, w))
        y[1, 0, 0] = 255
        batches.append((x, y))
        for n, i, j in itertools.product(range(2), range(h), range(w)):
            if y[n, i, j] == 255:
                continue
            logp = model(x[n : n + 1])[0, :, i, j].log_softmax(0)  # pixels are independent: their Fishers add up
            for c in range(3):
                for total, square in zip(want, squares(model, logp[c]), strict=True):
                    total += logp[c].exp().detach() * square / 4
    got = fd(model, batches, loss, fisher_type="mc", mc_samples=800)
    close(got, dict(zip(["weight", "bias"], want, strict=True)))


def test_first_batch_that_tells_nothing():
    model, (x, y) = Tokens(), data()
    loss = lambda o, y: ce(o, y, IGNORED, shift=True)  # noqa: E731
    got = fd(model, [(x, torch.full_like(y, IGNORED)), (x, y)], loss, fisher_type="mc", mc_samples=300)
    want = expectation(model, x, y, shifted, "sum")
    close(got, {n: f / 2 for n, f in want.items()})
    assert not fd(model, [(x, torch.full_like(y, IGNORED))], loss, fisher_type="mc").flat.any()


def test_targets_of_other_forms():
    """int32 and one-hot labels, dicts with labels, masks beside them, and none at all."""
    model, (x, y) = Tokens(), data()
    want, run = expectation(model, x, y, int, "sum"), functools.partial(fd, fisher_type="mc", mc_samples=300)
    close(run(model, [(x, y.int())], lambda o, y: ce(o, y.long(), IGNORED)), want)
    soft = F.one_hot(y.clamp_min(0), 3).double() * (y != IGNORED).unsqueeze(-1)
    close(run(model, [(x, soft)], losses.soft_cross_entropy), want)
    turned = lambda o, y: losses.soft_cross_entropy(o.transpose(1, 2), y.transpose(1, 2))  # noqa: E731
    model.dims = (0, 2, 1)
    close(run(model, [(x, soft.transpose(1, 2))], turned), want)
    model.dims = (0, 1, 2)
    close(run(model, [(x, {"labels": y, "weight": torch.ones(3)})], lambda o, y: ce(o, y["labels"], IGNORED)), want)
    mask = (y != IGNORED).double()
    masked = lambda o, y: (F.cross_entropy(o.transpose(1, 2), y[0], reduction="none") * y[1]).sum(1)  # noqa: E731
    close(run(model, [(x, (y.clamp_min(0), mask))], masked), want)
    y = torch.zeros_like(y)
    close(run(model, [(x, None)], lambda o, y: ce(o, y)), expectation(model, x, y, int, "sum"))


class Answers(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.head, self.form = nn.Linear(2, 2).double(), form

    def forward(self, x):
        start, end = self.head(x).unbind(-1)
        if self.form == "output":
            return QuestionAnsweringModelOutput(start_logits=start, end_logits=end)
        return start, end


@pytest.mark.parametrize("form", ["output", "tuple", "dict"])
def test_question_answering(form):
    torch.manual_seed(0)
    model, x = Answers(form), torch.randn(3, 4, 2).double()
    y = torch.tensor([[0, 2], [1, 9], [3, 3]])
    total = [torch.zeros_like(p) for p in model.parameters()]
    for n in range(3):
        start, end = (part[0].log_softmax(-1) for part in Answers.forward(copy_as(model, "tuple"), x[n : n + 1]))
        for i, j in itertools.product(range(4), range(4)):
            value, p = start[i] + end[j] * (n != 1), (start[i] + end[j]).exp().detach()
            for sum_, square in zip(total, squares(model, value), strict=True):
                sum_ += p * square / 3
    given = {"output": (y[:, 0], y[:, 1]), "tuple": y, "dict": {"start_positions": y[:, 0], "end_positions": y[:, 1]}}
    got = fd(model, [(x, given[form])], losses.question_answering, fisher_type="mc", mc_samples=400)
    close(got, dict(zip(["head.weight", "head.bias"], total, strict=True)))


def copy_as(model, form):
    other = copy.copy(model)
    other.form = form
    return other


# ---- losses that are not -log p ----------------------------------------------------------------------------


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


# ---- bernoulli and gaussian --------------------------------------------------------------------------------


def linear(d, n=5):
    torch.manual_seed(1)
    return nn.Linear(3, d).double(), torch.randn(n, 3).double()


@pytest.mark.parametrize("kind", ["mc", "exact"])
@pytest.mark.parametrize("form", ["[N, 1]", "[N]", "[N, 1] given [N]", "[N, K]", "ignored", "integers"])
def test_bernoulli(form, kind):
    """F of output k's weights is the mean of p (1 - p) x^2 over the labels that count."""
    d = 1 if "1" in form or form == "[N]" else 3
    model, x = linear(d)
    y, counts = torch.randint(0, 2, (5, d)).double(), torch.ones(5, d).double()
    loss = losses.bernoulli
    if form == "[N, 1] given [N]":
        y = y[:, 0]
    if form == "[N]":
        y, loss = y[:, 0], lambda o, y: losses.bernoulli(o.squeeze(1), y)
    if form == "ignored":
        y[1, 0] = y[4] = -1
        counts, loss = (y >= 0).double(), functools.partial(losses.bernoulli, ignore=-1)
    if form == "integers":
        y, loss = y.long(), lambda o, y: losses.bernoulli(o, y.float())
    p = model(x).detach().sigmoid() * counts
    spread = p * (counts - p)
    want = {"weight": spread.T @ x.square() / 5, "bias": spread.mean(0)}
    got = fd(model, [(x, y)], loss, fisher_type=kind, likelihood="bernoulli", mc_samples=400)
    close(got, want, 1e-9 if kind == "exact" else 0.06)


def test_exact_bernoulli_of_losses_that_take_no_probabilities():
    hard = lambda o, y: F.softplus(torch.where(y > 0.5, -o, o)).sum(1)  # noqa: E731
    model, x = linear(1)
    p = model(x).detach().sigmoid()
    got = fd(model, [(x, torch.ones(5, 1))], hard, fisher_type="exact", likelihood="bernoulli")
    close(got, {"weight": (p * (1 - p)).T @ x.square() / 5}, 1e-9)
    model, x = linear(3)
    with pytest.raises(ValueError, match=r"takes labels between 0 and 1.*fisher_type='mc'"):
        fd(model, [(x, torch.ones(5, 3))], hard, fisher_type="exact", likelihood="bernoulli")


@pytest.mark.parametrize("likelihood", ["gaussian", lambda outputs, generator: outputs])
def test_exact_has_no_finite_set_of_targets(likelihood):
    with pytest.raises(ValueError, match="use fisher_type='mc'"):
        fd(
            nn.Linear(3, 1),
            [(torch.randn(4, 3), torch.randn(4, 1))],
            losses.mse,
            fisher_type="exact",
            likelihood=likelihood,
        )


@pytest.mark.parametrize("form", ["[N, D]", "[N, 1] given [N]", "missing", "sentinel", "tokens", "shifted", "constant"])
def test_gaussian(form):
    """F of output d's weights is the mean of x^2 over the targets that count."""
    d = 1 if form == "[N, 1] given [N]" else 2
    model, x = linear(d)
    y, counts, loss = torch.randn(5, d).double(), torch.ones(5, d).double(), losses.mse
    if form == "[N, 1] given [N]":
        y = y[:, 0]
    if form in ("missing", "sentinel"):
        none = float("nan") if form == "missing" else -999.0
        y[1, 0] = y[4] = none
        counts[1, 0] = counts[4] = 0
        known = (lambda y: ~y.isnan()) if form == "missing" else (lambda y: y != -999)
        loss = lambda o, y: 0.5 * torch.where(known(y), o - y, 0).square().sum(1)  # noqa: E731
    if form == "constant":
        loss = lambda o, y: -torch.distributions.Normal(o, 1.0).log_prob(y).sum(1)  # noqa: E731
    if form in ("tokens", "shifted"):
        x, y = torch.randn(5, 4, 3).double(), torch.randn(5, 4, d).double()
        squares_ = lambda o, y: 0.5 * (o - y).square().sum(2).mean(1)  # noqa: E731
        loss = squares_ if form == "tokens" else lambda o, y: squares_(o[:, :-1], y[:, 1:])
        seen = x if form == "tokens" else x[:, :-1]
        want = {"weight": (seen.square().sum((0, 1)) / 5 / seen.shape[1] ** 2).expand(d, 3)}
    else:
        want = {"weight": counts.T @ x.square() / 5}
    close(fd(model, [(x, y)], loss, fisher_type="mc", likelihood="gaussian", mc_samples=400), want, 0.08)


# ---- samplers ----------------------------------------------------------------------------------------------


def sampler(shift=0, temperature=1.0):
    """Draw labels of tokens from their own position, or the one before, as a user would."""

    def drawn(outputs, generator):
        p = (outputs.detach() / temperature).softmax(-1)
        labels = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:-1])
        return labels.roll(shift, 1)

    return drawn


@pytest.mark.parametrize("n", [2, 30])
def test_samplers_that_draw_from_another_position_are_refused(n):
    torch.manual_seed(0)
    model = Tokens()
    x, y = torch.randint(0, 7, (n, 8)), torch.randint(0, 3, (n, 8))
    shift = lambda o, y: ce(o, y, shift=True)  # noqa: E731
    with torch.no_grad():
        model.head.weight.mul_(3)
    with pytest.raises(ValueError, match=r"does not draw from .* label t \+ 1 from there"):
        fd(model, [(x, y)], shift, fisher_type="mc", likelihood=sampler())
    with pytest.raises(ValueError, match="does not draw from the distribution"):
        fd(model, [(x, y)], ce, fisher_type="mc", likelihood=sampler(1))
    fd(model, [(x, y)], shift, fisher_type="mc", likelihood=sampler(1))
    fd(model, [(x, y)], ce, fisher_type="mc", likelihood=sampler())
    with pytest.raises(ValueError, match="does not draw"):
        fd(model, [(x, y)], ce, fisher_type="mc", likelihood=sampler(temperature=3.0))
    tempered = lambda o, y: ce(o / 3, y)  # noqa: E731  # not a likelihood that is known: the sampler is the user's word
    fd(model, [(x, y)], tempered, fisher_type="mc", likelihood=sampler(temperature=3.0))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_right_samplers_pass(scale):
    """Saturated probabilities, whose rare labels a few draws never show, too."""
    for seed in range(6):
        torch.manual_seed(seed)
        model, x = nn.Linear(3, 5), scale * torch.randn(4, 3)
        categorical = lambda o, g: torch.multinomial(o.detach().softmax(1), 1, generator=g)[:, 0]  # noqa: E731
        fd(model, [(x, torch.zeros(4).long())], ce, fisher_type="mc", likelihood=categorical)
        bernoulli = lambda o, g: torch.bernoulli(o.detach().sigmoid(), generator=g)  # noqa: E731
        fd(model, [(x, torch.zeros(4, 5))], losses.bernoulli, fisher_type="mc", likelihood=bernoulli)
        gaussian = lambda o, g: o.detach() + torch.randn(o.shape, generator=g)  # noqa: E731
        fd(model, [(x, torch.zeros(4, 5))], losses.mse, fisher_type="mc", likelihood=gaussian)


def test_a_gaussian_sampler_of_another_variance():
    wide = lambda o, g: o.detach() + 2 * torch.randn(o.shape, generator=g)  # noqa: E731
    with pytest.raises(ValueError, match="does not draw"):
        fd(nn.Linear(3, 5), [(torch.randn(4, 3), torch.zeros(4, 5))], losses.mse, fisher_type="mc", likelihood=wide)
    quarter = lambda o, y: losses.mse(o, y) / 4  # noqa: E731  # -log p of variance 4
    fd(nn.Linear(3, 5), [(torch.randn(4, 3), torch.zeros(4, 5))], quarter, fisher_type="mc", likelihood=wide)


# ---- draws -------------------------------------------------------------------------------------------------


def test_draws_have_the_distribution_and_rows_are_independent():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]] * 3000).double()
    p = logits[0].softmax(0)
    for count in (1, 5):
        drawn = draw(logits, "categorical", generator, count=count)
        assert drawn.shape == (count, 3000)
        for one in drawn:
            shares = torch.bincount(one, minlength=4) / 3000
            assert (shares - p).abs().max() < 0.04
            assert shares[2] == 0
        pairs = torch.bincount(drawn[0, ::2] * 4 + drawn[0, 1::2], minlength=16).view(4, 4) / 1500
        assert (pairs - p[:, None] * p).abs().max() < 0.05
    many = draw(logits[:2], "categorical", generator, count=1000)
    assert (torch.bincount(many[:, 0], minlength=4) / 1000 - p).abs().max() < 2e-3  # stratified
    normal = draw(torch.zeros(2, 500), "gaussian", generator, count=4)
    assert abs(float(normal.std()) - 1) < 0.05
    assert torch.isfinite(normal).all()
    assert abs(float((normal[:, 0] * normal[:, 1]).mean())) < 0.1


def test_half_precision_outputs():
    for dtype in (torch.bfloat16, torch.float16):
        outputs, y = torch.randn(4, 5, 6).to(dtype), torch.randint(0, 6, (4, 5))
        reading = fit("categorical", lambda o, y: ce(o, y, shift=True), outputs, y)
        assert (reading.alignment.dim, reading.alignment.offset) == (1, -1)
        with pytest.raises(ValueError, match="is not -log p"):
            fit("categorical", lambda o, y: ce(o / 2, y), outputs, y)


def test_generator_and_reports_are_left_alone():
    """The check draws nothing from the caller's generator, and the loss's own parameters get no gradient."""
    model, (x, y) = Tokens(), data()
    scale = torch.zeros(1, requires_grad=True)
    loss = lambda o, y: ce(o, y, IGNORED) + 0 * scale  # noqa: E731
    first, second = (torch.Generator(torch.get_default_device()).manual_seed(1) for _ in range(2))
    fd(model, [(x, y)], loss, fisher_type="mc", generator=first)
    draw(torch.zeros(3, 3, 3), "categorical", second)
    assert torch.equal(first.get_state(), second.get_state())
    assert scale.grad is None


@pytest.mark.parametrize("verify", [True, False])
def test_draws_of_a_sampler_are_data(verify):
    """A sampler may compute draws from the outputs with a graph."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(5, 3).double(), torch.randn(6, 5, dtype=torch.float64)
    loss = lambda o, t: (o - t).square().sum(1) / 2  # noqa: E731

    def run(sampler):
        generator = torch.Generator().manual_seed(1)
        options = {"fisher_type": "mc", "verify": verify, "generator": generator, "likelihood": sampler}
        return wplfast.fisher_diagonal(model, [(x, x[:, :3])], loss, **options)

    noise = lambda o, g: torch.randn(o.shape, generator=g, dtype=o.dtype)  # noqa: E731
    found, expected = run(lambda o, g: o + noise(o, g)), run(lambda o, g: o.detach() + noise(o, g))
    for name, f in expected.items():
        torch.testing.assert_close(found[name], f)
        assert f.sum() > 0


def test_exact_leaves_out_classes_that_are_masked_in_the_model():
    torch.manual_seed(0)
    linear, x, y = (
        torch.nn.Linear(5, 4).double(),
        torch.randn(6, 5, dtype=torch.float64),
        torch.zeros(6, dtype=torch.long),
    )

    class Masked(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.linear, self.value = linear, value

        def forward(self, x):
            return self.linear(x).masked_fill(torch.tensor([False, False, True, True]), self.value)

    one, other = (
        wplfast.fisher_diagonal(Masked(v), [(x, y)], wplfast.losses.cross_entropy, fisher_type="exact")
        for v in (-1e9, float("-inf"))
    )
    for name, f in one.items():
        torch.testing.assert_close(other[name], f)
