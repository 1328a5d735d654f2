"""The Fisher of a Trainer's data against the loss that the model itself returns for each sample alone, in float64."""

from __future__ import annotations

import copy
import logging
import os
import random

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (the extra 'test')")
pytest.importorskip("accelerate", reason="accelerate is not installed (the extra 'test')")
pytest.importorskip("peft", reason="peft is not installed (the extra 'test')")

import peft
import torch.nn.functional as F
from oracle import assert_close
from ranks import NEEDS_GLOO, start
from torch.distributed.fsdp import fully_shard
from torch.utils.data import IterableDataset
from trainer_cases import bert, descend, llama, own_loss_loop, padded, rows, t5, trainer
from transformers import DataCollatorWithFlattening, Trainer

import wplfast
from wplfast.integrations.transformers import WPLCallback, trainer_fisher

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (5, 3, 7, 4, 6)  # a short last batch


def one(batch):
    return 1


def tokens(batch):
    return (batch["labels"] != -100).sum()


def predicted(batch):
    """Labels that a causal model predicts: not the first."""
    return (batch["labels"][:, 1:] != -100).sum()


def masked(ids):
    labels = ids.clone()
    labels[::2] = -100
    return labels.tolist()


def spans(*lengths):
    found = rows(*lengths, labels=lambda ids: 1, name="start_positions")
    return [{**item, "end_positions": len(item["input_ids"]) - 1} for item in found]


def adapted():
    torch.manual_seed(1)
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def prompted():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(1)
    return peft.get_peft_model(llama(), config)


def classes(n):
    return lambda ids: int(ids[0]) % n


CASES = {  # model, data, what the model divides -log p by
    "causal": (llama, rows(*LENGTHS), predicted),
    "lora": (adapted, rows(*LENGTHS), predicted),
    "prompt": (prompted, rows(*LENGTHS), tokens),
    "masked": (lambda: bert("MaskedLM"), rows(*LENGTHS, labels=masked), tokens),
    "seq2seq": (t5, rows(*LENGTHS, labels=lambda ids: ids.flip(0)[:-1].tolist()), tokens),
    "tokens": (
        lambda: bert("TokenClassification", num_labels=4),
        rows(*LENGTHS, labels=lambda ids: (ids % 4).tolist()),
        tokens,
    ),
    "spans": (lambda: bert("QuestionAnswering"), spans(5, 5, 5, 5, 5), lambda batch: 2),
    "classes": (lambda: bert("SequenceClassification", num_labels=3), rows(*LENGTHS, labels=classes(3)), one),
    "several classes": (
        lambda: bert("SequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        rows(*LENGTHS, labels=lambda ids: [float(ids[0] % 2), 1.0, float(ids[1] % 2)]),
        lambda batch: 3,
    ),
    "regression": (
        lambda: bert("SequenceClassification", num_labels=1),
        rows(*LENGTHS, labels=lambda ids: float(ids[0]) / 10),
        lambda batch: 0.5,
    ),
    "regressions": (
        lambda: bert("SequenceClassification", num_labels=2, problem_type="regression"),
        rows(*LENGTHS, labels=lambda ids: [float(ids[0]) / 10, 1.0]),
        lambda batch: 1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_fisher_is_that_of_the_models_own_loss(name, tmp_path):
    make, data, times = CASES[name]
    model = make()
    run = trainer(model, data, tmp_path)
    fisher = trainer_fisher(run)
    assert fisher.n_samples == len(data)
    assert not fisher.report.unchecked
    assert_close(fisher, own_loss_loop(model, data, times))
    if name in ("lora", "prompt"):
        assert set(fisher) == {n for n, p in model.named_parameters() if "lora_" in n or "prompt" in n}
    if name in ("causal", "spans", "regression"):
        assert_close(trainer_fisher(run, token_reduction="mean"), own_loss_loop(model, data, one))


@pytest.mark.parametrize("column", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_packed_documents_are_samples(column, tmp_path):
    model, data = llama(), [{"input_ids": item["input_ids"]} for item in rows(*LENGTHS)]
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)

    def collator(items):
        batch = dict(flatten(items))
        positions = batch["position_ids"]  # without which documents see each other
        return {k: v for k, v in batch.items() if k in ("input_ids", "labels", column)} | {"position_ids": positions}

    fisher = trainer_fisher(trainer(model, data, tmp_path, collator))
    assert fisher.n_samples == len(data)
    plain = [{**item, "labels": item["input_ids"]} for item in data]
    assert_close(fisher, own_loss_loop(model, plain, predicted))


def padded_before(items):
    """A collator that pads on the left, and gives positions, as a generation's tokenizer does."""
    batch = padded(items)
    for name, by in (("input_ids", 0), ("labels", -100)):
        batch[name] = torch.stack([row.roll(int((row == by).sum())) for row in batch[name]])
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def test_rows_that_are_padded_before_and_have_positions(tmp_path):
    """Each is one document, whose first token the model predicts after padding."""
    model, data = llama(), rows(*LENGTHS)
    fisher = trainer_fisher(trainer(model, data, tmp_path, padded_before))
    assert fisher.n_samples == len(data)
    batches = [padded_before(data[i : i + 2]) for i in range(0, len(data), 2)]
    # the rows as their batches pad them, one at a time
    loose = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(len(batch["labels"]))]
    assert_close(fisher, own_loss_loop(model, loose, predicted, lambda items: dict(items[0])))


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
def test_labels_may_be_drawn(fisher_type, tmp_path):
    make, data, _ = CASES["classes"]
    model = make()
    fisher = trainer_fisher(trainer(model, data, tmp_path), fisher_type=fisher_type, mc_samples=40)
    everything = [{**item, "labels": label} for item in data for label in range(3)]
    with torch.no_grad():
        p = torch.cat([model.eval()(**padded([{**item, "labels": 0}])).logits.softmax(-1) for item in data]).flatten()
    weights = iter(p.sqrt() * 3**0.5)  # of the loss, so of its square p; the mean is over 3 times as many
    expected = own_loss_loop(model, everything, lambda batch: next(weights))
    if fisher_type == "exact":
        assert_close(fisher, expected)
    else:
        whole = torch.cat([e.flatten() for e in expected.values()])
        assert float((fisher.flat - whole).norm() / whole.norm()) < 0.2


def test_tokens_may_be_drawn(tmp_path):
    model = llama(initializer_range=0.02)  # whose tokens are nearly equally likely
    run = trainer(model, rows(*LENGTHS), tmp_path)
    drawn = trainer_fisher(run, fisher_type="mc", mc_samples=20, params={"head": model.lm_head.weight})
    given = trainer_fisher(run, params={"head": model.lm_head.weight})
    assert float(drawn.flat.sum() / given.flat.sum()) == pytest.approx(1.0, abs=0.2)


def smoothed(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, label_smoothing=0.1)


def weighted(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 5.0, 20.0]))


