"""The measurements, tiny: they run, check what they time, and write a whole record."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

from benchmarks import (
    anchors,
    contenders,
    figures,
    fisher,
    peers,
    readme,
    scaling,
    sweep,
    timing,
)
from benchmarks.__main__ import main
from benchmarks.plumbing import exact, peer_libraries, penalty_report

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("usual_malloc")


def test_all_quick(tmp_path, capfd):
    path = tmp_path / "record.json"
    before = torch.get_num_threads()
    arguments = ("--quick", "--threads", "1", "--workloads", "mlp", "rnn", "--json", str(path))
    assert main(["all", *arguments]) == 0
    assert torch.get_num_threads() == before
    record = json.loads(path.read_text())
    assert record["hardware"]["cpu"]
    assert record["versions"]["torch"] == torch.__version__
    assert set(record) >= {"penalty", "sweep", "fisher", "anchors"}
    (penalties,), (fishers,) = record["penalty"], record["fisher"]
    assert penalties["threads"] == fishers["threads"] == 1
    large, small = penalties["records"]
    assert large["tensors"] == 160
    assert small["tensors"] == 8
    ours = large["results"]["add_grad_"]
    assert ours["bytes"] == 20 * large["parameters"]
    assert {"eager_over_it", "foreach_over_it", "cat_over_it", "share_of_triad", "share_of_triad_in_place"} <= set(ours)
    assert [r["workload"] for r in fishers["records"]] == ["mlp", "rnn"]
    for r in fishers["records"]:
        assert r["unit_flops"] > 0
        assert min(r["peak_bytes"].values()) > 0
        assert r["ratio"]["q1"] <= r["ratio"]["median"] <= r["ratio"]["q3"]
    out, err = capfd.readouterr()
    assert "pass / unit" in out
    assert not err
    shown = readme.speed(record, record)
    assert "| flat vector (`torch.cat`) |" in shown
    assert "| pass, 1 thread |" in shown
    assert "| 0.1 M in 160 tensors, 1 thread |" in shown


@pytest.mark.parametrize(("numel", "n_tensors"), [(100_000, 160), (10_000_000, 160), (10_000, 100), (31_623, 1000)])
def test_net_shapes_have_the_size_asked_for(numel, n_tensors):
    shapes = contenders.net_shapes(numel, n_tensors)
    total = sum(torch.Size(shape).numel() for shape in shapes)
    assert len(shapes) == n_tensors
    assert abs(total / numel - 1) < 0.05


class CountedBytes(TorchDispatchMode):
    """Counts what every operation reads and writes; views move nothing, and an expanded scalar is one element."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.detach.default:
            arguments = zip(args, func._schema.arguments, strict=False)
            written = [value for value, about in arguments if about.alias_info and about.alias_info.is_write]
            moved = tree_leaves((args, kwargs)) + (tree_leaves(written) if written else tree_leaves(out))
            self.total += sum(
                min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in moved if isinstance(t, torch.Tensor)
            )
        return out


@pytest.mark.parametrize("maker", ["plain", "flat"])
def test_bytes_are_as_counted(maker):
    case = contenders.Case.of("counted", [(300, 300), (90_000,)], CPU)
    for name, way in contenders.MAKERS[maker](case).items():
        with CountedBytes() as counted:
            way()
        assert counted.total == pytest.approx(contenders.BYTES[name] * case.numel, rel=1e-3), name


