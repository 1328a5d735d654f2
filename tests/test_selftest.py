"""``wplfast selftest``, which must fail where an operator is wrong, and the command line around it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wplfast
from wplfast import cli, ops
from wplfast.backends import reference
from wplfast.cli import selftest
from wplfast.cli.selftest_cases import CASES
from wplfast.ops.contract import SCHEMAS

ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "wplfast", *arguments]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=settings)


def test_every_operator_in_every_dtype_agrees_on_this_machine_and_needs_neither_pytest_nor_the_tests(
    tmp_path: Path,
) -> None:
    code = "import sys; from wplfast import cli; code = cli.main(['selftest', '--device', 'cpu', '--json'])\n"
    code += "assert not {'pytest', '_pytest', 'hypothesis', 'tests'} & set(sys.modules); sys.exit(code)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "ok"
    assert found["problems"] == []
    assert {row["operator"] for row in found["operators"]} == set(SCHEMAS)
    for row in found["operators"]:
        assert set(row["dtypes"]) == {"float32", "float64", "bfloat16", "float16"}
        assert 0 < row["error"] <= row["tolerance"]
    assert found["seconds"] < 30


def test_a_backend_that_is_plain_pytorch_agrees_too() -> None:
    done = run("selftest", "--device", "cpu", WPLFAST_BACKEND="reference")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu served by reference" in done.stdout
    assert re.match(r"ok: (\d+) of \1 calls agree", done.stdout.splitlines()[-1])


def test_cases_write_to_all_that_is_written_to() -> None:
    for operator, schema in SCHEMAS.items():
        written = set(re.findall(r"Tensor\([ab]!\)(?:\[\]|\?)? (\w+)", schema))
        assert all(set(case.written) == written for case in CASES if case.operator == operator)


# ---- it must be able to fail -----------------------------------------------------------------------------------------


def one_element_off(result: torch.Tensor, by: float, index: int = -1) -> None:
    result.view(-1)[index] *= 1 + by


def wrong(operator: str, kind: str):  # type: ignore[no-untyped-def]
    """Return an operator that is wrong in a way."""
    right = getattr(ops, operator)

    def wronged(**arguments):  # type: ignore[no-untyped-def]
        if kind == "raises":
            raise RuntimeError("CUDA error: no kernel image")
        returned = right(**arguments)
        written = next(iter(case.written for case in CASES if case.operator == operator))
        results = [x for x in (returned if isinstance(returned, tuple) else [returned]) if x is not None]
        for name in written:
            value = arguments[name]
            results += value if isinstance(value, list) else [value]
        (result, *_) = [x for x in results if x is not None and x.numel()][-1:]
        if kind == "element":
            packed = operator == "penalty_with_grad"  # whose last elements are a gap
            one_element_off(result if result.is_contiguous() else result.transpose(-1, -2), 0.05, 0 if packed else -1)
        elif kind == "nan":
            result.fill_(float("nan"))
        elif kind == "nothing":
            result.zero_()
        elif kind == "input":
            given = next(v for k, v in arguments.items() if k not in written and isinstance(v, torch.Tensor))
            given.add_(1)
        elif kind == "beside":
            first = next(v[0] if isinstance(v, list) else v for v in arguments.values())
            memory = torch.empty(0, dtype=first.dtype).set_(first.untyped_storage())
            memory[first.storage_offset() - 1] = 3
        return returned

    return wronged


@pytest.mark.parametrize("kind", ["element", "nan", "nothing", "input", "beside", "raises"])
@pytest.mark.parametrize("operator", list(SCHEMAS))
def test_a_wrong_operator_is_found(
    operator: str, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, operator, wrong(operator, kind))
    # All of its own cases; of the others', which the next test runs all beside a wrong one, one each.
    others = {case.operator: case for case in CASES if case.operator != operator}
    monkeypatch.setattr(selftest, "CASES", [*(c for c in CASES if c.operator == operator), *others.values()])
    assert cli.main(["selftest", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line.split()[0]: line.split()[-1] for line in lines if line.split()[0] in SCHEMAS}
    assert set(verdicts) == set(SCHEMAS)
    assert verdicts.pop(operator) == "MISMATCH"
    assert set(verdicts.values()) == {"ok"}
    assert lines[-1].startswith("MISMATCH: ")
    assert any(line.startswith(f"MISMATCH {operator}, ") for line in lines)


def test_a_wrong_sum_in_one_dtype_is_found_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.fisher_linear_

    def wronged(**arguments):  # type: ignore[no-untyped-def]
        right(**arguments)
        if arguments["activations"].dtype == torch.bfloat16:
            one_element_off(arguments["fisher"], 1e-4)

    monkeypatch.setattr(ops, "fisher_linear_", wronged)
    assert cli.main(["selftest", "--device", "cpu", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "MISMATCH"
    assert found["problems"]
    assert all("fisher_linear_" in problem and "bfloat16: fisher is off by" in problem for problem in found["problems"])


def test_a_wrong_prepared_penalty_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = wplfast.backends.prepared_penalty("cpu")
    right = prepared.with_grad
    monkeypatch.setattr(prepared, "with_grad", lambda self: (right(self)[0], right(self)[1] * 1.1))
    problems = [c for c in selftest.compare_all(torch.device("cpu")) if c.problem]
    assert problems
    assert {c.case.what for c in problems} == {"prepared"}


def test_float64_is_held_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.scale_grads
    monkeypatch.setattr(ops, "scale_grads", lambda **arguments: right(**arguments) * (1 + 1e-9))
    assert {c.dtype for c in selftest.compare_all(torch.device("cpu")) if c.problem} == {torch.float64}


# ---- the command line ------------------------------------------------------------------------------------------------


def ended(*arguments: str) -> object:
    """Return the code with which the command line ends this process, as it does after what it only says."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    return caught.value.code


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version").stdout == f"wplfast {wplfast.__version__}\n"
    assert ended("--help") == 0
    told = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"wplfast {command.__name__.rpartition('.')[2]}" in told, "each has an example"
    assert ended("selftest", "--help") == 0
    assert "--device" in capsys.readouterr().out