class _OwnTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss.square()


def test_another_loss_of_the_trainer_is_asked_for_its_samples(tmp_path, caplog):
    make, data, _ = CASES["classes"]
    model = make()

    def loop(loss):
        found = own_loss_loop(_Losing(model, loss), data, one)
        return {name.removeprefix("model."): value for name, value in found.items()}

    for options in ({"compute_loss_func": smoothed}, {"label_smoothing_factor": 0.1}):
        run = trainer(model, data, tmp_path, **options)
        fisher = trainer_fisher(run)
        assert fisher.n_samples == len(data)
        assert "asked for one sample at a time" in caplog.text
        caplog.clear()
        assert_close(fisher, loop(smoothed))
        with pytest.raises(ValueError, match="needs a loss that is -log p"):
            trainer_fisher(run, fisher_type="exact")
    run = _OwnTrainer(model, run.args, data_collator=padded, train_dataset=data)
    run.label_smoother = None
    assert_close(trainer_fisher(run), loop(lambda outputs, labels: outputs.loss.square()))
    run = trainer(model, data, tmp_path, compute_loss_func=weighted)
    with pytest.raises(ValueError, match="weights of classes"):
        trainer_fisher(run)
    given = trainer_fisher(run, loss_fn=wplfast.losses.cross_entropy)
    assert_close(given, own_loss_loop(model, data, one))


def divided(outputs, labels, num_items_in_batch):
    """As transformers documents it: a sum, divided by what the Trainer counted in all of a step's batches."""
    shifted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(*shifted, ignore_index=-100, reduction="sum") / num_items_in_batch


class _DividingTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return 3 * divided(model(**inputs), labels, num_items_in_batch)


