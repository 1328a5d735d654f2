"""The measurements, tiny: they run, check what they time, and write a whole record."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

from benchmarks import contenders, figures, fisher, peers, penalty, readme, scaling, timing
from benchmarks.__main__ import main
from benchmarks.plumbing import peer_libraries

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
    shapes = contenders.net_shapes(numel)
    total = sum(torch.Size(shape).numel() for shape in shapes)
    assert len(shapes) == 160
    assert abs(total / numel - 1) < 0.05


def test_wrong_results_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(contenders.wplfast.WeightPlasticityLoss, "add_grad_", lambda self: self())
    assert main(["penalty", "--quick"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "add_grad_" in err
    assert "nothing was timed" in err


def test_wrong_fisher_is_refused(monkeypatch):
    monkeypatch.setattr(fisher, "oracle", lambda model, batch: {k: p + 1 for k, p in model.named_parameters()})
    model = fisher.Model(fisher.WORKLOADS["mlp"], CPU, quick=True)
    with pytest.raises(contenders.WrongResultError, match="mlp: relative error"), fisher.steady(model):
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


def test_a_contender_sits_out_after_its_time():
    slow = timing.Contender(lambda: None, lambda: None, seconds=0.0)
    times = timing.interleave({"slow": slow, "b": timing.Contender(lambda: None)}, rounds=6, seconds=60, device=CPU)
    assert [len(times["slow"]), len(times["b"])] == [3, 6]


@pytest.mark.filterwarnings("ignore")  # of peers, and of vmap about operations without a batching rule
@pytest.mark.parametrize("workload", ["mlp", "cnn", "decoder", "tied", "rnn"])
@pytest.mark.parametrize("peer", ["torch.func", "loop", "BackPACK", "Opacus"])
def test_peers_compute_the_same_fisher(peer, workload):
    if peer in peers.PACKAGES:
        pytest.importorskip(peers.PACKAGES[peer][0])
        if peer == "BackPACK" and workload not in ("mlp", "cnn"):
            pytest.skip("BackPACK has no rules for it")
    model = fisher.Model(fisher.WORKLOADS[workload], CPU, quick=True)
    expected = fisher.oracle(model.ordinary, model.batch)
    errors = []
    for way in peer_libraries.ways(len(model.batch[1]), peers.has_attention(model))[peer]:
        try:
            run = way.over(model.ordinary, *model.batch)
            for _ in range(2):  # nothing is left over from a call before
                errors.append(peers.error_of(run(), expected, len(model.batch[1])))
        except RuntimeError:
            assert peer == "Opacus", "only its expanded weights refuse models"
    if peer == "Opacus" and workload in ("decoder", "tied"):
        assert min(errors) < fisher.TOLERANCE < max(errors), "positions [T] have no axis of samples"
    else:
        assert max(errors) < fisher.TOLERANCE


def test_peers_and_scaling_quick(tmp_path, capfd):
    pytest.importorskip("matplotlib")
    path, image = tmp_path / "record.json", tmp_path / "figure.png"
    assert main(["fisher", "--peers", "--quick", "--threads", "1", "--workloads", "mlp", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    (row,) = record["peers"][0]["records"]
    assert set(row["contenders"]) == {"wplfast", "BackPACK", "Opacus", "torch.func", "loop"}
    for name in ("wplfast", "torch.func", "loop"):
        result = row["contenders"][name]
        assert result["right"]
        assert result["relative_error"] < fisher.TOLERANCE
        assert result["rounds"] >= 3
        assert result["peak_bytes"] > 0
        assert result["ratio"]["median"] > 0
    assert record["fisher"][0]["records"]
    assert "one sample at a time" in capfd.readouterr().out
    assert "| one-sample loop |" in readme.peers(record)
    assert main(["scaling", "--quick", "--threads", "1", "--json", str(path), "--plot", str(image)]) == 0
    record = json.loads(path.read_text())
    *timed, held = record["scaling"][0]["records"]
    assert [series["name"] for series in timed] == ["N", "T", "D", "C"]
    peaks = [point["peak_bytes"]["fisher"] for point in held["points"]]
    assert max(peaks) < 1.05 * min(peaks), "memory does not grow with the number of samples"
    assert image.read_bytes().startswith(b"\x89PNG")
    assert "| C^" in readme.scaling(record)
    assert readme.peers(record) == ""


def test_peers_that_fail_are_shown(monkeypatch):
    def broken(model):
        raise NotImplementedError("no rule for this")

    late = peer_libraries.Way("late", broken)
    wrong = peer_libraries.Way("wrong", lambda model: lambda x, y: [torch.zeros_like(p) for p in model.parameters()])
    found = {"torch.func": [peer_libraries.Way("broken", broken)], "loop": [wrong, late]}
    found |= {"BackPACK": [wrong], "Opacus": [wrong]}
    monkeypatch.setattr(peers, "ways", lambda n, attention: found)
    monkeypatch.setattr(peers, "PACKAGES", {"BackPACK": ("no_such_package", "no-such-package")})
    records = peers.run(CPU, ["mlp"], True, 3, 0.0)
    (row,) = records
    assert row["contenders"]["torch.func"]["error"] == "NotImplementedError: no rule for this"
    assert row["contenders"]["loop"]["right"] is False
    assert row["contenders"]["loop"]["relative_error"] == pytest.approx(1)
    assert row["contenders"]["BackPACK"]["error"] == "not installed"
    shown = peers.table(records)
    assert "WRONG, wrong (1 not tried for lack of time)" in shown
    assert "no rule for this" in shown
    text = readme.peers(
        {"versions": dict.fromkeys(("backpack-for-pytorch", "opacus")), "peers": [{"threads": 1, "records": records}]}
    )
    assert "fails: no rule for this" in text
    assert "**wrong** by 1" in text
    pytest.importorskip("matplotlib")
    place = {"hardware": {"cpu": "a"}, "versions": {"torch": "b"}}
    assert figures.draw({**place, "peers": [{"threads": 1, "records": records}]}).startswith(b"\x89PNG")


def test_slope_is_the_exponent():
    assert scaling.slope([1, 2, 4, 8, 16], [9, 9, 4, 16, 64]) == pytest.approx(2)


def test_plot_is_refused_where_nothing_is_drawn(capsys):
    with pytest.raises(SystemExit):
        main(["penalty", "--quick", "--plot", "a.png"])
    assert "not penalty" in capsys.readouterr().err
