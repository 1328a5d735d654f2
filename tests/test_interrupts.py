"""Passes that are interrupted, anywhere and again: everything comes back as it was."""

from __future__ import annotations

import collections
import copy
import gc
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch
import torch._dynamo
from fisher_cases import ce, mlp
from oracle import assert_close, fisher_loop
from torch import nn

import wplfast
from wplfast.capture import watched
from wplfast.capture.undo import Undo
from wplfast.errors import WplfastError
from wplfast.fisher.undisturbed import Undisturbed

FOLDER = Path(wplfast.__file__).parent

#: Files that hold what enters and leaves a pass.
ENTERS_AND_LEAVES = {
    str(FOLDER / name)
    for name in (
        "undo.py",
        "capture/watched.py",
        "fisher/accumulator.py",
        "fisher/diagonal.py",
        "fisher/preserve.py",
        "fisher/single_sample.py",
        "fisher/undisturbed.py",
    )
}


class Counting(nn.Module):
    """Everything that a pass could leave changed: modes, buffers, attributes, dropout, a frozen part, attention."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.last = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.frozen.eval()

    def forward(self, x):
        self.kept = x.detach()
        self.calls += 1
        return self.last(self.frozen(self.attention(self.first(x).unsqueeze(1)).squeeze(1)))


class Scene:
    """A model and data; parts have gradients."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Counting()
        self.data = [(torch.randn(n, 6), torch.randint(0, 4, (n,))) for n in (3, 2)]
        ce(self.model(self.data[0][0]), self.data[0][1]).sum().backward()
        self.model.last.weight.grad = None
        self.hook = self.model.first.weight.register_hook(lambda g: g)
        self.subset = {name: p for name, p in self.model.named_parameters() if p.requires_grad and "norm" not in name}

    def run(self):
        """Run a pass over a part of the parameters: the rest is frozen meanwhile."""
        return wplfast.fisher_diagonal(self.model, self.data, ce, params=self.subset, with_grad=True)

    def state(self) -> dict[str, object]:
        """All that a pass changes."""
        frames = torch._dynamo.eval_frame
        return {
            "classes": [type(p) for p in self.model.parameters()],
            "requires_grad": [p.requires_grad for p in self.model.parameters()],
            "grads": [id(p.grad) if p.grad is not None else None for p in self.model.parameters()],
            "hooks": [len(p._backward_hooks or ()) for p in self.model.parameters()],
            "modes": [module.training for module in self.model.modules()],
            "attributes": [sorted(module.__dict__) for module in self.model.modules()],
            "random": torch.get_rng_state().tolist(),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
            "stance": frames._stance,
            "grad mode": torch.is_grad_enabled(),
            "torch function": torch._C._is_torch_function_enabled(),
            "watched": len(watched._interceptors),
        }


class Injecting:
    """Raise KeyboardInterrupt before a line of some files, counted from 0, or before all later ones too."""

    def __init__(self, at: int, lasting: bool = False, files=ENTERS_AND_LEAVES):
        self.at, self.lasting, self.files, self.count = at, lasting, files, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(lambda frame, *_: self.line if frame.f_code.co_filename in self.files else None)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def line(self, frame, event, _):
        if event == "line":
            self.count += 1
            if self.count - 1 == self.at or (self.lasting and self.count > self.at >= 0):
                raise KeyboardInterrupt
        return self.line


def test_an_interrupt_before_any_line():
    scene = Scene()
    scene.run()
    before = scene.state()
    with Injecting(-1) as counter:
        scene.run()
    assert before == scene.state()
    interrupted = 0
    # All lines of entering and leaving, and a part of those between.
    for at in [*range(260), *range(260, counter.count - 60, 59), *range(counter.count - 60, counter.count + 1)]:
        try:
            with Injecting(at):
                scene.run()
        except KeyboardInterrupt:
            interrupted += 1
        assert before == scene.state(), at
    assert interrupted > 200
    fisher = scene.run()
    assert_close(fisher, fisher_loop(copy.deepcopy(scene.model).eval(), scene.data, ce, scene.subset), 1e-4, 1e-5)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupt_in_a_loop_of_ones_own(lasting, fails):
    scene = Scene()
    before = scene.state()

    def run():
        with wplfast.FisherAccumulator(scene.model.eval(), scene.subset) as acc:
            acc.backward(ce(scene.model(scene.data[0][0]), scene.data[0][1]))
            if fails:
                raise ZeroDivisionError
            acc.result()

    with suppress(ZeroDivisionError):
        run()
    before["modes"] = [False] * len(before["modes"])
    with Injecting(-1) as counter, suppress(ZeroDivisionError):
        run()
    assert before == scene.state()
    for at in [*range(0, 100, 1 + lasting), *range(100, counter.count, 29)]:
        with suppress(KeyboardInterrupt, ZeroDivisionError), Injecting(at, lasting):
            run()
        assert before == scene.state(), at