def test_a_loss_that_is_divided_by_the_number_of_items(tmp_path, caplog):
    """It is the model's own mean, so F is that of -log p; three times that is another loss, of one sample at a time."""
    model, data = llama(), rows(*LENGTHS)
    run = trainer(model, data, tmp_path, compute_loss_func=divided)
    averages = run.args.average_tokens_across_devices
    assert_close(trainer_fisher(run), own_loss_loop(model, data, predicted))
    assert "one sample at a time" not in caplog.text
    run.compute_loss_func = lambda *of, num_items_in_batch=None: divided(*of, num_items_in_batch or run.n_predicted)
    run.n_predicted = sum(n - 1 for n in LENGTHS[:4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_get_num_items_in_batch", lambda batches, _: (batches[0]["labels"] != -100).sum())
        assert_close(trainer_fisher(run), own_loss_loop(model, data, predicted))  # first tokens are counted, too
    assert "one sample at a time" not in caplog.text
    run = _DividingTrainer(model, run.args, data_collator=padded, train_dataset=data)
    assert_close(trainer_fisher(run), own_loss_loop(model, data, lambda batch: 3))
    assert "one sample at a time" in caplog.text
    assert run.args.average_tokens_across_devices == averages


def test_a_number_that_is_not_known_is_an_error_that_says_what_to_pass(tmp_path, monkeypatch):
    run = trainer(
        llama(), rows(5, 3), tmp_path, compute_loss_func=lambda *_, num_items_in_batch: 1 / num_items_in_batch
    )
    monkeypatch.setattr(run, "_get_num_items_in_batch", lambda *_: None)
    with pytest.raises(TypeError, match=r"takes num_items_in_batch, which is not known .*: pass loss_fn"):
        trainer_fisher(run)


class _Losing(torch.nn.Module):
    """A model with another loss."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, **batch):
        outputs = self.model(**batch)
        outputs.loss = self._loss(outputs, batch["labels"])
        return outputs


def test_mixed_precision_is_the_trainers(tmp_path):
    model, data = llama(), rows(*LENGTHS)
    expected = own_loss_loop(model, data, predicted)
    fisher = trainer_fisher(trainer(model, data, tmp_path, bf16=True))
    whole = torch.cat([e.flatten() for e in expected.values()])
    assert 1e-4 < float((fisher.flat - whole).norm() / whole.norm()) < 0.05
    assert all(f.dtype == torch.float32 for f in fisher.values())


class _Stream(IterableDataset):
    def __init__(self, items):
        self._items = items

    def __iter__(self):
        return iter(self._items)


def test_samples_are_chosen_and_streams_read(tmp_path):
    model, data = llama(), rows(*LENGTHS)
    run = trainer(model, data, tmp_path, max_steps=1)
    chosen = trainer_fisher(run, max_samples=3)
    assert chosen.n_samples == 3
    first = trainer_fisher(run, _Stream(data), max_samples=3)
    assert_close(first, own_loss_loop(model, data[:3], predicted))
    assert not torch.allclose(chosen.flat, first.flat)
    assert torch.equal(chosen.flat, trainer_fisher(run, max_samples=3).flat)
    run.data_collator = list
    with pytest.raises(TypeError, match="collator must return a dict, got list"):
        trainer_fisher(run)
    run.train_dataset = None
    with pytest.raises(ValueError, match="no train_dataset"):
        trainer_fisher(run)


class _Drawing:
    """A collator that draws from all generators there are."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, items):
        random.random(), np.random.rand(), torch.rand(1), torch.rand(1, generator=self.generator)
        return padded(items)


def test_the_trainer_is_left_as_it_was(tmp_path):
    def trained(between):
        model = bert("SequenceClassification", num_labels=3)
        collator = _Drawing()
        run = trainer(model, CASES["classes"][1], tmp_path, collator, max_steps=2, seed=3)
        run.train()
        before = (
            {**vars(run)},
            [m.training for m in model.modules()],
            copy.copy(run.state),
            run.accelerator._dataloaders,
        )
        if between:
            trainer_fisher(run)
        drawn = random.random(), np.random.rand(), torch.rand(1), torch.rand(1, generator=collator.generator)
        after = {**vars(run)}, [m.training for m in model.modules()], copy.copy(run.state), run.accelerator._dataloaders
        assert before == after
        assert all(p.grad is None for p in model.parameters())
        run.train()
        return drawn, [p.detach() for p in model.parameters()]

    (drawn, theta), (again, other) = trained(False), trained(True)
    assert drawn == again
    assert all(map(torch.equal, theta, other))


# ---- two processes ---------------------------------------------------------------------------------------------------


class _Broken(list):
    """Samples of which one cannot be read, beyond those that are looked at before the pass."""

    def __getitem__(self, index):
        if index == 6:
            raise OSError("sample 6 cannot be read")
        return super().__getitem__(index)


FAILURES = {  # what the other rank says has ended (nothing: both find out), and the error
    "data": ("fisher_diagonal", "OSError: sample 6 cannot be read"),
    "argument": ("trainer_fisher", "ValueError: token_reduction must be"),
    "other data": ("", "ValueError: trainer_fisher: rank 0 and rank 1 differ in ['the number of samples']"),
    "penalty": ("the start of training", "ValueError: none of the penalty's"),
}


def _failures(rank, run, model, data, folder, options):
    """Let rank 1 fail, or be given something else, in several places; return each rank's errors."""
    whole = rows(*LENGTHS, *LENGTHS)
    reduction, more = ("sums", [*whole, *data]) if rank else ("sum", whole)
    other = wplfast.WeightPlasticityLoss(llama() if rank else model)
    calls = {
        "data": lambda: trainer_fisher(run, _Broken(whole) if rank else whole),
        "argument": lambda: trainer_fisher(run, token_reduction=reduction),
        "other data": lambda: trainer_fisher(run, more),
        "penalty": lambda: trainer(model, data, folder, callbacks=[WPLCallback(other)], **options).train(),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _rank(rank: int, folder: str) -> None:
    """Estimate and train on one of two ranks; then differ."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, data = llama(), rows(*LENGTHS[:4])
    options = {"ddp_backend": "gloo", "max_steps": 2, "max_grad_norm": 0.1, "save_strategy": "steps", "save_steps": 2}
    run = trainer(model, data, folder, **options)
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("wplfast").addHandler(handler)
    fishers = [trainer_fisher(run, rows(*LENGTHS)), trainer_fisher(run, data[:1]), trainer_fisher(run, max_samples=3)]
    assert not [record for record in said if "this rank's data alone" in record.getMessage()]
    sharded = llama()
    for block in (*sharded.model.layers, sharded):
        fully_shard(block)
    shards = trainer_fisher(trainer(sharded, data, folder, **options), rows(*LENGTHS))
    fishers.append({n: f.full_tensor() for n, f in shards.items()})
    failed = _failures(rank, run, model, data, folder, options)
    wpl = wplfast.WeightPlasticityLoss(model, alpha=30.0)
    theta_hat = {n: p + 0.1 for n, p in model.named_parameters()}
    wpl.consolidate(fishers[0], theta_hat=theta_hat)
    states, start = [], copy.deepcopy(model.state_dict())
    for before_clipping in (False, True):
        model.load_state_dict(start)
        callback = WPLCallback(wpl, before_clipping=before_clipping)
        trainer(model, data, folder, callbacks=[callback], **options).train()
        states.append(copy.deepcopy(model.state_dict()))
    torch.save(([dict(f) for f in fishers], [f.n_samples for f in fishers[:3]], states, failed), f"{folder}/{rank}.pt")
    with torch.no_grad(), wplfast.distributed.local():
        wpl.consolidate({n: f * (1 + rank) for n, f in fishers[0].items()})
    try:
        trainer(model, data, folder, callbacks=[WPLCallback(wpl)], **options).train()
    except ValueError as error:
        assert "rank 0 and rank 1 differ in ['constant." in str(error), error  # noqa: PT017
    else:
        raise AssertionError("ranks with other Fishers train")
    torch.distributed.destroy_process_group()


@NEEDS_GLOO
def test_two_ranks_are_one(tmp_path):
    start(_rank, (str(tmp_path),), 2)
    model, data = llama(), rows(*LENGTHS[:4])
    theta_hat = {n: p.detach() + 0.1 for n, p in model.named_parameters()}
    (fishers, counts, states, failed), (others, _, others_states, others_failed) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    assert counts == [5, 1, 3]
    for (name, error), (_, other) in zip(failed.items(), others_failed.items(), strict=True):
        what, own = FAILURES[name]
        assert own in other, name
        assert error.startswith(f"RankFailedError: {what} ended: rank 1 failed with") if what else own in error, error
        assert own in error, error
    assert_close(fishers[0], own_loss_loop(model, rows(*LENGTHS), predicted))
    assert_close(fishers[1], own_loss_loop(model, data[:1], predicted))
    assert_close(fishers[3], own_loss_loop(model, rows(*LENGTHS), predicted))
    chosen = trainer_fisher(trainer(model, data, tmp_path), max_samples=3)  # by one process
    assert_close(fishers[2], {name: f.double() for name, f in chosen.items()})
    assert all(torch.equal(a[n], b[n]) for a, b in zip(fishers, others, strict=True) for n in a)
    for before_clipping, state, other in zip((False, True), states, others_states, strict=True):
        assert all(torch.equal(state[n], other[n]) for n in state)
        by_hand = copy.deepcopy(model).train()
        loss = lambda m: m(**padded(data)).loss  # noqa: E731
        descend(by_hand, loss, fishers[0], theta_hat, 2, 30.0, 0.1, before_clipping)
        for name, p in by_hand.named_parameters():
            torch.testing.assert_close(state[name], p.detach(), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "checkpoint-2" / "wpl.safetensors").exists()
