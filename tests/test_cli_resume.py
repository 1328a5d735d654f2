"""``wplfast fisher`` that ends too early, by any signal, goes on: no sample is lost or counted twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import WORDS, saved
from oracle import assert_close, fisher_loop

from wplfast import Fisher, cli

ROOT = Path(__file__).parent.parent
MINE = """
import os, signal, torch, wplfast
from pathlib import Path
from torch import nn
torch.manual_seed(0)
X, Y = torch.randn(33, 4), torch.randint(0, 3, (33,))
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
def loss(outputs, targets): return wplfast.losses.cross_entropy(outputs, targets)
def batches():
    kill = os.environ.pop("KILL", None)
    for i in range(0, 33, 3):
        if kill and i == 18:
            os.kill(os.getpid(), getattr(signal, kill))
        yield X[i : i + 3], Y[i : i + 3]
def task(): return model(), batches(), loss
def dataset(): return model(), torch.utils.data.TensorDataset(X, Y), loss
def reversed_task(): return model(), list(batches())[::-1], loss
def shorter(): return model(), list(batches())[:3], loss
"""
ARGUMENTS = ["fisher", "--model", "mine:task", "-o", "F", "--save-every", "0"]


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Any:
    """An empty folder with a user's module, imported anew for each test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("mine", None)
    import mine as found

    yield found
    sys.modules.pop("mine", None)


