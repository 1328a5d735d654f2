"""Two tasks, one after the other, with Hugging Face's Trainer and LoRA: what is forgotten of the first one?

A small language model first learns to count up, then, as a LoRA adapter, two tasks with tokens of their own: to count
in steps of 2, and backwards. Without the penalty the second task costs the first.
"""

import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import wplfast
from wplfast.integrations.transformers import WPLCallback, trainer_fisher

NUMBERS, LENGTH, ALPHA = 24, 10, 3e2


def counting(step, task, n=192):
    """Rows of the task's token and numbers that grow by so much, modulo NUMBERS."""
    first = torch.randint(NUMBERS, (n, 1), generator=torch.Generator().manual_seed(task))
    numbers = (first + step * torch.arange(LENGTH)) % NUMBERS
    rows = torch.cat([torch.full((n, 1), NUMBERS + task), numbers], 1)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(model, data, steps, rate, callbacks=()):
    """Train; return the Trainer."""
    arguments = TrainingArguments(
        "out", max_steps=steps, learning_rate=rate, per_device_train_batch_size=32, per_device_eval_batch_size=64,
        lr_scheduler_type="constant", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=0,
        logging_steps=steps,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))
    trainer.train()
    return trainer


def main():
    """Run the second task twice, with and without the penalty."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=NUMBERS + 3, **sizes))
    train(base, counting(1, 0), steps=120, rate=5e-3)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora)
    first = train(adapted, counting(2, 1), steps=120, rate=1e-2)
    fisher = trainer_fisher(first)  # of the adapters, over the first task's data
    before = first.evaluate()["eval_loss"]

    for way in ("without", "with"):
        model = copy.deepcopy(adapted)
        wpl = wplfast.WeightPlasticityLoss(model, alpha=ALPHA)
        wpl.consolidate(fisher)
        second = train(model, counting(-1, 2), 120, 5e-3, [WPLCallback(wpl)] if way == "with" else [])
        learned = second.evaluate()["eval_loss"]
        forgotten = second.evaluate(counting(2, 1))["eval_loss"] - before
        print(f"forgetting {way} the penalty: {forgotten:.3f} nats a token (the second task's loss: {learned:.3f})")


if __name__ == "__main__":
    main()
