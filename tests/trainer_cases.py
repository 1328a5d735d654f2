"""Tiny models of transformers, data and Trainers, on the CPU; the loops that they are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

VOCABULARY = 30
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0, **config}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def bert(head: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "initializer_range": 0.5, **config}
    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**sizes))


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def rows(*lengths: int, labels: Callable[[Tensor], Any] = lambda ids: ids.tolist(), name: str = "labels") -> list[dict]:
    """Sequences of random tokens, each with labels; and a column that no model takes."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]
    return [{"input_ids": ids.tolist(), name: labels(ids), "weather": "fine"} for ids in found]


def padded(items: list[dict]) -> dict[str, Tensor]:
    """A collator: pads tokens with 0 and their labels with -100."""

    def pad(values: list[list[int]], by: int) -> Tensor:
        longest = max(map(len, values))
        return torch.tensor([each + [by] * (longest - len(each)) for each in values])

    batch = {"input_ids": pad([item["input_ids"] for item in items], 0)}
    batch["attention_mask"] = pad([[1] * len(item["input_ids"]) for item in items], 0)
    for name in items[0].keys() - {"input_ids", "weather"}:
        values = [item[name] for item in items]
        is_sequence = isinstance(values[0], list) and isinstance(values[0][0], int)
        batch[name] = pad(values, -100) if is_sequence else torch.tensor(values)
    return batch


def trainer(model: nn.Module, data: Any, folder: Any, collator: Any = padded, **options: Any) -> Trainer:
    """A Trainer of plain gradient descent that says nothing."""
    kept = {name: options.pop(name) for name in ("callbacks", "eval_dataset", "compute_loss_func") if name in options}
    given = {"per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    given |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", **options}
    arguments = TrainingArguments(str(folder), **given)
    return Trainer(model, arguments, data_collator=collator, train_dataset=data, **kept)


def own_loss_loop(model: nn.Module, data: list[dict], times: Callable[[dict], float], collator: Any = padded) -> dict:
    """Mean over samples of squared gradients of the loss that the model itself returns for each one alone, in float64.

    Args:
        model: copied.
        data: samples.
        times: batch of one -> what the model divided its loss by.
        collator: makes a batch of one.
    """
    model = copy.deepcopy(model).double().eval()
    watched = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in watched.items()}
    for sample in data:
        batch = collator([sample])
        batch.pop("weather", None)
        batch = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
        (model(**batch).loss * times(batch)).backward()
        for name, p in watched.items():
            total[name] += 0 if p.grad is None else p.grad.square()
        model.zero_grad()
    return {name: value / len(data) for name, value in total.items()}


def descend(
    model: nn.Module,
    loss_fn: Callable[[nn.Module], Tensor],
    fisher: dict[str, Tensor],
    theta_hat: dict[str, Tensor],
    n_steps: int,
    alpha: float,
    clip: float,
    before_clipping: bool = False,
) -> list[float]:
    """The loop by hand: clipped gradient descent with a penalty written out; return the penalty at each step."""
    pairs = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    parameters, values = [p for _, p in pairs], []
    for _ in range(n_steps):
        penalty = alpha / 2 * sum((fisher[n] * (p - theta_hat[n]).square()).sum() for n, p in pairs)
        loss = loss_fn(model) + (penalty if before_clipping else 0)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        scale = (clip / (torch.cat([g.flatten() for g in gradients]).norm() + 1e-6)).clamp_max(1.0)
        of_penalty = torch.autograd.grad(penalty, parameters)
        with torch.no_grad():
            for p, g, h in zip(parameters, gradients, of_penalty, strict=True):
                p -= 0.1 * (g * scale + (0 if before_clipping else h))
        values.append(penalty.item())
    return values
