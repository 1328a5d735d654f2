"""Ready losses: formulas, forms of outputs and targets, gradients sample by sample, and what they refuse."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

import wplfast
from wplfast import losses


def shown(values):
    return torch.tensor(values, dtype=torch.float64)


def test_mse_is_half_a_sum_of_squares():
    outputs, targets = torch.randn(4, 2, 3).double(), torch.randn(4, 2, 3).double()
    expected = shown([0.5 * float((o - t).square().sum()) for o, t in zip(outputs, targets, strict=True)])
    torch.testing.assert_close(losses.mse(outputs, targets), expected)
    torch.testing.assert_close(losses.mse(outputs, targets, reduction="mean"), expected / 6)
    torch.testing.assert_close(losses.mse(outputs[:, 0, :1], targets[:, 0, 0]), (outputs - targets)[:, 0, 0] ** 2 / 2)
    hf = SequenceClassifierOutput(logits=outputs[:, 0, :1])
    torch.testing.assert_close(losses.mse(hf, targets[:, 0, 0]), (outputs - targets)[:, 0, 0] ** 2 / 2)
    assert losses.mse(outputs[:, 0, 0], torch.tensor([1, 2, 3, 4])).dtype == torch.float64


def test_mse_is_minus_log_p_up_to_a_constant():
    outputs = torch.randn(4, 3).double()
    first, second = torch.randn(2, 4, 3).double()
    normal = torch.distributions.Normal(outputs, 1.0)
    expected = (normal.log_prob(second) - normal.log_prob(first)).sum(1)
    torch.testing.assert_close(losses.mse(outputs, first) - losses.mse(outputs, second), expected)


def test_soft_cross_entropy():
    logits, targets = torch.randn(4, 3, 5).double(), torch.randn(4, 3, 5).double().softmax(-1)
    targets[1, 2] = 0
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none").view(4, 3).sum(1)
    torch.testing.assert_close(losses.soft_cross_entropy(logits, targets), expected)
    counted = shown([3, 2, 3, 3])
    torch.testing.assert_close(losses.soft_cross_entropy(logits, targets, token_reduction="mean"), expected / counted)
    classes = torch.randint(0, 5, (4, 3))
    torch.testing.assert_close(
        losses.soft_cross_entropy(logits, F.one_hot(classes, 5).double()), losses.cross_entropy(logits, classes)
    )
    logits = logits.masked_fill(targets.argmax(-1, keepdim=True) != torch.arange(5), -torch.inf).requires_grad_()
    hard = F.one_hot(targets.argmax(-1), 5).double()
    (gradient,) = torch.autograd.grad(losses.soft_cross_entropy(logits, hard).sum(), logits)
    assert torch.isfinite(gradient).all()


def test_bernoulli():
    logits, targets = torch.randn(4, 3).double(), torch.randint(0, 2, (4, 3))
    expected = -torch.distributions.Bernoulli(logits=logits).log_prob(targets.double())
    torch.testing.assert_close(losses.bernoulli(logits, targets), expected.sum(1))
    torch.testing.assert_close(losses.bernoulli(logits[:, :1], targets[:, 0].bool()), expected[:, 0])
    torch.testing.assert_close(losses.bernoulli(logits[:, 0], targets[:, 0].float()), expected[:, 0])
    targets[0, 1] = targets[2] = -1
    expected[0, 1] = expected[2] = 0
    torch.testing.assert_close(losses.bernoulli(logits, targets, ignore=-1), expected.sum(1))


def test_question_answering():
    start, end = torch.randn(2, 4, 6).double()
    positions = torch.tensor([[0, 5], [2, 6], [9, 9], [3, -1]])
    one = F.cross_entropy(start, positions[:, 0].clamp(0, 6), reduction="none", ignore_index=6)
    two = F.cross_entropy(end, torch.tensor([5, 6, 6, 6]), reduction="none", ignore_index=6)
    forms = {
        "tuple": ((start, end, torch.zeros(1)), tuple(positions.T)),
        "output": (QuestionAnsweringModelOutput(start_logits=start, end_logits=end), positions),
        "columns": ((start, end), (positions[:, :1], positions[:, 1:])),
        "dict": (
            {"start_logits": start, "end_logits": end},
            {"start_positions": positions[:, 0], "end_positions": positions[:, 1]},
        ),
    }
    for outputs, targets in forms.values():
        torch.testing.assert_close(losses.question_answering(outputs, targets), one + two)


def test_hugging_face_question_answering():
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model, x = BertForQuestionAnswering(config).double(), torch.randint(0, 40, (3, 6))
    y = torch.tensor([[0, 2], [3, 3], [1, 6]])  # 6: beyond the sequence
    for n in range(3):
        theirs = model(x[n : n + 1], start_positions=y[n : n + 1, 0], end_positions=y[n : n + 1, 1]).loss
        ours = losses.question_answering(model(x[n : n + 1]), y[n : n + 1])
        if n < 2:  # Hugging Face returns NaN where a mean is over nothing
            torch.testing.assert_close(ours, 2 * theirs.view(1))
    data = [({"input_ids": x}, (y[:, 0], y[:, 1]))]
    errors = wplfast.verify_fisher(model, data[0], losses.question_answering)
    assert max(errors.values()) < 1e-9
    fisher = wplfast.fisher_diagonal(model, data, losses.question_answering, fisher_type="mc", params=model.qa_outputs)
    assert (fisher["weight"] > 0).all()


def test_seq2seq():
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model, x, y = T5ForConditionalGeneration(config), torch.randint(1, 40, (3, 5)), torch.randint(1, 40, (3, 4))
    y[1, 2:] = -100
    outputs = model(input_ids=x, labels=y)
    mean = losses.seq2seq(outputs, y, token_reduction="mean")
    for n in range(3):
        torch.testing.assert_close(mean[n], model(input_ids=x[n : n + 1], labels=y[n : n + 1]).loss)
    torch.testing.assert_close(losses.seq2seq(outputs, y), mean * torch.tensor([4.0, 2.0, 4.0]))
    assert (losses.seq2seq(outputs, y).sum() - losses.cross_entropy(outputs, y, shift=True).sum()).abs() > 1e-3


READY = {
    "mse": (losses.mse, "gaussian", (5, 3), lambda: torch.randn(5, 3)),
    "bernoulli": (functools.partial(losses.bernoulli, ignore=-1), "bernoulli", (5, 3), lambda: torch.ones(5, 3)),
    "soft": (losses.soft_cross_entropy, "categorical", (5, 3), lambda: torch.rand(5, 3).softmax(1)),
    "seq2seq": (losses.seq2seq, "categorical", (5, 2, 3), lambda: torch.randint(0, 3, (5, 2))),
    "soft tokens": (
        functools.partial(losses.soft_cross_entropy, token_reduction="mean"),
        "categorical",
        (5, 2, 3),
        lambda: torch.rand(5, 2, 3).softmax(2),
    ),
}


@pytest.mark.parametrize("name", READY)
def test_ready_losses_are_likelihoods(name):
    """Each passes the check of drawn labels, and the Fisher of given targets equals the one-sample loop's."""
    loss, likelihood, shape, targets = READY[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, shape[1:])), torch.randn(5, 4)
    if name in ("mse", "bernoulli", "soft"):
        model = nn.Linear(4, 3)
    y = targets().to(torch.get_default_dtype()) if targets().is_floating_point() else targets()
    model, x, y = model.double(), x.double(), y.double() if y.is_floating_point() else y
    assert max(wplfast.verify_fisher(model, (x, y), loss).values()) < 1e-9
    wplfast.fisher_diagonal(model, [(x, y)], loss, fisher_type="mc", likelihood=likelihood, mc_samples=2)