@contextmanager
def alarms(first: float, then: float) -> Iterator[None]:
    """Raise KeyboardInterrupt from a signal's handler after so many seconds, and again and again."""

    def handler(number, frame):
        if armed:
            raise KeyboardInterrupt

    armed, old = True, signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, first, then)
        yield
    finally:
        while True:
            try:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, old)
                break
            except KeyboardInterrupt:
                continue


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signal.setitimer")
@pytest.mark.parametrize("again", [0.0, 1e-4, 2e-5])
def test_signals_at_any_time(again, monkeypatch):
    """One signal, or one after the other, which reach whatever teardown there is too.

    One that comes in a callback which cannot raise goes to a hook; that of pytest is Python, and interrupted in turn.
    """
    monkeypatch.setattr(sys, "unraisablehook", collections.deque(maxlen=0).append)
    scene = Scene()
    scene.run()
    before, source = scene.state(), random.Random(0)
    ends = 0.03
    interrupted = 0
    for _ in range(35):
        try:
            with alarms(source.uniform(1e-5, ends), again):
                scene.run()
        except KeyboardInterrupt:
            interrupted += 1
        else:
            ends *= 0.97
        after = scene.state()
        assert before == after, [key for key in before if before[key] != after[key]]
        assert torch._C._is_torch_function_enabled()
    assert interrupted > 10


def test_a_signal_at_the_very_end():
    """Teardown is no longer interrupted by what came during its last line."""
    scene = Scene()
    before, former = scene.state(), signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored
    try:
        with pytest.raises(KeyboardInterrupt), wplfast.FisherAccumulator(scene.model, scene.subset):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)
    assert before == scene.state()


# ---- what else may happen -------------------------------------------------------------------------------------------


def test_in_an_exit_stack():
    scene = Scene()
    before = scene.state()
    with ExitStack() as stack:
        acc = stack.enter_context(wplfast.FisherAccumulator(scene.model.eval(), scene.subset))
        acc.backward(ce(scene.model(scene.data[0][0]), scene.data[0][1]))
    before["modes"] = [False] * len(before["modes"])
    assert before == scene.state()
    assert acc.result().n_samples == 3
    acc.__exit__(None, None, None)  # once more: nothing comes back twice
    kept = scene.model.first.weight.grad = torch.ones(8, 6)
    acc.__exit__(None, None, None)
    del acc, stack
    gc.collect()
    assert scene.model.first.weight.grad is kept


def test_a_pass_that_is_dropped_while_it_is_open():
    scene = Scene()
    before = scene.state()
    acc = wplfast.FisherAccumulator(scene.model, scene.subset)
    acc.__enter__()
    assert before != scene.state()
    del acc
    gc.collect()
    assert before == scene.state()


def test_with_a_default_device():
    scene = Scene()
    before = scene.state()
    torch.set_default_device("cpu")
    try:
        with suppress(ZeroDivisionError), wplfast.FisherAccumulator(scene.model, scene.subset):
            raise ZeroDivisionError
        with Injecting(-1) as counter:
            scene.run()
        for at in range(0, counter.count, 97):
            with suppress(KeyboardInterrupt), Injecting(at):
                scene.run()
            assert before == scene.state(), at
    finally:
        torch.set_default_device(None)
    assert before == scene.state()


def test_every_line_at_which_parameters_are_claimed():
    scene, claims = Scene(), {str(FOLDER / "capture/watched.py")}
    before = scene.state()

    def enter():
        with wplfast.FisherAccumulator(scene.model, scene.subset):
            pass

    with Injecting(-1, files=claims) as counter:
        enter()
    assert counter.count > 50
    for at in range(counter.count):
        with suppress(KeyboardInterrupt), Injecting(at, files=claims):
            enter()
        assert before == scene.state(), at


def test_gradients_are_kept_no_longer_than_the_pass():
    model = mlp()
    model[0].weight.grad = torch.ones(9, 6)
    with wplfast.FisherAccumulator(model) as acc:
        acc.backward(ce(model(torch.randn(3, 6)), torch.tensor([0, 1, 2])))
    import weakref

    grad = weakref.ref(model[0].weight.grad)
    model[0].weight.grad = None
    assert grad() is None, "the accumulator holds it"


def test_an_error_when_it_opens():
    model = mlp()
    with wplfast.FisherAccumulator(model):
        scene = [type(p) for p in model.parameters()]
        for other in (nn.Sequential(model, nn.Linear(4, 2)), model):
            with pytest.raises(WplfastError, match="another Fisher pass"), wplfast.FisherAccumulator(other):
                pass
            assert [type(p) for p in model.parameters()] == scene
    assert not watched._interceptors


@pytest.mark.parametrize("fails_at", range(4))
def test_a_step_that_fails(fails_at):
    """Steps after it are made up for when nobody refers to the context any more."""
    found: list[int] = []
    undo = Undo()
    with pytest.raises(ZeroDivisionError), undo:
        undo.by(lambda i: found.append(i) if i != fails_at else 1 / 0, range(4))
    undo.close()
    assert found == [i for i in range(4) if i != fails_at]
    undo.close()
    assert len(found) == 3


def test_settings_that_were_off_stay_off():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        Scene().run()
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_modes_and_random_numbers_of_a_script():
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    state = torch.get_rng_state()
    with torch.no_grad(), Undisturbed(model, False, torch.device("cpu")):
        assert not any(module.training for module in model.modules())
        assert torch.is_grad_enabled()
        torch.rand(3)
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
