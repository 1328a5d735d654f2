"""The measurements of a GPU, rehearsed without one: parts, records, what is rendered of them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

from benchmarks import (
    fisher,
    gpu,
    gpu_report,
    kernels,
    layers,
    passes,
    penalty,
    penalty_kernels,
    readme,
    roofs,
    timing,
    ways,
)
from benchmarks.plumbing import parts
from benchmarks.plumbing import record as record_of
from benchmarks.workloads import KNOWN

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("usual_malloc")


def failing():
    raise ValueError("does not work")


def wrong_case():
    raise parts.WrongCaseError("off by one", {"right": False})


def test_parts_are_guarded_and_go_on_where_they_ended(tmp_path):
    path, done = tmp_path / "part.json", []
    cases = {"good": lambda: {"x": 1}, "bad": failing, "wrong": wrong_case, "last": lambda: done.append(1) or {"x": 2}}
    record = parts.run(cases, path, 60)
    assert json.loads(path.read_text()) == record
    assert set(record["cases"]) == {"good", "wrong", "last"}
    assert "ValueError: does not work" in record["errors"]["bad"]
    assert record["errors"]["wrong"] == "off by one"
    parts.run(cases, path, 60)
    assert done == [1], "what is in the record is not done again"
    record["running"] = record["cases"].pop("last") and "last"
    path.write_text(json.dumps(record))
    again = parts.run(cases | {"late": dict}, path, -1)
    assert "the process ended" in again["errors"]["last"]
    assert again["left_out"] == {"late": parts.LATE}


def test_records_are_kept_after_each_case(tmp_path):
    path, seen = tmp_path / "part.json", []
    cases = {name: lambda: seen.append(json.loads(path.read_text())) or {} for name in ("a", "b")}
    parts.run(cases, path, 60)
    assert [(set(record["cases"]), record["running"]) for record in seen] == [(set(), "a"), ({"a"}, "b")]
    assert json.loads(path.read_text())["running"] is None


def test_a_table_that_fails_does_not_cost_the_others(rehearsed, monkeypatch):
    monkeypatch.setitem(gpu_report.TABLES, "roofs", lambda found: 1 / 0)
    shown = gpu_report.section(rehearsed)
    assert "The table of roofs failed: ZeroDivisionError" in shown
    assert "| `fisher_linear_` |" in shown


def test_a_lost_device_ends_a_part(tmp_path):
    record = parts.run({"a": failing, "b": dict}, tmp_path / "part.json", 60, lambda: False)
    assert record["lost"] == "a"
    assert set(record["errors"]) == {"a"}
    record = parts.run({"a": failing, "b": dict}, tmp_path / "part.json", 60)
    assert set(record["cases"]) == {"b"}
    assert "lost" not in record


def test_processes_end_with_all_that_they_started():
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.perf_counter()
    code, output = gpu._process([sys.executable, "-c", child], 2)
    assert code == 124
    assert "ended after 2 s" in output
    assert time.perf_counter() - started < 20
    assert gpu._process(["/no/such/program"], 2)[0] == 127
    assert gpu._process([sys.executable, "-c", "print('a'); raise SystemExit(5)"], 30) == (5, "a\n")


def test_gpu_bench_rehearsal(tmp_path, capfd):
    path = tmp_path / "new" / "gpu.json"
    options = ("--device", "cpu", "--quick", "--commit", "abc", "--parts", "roofs")
    assert gpu.main(["--json", str(path), *options]) == 0
    record = json.loads(path.read_text())
    assert record["given_commit"] == "abc"
    assert record["plan_seconds"] == {"roofs": gpu.PARTS["roofs"][2]}
    roof = record["parts"]["roofs"]
    assert roof["place"]["versions"]["torch"] == torch.__version__
    assert roof["cases"]["memory"]["copy"]["gigabytes_per_second"] > 0
    assert "TFLOP/s |" in path.with_suffix(".txt").read_text()
    out, _ = capfd.readouterr()
    assert out.startswith("plan, seconds: roofs 15")


def test_the_plan_of_a_gpu_run_fits():
    assert sum(seconds for part, (_, _, seconds) in gpu.PARTS.items() if part not in gpu.OPTIONAL) <= gpu.TOTAL_SECONDS


def test_what_fails_is_said(monkeypatch, tmp_path, capfd):
    found = {"cases": {}, "errors": {"a case": "Traceback\nValueError: words"}, "left_out": {}}
    monkeypatch.setattr(gpu, "_run", lambda *arguments: found)
    monkeypatch.setattr(gpu_report, "section", lambda record: "a table")
    assert gpu.main(["--json", str(tmp_path / "gpu.json"), "--parts", "linear"]) == 1
    out, _ = capfd.readouterr()
    assert "a table" in out
    assert out.rstrip().endswith("FAILED linear / a case: ValueError: words")


@pytest.fixture(scope="module")
def rehearsed():
    """A record with a case or two of each part."""
    chosen = {
        "roofs": (roofs.cases, ("memory", "bf16 product", "smallest operation")),
        "linear": (
            kernels.linear_cases,
            (
                "3072x768, bf16, weights, gradient",
                "3072x768, bf16",
                "3072x768, fp32, bf16x3",
                "MLP 1024x1024 T=1, fp32",
            ),
        ),
        "layers": (
            layers.cases,
            (
                "conv 3x3 stride 2, 128, 56x56, bf16",
                "conv 7x7 depthwise, 96, 56x56, bf16",
                "conv 1x1, 256 to 64, 56x56, fp32",
                "embedding 50257x768, bf16",
                "scale, LayerNorm 768, N=8 T=512, bf16",
                "squares, N=64, 2048",
            ),
        ),
        "penalty": (penalty_kernels.cases, [f"256 M in 160, {kind.name}" for kind in penalty_kernels.KINDS]),
        "fisher": (fisher.cases, ("lstm", "gpt2")),
        "profile": (passes.cases, ("mlp",)),
    }
    found = {}
    for part, (make, names) in chosen.items():
        cases = make(CPU, True)
        found[part] = {"cases": {name: cases[name]() for name in names}, "errors": {}, "left_out": {}}
    found["roofs"]["place"] = record_of.environment()
    return json.loads(json.dumps({"quick": True, "parts": found}))


def test_gpu_cases_are_right(rehearsed):
    found = {part: record["cases"] for part, record in rehearsed["parts"].items()}
    for name, r in (found["linear"] | found["layers"]).items():
        assert r["right"], name
        assert r["same_bits_twice"], name
        assert r["times"]["wplfast"]["milliseconds"]["median"] > 0
    assert "gradient" in found["linear"]["3072x768, bf16, weights, gradient"]["relative_error"]
    assert "materialised" not in found["linear"]["3072x768, bf16, weights, gradient"]["times"]
    assert "materialised" in found["linear"]["MLP 1024x1024 T=1, fp32"]["times"]
    assert found["linear"]["3072x768, bf16"]["target"] == 0.5
    assert found["linear"]["3072x768, fp32, bf16x3"]["tolerance"] == kernels.TOLERANCE["bf16x3"]
    results = {name.removeprefix("256 M in 160, "): r["results"] for name, r in found["penalty"].items()}
    parameters = found["penalty"]["256 M in 160, fp32"]["parameters"]
    assert results["fp32"]["add_grad_"]["bytes"] == results["fp32"]["accumulate"]["bytes"] == 20 * parameters
    assert results["fp32"]["autograd"]["bytes"] == 28 * parameters
    assert results["fp32"]["copy"]["bytes"] == 20 * parameters
    assert results["fp32"]["value and gradient"]["bytes"] == 16 * parameters
    assert results["bf16, F in bf16"]["accumulate"]["bytes"] == 10 * parameters
    assert results["fp32, 2 anchors"]["value"]["bytes"] == 16 * parameters
    gpt2 = found["fisher"]["gpt2"]["errors"]
    assert 0 < gpt2["fisher"]["whole"] <= fisher.LOOPS * gpt2["loop"]["whole"]
    assert found["fisher"]["lstm"]["errors"]["fisher"]["largest"] < fisher.TOLERANCE
    assert {r["slow"] == [] for r in found["fisher"].values()} == {True}
    assert found["profile"]["mlp"]["fisher"]["kernels"] > 0
    assert len(found["profile"]["mlp"]["fisher"]["operators"]) > 3


def test_gpu_record_is_rendered(rehearsed):
    shown = gpu_report.section(rehearsed)
    assert "no measurement" in shown
    for words in ("| GPT-2-small-like", "| N=3, T=17: 3072x768, bf16 |", "| conv 3x3", "fp32, 2 anchors |", "GB/s"):
        assert words in shown
    for wrong in ("wrong", "differ", "failed", "Failed"):
        assert wrong not in shown
    assert gpu_report.section(None) == ""
    failed = json.loads(json.dumps(rehearsed))
    failed["parts"]["layers"]["errors"]["conv"] = "words"
    failed["parts"]["layers"]["left_out"]["scale"] = parts.LATE
    failed["parts"]["linear"]["cases"]["3072x768, bf16"]["same_bits_twice"] = False
    shown = gpu_report.section(failed)
    assert "Failed or wrong in this run: layers: conv." in shown
    assert "Left out in this run: layers: scale." in shown
    assert "3072x768, bf16 **two runs differ** |" in shown


def test_readme_says_that_gpu_speed_is_unmeasured_until_it_is(tmp_path, monkeypatch):
    assert readme.gpu(readme.ROOT) == [readme.UNMEASURED]
    assert "Neither are GPUs" in readme.beside(readme.ROOT)[-1]
    place = record_of.environment()
    record = {"quick": False, "parts": {"roofs": parts.EMPTY | {"place": place}}}
    monkeypatch.setattr(readme, "gpu_record", lambda: record)
    assert place["hardware"]["cpu"] in readme.gpu(readme.ROOT)[0]
    assert "#on-a-gpu" in readme.beside(readme.ROOT)[-1]
    monkeypatch.undo()
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.gpu_record() is None
    (tmp_path / "gpu_a.json").write_text(json.dumps({"quick": True}))
    assert readme.gpu_record() is None
    (tmp_path / "gpu_b.json").write_text(json.dumps({"quick": False}))
    assert readme.gpu_record() == {"quick": False}


def test_wrong_kernels_are_recorded_as_wrong(monkeypatch):
    monkeypatch.setattr(kernels.ops, "fisher_linear_", lambda *arguments: None)
    with pytest.raises(parts.WrongCaseError, match="relative error") as raised:
        kernels.linear_cases(CPU, True)["3072x768, bf16"]()
    assert raised.value.record["right"] is False
    assert "**wrong**" in "\n".join(gpu_report.linear({"a": raised.value.record}))
    monkeypatch.setattr(ways.wplfast.WeightPlasticityLoss, "add_grad_", lambda self: self())
    with pytest.raises(ways.WrongResultError, match="fp32, add_grad_: relative errors"):
        penalty_kernels.case(CPU, True, [(1000,)])


def test_penalties_beside_the_compiler(monkeypatch):
    def loop(case):
        return {"compile": ways.backward_of(lambda: ways.formula(case.theta, case.theta_hat, case.fisher))}

    monkeypatch.setattr(penalty, "MAKERS", ways.MAKERS | {"compiled": loop})
    found = {name: case() for name, case in penalty_kernels.compiled_cases(CPU, True).items()}
    assert list(found) == ["64 M in 1", "8 small tensors", "64 M in 160"]
    assert len(gpu_report.compiled(found)) == 2 + 3


def test_wrong_fisher_in_a_lower_precision_is_recorded(monkeypatch):
    monkeypatch.setattr(fisher, "LOOPS", 0.0)
    with pytest.raises(parts.WrongCaseError, match="gpt2"):
        fisher.case(CPU, True, "gpt2")


def test_large_models_have_the_sizes_they_are_named_for():
    sizes = {
        "gpt2": 124_046_592,
        "gpt2_untied": 162_643_968,
        "gpt2_autocast": 124_046_592,
        "resnet50": 25_557_032,
        "lstm": 28_018_000,
        "cell": 22_011_000,
    }
    for name, expected in sizes.items():
        with torch.device("meta"):
            model = KNOWN[name].model(False)
        assert sum(p.numel() for p in model.parameters()) == expected, name
    assert sorted(fisher.ORDER) == sorted(KNOWN)


def test_inputs_go_round():
    seen = []
    run = timing.rotating(lambda a, b: seen.append((a, b)), [(1, 2), (3, 4)])
    for _ in range(3):
        run()
    assert seen == [(1, 2), (3, 4), (1, 2)]
    assert timing.rotations(10, CPU) == 2
