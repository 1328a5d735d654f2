"""The measurements, tiny: they run, check what they time, and write a whole record."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

from benchmarks import fisher, penalty, timing
from benchmarks.__main__ import main

CPU = torch.device("cpu")


def test_all_quick(tmp_path, capfd):
    path = tmp_path / "record.json"
    before = torch.get_num_threads()
    arguments = ("--quick", "--threads", "1", "--workloads", "mlp", "rnn", "--json", str(path))
    assert main(["all", *arguments]) == 0
    assert torch.get_num_threads() == before
    record = json.loads(path.read_text())
    assert record["hardware"]["cpu"]
    assert record["versions"]["torch"] == torch.__version__
    (penalties,), (fishers,) = record["penalty"], record["fisher"]
    assert penalties["threads"] == fishers["threads"] == 1
    large, small = penalties["records"]
    assert large["tensors"] == 160
    assert small["tensors"] == 8
    ours = large["results"]["add_grad_"]
    assert ours["bytes"] == 20 * large["parameters"]
    assert {"eager_over_it", "foreach_over_it", "share_of_triad", "share_of_triad_in_place"} <= set(ours)
    assert [r["workload"] for r in fishers["records"]] == ["mlp", "rnn"]
    for r in fishers["records"]:
        assert r["unit_flops"] > 0
        assert min(r["peak_bytes"].values()) > 0
        assert r["ratio"]["q1"] <= r["ratio"]["median"] <= r["ratio"]["q3"]
    out, err = capfd.readouterr()
    assert "pass / unit" in out
    assert not err


@pytest.mark.parametrize("numel", [100_000, 10_000_000])
def test_net_shapes_have_the_size_asked_for(numel):
    shapes = penalty.net_shapes(numel)
    total = sum(torch.Size(shape).numel() for shape in shapes)
    assert len(shapes) == 160
    assert abs(total / numel - 1) < 0.05


def test_wrong_results_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(penalty.wplfast.WeightPlasticityLoss, "add_grad_", lambda self: self())
    assert main(["penalty", "--quick"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "add_grad_" in err
    assert "nothing was timed" in err


def test_wrong_fisher_is_refused(monkeypatch):
    monkeypatch.setattr(fisher, "oracle", lambda model, batch: {k: p + 1 for k, p in model.named_parameters()})
    model = fisher.Model(fisher.WORKLOADS["mlp"], CPU, quick=True)
    with pytest.raises(penalty.WrongResultError, match="mlp: relative error"), fisher.steady(model):
        pass


def test_peak_bytes_counts_what_is_held_at_once():
    def work():
        for _ in range(3):
            a = torch.zeros(1000)
            b = a + 1
            del a, b

    assert fisher.peak_bytes(work, CPU) == pytest.approx(8000, abs=256)


def test_interleave_prepares_and_keeps_rounds_together():
    calls = []
    contenders = {
        "a": timing.Contender(lambda: calls.append("a"), lambda: calls.append("prepare")),
        "b": timing.Contender(lambda: calls.append("b"), lambda: None),
    }
    times = timing.interleave(contenders, rounds=5, seconds=60, device=CPU)
    assert [len(measured) for measured in times.values()] == [5, 5]
    assert calls.count("a") == calls.count("prepare") == 6  # once to warm up
    assert timing.interleave(contenders, rounds=5, seconds=0, device=CPU)["a"][2:]
    assert len(timing.interleave(contenders, rounds=5, seconds=0, device=CPU)["a"]) == 3


def test_ratio_goes_round_by_round():
    found = timing.ratio([2.0, 40.0, 9.0], [1.0, 20.0, 3.0])
    assert (found.median, found.best) == (2.0, 2.0)
    assert found.q3 == 2.5
