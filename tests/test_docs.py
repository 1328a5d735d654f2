"""The examples in docstrings and on pages run as they stand; links lead somewhere; pages say what records say."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wplfast import cli

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


@pytest.mark.usefixtures("one_thread")
def test_path_of_the_command_line_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    page = ROOT / "docs" / "cli.md"
    (tmp_path / "mine.py").write_text("\n".join(blocks_of(page)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    path = page.read_text().partition("\n## A path to follow\n")[2]
    commands = re.findall(r"^\$ wplfast (.*)\n((?:(?!\$|```).*\n)*)", path.partition("\n## ")[0], re.MULTILINE)
    assert len(commands) > 5
    try:
        with torch.random.fork_rng(devices=[]):
            for command, said in commands:
                assert cli.main(shlex.split(command)) == 0, command
                assert words_of(capsys.readouterr().out) == words_of(said), command
    finally:
        sys.modules.pop("mine", None)


def words_of(text: str) -> list[str]:
    """Return what does not change from run to run: all but numbers, dates and times."""
    return [word for word in re.split(r"[\s,:()]+", text) if word and not re.match(r"\d+[-.]|\d+Z|\d+$", word)]


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


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, which imports wplfast under these environment variables."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


INFO = """
import runpy, sys
sys.argv = ["wplfast", "info"]
try:
    runpy.run_module("wplfast", run_name="__main__")
finally:
    print("compiler imported:", "torch._dynamo" in sys.modules)
"""


def test_command_line_info_of_a_chosen_backend():
    """With a backend of one's choice, and without the seconds that importing PyTorch's compiler takes."""
    done = run(INFO, WPLFAST_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    for label in ("wplfast", "torch", "cuda served by", "cpp instruction set", "threads"):
        assert re.search(rf"^{label} +\S", done.stdout, re.MULTILINE)
    assert re.search(r"^cpu served by +reference$", done.stdout, re.MULTILINE)
    assert "compiler imported: False" in done.stdout


def test_a_command_is_asked_for(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(" (see wplfast --help)\n")


#: One interpreter, which imports PyTorch once and forks for each import of wplfast.
FORKS = """
import json, os, sys, torch
for environment in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if os.fork():
        os.wait()
    else:
        os.environ |= environment
        try:
            import wplfast
            print("served by", wplfast.backends.serving("cpu"))
        except ImportError as error:
            print("ImportError:", error)
        sys.exit()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_backends_are_chosen_or_required():
    """Nothing else serves the CPU then; one that is unknown or missing is an error of the import."""
    said = {
        ("WPLFAST_BACKEND", "cpp"): "served by cpp",
        ("WPLFAST_BACKEND", "cuda"): "ImportError: WPLFAST_BACKEND must be 'auto' or one of",
        ("WPLFAST_REQUIRE", "cudnn"): "ImportError: required backends are missing",
    }
    environments = json.dumps([{name: value} for name, value in said])
    done = subprocess.run([sys.executable, "-c", FORKS, environments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(text) for line, text in zip(lines, said.values(), strict=True)), lines


def test_pages_say_what_the_records_say():
    from benchmarks import readme

    for name in readme.PAGES:
        assert (ROOT / name).read_text() == readme.render(name), f"{name}: run python -m benchmarks readme"


def test_versions_agree():
    import wplfast

    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert wplfast.__version__ == cited[1]
