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
    bandwidth,
    figures,
    fisher,
    gpu,
    layers,
    linear,
    models,
    passes,
    readme,
    roofs,
    timing,
)
from benchmarks.plumbing import gpu_report, parts
from benchmarks.plumbing import record as record_of

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("usual_malloc")


def failing():
    raise ValueError("does not work")


def wrong_case():
    raise parts.WrongCaseError("off by one", {"right": False})


def test_parts_are_guarded_and_go_on_where_they_ended(tmp_path):
    path, done = tmp_path / "part.json", []
    cases = {"good": lambda: {"x": 1}, "bad": failing, "wrong": wrong_case, "last": lambda: done.append(1) or {"x": 2}}
    record = parts.run(cases, path, 60, CPU)
    assert json.loads(path.read_text()) == record
    assert set(record["cases"]) == {"good", "wrong", "last"}
    assert "ValueError: does not work" in record["errors"]["bad"]
    assert record["errors"]["wrong"] == "off by one"
    parts.run(cases, path, 60, CPU)
    assert done == [1], "what is in the record is not done again"
    record["running"] = record["cases"].pop("last") and "last"
    path.write_text(json.dumps(record))
    again = parts.run(cases | {"late": dict}, path, -1, CPU)
    assert "the process ended" in again["errors"]["last"]
    assert again["left_out"] == {"late": parts.LATE}


def test_tables_are_kept_after_each_case(tmp_path):
    path = tmp_path / "part.json"
    seen = []

    def table(found):
        seen.append(json.loads(path.read_text())["running"])
        return ", ".join(found)

    assert parts.run({"a": dict, "b": dict}, path, 60, CPU, table)["table"] == "a, b"
    assert seen == ["a", "b"]
    record = parts.run({"c": dict}, path, 60, CPU, lambda found: 1 / 0)
    assert "ZeroDivisionError" in record["errors"]["the table"]
    assert set(record["cases"]) == {"a", "b", "c"}


def test_a_lost_device_ends_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_works", lambda device: False)
    record = parts.run({"a": failing, "b": dict}, tmp_path / "part.json", 60, CPU)
    assert record["lost"] == "a"
    assert set(record["errors"]) == {"a"}
    monkeypatch.undo()
    record = parts.run({"a": failing, "b": dict}, tmp_path / "part.json", 60, CPU)
    assert set(record["cases"]) == {"b"}
    assert "lost" not in record


def test_processes_end_with_all_that_they_started():
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.perf_counter()
    code, output = gpu._process([sys.executable, "-c", child], 2, {})
    assert code == 124
    assert "ended after 2 s" in output
    assert time.perf_counter() - started < 20
    assert gpu._process(["/no/such/program"], 2, {})[0] == 127
    assert gpu._process([sys.executable, "-c", "print('a'); raise SystemExit(5)"], 30, {}) == (5, "a\n")


def test_gpu_bench_rehearsal(tmp_path, capfd):
    path = tmp_path / "new" / "gpu.json"
    options = ("--device", "cpu", "--quick", "--no-build", "--commit", "abc", "--parts", "roofs")
    assert gpu.main(["--json", str(path), *options]) == 0
    record = json.loads(path.read_text())
    assert record["given_commit"] == "abc"
    assert len(record["sources"]) == 64
    assert record["plan_seconds"] == {"roofs": gpu.PARTS["roofs"][2]}
    roof = record["parts"]["roofs"]
    assert roof["place"]["versions"]["torch"] == torch.__version__
    assert roof["cases"]["memory"]["copy"]["gigabytes_per_second"] > 0
    assert "TFLOP/s of square products" in path.with_suffix(".txt").read_text()
    out, _ = capfd.readouterr()
    assert out.startswith("plan, seconds: roofs 15")
    assert len(out) < 12_000


def test_the_plan_of_a_gpu_run_fits():
    assert sum(seconds for part, (_, _, seconds) in gpu.PARTS.items() if part not in gpu.OPTIONAL) <= gpu.TOTAL_SECONDS
    long = gpu._shortened("x" * 20_000, ["FAILED a / b: words"])
    assert len(long) < 12_000
    assert long.endswith("FAILED a / b: words")


def test_what_fails_is_said(monkeypatch, tmp_path, capfd):
    found = {"cases": {}, "errors": {"a case": "Traceback\nValueError: words"}, "left_out": {}, "table": "a table"}
    monkeypatch.setattr(gpu, "_run", lambda *arguments: found)
    assert gpu.main(["--json", str(tmp_path / "gpu.json"), "--no-build", "--parts", "linear"]) == 1
    out, _ = capfd.readouterr()
    assert "a table" in out
    assert out.rstrip().endswith("FAILED linear / a case: ValueError: words")


@pytest.fixture(scope="module")
def rehearsed():
    """A record with a case or two of each part."""
    cases = {
        "roofs": {name: roofs.cases(CPU, True)[name]() for name in ("memory", "bf16 product")},
        "linear": {
            "a": linear.case(CPU, True, linear.LAYERS["3072x768"], "bf16", None, "weights, gradient"),
            "b": linear.case(CPU, True, linear.LAYERS["MLP 1024x1024 T=1"], "fp32", "bf16x3", ""),
        },
        "layers": {
            "conv": layers.conv(CPU, True, "3x3 stride 2, 128, 56x56", "bf16"),
            "depthwise": layers.conv(CPU, True, "7x7 depthwise, 96, 56x56", "fp32"),
            "embedding": layers.embedding(CPU, True, 50257, "bf16"),
            "scale": layers.scale(CPU, True, 8, 512, 768, "bf16"),
            "squares": layers.squares(CPU, True, 64, 2048),
        },
        "penalty": {kind.name: bandwidth.case(CPU, True, 10**6, 160, kind, baselines=True) for kind in bandwidth.KINDS},
        "fisher": {"lstm": models.case(CPU, True, "lstm"), "gpt2": models.case(CPU, True, "gpt2")},
        "profile": {"mlp": passes.case(CPU, True, "mlp")},
    }
    found = {part: {"cases": made, "errors": {}, "left_out": {}} for part, made in cases.items()}
    found["roofs"]["place"] = record_of.environment()
    return json.loads(json.dumps({"quick": True, "parts": found}))


