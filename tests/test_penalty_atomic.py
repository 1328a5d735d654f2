"""Interrupts and failed allocations: afterwards a penalty is as it was, or as it was to become, to the bit."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from penalty_cases import move, random_fisher, trunk
from torch.utils._python_dispatch import TorchDispatchMode

import wplfast

FOLDER = str(Path(wplfast.__file__).parent / "penalty")
ACTIVE = ["0.weight", "2.bias"]

#: At how many moments that are spread over an action it is stopped, besides its last ones.
SPREAD = int(os.environ.get("WPLFAST_TEST_MOMENTS", "6"))

# ---- what a penalty is, and what may happen to it ----------------------------------------------------------


@dataclass
class Larger:
    """A penalty with three anchors, as a file and as a state."""

    file: Path
    state: dict[str, torch.Tensor]


@pytest.fixture
def larger(tmp_path: Path) -> Larger:
    """What the actions load."""
    module = trunk()
    wpl = wplfast.WeightPlasticityLoss(module)
    for _ in range(3):
        wpl.consolidate(random_fisher(module))
    wpl.save(tmp_path / "larger")
    return Larger(tmp_path / "larger", wpl.state_dict())


class Scene:
    """A penalty with two anchors (or as many as are wanted), its module, and all that the actions need."""

    def __init__(self, larger: Larger, anchors: int = 2, l2: float = 0.0) -> None:
        torch.manual_seed(anchors)
        self.module = trunk()
        self.wpl = wplfast.WeightPlasticityLoss(self.module, alpha=2.0, l2=l2)
        for _ in range(anchors):
            self.wpl.consolidate(random_fisher(self.module))
            move(self.module)
        self.fisher = random_fisher(self.module)
        self.other = trunk()
        self.larger = larger
        self.evaluate()  # so that there are groups

    def evaluate(self) -> list[torch.Tensor]:
        """Return the values and gradients of all parameters and of some."""
        found, parameters = [], [*self.module.parameters(), *self.other.parameters()]
        for names in (None, ACTIVE):
            value = self.wpl(active=names)
            found.append(value.detach())
            if value.requires_grad:
                found += [g for g in torch.autograd.grad(value, parameters, allow_unused=True) if g is not None]
            found.append(self.wpl.add_grad_(active=names))
            for p in parameters:
                found += [] if p.grad is None else [p.grad]
                p.grad = None
        return found

    def snapshot(self) -> dict[str, Any]:
        """Return all that can be seen of the penalty; the evaluation first, as nothing else may have to repair it."""
        seen = {f"evaluation {i}": t for i, t in enumerate(self.evaluate())}
        seen |= {f"fisher {n}": t.clone() for n, t in self.wpl.fisher.items()}
        seen |= {f"theta_hat {n}": t.clone() for n, t in self.wpl.theta_hat.items()}
        seen |= {f"state {n}": t for n, t in self.wpl.state_dict().items()}
        return seen | {"n_anchors": torch.tensor(self.wpl.n_anchors), "alpha": self.wpl.alpha.clone()}


def set_alpha(scene: Scene) -> None:
    scene.wpl.alpha = {"": 1.0, "0.": 3.0}


ACTIONS: dict[str, Callable[[Scene], object]] = {
    "merge": lambda s: s.wpl.consolidate(s.fisher),
    "merge some": lambda s: s.wpl.consolidate(s.fisher, active=ACTIVE, decay=0.5),
    "merge and clip": lambda s: s.wpl.consolidate(s.fisher, clip_norm=0.5),
    "replace": lambda s: s.wpl.consolidate(s.fisher, anchor="replace"),
    "replace some": lambda s: s.wpl.consolidate(s.fisher, anchor="replace", active=ACTIVE, theta_hat=s.wpl.theta_hat),
    "update": lambda s: s.wpl.update(s.fisher, 0.25),
    "update some": lambda s: s.wpl.update(s.fisher, 0.25, active=ACTIVE),
    "load": lambda s: s.wpl.load(s.larger.file),
    "load_state_dict": lambda s: s.wpl.load_state_dict(s.larger.state),
    "rebind": lambda s: s.wpl.rebind(s.other),
    "reset": lambda s: s.wpl.reset(),
    "alpha": set_alpha,
    "follow": lambda s: (s.module.double(), s.wpl()),
}
SCENES = [
    *[(name, 2, 0.0) for name in ACTIONS],
    *[(name, anchors, 0.0) for name in ("merge", "update some") for anchors in (0, 1)],
    *[(name, anchors, 0.5) for name in ("merge", "reset") for anchors in (0, 1)],
]
scenes = pytest.mark.parametrize(
    ("action", "anchors", "l2"), SCENES, ids=[f"{name}, {anchors} anchors, l2={l2}" for name, anchors, l2 in SCENES]
)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )


class Undisturbed:
    """What an action makes of a scene: its states before and after."""

    def __init__(self, make: Callable[[], Scene], action: str, watch: AbstractContextManager[Any]) -> None:
        self.make, self.act, scene = make, ACTIONS[action], make()
        if action == "follow":
            scene.module.double()  # the conversion comes before anything of the penalty's
        self.before = scene.snapshot()
        with watch:
            self.act(scene)
        self.after = scene.snapshot()

    def check(self, stop: AbstractContextManager[Any], error: type[BaseException] | tuple[type[BaseException], ...]):
        """Let the action be stopped, and done again where nothing came of it; return whether that was so."""
        scene = self.make()
        with pytest.raises(error), stop:
            self.act(scene)
        seen = scene.snapshot()
        if same(seen, self.after):
            return False
        assert same(seen, self.before)
        self.act(scene)
        assert same(scene.snapshot(), self.after)
        return True


# ---- interrupts --------------------------------------------------------------------------------------------


class Interrupts:
    """Raise KeyboardInterrupt before a line of the penalty's code is run, counted from 0, or before all later."""

    def __init__(self, at: int = sys.maxsize, lasting: bool = False) -> None:
        self.count, self._at, self._lasting = 0, at, lasting

    def __enter__(self) -> None:
        self._tracing = sys.gettrace()
        sys.settrace(lambda frame, *_: self._line if frame.f_code.co_filename.startswith(FOLDER) else None)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._tracing)

    def _line(self, _frame, event, _):
        if event == "line":
            self.count += 1
            if self.count == self._at + 1 or (self._lasting and self.count > self._at):
                raise KeyboardInterrupt
        return self._line


