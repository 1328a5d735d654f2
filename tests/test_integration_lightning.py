"""Lightning's own Trainer with the callback, against the same training written by hand; Fishers of a module's data."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning_cases import QUIET, Module, OtherModule, TwoOptimizers, assert_equal, by_hand, data, penalty
from oracle import assert_close, fisher_loop
from torch import nn
from torch.nn import functional as F

import wplfast
from wplfast.integrations.lightning import WPLCallback, module_fisher


def fit(module, wpl, **options):
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [WPLCallback(wpl)], **options})
    trainer.fit(module, data())
    return trainer


CLIPS = {
    "no clipping": ({}, lambda parameters: None),
    "by norm": (
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "norm"},
        lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.02),
    ),
    "by value": (
        {"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"},
        lambda parameters: nn.utils.clip_grad_value_(parameters, 0.003),
    ),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clipping", CLIPS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_steps(precision, clipping, accumulate):
    """The same bits as by hand, and the penalty that is logged."""
    options, clip = CLIPS[clipping]
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) if precision == "16-mixed" else None for _ in range(2)]
    if precision == "16-mixed":  # Lightning turns it into bf16-mixed on a CPU unless it is given the plugin
        options = {**options, "plugins": [MixedPrecision("16-mixed", "cpu", scalers[0])]}
    else:
        options = {**options, "precision": precision}
    module, expected = Module(), Module()
    values = by_hand(expected, penalty(expected).add_grad_, autocast, scalers[1], clip, accumulate)
    trainer = fit(module, penalty(module), accumulate_grad_batches=accumulate, **options)
    assert_equal(module, expected)
    assert trainer.callback_metrics["wpl"].item() == pytest.approx(values[-1], rel=1e-6)
    assert values[-1] != pytest.approx(values[0])


def test_an_optimizer_that_unscales_itself():
    """A fused one divides by the loss scale within its step: the penalty's gradient is scaled before."""
    module, expected = Module(), Module()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=0.05, fused=True)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    by_hand(expected, penalty(expected).add_grad_, torch.float16, scalers[0])
    fit(module, penalty(module), plugins=[MixedPrecision("16-mixed", "cpu", scalers[1])])
    for p, q in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_parameters_that_an_optimizer_gets_later():
    """As BackboneFinetuning gives them: their gradient is added from then on."""
    module, expected = Module(), Module()

    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": list(pl_module.trunk.parameters())})

    module.configure_optimizers = lambda: torch.optim.SGD(module.head.parameters(), lr=0.05)
    wpl, by_hand_wpl = penalty(module), penalty(expected)
    fit(module, wpl, callbacks=[WPLCallback(wpl), Unfreeze()])
    head = ["head.weight", "head.bias"]
    optimizer = torch.optim.SGD(expected.head.parameters(), lr=0.05)
    for epoch in range(2):
        if epoch == 1:
            optimizer.add_param_group({"params": list(expected.trunk.parameters())})
        for x, y in data():
            expected.zero_grad()
            F.cross_entropy(expected.head(torch.tanh(expected.trunk(x))), y).backward()
            by_hand_wpl.add_grad_(active=None if epoch else head)
            optimizer.step()
    assert_equal(module, expected)


class Thawing(TwoOptimizers):
    """The trunk is frozen in the first epoch, in which both optimizers are asked already what they hold."""

    def on_train_epoch_start(self):
        self.trunk.requires_grad_(self.current_epoch > 0)


def test_what_is_thawed_is_added_once():
    module = Thawing()
    wpl = penalty(module)
    seen = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append([call.kwargs["active"] for call in add.call_args_list])
            add.reset_mock()

    with mock.patch.object(wpl, "add_grad_", wraps=wpl.add_grad_) as add:
        fit(module, wpl, callbacks=[WPLCallback(wpl), Spy()])
    both = [("trunk.weight", "trunk.bias"), ("head.weight", "head.bias")]
    assert seen[0] == seen[-1] == both


def test_two_optimizers_by_hand():
    module, expected = TwoOptimizers(), TwoOptimizers()
    wpl = penalty(expected)
    optimizers = expected.configure_optimizers()
    for _ in range(2):
        for x, y in data():
            F.cross_entropy(expected.head(torch.tanh(expected.trunk(x))), y).backward()
            nn.utils.clip_grad_norm_(list(expected.trunk.parameters()), 0.05)
            value = wpl.add_grad_().item()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    trainer = fit(module, penalty(module))
    assert_equal(module, expected)
    assert trainer.callback_metrics["wpl"].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_left_out_adds_nothing(accumulate):
    """``training_step`` returns None for the first batch: no step, or one with the other batch's gradient alone."""
    module, before = Module(), Module()
    module.skipped = (0,) if accumulate == 1 else (1,)
    wpl = penalty(module)
    trainer = fit(module, wpl, max_steps=1, limit_train_batches=accumulate, accumulate_grad_batches=accumulate)
    if accumulate == 1:
        assert_equal(module, before)
        assert "wpl" not in trainer.callback_metrics
    else:
        expected = Module()
        optimizer = expected.configure_optimizers()
        x, y = next(iter(data()))
        (F.cross_entropy(expected.head(torch.tanh(expected.trunk(x))), y) / 2).backward()
        penalty(expected).add_grad_()
        optimizer.step()
        assert_equal(module, expected)


