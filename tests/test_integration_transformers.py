"""Hugging Face's Trainer with a penalty: each step against a loop by hand, and what is saved, logged and refused."""

from __future__ import annotations

import copy
import doctest
import importlib
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (the extra 'test')")
pytest.importorskip("accelerate", reason="accelerate is not installed (the extra 'test')")
pytest.importorskip("peft", reason="peft is not installed (the extra 'test')")

import peft
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from trainer_cases import bert, descend, llama, padded, rows, trainer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import wplfast
from wplfast.integrations.transformers import WPLCallback, trainer_fisher

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = rows(5, 3, 7, 4)
ALPHA, CLIP = 30.0, 0.1


def lora(model):
    torch.manual_seed(1)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )


def penalty_of(model, alpha=ALPHA):
    """A penalty whose anchors are away from the parameters, with F of two orders of magnitude."""
    torch.manual_seed(2)
    shared = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fisher = {n: torch.rand_like(p) ** 4 for n, p in shared.items()}
    theta_hat = {n: p.detach() + 0.05 * torch.randn_like(p) for n, p in shared.items()}
    wpl = wplfast.WeightPlasticityLoss(model, alpha=alpha)
    wpl.consolidate(fisher, theta_hat=theta_hat)
    return wpl, fisher, theta_hat


def whole(model):
    """The loss of all data, a mean over tokens: what the Trainer minimises in a step that accumulates all of them."""
    return model(**padded(DATA)).loss


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same_way(model, other, start, rtol):
    """Compare where two models have gone from a start."""
    theirs = dict(other.named_parameters())
    moved = torch.cat([(theirs[n] - p).flatten() for n, p in start.items()]).norm()
    difference = torch.cat([(theirs[n] - p).flatten() for n, p in model.named_parameters()]).norm()
    assert moved > 1e-3
    assert difference <= rtol * moved


