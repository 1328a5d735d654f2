"""The examples in docstrings and in the README run as they stand."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = ["fisher.accumulator", "fisher.diagonal", "fisher.result", "functional", "losses", "penalty.loss"]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(f"wplfast.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_examples_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) > 1
    script = tmp_path / "example.py"
    script.write_text("\n".join(blocks))  # each goes on from those before it
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_command_line_info():
    done = subprocess.run([sys.executable, "-m", "wplfast", "info"], capture_output=True, text=True, check=True)
    for label in ("wplfast", "torch", "cpu served by", "cuda served by", "cpp instruction set", "threads"):
        assert re.search(rf"^{label} +\S", done.stdout, re.MULTILINE)
    usage = subprocess.run([sys.executable, "-m", "wplfast"], capture_output=True, text=True)
    assert usage.returncode == 2


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_backend_can_be_chosen(backend):
    code = "import wplfast; print(wplfast.backends.serving('cpu'))"
    env = {"WPLFAST_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    assert done.stdout.strip() == backend


def test_unknown_or_missing_backends_are_errors():
    for env, message in (
        ({"WPLFAST_BACKEND": "cuda"}, "must be 'auto' or one of"),
        ({"WPLFAST_REQUIRE": "cudnn"}, "required backends are missing"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", "import wplfast"], capture_output=True, text=True, env={**os.environ, **env}
        )
        assert done.returncode != 0
        assert message in done.stderr


def test_readme_says_what_the_records_say():
    from benchmarks import readme

    assert (ROOT / "README.md").read_text() == readme.render(), "run python -m benchmarks readme"
