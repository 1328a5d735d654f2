"""TRL's trainers: packed and padded fine-tuning, preference pairs, and rewards."""

from __future__ import annotations

import copy

import datasets
import pytest
import torch
import transformers
import trl
from oracle import assert_close
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_cases import llama, own_loss_loop, padded, rows

import wplfast
from wplfast.integrations.transformers import WPLCallback, trainer_fisher

WORDS = [f"w{index}" for index in range(3, 30)]
OPTIONS = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "bf16": False}
OPTIONS |= {"per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
OPTIONS |= {"gradient_checkpointing": False, "max_steps": 2, "logging_steps": 1}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


def tokenizer():
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def text(item):
    return " ".join(WORDS[index % len(WORDS)] for index in item["input_ids"])


@pytest.mark.parametrize("packing", [False, True, "wrapped"])
def test_supervised(packing, tmp_path):
    model, items = llama(eos_token_id=1), rows(5, 3, 7, 4, 6)
    data = datasets.Dataset.from_dict({"input_ids": [item["input_ids"] for item in items]})
    options = {"packing": bool(packing), "max_length": 12, "eos_token": None}
    options |= {"packing_strategy": "wrapped"} if packing == "wrapped" else {}
    arguments = trl.SFTConfig(str(tmp_path), **OPTIONS, **options)
    wpl = wplfast.WeightPlasticityLoss(model, alpha=0.1)
    run = trl.SFTTrainer(
        model, arguments, train_dataset=data, processing_class=tokenizer(), callbacks=[WPLCallback(wpl)]
    )
    metrics = copy.deepcopy(run._metrics)
    fisher = trainer_fisher(run)
    assert run._metrics == metrics
    if packing == "wrapped":  # rows go across documents, and are samples
        items = [{"input_ids": list(ids)} for ids in run.train_dataset["input_ids"]]
        assert len(items) < 5
    assert fisher.n_samples == len(items)
    plain = [{"input_ids": item["input_ids"], "labels": item["input_ids"]} for item in items]
    unpatched = llama(eos_token_id=1)  # TRL gives the other one a forward of its own
    expected = own_loss_loop(unpatched, plain, lambda batch: batch["labels"].shape[1] - 1, padded)
    assert_close(fisher, expected)
    theta_hat = {name: p + 0.1 for name, p in model.named_parameters()}
    wpl.consolidate(fisher, theta_hat=theta_hat)
    before = wpl().item()
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert logs[0]["wpl"] == pytest.approx(before, rel=1e-5)
    assert 0 < logs[1]["wpl"] != pytest.approx(before)
    assert "mean_token_accuracy" in logs[0]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("adapters", [False, True])
def test_preferences(adapters, loss_type, tmp_path):
    items = rows(*(5, 3, 7, 4, 6, 3, 4, 5, 3))
    columns = {name: [text(item) for item in items[k::3]] for k, name in enumerate(("prompt", "chosen", "rejected"))}
    model = llama(eos_token_id=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    peft_config = None
    if adapters:
        import peft

        peft_config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    arguments = trl.DPOConfig(str(tmp_path), **OPTIONS, loss_type=loss_type, beta=0.5)
    reference = None if adapters else llama(eos_token_id=1, initializer_range=0.1)
    run = trl.DPOTrainer(
        model,
        reference,
        arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    fisher = trainer_fisher(run)
    assert fisher.n_samples == 3
    watched = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in watched.items()}
    run.model.eval()
    for item in run.train_dataset:  # in float32: TRL's own loss, and the reference model's, of each pair
        pair = run.data_collator([{k: v for k, v in item.items() if k.endswith("ids")}])
        loss = run.compute_loss(run.model, dict(pair))
        for name, g in zip(watched, torch.autograd.grad(loss, watched.values(), allow_unused=True), strict=True):
            expected[name] += 0 if g is None else g.double().square() / 3
    assert_close(fisher, expected, rtol=1e-4, model_rtol=1e-5)
    wpl = wplfast.WeightPlasticityLoss(run.model, alpha=10.0)
    wpl.consolidate(fisher, theta_hat={name: p + 0.1 for name, p in watched.items()})
    run.add_callback(WPLCallback(wpl))
    run.train()
    assert [entry["wpl"] > 0 for entry in run.state.log_history if "loss" in entry] == [True, True]


def test_rewards(tmp_path):
    """One step of GRPO with the callback is the step without it, and the penalty's."""

    def stepped(alpha):
        transformers.set_seed(0)
        model = llama(eos_token_id=1)
        arguments = trl.GRPOConfig(
            str(tmp_path), **OPTIONS | {"max_steps": 1}, num_generations=2, max_completion_length=4, max_grad_norm=0.0
        )
        run = trl.GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [float(len(set(each.split()))) for each in completions],
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": [text(item) for item in rows(5, 3, 7, 4)]}),
            processing_class=tokenizer(),
        )
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        fisher = wplfast.Fisher({name: torch.rand_like(p) for name, p in start.items()}, 4)
        wpl = wplfast.WeightPlasticityLoss(model, alpha=alpha)
        wpl.consolidate(fisher, theta_hat={name: p + 0.1 for name, p in start.items()})
        run.add_callback(WPLCallback(wpl))
        run.train()
        return start, fisher, {name: p.detach() for name, p in model.named_parameters()}

    start, fisher, without = stepped(0.0)
    _, _, with_penalty = stepped(1.0)
    assert any(not torch.equal(p, start[name]) for name, p in without.items())
    assert_close(
        {name: without[name] - p for name, p in with_penalty.items()},
        {name: OPTIONS["learning_rate"] * f * -0.1 for name, f in fisher.items()},
        rtol=1e-3,
        model_rtol=1e-4,
    )