class Stop(pl.Callback):
    """Ends training as a crash would."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            raise KeyError("crash")


class Resumable:
    """A loader that goes on within an epoch, as Lightning needs to."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self):
        return 4

    def __iter__(self):
        batches, self.at = list(data()), self.at % len(self)
        while self.at < len(batches):
            self.at += 1
            yield batches[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_resumes_with_the_same_bits(tmp_path):
    whole, cut = Module(), Module()
    fit(whole, penalty(whole))
    saves = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="last", enable_version_counter=False)
    trainer = pl.Trainer(
        **{**QUIET, "enable_checkpointing": True}, max_epochs=2, callbacks=[WPLCallback(penalty(cut)), saves, Stop(6)]
    )
    with pytest.raises(KeyError, match="crash"):
        trainer.fit(cut, Resumable())
    resumed = Module()
    wpl = wplfast.WeightPlasticityLoss(resumed, alpha=3.0)  # of a new process: without anchors
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[WPLCallback(wpl)])
    trainer.fit(resumed, Resumable(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 8
    assert_equal(resumed, whole)


def test_checkpoints_replace_anchors_only_where_training_resumes(tmp_path, caplog):
    module = Module()
    wpl = wplfast.WeightPlasticityLoss(module)
    callback = WPLCallback(wpl)
    trainer = pl.Trainer(**QUIET, max_epochs=1, callbacks=[callback])
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    wpl.consolidate(module_fisher(module, data()))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    wpl.consolidate(module_fisher(module, data()))
    kept = {name: f.clone() for name, f in wpl.fisher.items()}
    trainer.validate(module, data(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert wpl.n_anchors == 2
    caplog.clear()
    pl.Trainer(**QUIET, max_epochs=2, callbacks=[callback]).fit(module, data(), ckpt_path=tmp_path / "without.ckpt")
    assert wpl.n_anchors == 2
    assert "keeps its own" in caplog.text
    assert all(torch.equal(f, kept[name]) for name, f in wpl.fisher.items())
    pl.Trainer(**QUIET, max_epochs=2, callbacks=[callback]).fit(module, data(), ckpt_path=tmp_path / "one.ckpt")
    assert wpl.n_anchors == 1
    assert "holds 1 anchors, the penalty 2" in caplog.text


@pytest.mark.parametrize("made", [(pl, Module), (pytorch_lightning, OtherModule)], ids=["lightning", "the other"])
def test_two_penalties_each_with_a_name(made, tmp_path):
    package, kind = made
    module, expected = kind(), kind()
    whole, first, second = penalty(expected), penalty(module), penalty(module)
    whole.alpha, first.alpha, second.alpha = 3.0, 1.0, 2.0  # the same F and anchors
    by_hand(expected, whole.add_grad_)
    callbacks = [WPLCallback(first), WPLCallback(second, name="second")]
    trainer = package.Trainer(**QUIET, max_epochs=2, callbacks=callbacks)
    trainer.fit(module, data())
    for p, q in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    logged = trainer.callback_metrics
    assert 2 * logged["wpl"].item() == pytest.approx(logged["second"].item(), rel=1e-5)
    second.consolidate({name: torch.ones_like(p) for name, p in module.named_parameters()})
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt")["callbacks"]
    assert {key: int(state["n_anchors"]) for key, state in saved.items()} == {
        "WPLCallback": 1,
        "WPLCallback[second]": 2,
    }
    again = [wplfast.WeightPlasticityLoss(module) for _ in range(2)]
    resumed = [WPLCallback(again[1], name="second"), WPLCallback(again[0])]  # names count, not places
    package.Trainer(**QUIET, max_epochs=2, callbacks=resumed).fit(module, data(), ckpt_path=tmp_path / "two.ckpt")
    assert [wpl.n_anchors for wpl in again] == [1, 2]
    with pytest.raises(TypeError, match="name must be a string, got bool"):
        WPLCallback(first, True, True)


@pytest.mark.parametrize("ends", ["at its end", "in an error"])
def test_detaches(ends):
    module = Module()
    wpl = penalty(module)
    held = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            held.append(trainer.optimizers[0])
            assert len(held[0]._optimizer_step_pre_hooks) == 1
            if ends == "in an error":
                raise KeyError("crash")

    callbacks = [WPLCallback(wpl), Spy()]
    if ends == "in an error":
        with pytest.raises(KeyError, match="crash"):
            fit(module, wpl, callbacks=callbacks)
    else:
        fit(module, wpl, callbacks=callbacks)
    assert not held[0]._optimizer_step_pre_hooks
    wpl.attach(held[0])  # and may be attached again


def test_optimizers_that_hold_too_little(caplog):
    module = Module()
    with pytest.raises(ValueError, match="the optimizers hold none of the penalty's 4 parameters"):
        fit(module, penalty(Module()))
    module.configure_optimizers = lambda: torch.optim.SGD(module.trunk.parameters(), lr=0.1)
    fit(module, penalty(module), max_epochs=1)
    assert "no optimizer holds ['head.weight', 'head.bias']" in caplog.text


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "alone"])
def test_the_other_package(as_list, tmp_path):
    """``pytorch_lightning`` takes the callback too, though its classes are not those of ``lightning``."""
    module, expected = OtherModule(), Module()
    wpl = penalty(module)
    values = by_hand(expected, penalty(expected).add_grad_)
    callback = WPLCallback(wpl)
    trainer = pytorch_lightning.Trainer(**QUIET, max_epochs=2, callbacks=[callback] if as_list else callback)
    trainer.fit(module, data())
    assert_equal(module, expected)
    assert trainer.callback_metrics["wpl"].item() == pytest.approx(values[-1], rel=1e-6)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    assert torch.load(tmp_path / "other.ckpt")["callbacks"]["WPLCallback"]["n_anchors"] == 1
    assert_close(module_fisher(module, trainer), fisher_loop(module, list(data()), wplfast.losses.cross_entropy))


RANKS = """
import sys, torch
from pathlib import Path
import lightning.pytorch as pl
sys.path[:0] = [{tests!r}, {root!r}]
from lightning_cases import Module, QUIET, data, penalty
from torch.utils.data import DataLoader, DistributedSampler
from wplfast.integrations.lightning import WPLCallback, module_fisher

torch.set_num_threads(1)
class Dealt(Module):
    def train_dataloader(self):  # which Lightning's own sampler would shuffle
        dataset = data().dataset
        return DataLoader(dataset, 3, sampler=DistributedSampler(dataset, shuffle=False))
module = Dealt()
wpl = penalty(module)
options = QUIET | {{"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}}
class End(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        fisher = module_fisher(pl_module, trainer)
        uneven = torch.utils.data.Subset(data().dataset, range(23))
        padded = DataLoader(uneven, 4, sampler=DistributedSampler(uneven, shuffle=False))
        counts = fisher.n_samples, module_fisher(pl_module, padded).n_samples
        torch.save((dict(pl_module.state_dict()), dict(fisher), counts), f"{out}.{{trainer.global_rank}}")
trainer = pl.Trainer(**options, max_epochs=2, gradient_clip_val=0.02, callbacks=[WPLCallback(wpl), End()])
trainer.fit(module)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_ranks(tmp_path):
    """DDP: after all-reduce and clipping, once; the Fisher is that of all data, on every rank."""
    expected = Module()
    by_hand(expected, penalty(expected).add_grad_, clip=lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.02))
    tests = Path(__file__).parent
    script = RANKS.format(tests=str(tests), root=str(tests.parent), out=str(tmp_path / "rank"))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    fisher = fisher_loop(expected, list(data()), wplfast.losses.cross_entropy)
    for rank in range(2):
        state, found, counts = torch.load(tmp_path / f"rank.{rank}")
        assert counts == (24, 23)
        for name, p in expected.named_parameters():
            torch.testing.assert_close(state[name], p.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[name].double(), fisher[name], rtol=1e-4, atol=1e-9)


# ---- module_fisher -------------------------------------------------------------------------------------------------


class OwnLosses(Module):
    """A batch of another form, and losses of its own."""

    def per_sample_losses(self, batch):
        self.log("seen", 1.0)
        return F.cross_entropy(self(batch.x), batch.y, reduction="none")


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.steps = []

    def prepare_data(self):
        self.steps.append("prepare")

    def setup(self, stage):
        self.steps.append(stage)

    def train_dataloader(self):
        return data()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 2, batch[1]


@pytest.mark.parametrize("name", ["criterion", "own losses", "loss_fn", "class weights", "data module", "unpack"])
def test_module_fisher(name):
    module, source, loss_fn, options = Module(), data(), None, {}
    batches, expected_loss = list(data()), wplfast.losses.cross_entropy
    if name == "own losses":
        module = OwnLosses()
        source = [SimpleNamespace(x=x, y=y) for x, y in batches]
    elif name == "loss_fn":
        loss_fn = expected_loss = lambda outputs, y: F.cross_entropy(outputs, y, reduction="none") ** 2
    elif name == "class weights":  # which cancel in a batch of one sample
        module.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)
        smooth = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double(), label_smoothing=0.1)
        expected_loss = lambda outputs, y: smooth(outputs, y).view(1)  # noqa: E731
    elif name == "data module":
        source = Data()
        batches = [(x * 2, y) for x, y in batches]
    elif name == "unpack":
        source = [{"x": x, "y": y} for x, y in batches]
        options = {"unpack": lambda batch: (batch["x"], batch["y"])}
    modes = [m.training for m in module.modules()]
    fisher = module_fisher(module, source, loss_fn, **options)
    assert list(fisher) == ["trunk.weight", "trunk.bias", "head.weight", "head.bias"]
    assert_close(fisher, fisher_loop(module, batches, expected_loss))
    assert fisher.n_samples == 24
    assert modes == [m.training for m in module.modules()]
    assert not {"log", "log_dict"} & set(vars(module))
    if name == "data module":
        assert source.steps == ["prepare", "fit"]


def test_module_fisher_of_a_trainer_runs_as_it_trains():
    """In its precision, on the data that it trained on, also within a hook; parameters may be chosen."""
    module = Module()
    found = []

    class End(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            found.append(module_fisher(pl_module, trainer, params=pl_module.trunk))

    trainer = pl.Trainer(**QUIET, max_epochs=1, precision="bf16-mixed", callbacks=[End()])
    trainer.fit(module, source := Data())
    after = module_fisher(module, source, params=module.trunk)
    assert source.steps == ["prepare", "fit"]
    assert list(after) == ["weight", "bias"]

    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module.head(torch.tanh(module.trunk(x)))

    def loss(outputs, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(outputs, y, reduction="none")

    batches = [(x * 2, y) for x, y in data()]
    expected = wplfast.fisher_diagonal(copy_with(module, forward), batches, loss, params=module.trunk)
    for name, f in expected.items():
        assert torch.equal(found[0][name], f)
        assert torch.equal(after[name], f)
    exact = fisher_loop(module, batches, wplfast.losses.cross_entropy)
    assert not torch.allclose(after["weight"].double(), exact["trunk.weight"], rtol=1e-5)


def copy_with(module: nn.Module, forward) -> nn.Module:
    """A plain module over the same parts with another forward pass."""
    plain = nn.Module()
    plain.trunk, plain.head, plain.forward = module.trunk, module.head, forward
    return plain


def test_module_fisher_says_what_it_needs():
    with pytest.raises(TypeError, match="must be a LightningModule, got Linear"):
        module_fisher(nn.Linear(5, 3), data())
    with pytest.raises(TypeError, match=r"got DataLoader, and dataloader is one: the order is module_fisher\(mod"):
        module_fisher(data(), Module())
    with pytest.raises(TypeError, match=r"must be a LightningModule, got DataLoader$"):
        module_fisher(data(), data())
    with pytest.raises(TypeError, match=r"^module_fisher\(\) got an .* 'max_sample'; did you mean 'max_samples'\?"):
        module_fisher(Module(), data(), max_sample=3)
    module = Module()
    module.criterion = None
    with pytest.raises(TypeError, match="per_sample_losses"):
        module_fisher(module, data())
    with pytest.raises(ValueError, match="draws targets"):
        module_fisher(OwnLosses(), data(), fisher_type="mc")
    with pytest.raises(ValueError, match="no training data yet"):
        module_fisher(Module(), pl.Trainer(**QUIET))
    with pytest.raises(TypeError, match="several training data loaders"):
        module_fisher(Module(), [data(), data()])


def test_what_is_no_penalty_is_refused_at_once():
    with pytest.raises(TypeError, match=r"wpl must be a wplfast.WeightPlasticityLoss, got Module: make one"):
        WPLCallback(Module())


def test_the_callback_of_transformers_is_told_from_this_one():
    transformers = pytest.importorskip("wplfast.integrations.transformers")
    wpl = penalty(module := Module())
    with pytest.raises(AttributeError, match=r"Lightning's Trainer takes that of wplfast\.integrations\.lightning"):
        pl.Trainer(**{**QUIET, "callbacks": [transformers.WPLCallback(wpl)]}).fit(module, data())
    for callback in (transformers.WPLCallback(wpl), WPLCallback(wpl)):
        assert not hasattr(callback, "wpll")
        assert copy.copy(callback).wpl is wpl
        assert type(pickle.loads(pickle.dumps(callback))) is type(callback)