@pytest.mark.parametrize("before_clipping", [False, True])
@pytest.mark.parametrize("way", ["plain", "lora", "checkpointing", "bf16"])
def test_a_step_is_that_of_a_loop_by_hand(way, before_clipping, tmp_path):
    model = lora(llama()) if way == "lora" else llama()
    wpl, fisher, theta_hat = penalty_of(model)
    by_hand, start = copy.deepcopy(model).train(), parameters(model)
    callback = WPLCallback(wpl, before_clipping=before_clipping)
    options = {"checkpointing": {"gradient_checkpointing": True}, "bf16": {"bf16": True}}.get(way, {})
    run = trainer(
        model,
        DATA,
        tmp_path,
        max_steps=3,
        gradient_accumulation_steps=2,
        max_grad_norm=CLIP,
        logging_steps=3,
        callbacks=[callback],
        **options,
    )
    run.train()

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
            return whole(model)

    values = descend(by_hand, loss, fisher, theta_hat, 3, ALPHA, CLIP, before_clipping)
    assert_same_way(model, by_hand, start, 2e-2 if way == "bf16" else 2e-6)
    (logs,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert logs["wpl"] == pytest.approx(sum(values) / 3, rel=1e-2 if way == "bf16" else 1e-5)
    assert min(values) > 0.1  # it weighs, and the norm below is clipped
    assert logs["grad_norm"] > CLIP


class _Reporter(TrainerCallback):
    """Takes the place of Tensorboard: first among callbacks."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_reports_have_the_penalty_and_evaluation_has_not(tmp_path):
    model, reporter = llama(), _Reporter()
    wpl = penalty_of(model)[0]
    evaluated = copy.deepcopy(model).eval()
    run = trainer(
        model,
        DATA,
        tmp_path,
        max_steps=2,
        logging_steps=1,
        eval_dataset=DATA,
        callbacks=[reporter, WPLCallback(wpl)],
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.0,
        per_device_eval_batch_size=4,
    )
    run.train()
    with torch.no_grad():
        expected = whole(evaluated).item()
    assert run.state.log_history[2]["eval_loss"] == pytest.approx(expected, rel=1e-6)
    trained = [logs for logs in reporter.seen if "loss" in logs]
    assert [logs["wpl"] for logs in trained] == [pytest.approx(wpl().item(), rel=1e-6)] * 2
    assert not any("wpl" in logs for logs in reporter.seen if "loss" not in logs)


def test_two_penalties_each_with_files_and_logs_and_training_twice(tmp_path):
    model = llama()
    (first, *one), (second, *_) = penalty_of(model, 10.0), penalty_of(model, 20.0)
    by_hand, start = copy.deepcopy(model).train(), parameters(model)
    callbacks = [WPLCallback(first), WPLCallback(second)]
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": CLIP, "logging_steps": 1, "save_strategy": "steps"}
    run = trainer(model, DATA, tmp_path, max_steps=1, save_steps=1, callbacks=callbacks, **options)
    for _ in range(2):
        run.train()
    assert sorted(path.name for path in (tmp_path / "checkpoint-1").glob("wpl*")) == [
        "wpl.safetensors",
        "wpl_1.safetensors",
    ]
    descend(by_hand, whole, one[0], one[1], 2, 30.0, CLIP)  # the same F and anchors
    assert_same_way(model, by_hand, start, 2e-6)
    logs = run.state.log_history[0]
    assert 2 * logs["wpl"] == pytest.approx(logs["wpl_1"], rel=1e-5)
    assert not run.optimizer.optimizer._optimizer_step_pre_hooks  # it is left alone


def bert_run(folder, consolidate, checkpoint=None, **options):
    """Train on a second task, with Adam and dropout in another order each epoch; return parameters and logs."""
    model = bert("SequenceClassification", num_labels=3)
    wpl = penalty_of(model)[0] if consolidate else wplfast.WeightPlasticityLoss(model, alpha=ALPHA)
    data = rows(5, 3, 7, 4, 6, 5, labels=lambda ids: int(ids[0]) % 3)
    given = {"optim": "adamw_torch", "max_steps": 5, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    given |= {"learning_rate": 0.01, "gradient_accumulation_steps": 2}
    run = trainer(model, data, folder, callbacks=[WPLCallback(wpl)], **given | options)
    run.train(resume_from_checkpoint=checkpoint)
    return parameters(model), [e for e in run.state.log_history if "loss" in e]


def test_resuming_in_the_middle_of_a_task_gives_the_same_bits(tmp_path):
    expected, logs = bert_run(tmp_path / "whole", consolidate=True)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "elsewhere")  # a folder that says nothing
    found, again = bert_run(tmp_path / "resumed", consolidate=False, checkpoint=str(tmp_path / "elsewhere"))
    assert all(torch.equal(found[name], p) for name, p in expected.items())
    assert again == logs
    anchors = tmp_path / "elsewhere" / "wpl.safetensors"
    anchors.write_bytes(anchors.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        bert_run(tmp_path / "resumed", consolidate=False, checkpoint=str(tmp_path / "elsewhere"))
    anchors.unlink()
    with pytest.raises(FileNotFoundError, match="saved without this callback"):
        bert_run(tmp_path / "resumed", consolidate=False, checkpoint=str(tmp_path / "elsewhere"))


def test_a_checkpoint_that_is_not_known_is_an_error_without_anchors(caplog):
    """Called by something else than a Trainer: nothing says which checkpoint is resumed from."""
    model = torch.nn.Linear(3, 2)
    wpl = wplfast.WeightPlasticityLoss(model)
    events = TrainingArguments(use_cpu=True), TrainerState(global_step=3), TrainerControl()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    with pytest.raises(RuntimeError, match=r"has no anchors: call wpl.load\("):
        WPLCallback(wpl).on_train_begin(*events, **given)
    assert not given["optimizer"]._optimizer_step_pre_hooks
    wpl.consolidate({n: torch.ones_like(p) for n, p in model.named_parameters()})  # what the error says has been done
    WPLCallback(wpl).on_train_begin(*events, **given)
    assert "keeps the 1 anchors it has" in caplog.text
    assert given["optimizer"]._optimizer_step_pre_hooks


def test_the_best_model_comes_back_and_the_penalty_still_holds_it(tmp_path):
    model = llama()
    wpl, fisher, theta_hat = penalty_of(model)
    options = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_steps": 1,
        "eval_dataset": DATA,
    }
    options |= {"load_best_model_at_end": True, "learning_rate": 5.0, "max_grad_norm": 0.0}  # diverges after a step
    run = trainer(model, DATA, tmp_path, max_steps=3, callbacks=[WPLCallback(wpl)], **options)
    run.train()
    expected = ALPHA / 2 * sum((fisher[n] * (p - theta_hat[n]).square()).sum() for n, p in model.named_parameters())
    assert wpl().item() == pytest.approx(expected.item(), rel=1e-5)
    assert run.evaluate()["eval_loss"] == pytest.approx(
        min(e["eval_loss"] for e in run.state.log_history[:-1] if "eval_loss" in e)
    )


def test_anchors_are_there_before_a_checkpoint_is_pushed(tmp_path):
    callback = WPLCallback(penalty_of(llama())[0])
    events = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(global_step=7), TrainerControl()
    callback.on_push_begin(*events)  # of the model alone, after training
    assert not list(tmp_path.iterdir())
    (tmp_path / "checkpoint-7").mkdir()
    callback.on_push_begin(*events)
    other = wplfast.WeightPlasticityLoss(llama())
    other.load(tmp_path / "checkpoint-7" / "wpl.safetensors")
    assert all(torch.equal(f, other.fisher[name]) for name, f in callback.wpl.fisher.items())


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("wplfast.integrations.transformers"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("before_clipping", [False, True])
def test_a_loss_scale_is_taken_out_and_a_step_that_is_left_out_adds_nothing(before_clipping, unscaled):
    model = torch.nn.Linear(3, 2)
    wpl, fisher, theta_hat = penalty_of(model)
    x, expected = torch.randn(4, 3), copy.deepcopy(model)
    descend(expected, lambda m: m(x).square().mean(), fisher, theta_hat, 1, ALPHA, 1e9)
    events = TrainingArguments(use_cpu=True), TrainerState(), TrainerControl()
    Accelerator(cpu=True)  # its wrapper of optimizers wants one
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler, device_placement=False)
    callback = WPLCallback(wpl, before_clipping=before_clipping)
    callback.on_train_begin(*events, model=model, optimizer=optimizer)
    for factor in (1.0, float("inf")):
        callback.on_step_begin(*events)
        scaler.scale(factor * model(x).square().mean()).backward()
        if unscaled:
            scaler.unscale_(optimizer.optimizer)
        optimizer.step()
        callback.on_optimizer_step(*events)
        optimizer.zero_grad()
        for p, e in zip(model.parameters(), expected.parameters(), strict=True):  # the second step is left out
            torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-6)
    assert optimizer.step_was_skipped


def test_penalties_that_nothing_would_come_of_are_refused(tmp_path):
    model = llama()
    other = WPLCallback(penalty_of(llama())[0])
    with pytest.raises(ValueError, match=r"none of the penalty's \d+ parameters .* is one of the Trainer's model"):
        trainer(model, DATA, tmp_path, max_steps=1, callbacks=[other]).train()
    embedding = wplfast.WeightPlasticityLoss({"e": model.model.embed_tokens.weight})
    adapted = lora(model)
    with pytest.raises(ValueError, match="are frozen: if PEFT has adapted the model"):
        trainer(adapted, DATA, tmp_path, max_steps=1, callbacks=[WPLCallback(embedding)]).train()
    everything = wplfast.WeightPlasticityLoss(llama().model)
    attached = trainer(model, DATA, tmp_path, max_steps=1, callbacks=[WPLCallback(everything)])
    with pytest.raises(ValueError, match="make it of this model"):
        attached.train()


def test_a_model_that_is_made_anew(tmp_path):
    wpl = penalty_of(llama())[0]
    arguments = trainer(llama(), DATA, tmp_path, max_steps=1, logging_steps=1).args
    options = {"args": arguments, "train_dataset": DATA, "data_collator": padded, "callbacks": [WPLCallback(wpl)]}
    with pytest.raises(
        ValueError, match=r"model_init makes it anew .*: call wpl.rebind\(model\) at the end of model_init"
    ):
        Trainer(model_init=lambda: llama(), **options).train()

    def model_init():
        model = llama()
        wpl.rebind(model)
        return model

    run = Trainer(model_init=model_init, **options)
    run.train()
    assert run.state.log_history[0]["wpl"] > 0


@pytest.mark.parametrize("before_clipping", [False, True])
@pytest.mark.parametrize("same", [False, True], ids=["two callbacks", "one callback twice"])
def test_a_penalty_that_would_be_added_twice_is_refused(same, before_clipping, tmp_path):
    model = llama()
    wpl = penalty_of(model)[0]
    callback = WPLCallback(wpl, before_clipping=before_clipping)
    other = callback if same else WPLCallback(wpl, before_clipping=before_clipping)
    run = trainer(model, DATA, tmp_path, max_steps=1, callbacks=[callback, other])
    with pytest.raises(
        ValueError, match=r"2 of the Trainer's callbacks .* would be added 2 times; give the Trainer one"
    ):
        run.train()
    run.pop_callback(other)
    run.train()


def test_an_optimizer_that_steps_elsewhere_is_refused(tmp_path):
    model = llama()
    callback = WPLCallback(penalty_of(model)[0])
    run = trainer(model, DATA, tmp_path, max_steps=1, callbacks=[callback])
    run.create_optimizer()
    run.optimizer.step = lambda closure=None: None
    with pytest.raises(RuntimeError, match="steps within the backward pass"):
        run.train()


@pytest.mark.parametrize(
    "given", [torch.nn.Linear(2, 2), {"w": torch.ones(2)}, None], ids=lambda given: type(given).__name__
)
def test_what_is_no_penalty_is_refused_at_once(given):
    with pytest.raises(TypeError, match=f"wpl must be a wplfast.WeightPlasticityLoss, got {type(given).__name__}"):
        WPLCallback(given)


def test_what_is_no_trainer_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"must be a transformers.Trainer, got Linear: use wplfast.fisher_diagonal"):
        trainer_fisher(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"got list, and dataset is one: the order is trainer_fisher\(trainer, dataset"):
        trainer_fisher(DATA, trainer(llama(), DATA, tmp_path))
    with pytest.raises(TypeError, match=r"^trainer_fisher\(\) got an .* 'max_sample'; did you mean 'max_samples'\?"):
        trainer_fisher(trainer(llama(), DATA, tmp_path), max_sample=3)


def test_the_callback_of_lightning_is_told_from_this_one(tmp_path):
    lightning = pytest.importorskip("wplfast.integrations.lightning")
    model = llama()
    callback = lightning.WPLCallback(penalty_of(model)[0])
    with pytest.raises(AttributeError, match=r"'on_\w+': .* takes that of wplfast\.integrations\.transformers"):
        trainer(model, DATA, tmp_path, max_steps=1, callbacks=[callback]).train()
