"""Models as users have them, from transformers and PEFT, against the one-sample loop; random weights, no downloads."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_close, fisher_loop

import wplfast
from wplfast.capture.watched import map_tensors

pytest.importorskip("transformers", reason="transformers is not installed (the extra 'test')")
pytest.importorskip("peft", reason="peft is not installed (the extra 'test')")

from architectures import ARCHITECTURES, TINY, language  # after importorskip

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # theirs
    pytest.mark.slow,
]


#: Shares of parameters below 99% that fast rules serve: products of two derived tensors, grouped expert products, and
#: prompts, which are looked up once for each sample and masked to it.
FAST = {"deberta": 0.8, "mixtral, grouped": 0.1, "gpt2, prompt": 0.0}


def build(name, sizes=(3, 2), double=True):
    """The model, and batches of the given sizes; everything in float64 where the model can."""
    architecture = ARCHITECTURES[name]
    model = architecture.make(double=double)
    torch.manual_seed(1)
    batches = [architecture.data(TINY, n) for n in sizes]
    if double and architecture.double:
        batches = map_tensors(lambda t: t.double() if t.is_floating_point() else t, batches)
    return architecture, model, batches


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fisher_is_that_of_the_loop(name, device):
    if name == "mixtral, grouped" and device.type == "rehearsal":
        pytest.skip("the rehearsal device lacks histograms of integers")
    architecture, model, batches = build(name)
    fisher = wplfast.fisher_diagonal(model, batches, architecture.loss, train=architecture.train)
    expected = fisher_loop(model, batches, architecture.loss, double=architecture.double)
    assert_close(fisher, expected, rtol=architecture.rtol, model_rtol=architecture.model_rtol)
    assert not fisher.report.unreached
    slow = {parameter: rules for parameter, rules in fisher.report.rules.items() if parameter in fisher.report.slow}
    assert fisher.report.fast_share >= FAST.get(name, 0.99), slow


@pytest.mark.parametrize("given", [False, True], ids=["inputs", "inputs and labels"])
def test_accumulated_from_dicts_with_labels(given):
    architecture, model, batches = build("gpt2")
    with wplfast.FisherAccumulator(model.eval()) as accumulator:
        for inputs, labels in batches:
            batch = {**inputs, "labels": labels} if given else inputs
            accumulator.backward(architecture.loss(model(**batch), labels))
    expected = fisher_loop(model, batches, architecture.loss)
    assert_close(accumulator.result(), expected, rtol=1e-9, model_rtol=1e-10)


def test_batches_are_dicts_with_labels():
    architecture, model, batches = build("gpt2")
    dicts = [{**inputs, "labels": labels} for inputs, labels in batches]
    fisher = wplfast.fisher_diagonal(model, dicts, architecture.loss)
    assert_close(fisher, fisher_loop(model, batches, architecture.loss), rtol=1e-9, model_rtol=1e-10)


def test_the_models_own_mean_loss_is_refused():
    _, model, [(inputs, labels), _] = build("gpt2")
    with wplfast.FisherAccumulator(model) as accumulator, pytest.raises(ValueError, match="one value per sample"):
        accumulator.backward(model(**inputs, labels=labels).loss)


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_autocast_is_as_good_as_a_loop_under_autocast(name):
    architecture, model, batches = build(name, double=False)
    exact = fisher_loop(model, batches, architecture.loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fisher = wplfast.fisher_diagonal(model, batches, architecture.loss)
        loop = fisher_loop(model, batches, architecture.loss, double=False)
    assert distance(fisher, exact) <= 2 * distance(loop, exact)


def distance(fisher, exact):
    """Relative to the whole model."""
    difference = torch.cat([(fisher[name].double() - e).flatten() for name, e in exact.items()])
    return float(difference.norm() / torch.cat([e.flatten() for e in exact.values()]).norm())


def test_a_compiled_model_runs_eagerly():
    architecture, model, batches = build("gpt2")
    expected = fisher_loop(model, batches, architecture.loss)
    fisher = wplfast.fisher_diagonal(torch.compile(model, backend="aot_eager"), batches, architecture.loss)
    assert_close(fisher.rename(lambda name: name.removeprefix("_orig_mod.")), expected, rtol=1e-9, model_rtol=1e-10)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_dropout_in_training_mode(checkpointing):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=TINY.vocabulary, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    batches = [language(TINY, n) for n in (3, 2)]
    loss = ARCHITECTURES["gpt2"].loss
    fisher = wplfast.fisher_diagonal(model, batches, loss, train=True, verify="always")  # the check is the assertion
    assert not fisher.report.unreached