def test_a_process_ends_with_the_code_of_its_command_line() -> None:
    done = run("fishr")
    assert done.returncode == 2
    assert re.fullmatch(r"wplfast: error: .*'fishr'.* \(see wplfast --help\)\n", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "wplfast: error: .*COMMAND"),
        (["selftest", "--devise", "cpu"], "wplfast: error: unrecognized arguments: --devise cpu"),
        (["show"], "wplfast show: error: .* F"),
        (["show", "F", "--depth", "x"], "wplfast show: error: argument --depth: invalid int value: 'x'"),
        (["fisher", "--max-samples", "0"], "wplfast fisher: error: argument --max-samples: must be at least 1, got 0"),
        (["fisher", "--dtype", "int8"], "wplfast fisher: error: argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(*arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert re.fullmatch(rf"{said}.* \(see wplfast[a-z ]* --help\)\n", told.err), told.err


@pytest.mark.parametrize("device", ["no-such-device", "cuda:63", "xpu"])
def test_errors_are_one_line(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftest", "--device", device]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert re.fullmatch(r"wplfast selftest: error: .+\n", told.err)


def test_the_console_script_is_the_same_function() -> None:
    entry = re.search(r'\[project\.scripts\]\nwplfast = "([\w.]+):(\w+)"', (ROOT / "pyproject.toml").read_text())
    assert entry is not None
    assert getattr(importlib.import_module(entry[1]), entry[2]) is cli.main


def test_the_package_has_few_entries() -> None:
    entries = {p.name for p in (ROOT / "wplfast").iterdir() if not re.search(r"^__pycache__$|\.(so|pyd)$", p.name)}
    assert len(entries) <= 16, sorted(entries)


def test_the_reference_has_every_operator() -> None:
    assert all(callable(getattr(reference, operator)) for operator in SCHEMAS)
