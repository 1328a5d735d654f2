"""Every script in ``examples/`` runs, says what was forgotten with and without the penalty, and keeps its promises."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FORGETTING = re.compile(r"^forgetting (with|without) the penalty: (-?[\d.]+)", re.MULTILINE)


def imports(path: Path) -> set[str]:
    """Return the packages that a script imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


def run(path: Path, folder: Path, **environment: str) -> dict[str, float]:
    """Run a script in an empty folder, offline; return what it says was forgotten."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=folder, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return {way: float(value) for way, value in FORGETTING.findall(done.stdout)}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example(path, tmp_path):
    lines = path.read_text().splitlines()
    assert 30 <= len(lines) <= 70
    for package in sorted(imports(path)):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    forgotten = run(path, tmp_path)
    assert forgotten["with"] < forgotten["without"]