def test_gpu_cases_are_right(rehearsed):
    found = {part: record["cases"] for part, record in rehearsed["parts"].items()}
    for name, r in (found["linear"] | found["layers"]).items():
        assert r["right"], name
        assert r["same_bits_twice"], name
        assert r["times"]["wplfast"]["milliseconds"]["median"] > 0
    assert "gradient" in found["linear"]["a"]["relative_error"]
    assert "materialised" in found["linear"]["b"]["times"]
    fp32 = found["penalty"]["fp32"]
    assert fp32["results"]["add_grad_"]["bytes"] == 20 * fp32["parameters"]
    assert fp32["results"]["value and gradient"]["bytes"] == 16 * fp32["parameters"]
    assert found["penalty"]["bf16, F in bf16"]["results"]["add_grad_"]["bytes"] == 10 * fp32["parameters"]
    assert found["penalty"]["fp32, 2 anchors"]["results"]["value"]["bytes"] == 16 * fp32["parameters"]
    gpt2 = found["fisher"]["gpt2"]["errors"]
    assert 0 < gpt2["fisher"]["whole"] <= fisher.LOOPS * gpt2["loop"]["whole"]
    assert found["fisher"]["lstm"]["errors"]["fisher"]["largest"] < fisher.TOLERANCE
    assert {r["slow"] == [] for r in found["fisher"].values()} == {True}
    assert found["profile"]["mlp"]["fisher"]["kernels"] > 0


def test_gpu_record_is_rendered(rehearsed):
    shown = gpu_report.section(rehearsed)
    assert "no measurement" in shown
    for words in ("| GPT-2-small-like", "| N=3, T=17: a |", "| conv |", "| fp32, 2 anchors |", "GB/s"):
        assert words in shown
    assert gpu_report.section(None) == ""
    failed = json.loads(json.dumps(rehearsed))
    failed["parts"]["layers"]["errors"]["conv"] = "words"
    assert "Failed or wrong in this run: layers: conv." in gpu_report.section(failed)
    pytest.importorskip("matplotlib")
    assert figures.draw(rehearsed).startswith(b"\x89PNG")
    tables = {"roofs": roofs, "linear": linear, "layers": layers, "penalty": bandwidth, "profile": passes}
    for part, module in tables.items():
        lines = module.table(rehearsed["parts"][part]["cases"]).splitlines()
        assert max(map(len, lines)) <= 125
    assert "WRONG" not in models.table(rehearsed["parts"]["fisher"]["cases"])
    assert passes.log(rehearsed["parts"]["profile"]["cases"]).count("host") > 3


def test_readme_says_that_gpu_speed_is_unmeasured_until_it_is(tmp_path, monkeypatch):
    record = {name: json.loads((readme.RESULTS / f"{name}.json").read_text()) for name in ("penalty_cpu", "fisher_cpu")}
    assert "GPU speed is unmeasured" in readme.speed(*record.values())
    assert "GPU speed is unmeasured" not in readme.speed(*record.values(), on_gpu=True)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.gpu_record() is None
    (tmp_path / "gpu_a.json").write_text(json.dumps({"quick": True}))
    assert readme.gpu_record() is None
    (tmp_path / "gpu_b.json").write_text(json.dumps({"quick": False}))
    assert readme.gpu_record() == {"quick": False}


def test_wrong_kernels_are_recorded_as_wrong(monkeypatch):
    monkeypatch.setattr(linear.ops, "fisher_linear_", lambda *arguments: None)
    with pytest.raises(parts.WrongCaseError, match="relative error") as raised:
        linear.case(CPU, True, linear.LAYERS["3072x768"], "bf16", None, "")
    assert raised.value.record["right"] is False
    assert "WRONG" in linear.table({"a": raised.value.record})
    monkeypatch.setattr(bandwidth.wplfast.WeightPlasticityLoss, "add_grad_", lambda self: self())
    with pytest.raises(parts.WrongCaseError, match="errors"):
        bandwidth.case(CPU, True, 1000, 1, bandwidth.FP32, baselines=False)


def test_wrong_fisher_in_a_lower_precision_is_recorded(monkeypatch):
    monkeypatch.setattr(fisher, "LOOPS", 0.0)
    with pytest.raises(parts.WrongCaseError, match="gpt2"):
        models.case(CPU, True, "gpt2")


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
            model = fisher.KNOWN[name].model(False)
        assert sum(p.numel() for p in model.parameters()) == expected, name
    assert sorted(models.ORDER) == sorted(fisher.KNOWN)


def test_union_of_spans():
    assert passes.union([(0, 4), (2, 6), (10, 11), (3, 5)]) == 7
    assert passes.union([]) == 0


def test_inputs_go_round():
    seen = []
    run = timing.rotating(lambda a, b: seen.append((a, b)), [(1, 2), (3, 4)])
    for _ in range(3):
        run()
    assert seen == [(1, 2), (3, 4), (1, 2)]
    assert timing.rotations(10, CPU) == 2
