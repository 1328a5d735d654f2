"""A step of Hugging Face's Trainer with the callback, over one without and over the loop that users write.

One training run serves all ways: they take turns from step to step, so that a busy machine slows them alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import wplfast
from wplfast.integrations.transformers import WPLCallback, trainer_fisher
from wplfast.penalty.attach import attach

from .integrations import Turns, n_steps
from .timing import Budget, Contender, quartiles, ratio
from .ways import WrongResultError

VOCABULARY, LENGTH, WIDTH, HEADS, BATCH = 50257, 512, 768, 12, 2  # GPT-2-small's shapes, one layer
QUICK = (50, 16, 8, 2, 2)
N_BATCHES = 4  # of an evaluation epoch


class LoopTrainer(Trainer):
    """``with_loop``: its loss has the penalty, parameter by parameter."""

    fisher: dict[str, Tensor]
    anchors: dict[str, Tensor]
    with_loop = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + self.loop() if self.with_loop else loss

    def loop(self) -> Tensor:
        """Return the penalty as it is written everywhere."""
        loss = torch.zeros((), device=self.args.device)
        for name, p in self.model.named_parameters():
            loss = loss + 0.5 * (self.fisher[name] * (p - self.anchors[name]) ** 2).sum()
        return loss


class Way(TrainerCallback):
    """Makes each step go its way, and times it."""

    def __init__(self, trainer: LoopTrainer, callback: WPLCallback, turns: Turns) -> None:
        self._trainer, self._callback, self._turns = trainer, callback, turns

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Attach or detach the callback, and start."""
        callback, way = self._callback, self._turns.next()
        self._trainer.with_loop = way == "loop"
        callback.on_train_end(args, state, control)
        if way == "callback":
            callback._handle = attach(callback.wpl, optimizer.optimizer, callback._added)
        self._turns.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop."""
        self._turns.stop()
        control.should_training_stop |= self._turns.are_over
        return control


def _trainer(budget: Budget, folder: str, n_samples: int, callbacks: list[Any], **options: Any) -> tuple[Any, str]:
    """Return a Trainer of a language model on random tokens, and what it is."""
    vocabulary, length, width, heads, size = QUICK if budget.quick else (VOCABULARY, LENGTH, WIDTH, HEADS, BATCH)
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "n_positions": length, "n_embd": width, "n_head": heads, "n_layer": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    tokens = torch.randint(vocabulary, (n_samples * size, length))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    given = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size, "optim": "adamw_torch"}
    given |= {"use_cpu": budget.device.type == "cpu", "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(folder, learning_rate=1e-6, logging_strategy="no", **given | options)
    trainer = LoopTrainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    return trainer, f"GPT-2 of one layer, d={width}, V={vocabulary}, T={length}, N={size}"


def transformers_step(budget: Budget) -> dict[str, Any]:
    """Time steps, and return their milliseconds with ratios to the steps without the callback.

    Raises:
        WrongResultError: if the callback's penalty is not that of the loop.
    """
    steps = n_steps(budget.rounds)
    with tempfile.TemporaryDirectory() as folder:
        trainer, case = _trainer(budget, folder, min(steps, 8), [], max_steps=steps)
        model = trainer.model
        wpl = wplfast.WeightPlasticityLoss(model, alpha=1.0)
        trainer.fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
        trainer.anchors = {name: p.detach() + 0.01 for name, p in model.named_parameters()}
        wpl.consolidate(trainer.fisher, theta_hat=trainer.anchors)
        here, there = wpl().item(), trainer.loop().item()
        if abs(here - there) > 1e-4 * there:
            raise WrongResultError(f"the penalty is {here:.8g}, that of the loop {there:.8g}")
        callback = WPLCallback(wpl)
        turns = Turns(model, wpl, budget)
        trainer.add_callback(Way(trainer, callback, turns))
        trainer.add_callback(callback)
        trainer.train()
    return turns.record(f"Trainer, {case}")


class Clock:
    """A collator that notes when it is asked for a batch, which is when the one before is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        """Note the time and collate."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        return default_data_collator(items)

    def later_batch(self) -> float:
        """Return the seconds of a batch of the pass that is just over, of those between the first and the last."""
        times = self.times[1 - N_BATCHES :]
        return (times[-1] - times[0]) / (len(times) - 1)


def fisher_epoch(budget: Budget) -> dict[str, Any]:
    """Time the Fisher of a Trainer's data, and an evaluation of the same data.

    So few batches show what is done once: looks at the Trainer's loss and checks of the first batch. What a larger data
    set costs is told by the later batches.
    """
    clock = Clock(budget.device)
    later: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], object]) -> Contender:
        def call() -> None:
            run()
            later.setdefault(name, []).append(clock.later_batch())

        return Contender(call)

    with tempfile.TemporaryDirectory() as folder:
        trainer, case = _trainer(budget, folder, N_BATCHES, [], prediction_loss_only=True)
        trainer.data_collator = clock
        runs = {
            "fisher": lambda: trainer_fisher(trainer),
            "fisher, unverified": lambda: trainer_fisher(trainer, verify=False),
            "evaluation": trainer.evaluate,
        }
        times = budget.time({name: timed(name, run) for name, run in runs.items()})
    return {
        "case": f"{N_BATCHES} batches, {case}",
        "milliseconds": {name: quartiles(taken, 1e3) for name, taken in times.items()},
        "fisher_over_evaluation": ratio(times["fisher"], times["evaluation"]),
        "unverified_over_evaluation": ratio(times["fisher, unverified"], times["evaluation"]),
        "later_batch_over_evaluation": ratio(later["fisher"], later["evaluation"]),
    }