def points(count: int, last: int = 15) -> list[int]:
    """Return moments all over, and all of the last ones, where the change is made."""
    return sorted({*range(0, count, max(1, count // SPREAD)), *range(max(0, count - last), count)})


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "and again"])
@scenes
def test_interrupted_at_any_line(larger, action, anchors, l2, lasting):
    counter = Interrupts()
    undisturbed = Undisturbed(partial(Scene, larger, anchors, l2), action, counter)
    undone = [undisturbed.check(Interrupts(at, lasting), KeyboardInterrupt) for at in points(counter.count)]
    assert undone[0] or same(undisturbed.before, undisturbed.after)
    assert undone == sorted(undone, reverse=True)  # from the moment of the change on it is made


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
@pytest.mark.parametrize("how", ["merge", "replace"])
def test_interrupted_by_a_signal(how):
    params = {f"p{i}": torch.randn(300, requires_grad=True) for i in range(400)}
    fisher = {name: torch.rand(300) for name in params}

    armed = False

    def interrupt(*_):
        nonlocal armed
        if armed:  # a signal that comes late, between two statements of this test, must not end the process
            armed = False
            raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        for trial in range(24):
            wpl = wplfast.WeightPlasticityLoss(params)
            wpl.consolidate(fisher)
            before, value = {n: f.clone() for n, f in wpl.fisher.items()}, wpl().item()
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + trial * 5e-4)
                wpl.consolidate(fisher, anchor=how)
                armed = False
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            changed = [not torch.equal(before[name], f) for name, f in wpl.fisher.items()]
            assert all(changed) or not any(changed)
            assert wpl.n_anchors == (2 if how == "merge" and all(changed) else 1)
            assert wpl().item() == value  # all anchors are where the parameters are
    finally:
        signal.signal(signal.SIGALRM, former)


# ---- failed allocations ------------------------------------------------------------------------------------


class Failing(TorchDispatchMode):
    """Let one operator fail, counted from 0, or all from there on."""

    def __init__(self, at: int = sys.maxsize, error: type[Exception] = MemoryError, lasting: bool = False) -> None:
        super().__init__()
        self.count, self._at, self._error, self._lasting = 0, at, error, lasting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self._at + 1 or (self._lasting and self.count > self._at):
            raise self._error("no memory is left")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@scenes
def test_an_allocation_that_fails(larger, action, anchors, l2, lasting):
    if action == "follow":
        pytest.skip("the module's own conversion would fail")
    counter = Failing()
    undisturbed = Undisturbed(partial(Scene, larger, anchors, l2), action, counter)
    for at in points(counter.count, last=6):
        error = (MemoryError, torch.OutOfMemoryError)[at % 2]
        undisturbed.check(Failing(at, error, lasting), (error, ValueError))  # safetensors has words of its own


class Allocations(TorchDispatchMode):
    """Add up the memory that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.found.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # kept, so that each is another one
        return result


@pytest.mark.parametrize("how", ["merge", "replace"])
def test_a_part_is_consolidated_without_a_copy_of_the_rest(how):
    params = {f"p{i}": torch.randn(1000, requires_grad=True) for i in range(100)}
    fisher = {name: torch.rand(1000) for name in params}
    wpl = wplfast.WeightPlasticityLoss(params)
    wpl.consolidate(fisher)
    wpl.consolidate(fisher)
    known = {t.untyped_storage().data_ptr() for t in (*wpl.fisher.values(), *wpl.theta_hat.values(), *fisher.values())}
    known |= {p.untyped_storage().data_ptr() for p in params.values()}
    with Allocations() as allocations:
        wpl.consolidate(fisher, active=list(params)[::10], anchor=how)
    new = [t.untyped_storage().nbytes() for place, t in allocations.found.items() if place not in known]
    of_one, offsets = 10 * 1000 * 4, 100 * 1008 * 4
    assert (
        sum(n for n in new if n != offsets) <= 30 * of_one
    )  # a merge's float64 is one parameter's at a time, but kept


@pytest.mark.parametrize("change", ["merge some", "update some", "alpha"])
def test_what_changes_before_the_anchors_followed_their_parameters(larger, change):
    """Parameters that an action does not name are of another type by then, and nobody evaluated in between."""
    at_once, later = Scene(larger), Scene(larger)
    for scene in (at_once, later):
        scene.module[0].bias.data = scene.module[0].bias.data.double()
    later.evaluate()
    for scene in (at_once, later):
        ACTIONS[change](scene)
    assert same(at_once.snapshot(), later.snapshot())


def test_files_that_no_penalty_can_have_written_change_nothing(larger):
    scene = Scene(larger)
    before = scene.snapshot()
    for key, value in (
        ("n_anchors", torch.tensor(-3)),
        ("fisher.0.bias", torch.full((7,), 1e300, dtype=torch.float64)),
        ("theta_hat.0.bias", torch.full((7,), -1e300, dtype=torch.float64)),
    ):
        with pytest.raises(RuntimeError, match=r"must not be negative, got -3|must be finite.* in torch.float32"):
            scene.wpl.load_state_dict({**larger.state, key: value})
        assert same(scene.snapshot(), before)