def test_targets_of_another_loss_name_the_right_one():
    logits = torch.randn(4, 3)
    with pytest.raises(TypeError, match=r"use wplfast\.losses\.soft_cross_entropy .*wplfast\.losses\.mse"):
        losses.cross_entropy(logits, torch.rand(4, 3))
    with pytest.raises(TypeError, match=r"wplfast\.losses\.bernoulli, or wplfast\.losses\.mse for regression"):
        losses.cross_entropy(logits, torch.rand(4))
    with pytest.raises(TypeError, match=r"int32: use targets\.long\(\)"):
        losses.cross_entropy(logits, torch.zeros(4, dtype=torch.int32))
    with pytest.raises(TypeError, match="use cross_entropy for classes"):
        losses.soft_cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"soft labels of the logits' shape \[4, 3\], got \[4, 2\]"):
        losses.soft_cross_entropy(logits, torch.zeros(4, 2))


@pytest.mark.parametrize("loss", [losses.mse, losses.bernoulli])
def test_nothing_is_broadcast(loss):
    for outputs, targets in ((torch.randn(4, 3), torch.randn(4)), (torch.randn(4), torch.randn(4, 1))):
        with pytest.raises(ValueError, match="targets must have the outputs' shape"):
            loss(outputs, targets)
    with pytest.raises(TypeError, match="outputs must be a tensor"):
        loss([1, 2], torch.randn(2))


def test_options_and_forms_are_checked():
    with pytest.raises(ValueError, match="reduction must be"):
        losses.mse(torch.randn(2, 2), torch.randn(2, 2), reduction="none")
    with pytest.raises(ValueError, match="token_reduction must be"):
        losses.soft_cross_entropy(torch.randn(2, 2), torch.rand(2, 2), token_reduction="none")
    with pytest.raises(TypeError, match="start_logits and end_logits, got Tensor"):
        losses.question_answering(torch.randn(2, 4), torch.zeros(2, 2).long())
    with pytest.raises(TypeError, match="start_positions and end_positions, got dict"):
        losses.question_answering((torch.randn(2, 4),) * 2, {"start_positions": torch.zeros(2).long()})
    with pytest.raises(ValueError, match=r"positions must be \[N, 2\]"):
        losses.question_answering((torch.randn(2, 4),) * 2, torch.zeros(2, 3).long())


@pytest.mark.parametrize("targets", [1, [0, 1], "01"])
def test_targets_that_are_no_tensor(targets):
    with pytest.raises(TypeError, match="targets must be a tensor of class indices, got"):
        losses.cross_entropy(torch.randn(2, 3), targets)
