"""A loss is compared with -log p in every batch, on its outputs and labels: right, or an error; never another F."""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wplfast
from wplfast import losses

ce, fd = losses.cross_entropy, wplfast.fisher_diagonal
NOT = r"is not -log p of targets drawn for likelihood='{}' in batch {}"


def per_token(o, y):
    return F.cross_entropy(o.transpose(1, 2), y, reduction="none")


class Logits(nn.Module):
    """Logits [N, T, C] of features, times a scale."""

    def __init__(self, classes=5, scale=1.0, features=3):
        super().__init__()
        self.head, self.scale = nn.Linear(features, classes), scale

    def forward(self, x):
        return self.scale * self.head(x)


def tokens(classes=5, n=4, t=6, n_batches=2, dtype=torch.float32):
    torch.manual_seed(0)
    return [(torch.randn(n, t, 3, dtype=dtype), torch.randint(0, min(classes, 5), (n, t))) for _ in range(n_batches)]


def expected(model, batches, shares):
    """Return F of a linear head whose rows are independent: the sum over rows of p (1 - p) x^2, their gradients' mean.

    ``shares(b, n, t)`` is how often -log p of a row is in its sample's loss.
    """
    model = copy.deepcopy(model).double()
    weight, bias, count = torch.zeros_like(model.head.weight), torch.zeros_like(model.head.bias), 0
    for b, (x, _) in enumerate(batches):
        p = model(x.double()).detach().softmax(-1)
        rows = p * (1 - p) * model.scale**2
        for n, t in itertools.product(range(len(x)), range(x.shape[1])):
            weight += shares(b, n, t) ** 2 * torch.outer(rows[n, t], x[n, t].double() ** 2)
            bias += shares(b, n, t) ** 2 * rows[n, t]
        count += len(x)
    return {"head.weight": weight / count, "head.bias": bias / count}


def close(got, want, tolerance):
    flat = [torch.cat([f[n].double().flatten() for n in want]) for f in (got, want)]
    assert (flat[0] - flat[1]).norm() <= tolerance * flat[1].norm(), flat[0] / flat[1]


# ---- what acts on some logits, labels or batches alone -----------------------------------------------------


def hard_ones(o, y):
    """Hard example mining: tokens that are not easy."""
    found = per_token(o, y)
    return (found * (found > 0.02)).sum(1)


def hardest(o, y):
    """The harder half of all tokens."""
    found = per_token(o, y)
    return (found * (found >= found.detach().median())).sum(1)


def easy_ones_count_less(o, y):
    found = per_token(o, y)
    return (found * torch.where(found < 0.2, 0.1, 1.0)).sum(1)


def rare(loss, first):
    """Another loss for the labels of classes that are never among those tried."""
    return lambda o, y: torch.where(y >= first, loss(o, y), per_token(o, y)).sum(1)


class Clipped(torch.autograd.Function):
    """Passes logits on, and clips their gradient."""

    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(max=0.9)


def smooth(o, y):
    return F.cross_entropy(o.transpose(1, 2), y, label_smoothing=0.1, reduction="none")


def weighted(o, y):
    return 2 * per_token(o, y)


