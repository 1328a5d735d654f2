"""The examples in docstrings and on pages run as they stand; links lead somewhere; pages say what records say."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
MODULES = ["fisher.accumulator", "fisher.diagonal", "fisher.result", "functional", "losses", "penalty.loss"]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(f"wplfast.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def blocks_of(path: Path) -> list[str]:
    """Return the Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("path", [*filter(blocks_of, PAGES)], ids=lambda path: path.stem)
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks_of(path))  # each goes on from those before it
    for package in ("transformers", "peft", "trl", "lightning", "avalanche", "sklearn"):
        if re.search(rf"^(?:import|from) {package}\b", code, re.MULTILINE):
            pytest.importorskip(package)
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, str(path), "exec"), {"__name__": "example"})


def test_readme_is_short_and_its_example_too():
    assert len((ROOT / "README.md").read_bytes()) <= 8192
    (example,) = blocks_of(ROOT / "README.md")
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 16


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *PAGES[1:]], ids=str)
def test_links_lead_to_files_and_headings(path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = path.parent / name if name else path
        assert found.exists(), f"{path}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", found.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{path}: {target}"


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


def test_pages_say_what_the_records_say():
    from benchmarks import readme

    for name in readme.PAGES:
        assert (ROOT / name).read_text() == readme.render(name), f"{name}: run python -m benchmarks readme"


def test_versions_agree():
    import wplfast

    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert wplfast.__version__ == cited[1]
