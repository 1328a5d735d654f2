"""The prototype of penalty and optimizer step in one pass takes the steps of ``add_grad_`` and torch's optimizer."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

from benchmarks import fused_step
from benchmarks.contenders import Case, WrongResultError
from benchmarks.plumbing import fused_step as prototype
from benchmarks.plumbing import fused_step_check

SHAPES = [(1,), (3, 5), (16,), (17,), (2, 31), (4096,), (4097,), (37, 911), (0,), (129, 513)]
missing = sys.platform != "linux" or shutil.which(prototype.compiler()[0]) is None
needs_compiler = pytest.mark.skipif(missing, reason="no C++ compiler with OpenMP")


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def case(shapes=SHAPES):
    made = Case.of("odd sizes", shapes, fused_step.CPU)
    for p in made.theta:
        p.grad = torch.randn_like(p)
    return made


@needs_compiler
@pytest.mark.parametrize("rule", prototype.RULES)
def test_steps_are_those_of_add_grad_and_torch(rule, threads):
    errors = fused_step_check.check(rule, case())
    assert set(errors) == {"fused", "fused, value", "two passes", "two passes, value"}


@needs_compiler
def test_a_wrong_step_is_refused(monkeypatch):
    monkeypatch.setattr(prototype, "MOMENTUM", 0.8)
    wrong = case([(5,)])
    right = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda theta, lr, momentum, fused: right(theta, lr=lr, momentum=0.9))
    with pytest.raises(WrongResultError, match="odd sizes, momentum: relative errors"):
        fused_step_check.check("momentum", wrong)


@needs_compiler
def test_other_tensors_are_refused():
    half = torch.zeros(3, dtype=torch.float16)
    with pytest.raises(ValueError, match="expected contiguous float32"):
        prototype.OwnStep("sgd", [half], [half], [half], [()], 1.0, 0.1)


def test_no_compiler_is_said(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(fused_step, "library", prototype.library.__wrapped__)  # what is compiled stays
    assert fused_step.main(["--quick"]) == 2
    assert "'no-such-compiler' not found" in capsys.readouterr().err


@needs_compiler
def test_quick(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fused_step, "MODELS", (("mlp", None), ("mlp", 1)))
    path = tmp_path / "record.json"
    assert fused_step.main(["--quick", "--rules", "adamw", "--threads", "1", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    (run,) = record["fused_step"]
    (alone,), training = run["alone"], run["training"]
    assert alone["gain"]["paper"] == 0.25
    assert [r["case"][-4:] for r in training] == ["=256", " N=1"]
    assert {"tail_over_own", "step_over_torch", "tail_over_torch_of_step"} <= set(training[0]["gain"])
    assert "gain over_own" in capsys.readouterr().out
