"""What fisher_diagonal and FisherAccumulator say of bad input, and leave alone."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import Rnn, assert_same_state, batches, ce, mlp, state_of, tokens
from torch import nn

import wplfast
from wplfast.errors import CoupledSamplesError, NonFiniteError, UnsupportedParameterError, WplfastError
from wplfast.fisher.sampling import draw

# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (F.cross_entropy, r"shape \[N\], got float32\[\], a scalar: .*reduction='none'"),
        (lambda o, y: o.log_softmax(1), r"got float32\[5, 4\], one value per token"),
        (lambda o, y: ce(o, y).detach(), "graph"),
        (lambda o, y: ce(o, y).tolist(), "must be a tensor"),
        (lambda o, y: torch.cat([ce(o, y)] * 3), r"one loss per sample, shape \[N\], got \[15\]"),
    ],
)
def test_losses_that_are_not_per_sample(loss, match):
    with pytest.raises((ValueError, TypeError), match=match):
        wplfast.fisher_diagonal(mlp(), batches((5,)), loss)


@pytest.mark.parametrize("loss", [nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss])
@pytest.mark.parametrize(
    ("layers", "y", "options", "match"),
    [
        ([], (5,), {}, r"outputs \[5, 1\] and targets \[5\] were broadcast, .* give the loss outputs\.squeeze\(1\)"),
        (
            [nn.Flatten(0)],
            (5, 1),
            {},
            r"outputs \[5\] and targets \[5, 1\] were .* the loss targets\.squeeze\(1\)",
        ),
        ([], (5,), {"fisher_type": "mc", "likelihood": lambda o, g: o.detach()[:, 0]}, r"outputs\.squeeze\(1\)"),
    ],
    ids=["outputs", "targets", "drawn"],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_outputs_and_targets_that_broadcast_are_named(loss, layers, y, options, match):
    model = nn.Sequential(nn.Linear(6, 1), *layers)
    with pytest.raises(ValueError, match=rf"got float32\[5, 5\], to which .*{match}"):
        wplfast.fisher_diagonal(model, [(torch.ones(5, 6), torch.zeros(y))], loss(reduction="none"), **options)


def test_several_outputs_of_as_many_samples_are_not_taken_for_broadcast():
    with pytest.raises(ValueError, match=r"got float32\[4, 4\], one value per token or output: sum"):
        wplfast.fisher_diagonal(nn.Linear(6, 4), [(torch.ones(4, 6), torch.ones(4, 4))], nn.MSELoss(reduction="none"))


def test_losses_per_token_are_named():
    def per_token(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")

    with pytest.raises(ValueError, match=r"losses per token, use losses.view\(N, T\).sum\(1\)"):
        wplfast.fisher_diagonal(Rnn(), [tokens(4, 6)], per_token)


def test_empty_and_odd_data():
    with pytest.raises(ValueError, match="data is empty"):
        wplfast.fisher_diagonal(mlp(), [], ce)
    with pytest.raises(TypeError, match=r"got a tensor \[5, 6\]; pass unpack="):
        wplfast.fisher_diagonal(mlp(), [torch.zeros(5, 6)], ce)
    with pytest.raises(TypeError, match="unpack must return"):
        wplfast.fisher_diagonal(mlp(), batches(), ce, unpack=lambda b: b[0])
    for options in ({"fisher_type": "true"}, {"mc_samples": 0}, {"max_samples": 0}, {"on_nonfinite": "ignore"}):
        with pytest.raises(ValueError, match="got"):
            wplfast.fisher_diagonal(mlp(), batches(), ce, **options)
    with pytest.raises(ValueError, match="use fisher_type='mc'"):
        wplfast.fisher_diagonal(Rnn(), [tokens(4, 6)], ce, fisher_type="exact")
    with pytest.raises(ValueError, match="likelihood must be"):
        wplfast.fisher_diagonal(mlp(), batches(), ce, fisher_type="mc", likelihood="poisson")
    with pytest.raises(ValueError, match="weights must have shape"):
        wplfast.fisher_diagonal(mlp(), [(*batches((5,))[0], torch.ones(4))], ce)
    with pytest.raises(ValueError, match="not negative"):
        wplfast.fisher_diagonal(mlp(), [(*batches((5,))[0], -torch.ones(5))], ce)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_on_batch_statistics_is_an_error(train):
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9, track_running_stats=train), nn.ReLU(), nn.Linear(9, 4))
    with pytest.raises(CoupledSamplesError, match=r"1 \(BatchNorm1d\) (is in training mode|has no running statistics)"):
        wplfast.fisher_diagonal(model, batches(), ce, train=train)


def test_in_batch_negatives_are_an_error_that_names_the_operation():
    def contrastive(outputs, targets):
        z = F.normalize(outputs, dim=1)
        return F.cross_entropy(z @ z.t(), torch.arange(len(z)), reduction="none")

    model = mlp()
    before = state_of(model)
    with pytest.raises(CoupledSamplesError, match=r"coupled at linear in 2 \(parameter '2.weight'\)"):
        wplfast.fisher_diagonal(model, batches(), contrastive)
    assert_same_state(model, before)


def test_hidden_coupling_between_samples_is_an_error():
    class Centre(nn.Module):
        def forward(self, h):
            return h - 0.1 * h.mean(0)

    model = nn.Sequential(nn.Linear(6, 9), Centre(), nn.Linear(9, 4))
    with pytest.raises(CoupledSamplesError, match="coupled at linear in 0"):
        wplfast.fisher_diagonal(model, batches(), ce)


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (lambda: mlp(), lambda o, y: ce(o, y) / len(y)),  # a mean in disguise
        (lambda: nn.Sequential(Standardise(), mlp()), ce),  # statistics of raw inputs: no gradient passes through them
    ],
)
def test_coupling_that_gradients_cannot_show_is_an_error(model, loss):
    with pytest.raises(CoupledSamplesError, match="another one in a batch of its own"):
        wplfast.fisher_diagonal(model(), batches(), loss)


class Standardise(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)) / (1e-3 + (x - x.mean(0)).square().mean(0).sqrt())


def test_nonfinite_losses():
    model, data = mlp(), batches()
    data[1][0][2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="the loss of sample 2 is nan"):
        wplfast.fisher_diagonal(model, data, ce)
    fisher = wplfast.fisher_diagonal(model, data, ce, on_nonfinite="skip")
    torch.testing.assert_close(fisher.flat, wplfast.fisher_diagonal(model, [data[0], data[2]], ce).flat)
    assert fisher.n_samples == 7
    assert fisher.report.skipped_samples == 5
    with pytest.raises(ValueError, match=r"no usable samples \(5 skipped\)"):
        wplfast.fisher_diagonal(model, data[1:2], ce, on_nonfinite="skip")


class Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, active):
        ctx.active = active
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return (g * float("inf") if ctx.active else g), None


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_generator_of_another_device(likelihood):
    logits = torch.zeros(3, 4, device="meta")
    with pytest.raises(ValueError, match="generator must be of the outputs' device, meta, got one of cpu"):
        draw(logits, likelihood, torch.Generator("cpu"))


@pytest.mark.parametrize("options", [{"fisher_type": "exact"}, {"fisher_type": "mc", "mc_samples": 3}])
def test_nonfinite_outputs_when_targets_are_drawn(options, device):
    """NaN in the outputs is reported as that of the losses is, whoever makes the targets; a batch is left out once."""
    model, data = mlp(), batches((4, 4, 4))
    data[1][0][2, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="the loss of sample 2 is nan"):
        wplfast.fisher_diagonal(model, data, ce, **options)
    found = wplfast.fisher_diagonal(
        model, data, ce, on_nonfinite="skip", generator=torch.Generator(device).manual_seed(0), **options
    )
    assert (found.n_samples, found.report.skipped_samples) == (8, 4)
    if options["fisher_type"] == "exact":
        expected = wplfast.fisher_diagonal(model, [data[0], data[2]], ce, **options)
        torch.testing.assert_close(found.flat, expected.flat)


def test_nonfinite_gradients_name_the_parameter():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 4)

        def forward(self, x):
            return self.b(Overflow.apply(self.a(x), bool(x[0, 0] > 100)))

    model, data = Model(), batches((4, 4, 4))
    data[1][0][0, 0] = 200.0
    before = state_of(model)
    with wplfast.FisherAccumulator(model) as acc:
        acc.backward(ce(model(data[0][0]), data[0][1]))
        with pytest.raises(NonFiniteError, match=r"'a\.weight'"):
            acc.backward(ce(model(data[1][0]), data[1][1]))
        with pytest.raises(WplfastError, match="cannot be used any more"):
            acc.result()
    assert_same_state(model, before)
    skipped = wplfast.fisher_diagonal(model, data, ce, on_nonfinite="skip", with_grad=True)
    clean = wplfast.fisher_diagonal(model, [data[0], data[2]], ce, with_grad=True)
    torch.testing.assert_close(skipped.flat, clean.flat)
    torch.testing.assert_close(skipped.mean_grad["a.weight"], clean.mean_grad["a.weight"])


def test_tensor_subclasses_are_refused():
    class Special(torch.Tensor):
        pass

    model = mlp()
    strange = torch.zeros(3).as_subclass(Special).requires_grad_()
    with pytest.raises(UnsupportedParameterError, match="'x' is a Special"):
        wplfast.fisher_diagonal(model, batches(), ce, params={"x": strange})


# ---- no graph ----------------------------------------------------------------------------------------------


def under(mode, run):
    with mode:
        return run()


def result_of(acc, losses):
    acc.backward(losses)
    return acc.result()


class RunsItselfIn(nn.Sequential):
    """A model whose forward pass enters a mode of its own."""

    mode = torch.no_grad

    def forward(self, x):
        return under(self.mode(), lambda: nn.Sequential.forward(self, x))


def test_parameters_of_another_model_are_named():
    model, other = mlp(), mlp()
    theirs = r"none of params, \['0.weight', .*is a parameter of this Sequential, which has \['0.weight'"
    scale = torch.ones(4, requires_grad=True)
    for loss in (ce, lambda o, y: ce(o * scale, y)):  # a loss that has a graph all the same
        with pytest.raises(ValueError, match=theirs):
            wplfast.fisher_diagonal(model, batches((3,)), loss, params=other)


def test_a_parameter_of_another_model_among_others_is_warned_of(caplog):
    model, other = mlp(), mlp()
    params = {"mine": model[0].weight, "theirs": other[0].weight}
    fisher = wplfast.fisher_diagonal(model, batches((3,)), ce, params=params)
    assert fisher["mine"].any()
    assert not fisher["theirs"].any()
    assert "no loss depends on ['theirs']" in caplog.text


@pytest.mark.parametrize(
    ("mode", "match"), [(torch.no_grad, "run under no_grad, are its outputs"), (torch.inference_mode, "inference_mode")]
)
def test_why_there_is_no_graph_is_told(mode, match):
    x, y = batches((3,))[0]
    model = RunsItselfIn(nn.Linear(6, 4))
    model.mode = mode
    with pytest.raises(ValueError, match=match):
        wplfast.fisher_diagonal(model, [(x, y)], ce)
    losses = under(mode(), lambda: ce(model(x), y))
    acc = wplfast.FisherAccumulator(model)
    with acc, pytest.raises(ValueError, match=match):
        result_of(acc, losses)


def test_what_the_forward_pass_leaves_out_is_named():
    model = nn.ModuleDict({"used": mlp(), "left": mlp()})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(ValueError, match=r"or is \['0.weight', .*\] no part of its forward pass"):
        wplfast.fisher_diagonal(model, batches((3,)), ce, params=model["left"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"fisher_type": "mc"}, {"with_grad": True, "on_nonfinite": "skip"}])
def test_a_pass_may_begin_in_any_mode(mode, options):
    model, data = mlp(), batches((3, 2))
    expected = wplfast.fisher_diagonal(model, data, ce, **options)
    with mode():
        same = [(x.clone(), y.clone()) for x, y in data]  # made in this mode
        fisher = wplfast.fisher_diagonal(model, same, ce, **options)
        wplfast.verify_fisher(model, same[0], ce)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    for name, f in expected.items():
        assert not fisher[name].is_inference()
        torch.testing.assert_close(fisher[name], f)
    fisher = wplfast.fisher_diagonal(model, same, ce, **options)  # and outside, on what was made inside
    torch.testing.assert_close(fisher.flat, expected.flat)


def test_parameters_that_take_no_gradient_are_named():
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(UnsupportedParameterError, match=r"'0.weight' was made under torch\.inference_mode"):
        wplfast.fisher_diagonal(model, batches((3,)), ce)


@pytest.mark.not_rehearsed("sparse tensors")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_parameters_are_named(layout):
    model = nn.Linear(6, 4)
    model.weight = nn.Parameter(getattr(model.weight.detach(), layout)())
    with pytest.raises(UnsupportedParameterError, match="'weight' is a sparse tensor"):
        wplfast.fisher_diagonal(model, batches((3,)), ce)


# ---- labels that the model itself needs --------------------------------------------------------------------


class Decoder(nn.Module):
    """Makes its decoder's inputs of the labels, as T5 does, and fails without them in one way or another."""

    def __init__(self, error):
        super().__init__()
        self.error, self.emb, self.head = error, nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, input_ids, labels=None):
        if labels is None:
            raise self.error("no decoder_input_ids")
        return self.head(self.emb(F.pad(labels[:, :-1], (1, 0))) + self.emb(input_ids).mean(1, keepdim=True))


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)