LOCAL = {  # loss, classes, a scale of the logits with which it shows, and what the error says
    "clamped logits": (lambda o, y: ce(o.clamp(-5, 5), y), 5, 9, "its gradient by the outputs is another one"),
    "clamped losses": (lambda o, y: per_token(o, y).clamp(max=4).sum(1), 5, 30, "-log p is"),
    "clamped probabilities": (
        lambda o, y: -o.softmax(-1).clamp(min=0.02).log().gather(-1, y.unsqueeze(-1)).sum((1, 2)), 5, 4, "clamped"
    ),
    "hard examples": (hard_ones, 5, 6, "depends on the outputs or on the labels drawn"),
    "easy examples": (easy_ones_count_less, 5, 5, "factor that differs"),
    "weights of rare classes": (rare(weighted, 10_000), 20_000, 1, "factor that differs"),
    "smoothing of rare classes": (rare(smooth, 10_000), 20_000, 1, "its gradient by the outputs"),
    "clipped gradients": (lambda o, y: ce(Clipped.apply(o), y), 5, 6, "as -log p is, but not its gradient"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCAL)
def test_local_differences_are_refused_where_they_act(name):
    loss, classes, scale, message = LOCAL[name]
    model = Logits(classes, scale)
    batches = tokens(classes, n=20 if classes < 100 else 4)
    with pytest.raises(ValueError, match=NOT.format("categorical", r"\d") + f".*{message}"):
        fd(model, batches, loss, fisher_type="mc", mc_samples=3)


@pytest.mark.parametrize("kind", ["mc", "exact"])
def test_clamps_pass_where_they_do_not_act(kind):
    torch.manual_seed(0)
    model, batches = nn.Linear(3, 4).double(), [(torch.randn(6, 3).double(), torch.randint(0, 4, (6,)))]
    want = fd(model, batches, ce, fisher_type=kind)
    clamped = {
        "logits": lambda o, y: ce(o.clamp(-30, 30), y),
        "losses": lambda o, y: ce(o, y).clamp(max=30),
        "probabilities": lambda o, y: F.nll_loss(o.softmax(1).clamp(min=1e-6).log(), y, reduction="none"),
        "offset": lambda o, y: ce(o, y) + 3 - y.double().log1p(),
    }
    for loss in clamped.values():
        close(fd(model, batches, loss, fisher_type=kind), want, 1e-9)
    sharp = nn.Linear(3, 4).double()
    with torch.no_grad():
        sharp.weight.mul_(40)
    for name in ("logits", "losses", "probabilities"):
        with pytest.raises(ValueError, match=NOT.format("categorical", 1)):
            fd(sharp, batches, clamped[name], fisher_type="exact")


class Late:
    """A loss that is -log p, and something else from the third batch with a new size on."""

    def __init__(self, change, n):
        self.change, self.n = change, n

    def __call__(self, o, y):
        return self.change(o, y) if len(y) == self.n else ce(o, y)


LATE = {
    "mask": lambda o, y: per_token(o, y)[:, :3].sum(1),
    "mask of labels": lambda o, y: (per_token(o, y) * (y > 2)).sum(1),
    "half": lambda o, y: ce(o, y) / 2,
    "temperature by targets": lambda o, y: ce(o * torch.where(y > 2, 0.9, 1.0).unsqueeze(-1), y),
    "harder half": hardest,
    "confidence penalty": lambda o, y: ce(o, y) + 0.1 * (o.softmax(-1) * o.log_softmax(-1)).sum((1, 2)),
}


@pytest.mark.parametrize("name", LATE)
def test_later_batches_are_compared_too(name):
    batches = tokens(n_batches=2) + tokens(n=7, n_batches=1)
    if name == "mask":  # of positions: the loss of part of a sequence is the likelihood of that part
        model = Logits()
        got = fd(model, batches, Late(LATE[name], 7), fisher_type="mc", mc_samples=200)
        close(got, expected(model, batches, lambda b, n, t: float(b < 2 or t < 3)), 0.06)
        return
    with pytest.raises(ValueError, match=NOT.format("categorical", 3)):
        fd(Logits(), batches, Late(LATE[name], 7), fisher_type="mc", mc_samples=3)


def test_what_reaches_parameters_past_the_logits_in_a_later_batch():
    model, batches = Logits(), tokens(n_batches=1) + tokens(n=7, n_batches=1)
    penalty = Late(lambda o, y: ce(o, y) + 0.1 * model.head.weight.square().sum(), 7)
    with pytest.raises(ValueError, match=r"in batch 2, .* depends on parameters in other ways"):
        fd(model, batches, penalty, fisher_type="mc")

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Logits()

        def forward(self, x):
            return {"logits": self.inner(x), "other": self.inner(x).square().sum((1, 2))}

    other = Late(lambda o, y: ce(o, y) + o["other"], 7)
    with pytest.raises(ValueError, match=r"in batch 2, .* outputs other than the logits"):
        fd(Two(), batches, other, fisher_type="mc")


def test_losses_that_change_the_outputs():
    model = Logits()
    with pytest.raises(ValueError, match=r"changes the model's outputs in place.*outputs.clone\(\)"):
        fd(model, tokens(), lambda o, y: ce(o.clamp_(-5, 5), y), fisher_type="mc")
    want = fd(model, tokens(), ce, fisher_type="mc")
    got = fd(model, tokens(), lambda o, y: ce(o.clone().sub_(o.amax(-1, keepdim=True)), y), fisher_type="mc")
    close(got, want, 1e-5)


# ---- right losses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_masks_beside_the_labels_may_differ_from_batch_to_batch(reduction):
    model, batches = Logits(), tokens(n_batches=3)
    masks = [torch.ones(4, 6), (torch.rand(4, 6) < 0.5).float(), (torch.rand(4, 6) < 0.3).float()]
    for mask in masks:
        mask[:, 0] = 1

    def loss(o, y):
        labels, mask = y
        total = (per_token(o, labels) * mask).sum(1)
        return total / mask.sum(1) if reduction == "mean" else total

    data = [(x, (y, mask)) for (x, y), mask in zip(batches, masks, strict=True)]
    got = fd(model, data, loss, fisher_type="mc", mc_samples=150)
    counted = lambda b, n: float(masks[b][n].sum()) if reduction == "mean" else 1.0  # noqa: E731
    close(got, expected(model, batches, lambda b, n, t: float(masks[b][n, t]) / counted(b, n)), 0.06)


def test_an_ignored_class_that_is_found_when_it_is_drawn():
    """It is none of the labels of the first batch, nor of the first classes that are tried."""
    model, batches = Logits(classes=300), tokens(classes=300)
    with torch.no_grad():
        model.head.bias[250] = 5.0
    loss = functools.partial(ce, ignore_index=250)
    for reduction in ("sum", "mean"):
        want = fd(model, batches, lambda o, y: ce(o, y, -1, reduction), fisher_type="mc")  # noqa: B023
        got = fd(model, batches, functools.partial(loss, token_reduction=reduction), fisher_type="mc")
        close(got, want, 1e-5)
    padded = [(x, y.clone()) for x, y in batches]
    padded[1][1][1, 2:] = 250
    marked = [(x, y.masked_fill(y == 250, -1)) for x, y in padded]
    got, want = (
        fd(model, data, functools.partial(ce, ignore_index=i), fisher_type="mc")
        for data, i in ((padded, 250), (marked, -1))
    )
    close(got, want, 1e-5)


def composed(o, y):
    return (o.logsumexp(-1) - o.gather(-1, y.unsqueeze(-1)).squeeze(-1)).sum(1)


PRECISIONS = {
    "float32": (ce, torch.float32),
    "bf16": (ce, torch.bfloat16),
    "float16": (ce, torch.float16),
    "composed": (composed, torch.float32),
    "bf16 composed": (composed, torch.bfloat16),
    "autocast": (ce, torch.float32),
    "float32 of float64": (lambda o, y: ce(o.float(), y), torch.float64),
}


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("form", PRECISIONS)
def test_rounding_is_no_difference(form, scale):
    """Of saturated probabilities and huge logits, in any precision."""
    loss, dtype = PRECISIONS[form]
    model = Logits(scale=min(scale, 500.0) if dtype == torch.float16 else scale)
    model = model.to(dtype)
    for reduction in ("sum", "mean"):
        reduced = loss if reduction == "sum" else (lambda o, y, loss=loss: loss(o, y) / y.shape[1])
        batches = tokens(dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            assert fd(model, batches, reduced, fisher_type="mc", mc_samples=4).n_samples == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_and_many_classes(dtype):
    for classes, t in ((120_000, 4), (40, 4000)):
        model = Logits(classes, 3.0).to(dtype)
        batches = tokens(classes, n=2, t=t, n_batches=1, dtype=dtype)
        for reduction in ("sum", "mean"):
            loss = functools.partial(ce, token_reduction=reduction)
            fd(model, batches, loss, fisher_type="mc", verify=False, params=[("bias", model.head.bias)])


class Positions(nn.Module):
    """Learned positions, which the first batch is run again for: its later terms have another graph than its first."""

    def __init__(self):
        super().__init__()
        self.positions, self.norm, self.head = nn.Embedding(6, 3), nn.LayerNorm(3), nn.Linear(3, 4)

    def forward(self, x):
        return self.head((x + self.norm(self.positions(torch.arange(x.shape[1])))).tanh().mean(1))


def test_terms_of_a_batch_that_is_run_again():
    torch.manual_seed(0)
    model, batches = Positions().double(), [(torch.randn(4, 6, 3).double(), torch.zeros(4, dtype=int)) for _ in "ab"]
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x in torch.cat([x for x, _ in batches]).split(1):
        log_p = model(x)[0].log_softmax(0)
        for value in log_p:
            found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            for total, g in zip(want.values(), found, strict=True):
                total += value.exp().detach() * g.square() / 8
    close(fd(model, batches, ce, fisher_type="exact"), want, 1e-9)
    assert fd(model, batches, ce, fisher_type="mc", mc_samples=3).n_samples == 8
    with pytest.raises(ValueError, match=NOT.format("categorical", 1)):
        fd(model, batches, lambda o, y: ce(o.clamp(-0.1, 0.1), y), fisher_type="exact")


SHORT = torch.tensor([[0] * 5 + [1], [2] * 6])


@pytest.mark.parametrize("form", ["padded", "documents"])
def test_means_over_few_tokens_that_are_certain(form):
    """How often -log p counts cannot be told where p is 1 nearly, and is more there than in all other rows."""
    model = nn.Linear(5, 5)
    with torch.no_grad():
        model.weight.copy_(torch.eye(5))
        model.bias.zero_()
    x, y = torch.randn(2, 6, 5), torch.zeros(2, 6, dtype=int)
    x[0, 5] = torch.tensor([12.0, 0, 0, 0, 0])  # 1 - p = 2e-5
    if form == "padded":
        x, y = torch.cat([x, x.flip(1)[:1]]), torch.zeros(3, 6, dtype=int)
        y[2, 1:] = -100
    ids = SHORT if form == "documents" else None

    def loss(o, y):
        return ce(o, y, token_reduction="mean", sample_ids=ids)

    samples = "losses" if form == "documents" else "batch"
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        assert fd(model, [(x.to(dtype), y)] * 2, loss, fisher_type="mc", samples=samples, mc_samples=2).n_samples == 6

    def pushed(o, y):  # the gradient of tokens that are certain is not small
        return loss(o, y) + 0.1 * torch.where(o[..., 0] - o[..., 1] > 8, o[..., 1], 0).sum()

    with pytest.raises(ValueError, match=r"is not -log p of targets drawn for likelihood='categorical' in batch 1"):
        fd(model.float(), [(x, y)], pushed, fisher_type="mc", samples=samples, verify=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [5, 300, 20_000])
def test_log_probabilities_in_half_precision(dtype, classes):
    """Their rounding leaves sums of probabilities that are not 1."""
    model, batches = nn.Sequential(Logits(classes), nn.LogSoftmax(-1)).to(dtype), tokens(classes, dtype=dtype)
    nll = lambda o, y: F.nll_loss(o.transpose(1, 2), y, reduction="none").sum(1)  # noqa: E731
    assert fd(model, batches, nll, fisher_type="mc", mc_samples=2).n_samples == 8
    with pytest.raises(ValueError, match="is not -log p"):
        fd(model[0], batches, nll, fisher_type="mc")


class Own(torch.autograd.Function):
    """The cross-entropy with a backward pass of its own, which keeps the gradient from the forward pass."""

    @staticmethod
    def forward(ctx, logits, labels):
        log_p = logits.log_softmax(-1)
        ctx.save_for_backward(log_p.exp().scatter_add(-1, labels.unsqueeze(-1), -torch.ones_like(log_p[..., :1])))
        return -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0] * gradient.unsqueeze(-1), None


def test_functions_with_a_backward_pass_of_their_own():
    model = Logits()
    want = fd(model, tokens(), ce, fisher_type="mc")
    close(fd(model, tokens(), lambda o, y: Own.apply(o, y).sum(1), fisher_type="mc"), want, 1e-5)


# ---- other losses that users bring -------------------------------------------------------------------------


class Smoothed(nn.Module):
    """Label smoothing while it is trained."""

    def forward(self, o, y):
        return F.cross_entropy(o, y, reduction="none", label_smoothing=0.1 if self.training else 0.0)


PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()

BROUGHT = {
    "smoothing in training": ("categorical", Smoothed().train(), "label smoothing"),
    "z-loss": ("categorical", lambda o, y: ce(o, y) + 1e-3 * o.logsumexp(1).square(), "Likely reasons"),
    "confidence": ("categorical", lambda o, y: ce(o, y) - 0.1 * torch.special.entr(o.softmax(1)).sum(1), "Likely"),
    "of probabilities": ("categorical", lambda o, y: F.nll_loss(o.softmax(1), y, reduction="none"), "probabilities"),
    "temperatures": ("categorical", lambda o, y: ce(o * torch.tensor([1.0, 1.1, 1.2, 1.3]), y), "a temperature"),
    "logit adjustment": ("categorical", lambda o, y: ce(o + PRIOR, y), "by a prior .let the model add it"),
    "classes so far": ("categorical", lambda o, y: ce(o[:, :3], y), "a part of the classes alone"),
    "float16": ("categorical", lambda o, y: ce(o.half(), y), "computed in float16.*float32"),
    "poisson": ("gaussian", lambda o, y: F.poisson_nll_loss(o, y[:, :4], reduction="none").sum(1), "is not -log p"),
    "laplace": ("gaussian", lambda o, y: (o - y).abs().sum(1), "is not -log p"),
    "huber": ("gaussian", lambda o, y: F.huber_loss(o, y, delta=0.5, reduction="none").sum(1), "Huber"),
    "variance too": ("gaussian", lambda o, y: F.gaussian_nll_loss(o, y, o.exp(), reduction="none").sum(1), "is not"),
}


@pytest.mark.parametrize("name", BROUGHT)
def test_other_losses_that_users_bring(name):
    likelihood, loss, message = BROUGHT[name]
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    y = torch.randint(0, 3, (6,)) if likelihood == "categorical" else torch.rand(6, 4)
    with pytest.raises(ValueError, match=message):
        fd(nn.Linear(3, 4), [(x, y)], loss, fisher_type="mc", likelihood=likelihood)


def test_smoothing_that_is_off_in_eval_mode():
    torch.manual_seed(0)
    model, batches = nn.Linear(3, 4), [(torch.randn(6, 3), torch.randint(0, 4, (6,)))]
    close(fd(model, batches, Smoothed().eval(), fisher_type="exact"), fd(model, batches, ce, fisher_type="exact"), 1e-6)


# ---- gaussian and bernoulli --------------------------------------------------------------------------------


ELEMENTWISE = {
    "huber": ("gaussian", lambda o, y: F.huber_loss(o, y, delta=3.0, reduction="none").sum(1), "Huber"),
    "clamped residuals": ("gaussian", lambda o, y: (o - y).square().clamp(max=9).sum(1) / 2, "clamped"),
    "clamped means": ("gaussian", lambda o, y: losses.mse(o.clamp(-5, 5), y), "clamped"),
    "clamped logits": ("bernoulli", lambda o, y: losses.bernoulli(o.clamp(-5, 5), y), "clamped"),
    "clamped probabilities": (
        "bernoulli",
        lambda o, y: F.binary_cross_entropy(o.sigmoid().clamp(0.02, 0.98), y, reduction="none").sum(1),
        "clamped",
    ),
    "easy labels": (
        "bernoulli",
        lambda o, y: (F.binary_cross_entropy_with_logits(o, y, reduction="none") * (o.abs() < 5)).sum(1),
        "which rows",
    ),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_local_differences_of_elementwise_losses(name):
    likelihood, loss, message = ELEMENTWISE[name]
    torch.manual_seed(1)
    model = Logits(4, 9.0)
    batches = [(torch.randn(60, 3), torch.randint(0, 2, (60, 4)).float()) for _ in range(2)]
    with pytest.raises(ValueError, match=f"likelihood='{likelihood}'.*{message}"):
        fd(model, batches, loss, fisher_type="mc", likelihood=likelihood, mc_samples=40)


def test_elementwise_losses_whose_clamps_do_not_act():
    torch.manual_seed(1)
    model = nn.Linear(3, 4).double()
    batches = [(torch.randn(9, 3).double(), torch.randint(0, 2, (9, 4)).double())]
    for likelihood, loss, clamped in (
        ("gaussian", losses.mse, lambda o, y: F.huber_loss(o, y, delta=9.0, reduction="none").sum(1)),
        ("gaussian", losses.mse, lambda o, y: (o - y).square().clamp(max=90).sum(1) / 2),
        ("bernoulli", losses.bernoulli, lambda o, y: F.binary_cross_entropy(o.sigmoid(), y, reduction="none").sum(1)),
    ):
        run = functools.partial(fd, model, batches, fisher_type="mc", likelihood=likelihood, mc_samples=3)
        close(run(clamped), run(loss), 1e-9)


def test_labels_that_are_broadcast_against_outputs():
    """Outputs [N, 1] minus labels [N] is [N, N]: each sample's loss mixes the labels of all."""
    model, x, y = nn.Linear(3, 1), torch.randn(6, 3), torch.randn(6)
    slip = lambda o, y: 0.5 * (o - y).square().mean(1)  # noqa: E731
    with pytest.raises(ValueError, match="is not -log p of targets drawn for likelihood='gaussian'"):
        fd(model, [(x, y)], slip, fisher_type="mc", likelihood="gaussian")
    fd(model, [(x, y.unsqueeze(1))], slip, fisher_type="mc", likelihood="gaussian")


def test_losses_that_hold_those_of_other_samples():
    """Their sum is right, and so is its gradient; each sample's loss is not."""
    model, batches = Logits(), tokens()
    mixed = lambda o, y: ce(o, y).mean().expand(len(y))  # noqa: E731
    with pytest.raises(ValueError, match="losses of several samples hold -log p of one sample's label"):
        fd(model, batches, mixed, fisher_type="mc", verify=False)
    offset = lambda o, y: ce(o, y) + torch.arange(len(y))  # noqa: E731
    close(fd(model, batches, offset, fisher_type="mc"), fd(model, batches, ce, fisher_type="mc"), 1e-5)
