"""Labels are drawn as the loss reads them: F against the expectation over all labels, sample by sample, in float64."""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from label_cases import IGNORED, Tokens, close, data, expectation, squares
from torch import nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput

import wplfast
from wplfast import losses

ce, fd = losses.cross_entropy, wplfast.fisher_diagonal


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
    close(fd(model, [(x, y)], PLAIN[form], fisher_type="mc", mc_samples=150), expectation(model, x, y, int, "sum"))


SHIFTED = {
    "tensor": lambda o, y: ce(o, y, IGNORED, shift=True),
    "output": hf_shift,
    "virtual": lambda o, y: ce(o[:, -y.shape[1] :], y, IGNORED, shift=True),
    "flat": lambda o, y: ce(o.view(*y.shape, -1), y, IGNORED, shift=True),
}


@pytest.mark.parametrize("form", SHIFTED)
def test_shifted_labels_come_from_the_position_before(form):
    model, (x, y) = Tokens(form=form), data()
    got = fd(model, [(x, y)], SHIFTED[form], fisher_type="mc", mc_samples=150)
    close(got, expectation(model, x, y, shifted, "sum"))


def test_labels_that_were_shifted_before():
    """Logits are one longer than labels, and the loss drops the last ones."""
    model, (x, y) = Tokens(), data()
    got = fd(model, [(x, y[:, 1:])], lambda o, y: ce(o[:, :-1], y, IGNORED), fisher_type="mc", mc_samples=150)
    close(got, expectation(model, x, y, shifted, "sum"))


@pytest.mark.parametrize("at", [0, -1])
def test_one_label_for_a_sequence(at):
    model, (x, y) = Tokens(), data()
    y = torch.where(y[:, :1] == IGNORED, 0, y[:, :1])
    y[1] = IGNORED
    got = fd(model, [(x, y[:, 0])], lambda o, y: ce(o[:, at], y, IGNORED), fisher_type="mc", mc_samples=150)
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
    close(fd(model, [(x, y)], loss, fisher_type="mc", mc_samples=150), want)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_padding_that_is_a_class(padding, reduction):
    """An ignored class of the model's own is drawn like any other, though the loss does not count it; padding stays."""
    model, (x, y) = Tokens(), data()
    want = expectation(model, x, y, int, reduction)
    y = torch.where(y == IGNORED, padding, torch.where(y == padding, 1, y))
    got = fd(model, [(x, y)], lambda o, y: ce(o, y, padding, reduction), fisher_type="mc", mc_samples=200)
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
    got = fd(model, batches, loss, fisher_type="mc", mc_samples=400)
    close(got, dict(zip(["weight", "bias"], want, strict=True)))


def test_first_batch_that_tells_nothing():
    model, (x, y) = Tokens(), data()
    loss = lambda o, y: ce(o, y, IGNORED, shift=True)  # noqa: E731
    got = fd(model, [(x, torch.full_like(y, IGNORED)), (x, y)], loss, fisher_type="mc", mc_samples=150)
    want = expectation(model, x, y, shifted, "sum")
    close(got, {n: f / 2 for n, f in want.items()})
    assert not fd(model, [(x, torch.full_like(y, IGNORED))], loss, fisher_type="mc").flat.any()


def test_targets_of_other_forms():
    """int32 and one-hot labels, dicts with labels, masks beside them, and none at all."""
    model, (x, y) = Tokens(), data()
    want, run = expectation(model, x, y, int, "sum"), functools.partial(fd, fisher_type="mc", mc_samples=150)
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
    got = fd(model, [(x, given[form])], losses.question_answering, fisher_type="mc", mc_samples=200)
    close(got, dict(zip(["head.weight", "head.bias"], total, strict=True)))


def copy_as(model, form):
    other = copy.copy(model)
    other.form = form
    return other


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