class WithoutLabels(Decoder):
    def forward(self, input_ids):
        raise self.error("no decoder_input_ids")


@pytest.mark.parametrize("error", [ValueError, TypeError, AttributeError, KeyError])
@pytest.mark.parametrize("wrap", [lambda m: m, Wrapped])
def test_a_model_that_needs_its_labels_is_told_how_to_get_them(error, wrap):
    model = wrap(Decoder(error))
    batch = {"input_ids": torch.randint(7, (4, 3)), "labels": torch.randint(7, (4, 6))}
    with pytest.raises(ValueError, match=r"no decoder_input_ids.*unpack=lambda b: \(b, b\[\"labels\"\]\)") as found:
        wplfast.fisher_diagonal(model, [batch], ce)
    assert isinstance(found.value.__cause__, error)
    fisher = wplfast.fisher_diagonal(model, [batch], ce, unpack=lambda b: (b, b["labels"]))
    assert all(bool(f.any()) for f in fisher.values())


@pytest.mark.parametrize("error", [ValueError, RuntimeError, CoupledSamplesError, UnsupportedParameterError])
def test_other_failures_of_a_model_stay_as_they_are(error):
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "labels": torch.zeros(2, 3, dtype=torch.int64)}
    with pytest.raises(error, match=r"^no decoder_input_ids$"):
        wplfast.fisher_diagonal(WithoutLabels(error), [batch], ce)
    if error is not ValueError:
        with pytest.raises(error, match=r"^no decoder_input_ids$"):
            wplfast.fisher_diagonal(Decoder(error), [batch], ce)