@pytest.fixture
def interrupted(mine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """A run that SIGINT ended after 6 of 11 batches; returns what it said."""
    monkeypatch.setenv("KILL", "SIGINT")
    before = signal.getsignal(signal.SIGINT)  # processes in the background ignore it
    assert cli.main(ARGUMENTS) == 130
    assert signal.getsignal(signal.SIGINT) is before
    return capsys.readouterr().err


def whole(mine: Any) -> dict[str, torch.Tensor]:
    """The Fisher of all samples."""
    return fisher_loop(mine.model(), [(mine.X, mine.Y)], mine.loss)


def test_an_interrupt_keeps_what_is_done(mine: Any, interrupted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert interrupted == (
        "wplfast fisher: stopped after 18 samples: run the same command again to go on (they are in F.partial)\n"
    )
    assert not Path("F").exists()
    assert Fisher.load("F.partial").n_samples == 18
    assert cli.main([*ARGUMENTS, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["samples"], said["resumed"]) == (33, 18)
    assert os.listdir() == [name for name in os.listdir() if ".partial" not in name]
    fisher = Fisher.load("F")
    assert fisher.n_samples == 33
    assert_close(fisher, whole(mine))


def test_sigterm_does_the_same(mine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILL", "SIGTERM")
    assert cli.main(ARGUMENTS) == 143
    assert cli.main(ARGUMENTS) == 0
    assert_close(Fisher.load("F"), whole(mine))


def test_sigkill_loses_what_was_not_written_alone(mine: Any) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "KILL": "SIGKILL"}
    done = subprocess.run([sys.executable, "-m", "wplfast", *ARGUMENTS], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert Fisher.load("F.partial").n_samples in (15, 18)
    assert cli.main(ARGUMENTS) == 0
    assert Fisher.load("F").n_samples == 33
    assert_close(Fisher.load("F"), whole(mine))


@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
def test_the_result_is_that_of_an_uninterrupted_run(mine: Any, monkeypatch: Any, fisher_type: str) -> None:
    arguments = [*ARGUMENTS, "--fisher-type", fisher_type]
    assert cli.main([*arguments, "-o", "uninterrupted", "--save-every", "60"]) == 0
    monkeypatch.setenv("KILL", "SIGINT")
    assert cli.main(arguments) == 130
    assert cli.main(arguments) == 0
    expected = {name: tensor.double() for name, tensor in Fisher.load("uninterrupted").items()}
    assert_close(Fisher.load("F"), expected, rtol=1e-6, model_rtol=1e-6)


def test_an_error_in_the_middle_keeps_what_was_written(mine: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(mine, "batches", lambda: ((x, y) if i < 5 else 1 / 0 for i, (x, y) in enumerate(zip(
        mine.X.split(3), mine.Y.split(3), strict=True))))  # fmt: skip
    assert cli.main(ARGUMENTS) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert Fisher.load("F.partial").n_samples in (12, 15)
    monkeypatch.undo()
    os.chdir(Path(mine.__file__).parent)
    monkeypatch.setattr(mine, "batches", lambda: zip(mine.X.split(3), mine.Y.split(3), strict=True))
    assert cli.main(ARGUMENTS) == 0
    assert_close(Fisher.load("F"), whole(mine))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1"], r"F\.partial is of another run: --seed was 0, now it is 1; .* or delete F\.partial to start"),
        (["--params", "0.*"], r"--params was None, now it is \['0\.\*'\]"),
        (["--fisher-type", "mc"], r"--fisher-type was 'empirical', now it is 'mc'"),
        (["--max-samples", "9"], r"--max-samples was None, now it is 9"),
        (["--model", "mine:shorter"], r"--data was '--model mine:task', now it is '--model mine:shorter'"),
    ],
)
def test_another_command_is_not_merged(interrupted: str, arguments: list[str], message: str, capsys: Any) -> None:
    assert cli.main([*ARGUMENTS, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert Fisher.load("F.partial").n_samples == 18  # nothing was lost


def test_other_weights_or_batches_are_not_merged(mine: Any, interrupted: str, monkeypatch: Any, capsys: Any) -> None:
    for name, message in [("reversed_task", "are others now"), ("shorter", "data end after 3 batches, 6 of which")]:
        monkeypatch.setattr(mine, "task", getattr(mine, name))
        assert cli.main(ARGUMENTS) == 2
        assert message in capsys.readouterr().err
    trained = mine.model()
    with torch.no_grad():
        trained[0].bias[0] += 1e-3
    monkeypatch.setattr(mine, "task", lambda: (trained, mine.batches(), mine.loss))
    assert cli.main(ARGUMENTS) == 2
    assert re.search(r"--model was 'Sequential, checksum \w{8}', now it is", capsys.readouterr().err)


def test_a_damaged_or_foreign_unfinished_file(interrupted: str, capsys: Any) -> None:
    data = bytearray(Path("F.partial").read_bytes())
    data[-3] ^= 1
    Path("F.partial").write_bytes(data)
    assert cli.main(ARGUMENTS) == 2
    assert "F.partial is not what an interrupted run left (F.partial is damaged" in capsys.readouterr().err
    Fisher({"w": torch.ones(2)}, 1).save("F.partial")
    assert cli.main(ARGUMENTS) == 2
    assert "delete F.partial to start anew" in capsys.readouterr().err
    Path("F.partial").rename("F.partial-0-of-2")
    assert cli.main(ARGUMENTS) == 2
    assert (
        "F.partial-0-of-2 was left by a run with another number of processes, this one has 1" in capsys.readouterr().err
    )


def test_a_file_goes_on_within_its_windows(tmp_path: Path, monkeypatch: Any) -> None:
    from wplfast.cli.estimate import batches, language

    monkeypatch.setattr(batches, "WINDOW", 3)  # of 3 batches of 2: 25 samples are 5 windows
    texts = [" ".join(WORDS[(i + j) % 30] for j in range(2 + i % 7)) for i in range(25)]
    (tmp_path / "d.txt").write_text("\n".join(texts))
    arguments = ["fisher", "--model", saved("gpt2", tmp_path), "--data", "d.txt", "--batch-size", "2", "-o"]
    assert cli.main([*arguments, "whole"]) == 0
    collate, seen = language.CausalLM.collate, []

    def interrupting(self: Any, examples: Any) -> Any:
        seen.extend(tuple(example.label) for example in examples)
        if len(seen) in (8, 18):
            os.kill(os.getpid(), signal.SIGINT)
        return collate(self, examples)

    monkeypatch.setattr(language.CausalLM, "collate", interrupting)
    codes = [cli.main([*arguments, "F", "--save-every", "3600"]) for _ in range(3)]
    assert codes == [130, 130, 0]
    fisher = Fisher.load("F")
    assert fisher.n_samples == 25
    assert_close(fisher, {name: tensor.double() for name, tensor in Fisher.load("whole").items()}, 1e-6, 1e-6)


@pytest.mark.slow
def test_torchrun(mine: Any, tmp_path: Path) -> None:
    def torchrun(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "wplfast",
        ]
        settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run([*command, *arguments], env=settings, capture_output=True, text=True, timeout=120)

    arguments = [*ARGUMENTS, "--batch-size", "5", "--model", "mine:dataset"]
    done = torchrun(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("33 samples") == 1  # one rank says so
    assert not list(tmp_path.glob("*.partial*"))
    fisher = Fisher.load("F")
    assert fisher.n_samples == 33
    assert_close(fisher, whole(mine))
    assert cli.main([*arguments, "-o", "one"]) == 0
    assert_close(fisher, {name: tensor.double() for name, tensor in Fisher.load("one").items()}, 1e-6, 1e-6)