def test_wrong_results_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(contenders.wplfast.WeightPlasticityLoss, "add_grad_", lambda self: self())
    assert main(["penalty", "--quick"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "add_grad_" in err
    assert "nothing was timed" in err
    with pytest.raises(contenders.WrongResultError, match="1 anchors, add_grad_"):
        anchors.run(CPU, True, 3, 0.0)


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_wrong_contenders_of_a_sweep_are_refused(monkeypatch, factor):
    def wrong(case):
        def run():
            value = factor * contenders.formula(case.theta, case.theta_hat, case.fisher)
            value.backward()
            return value

        return {"cat": run}

    monkeypatch.setattr(contenders, "MAKERS", {**contenders.MAKERS, "flat": wrong})
    with pytest.raises(contenders.WrongResultError, match="1,000 parameters in 1 tensors, cat"):
        sweep.measure_case(1000, 1, CPU, 3, 0.0, compiled=False)


def test_gradients_outside_an_active_set_are_wrong():
    walk = anchors.Walk(10_000, CPU)
    penalty, expected = walk.penalty(), exact.Exact(walk.named)
    fisher_, theta_hat = walk.step()
    penalty.consolidate(fisher_, theta_hat=theta_hat)
    expected.add(fisher_, theta_hat)
    names = anchors.share_of(walk, 0.25)
    assert len(names) == 40
    expected.check("right", penalty.subset(names).add_grad_, names)
    with pytest.raises(contenders.WrongResultError, match="wrong: relative errors"):
        expected.check("wrong", penalty.add_grad_, names)


def test_a_sweep_says_what_it_left_out(monkeypatch):
    monkeypatch.setattr(
        contenders, "MAKERS", contenders.MAKERS | {"compiled": lambda case: {"compile": loop_over(case)}}
    )
    pairs = sweep.cases_of((1000, 10_000), (1, 10, 100, 1000))
    assert pairs == [(1000, 1), (1000, 10), (10_000, 1), (10_000, 10), (10_000, 100)]
    few = sweep.measure_case(5000, 10, CPU, 3, 0.0, compiled=True)
    many = sweep.measure_case(5000, 200, CPU, 3, 0.0, compiled=True, apart=0)
    assert few["interleaved"]
    assert not many["interleaved"]
    assert few["compile_seconds"] > 0
    assert set(few["results"]) - set(many["results"]) == {"compile"}
    assert "unrolls" in many["left_out"]["compile"]
    for record in (few, many):
        results = record["results"]
        assert record["rounds"] == 3
        for name, result in results.items():
            assert result["bytes"] == contenders.BYTES.get(name, 20) * record["parameters"]
            rate = result["bytes"] / result["milliseconds"]["median"] / 1e6
            assert result["gigabytes_per_second"] == pytest.approx(rate)
            assert result["share_of_triad"] == pytest.approx(rate / results["triad"]["gigabytes_per_second"])
    monkeypatch.setattr(sweep, "available", lambda device: 0.0)
    short = sweep.measure_case(5000, 10, CPU, 3, 0.0, compiled=False, apart=0)
    assert set(short["results"]) == {"triad"}
    assert "GB at" in short["left_out"]["cat"]
    between = sweep.measure_case(50_000, 20, CPU, 3, 0.0, compiled=True)
    assert "whole decades" in between["left_out"]["compile"]
    shown = sweep.table([few, many])
    assert "compile, 200 tensors: unrolls the loop over tensors: left out beyond 100" in shown
    assert "one after another" in shown


def loop_over(case):
    def run():
        value = contenders.formula(case.theta, case.theta_hat, case.fisher)
        value.backward()
        return value

    return run


def test_sweep_is_drawn_and_rendered(tmp_path):
    pytest.importorskip("matplotlib")
    path, image = tmp_path / "record.json", tmp_path / "figure.png"
    sizes = ("--sizes", "1e3", "2e3", "--tensors", "1", "10")
    assert main(["penalty", "--quick", *sizes, "--threads", "1", "2", "--json", str(path), "--plot", str(image)]) == 0
    record = json.loads(path.read_text())
    assert [run["threads"] for run in record["sweep"]] == [1, 2]
    assert [(r["parameters"] // 1000, r["tensors"]) for r in record["sweep"][0]["records"]] == [
        (1, 1),
        (1, 10),
        (2, 1),
        (1, 10),
    ]
    assert image.read_bytes().startswith(b"\x89PNG")
    shown = penalty_report.sweep(record)
    assert "| 1,000 | 1 |" in shown
    assert "| triad |" in shown
    assert penalty_report.sweep({key: part for key, part in record.items() if key != "sweep"}) == ""
    assert penalty_report.sweep(None) == penalty_report.anchors(None) == ""


@pytest.mark.parametrize("option", [False, True])
def test_anchors_are_recorded_and_rendered(monkeypatch, option):
    class Narrow(anchors.wplfast.WeightPlasticityLoss):
        """A penalty that rounds F."""

        def __init__(self, params, alpha=1.0, *, l2=0.0, fisher_dtype=torch.float32):
            super().__init__(params, alpha, l2=l2)
            self.fisher_dtype = fisher_dtype

        def consolidate(self, fisher, **options):
            super().consolidate({name: f.to(self.fisher_dtype).float() for name, f in fisher.items()}, **options)

    class Plain(anchors.wplfast.WeightPlasticityLoss):
        """A penalty without the option."""

        def __init__(self, params, alpha=1.0):
            super().__init__(params, alpha)

    monkeypatch.setattr(anchors.wplfast, "WeightPlasticityLoss", Narrow if option else Plain)
    found = anchors.run(CPU, True, 3, 0.0)
    assert [line["anchors"] for line in found["merged"]] == list(anchors.QUICK_COUNTS)
    for line in found["merged"]:
        assert set(line["results"]) == {"add_grad_", "autograd", "apart, loop", "apart, foreach"}
        assert all(max(r["relative_error"].values()) < contenders.TOLERANCE for r in line["results"].values())
    for line in found["active"]:
        assert line["elements"] == pytest.approx(line["share"], abs=0.03)
        assert line["tensors"] == pytest.approx(line["share"], abs=0.02)
    assert set(found["consolidate"]) == {"active_elements", "merge", "merge, active", "replace", "replace, active"}
    shown = penalty_report.anchors({"anchors": [{"threads": 1, "records": found}]})
    assert "| K | `wpl.add_grad_()` |" in shown
    assert "% of the parameters (`wpl.subset(names)`) takes" in shown
    assert "to merge a second anchor" in shown
    assert ("bfloat16" in shown) is option
    assert ("F in bfloat16: left out" in anchors.table(found)) is not option
    if option:
        error = found["fisher_dtype"]["add_grad_, bfloat16"]["relative_error"]["gradient"]
        assert contenders.TOLERANCE < error < anchors.NARROW


def test_malloc_keeps_freed_memory():
    code = "from benchmarks.plumbing import malloc; print(malloc.keep()); malloc.give_back()"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(platform.libc_ver()[0] == "glibc")


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
        main(["fisher", "--quick", "--plot", "a.png"])
    assert "not fisher" in capsys.readouterr().err