def test_a_loss_that_is_none_is_told_of():
    with pytest.raises(
        TypeError, match=r"got None: .*outputs\.loss.*losses\.cross_entropy\(outputs, labels, shift=True"
    ):
        wplfast.fisher_diagonal(mlp(), batches((3,)), lambda o, y: None)


@pytest.mark.parametrize(("data", "got"), [(None, "None"), (5, "int"), (nn.Linear(2, 2), "Linear")])
def test_data_that_cannot_be_iterated_over(data, got):
    with pytest.raises(TypeError, match=f"data must be an iterable of batches, .* got {got}"):
        wplfast.fisher_diagonal(nn.Linear(2, 2), data, wplfast.losses.cross_entropy)


def test_arguments_that_were_taken_for_others():
    model, (x, y) = nn.Linear(2, 3), (torch.ones(4, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(
        TypeError, match=r"got list, and data are one, a Linear: the order is fisher_diagonal\(model, data"
    ):
        wplfast.fisher_diagonal([(x, y)], model, ce)
    for given in ("mse", None, x):
        with pytest.raises(TypeError, match=f"loss_fn must be a function .* got {type(given).__name__}"):
            wplfast.fisher_diagonal(model, [(x, y)], given)
    for one, name in (((x, y), "x, y"), ([x, y, torch.ones(4)], "x, y, weights")):
        with pytest.raises(TypeError, match=rf"got {len(one)} tensors, which are one batch: pass \[\({name}\)\]"):
            wplfast.fisher_diagonal(model, one, ce)
    inputs_alone = wplfast.fisher_diagonal(model, [x, x], wplfast.losses.mse, unpack=lambda b: (b, torch.zeros(4, 3)))
    assert inputs_alone.n_samples == 8
    with pytest.raises(TypeError, match="max_samples must be a number, or None for all, got 'all'"):
        wplfast.fisher_diagonal(model, [(x, y)], ce, max_samples="all")
    with pytest.raises(ValueError, match="verify must be True, False or 'always', got 'never'"):
        wplfast.fisher_diagonal(model, [(x, y)], ce, verify="never")
    with pytest.raises(ValueError, match="verify must be True, False or 'always', got 'first'"):
        wplfast.FisherAccumulator(model, verify="first")
    fisher = wplfast.fisher_diagonal(model, [(x, y)], ce, verify="always")
    for given in (fisher, dict(fisher)):
        with pytest.raises(TypeError, match=r"alpha must be a number, .* pass the Fisher to its consolidate\(fisher\)"):
            wplfast.WeightPlasticityLoss(model, given)


def test_a_loss_that_is_a_class_is_told_of():
    with pytest.raises(TypeError, match=r"make an instance of it, CrossEntropyLoss\(reduction='none'\)$"):
        wplfast.fisher_diagonal(mlp(), batches(), nn.CrossEntropyLoss)
    with pytest.raises(TypeError, match=r"loss_fn is a class: make an instance of it, Centre\(\.\.\.\)$"):
        wplfast.fisher_diagonal(mlp(), batches(), type("Centre", (nn.Module,), {}))


def test_data_and_loss_that_were_swapped_are_told_of():
    for loss in (ce, nn.CrossEntropyLoss(reduction="none")):
        with pytest.raises(TypeError, match=r"got \w+, and loss_fn is one, a list: the order is .*\(model, data, loss"):
            wplfast.fisher_diagonal(mlp(), loss, batches())


def blog_loss(model, x, y):
    return ce(model(x), y)


@pytest.mark.parametrize("loss", [blog_loss, lambda o: o.sum(1)])
def test_a_loss_of_other_arguments_is_told_of(loss):
    with pytest.raises(
        TypeError, match=r"called with two .*\(outputs, targets\), and takes \((model, x, y|o)\)"
    ) as found:
        wplfast.fisher_diagonal(mlp(), batches(), loss)
    assert isinstance(found.value.__cause__, TypeError)


def test_a_loss_that_is_wrapped_may_show_another_signature():
    model = mlp()

    @functools.wraps(blog_loss)
    def wrapped(outputs, targets):
        return blog_loss(nn.Identity(), outputs, targets)

    assert wplfast.fisher_diagonal(model, batches((3,)), wrapped).n_samples == 3


@pytest.mark.cpu_only("labels out of range, which end the process on a GPU")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (lambda o, y: F.cross_entropy(y, o, reduction="none"), Exception),
        (lambda o, y: ce(o, y + 3), Exception),
        (lambda o, y: 1 / 0, ZeroDivisionError),
        (lambda o, y: o + None, TypeError),
    ],
)
def test_an_error_of_a_loss_says_what_it_was_given(loss, error):
    data = [(torch.randn(5, 6), torch.tensor([0, 3, 1, 1, 2]))]
    with pytest.raises(error) as found:
        wplfast.fisher_diagonal(mlp(), data, loss)
    (note,) = found.value.__notes__
    assert note.endswith("loss_fn(outputs, targets): outputs are float32[5, 4], targets are int64[5] from 0 to 3")


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (lambda: nn.LazyLinear(3), "parameter '0.weight'"),
        (lambda: nn.LazyBatchNorm1d(affine=False), "buffer '0.running_mean'"),
    ],
    ids=["parameter", "buffer"],
)
def test_a_lazy_module_that_has_not_run(layer, what):
    data = [(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))]
    model = nn.Sequential(layer(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=f"the {what} has no shape yet.* run one batch through the model first"):
        wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy)
    model(data[0][0])
    assert wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy).n_samples == 4
