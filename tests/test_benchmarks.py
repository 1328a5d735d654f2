"""The measurements, tiny: they run, check what they time, and write a whole record."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

from ranks import NEEDS_GLOO

from benchmarks import (
    anchors,
    distributed,
    distributed_report,
    fisher,
    peer_libraries,
    peers,
    penalty,
    report,
    rule,
    scaling,
    timing,
    ways,
)
from benchmarks.__main__ import main
from benchmarks.integrations import TURN, way_of
from benchmarks.plumbing.markdown import aligned
from benchmarks.timing import Budget
from benchmarks.workloads import KNOWN, WORKLOADS
from wplfast.capture import rules as capture_rules

CPU = torch.device("cpu")
QUICK = Budget(CPU, 3, 0.0, quick=True)

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
    large, small, few, many = penalties["records"]
    assert large["tensors"] == 160
    assert [r["tensors"] for r in (small, few, many)] == [8, 4, 28]
    assert "eager_over_it" in few["results"]["functional"]
    ours = large["results"]["add_grad_"]
    assert ours["bytes"] == 20 * large["parameters"]
    assert {"eager_over_it", "foreach_over_it", "cat_over_it", "share_of_triad", "share_of_triad_in_place"} <= set(ours)
    assert [r["workload"] for r in fishers["records"]] == ["mlp", "rnn"]
    for r in fishers["records"]:
        assert r["unit_flops"] > 0
        assert min(r["peak_bytes"].values()) > 0
        assert r["ratio"]["q1"] <= r["ratio"]["median"] <= r["ratio"]["q3"]
    out, err = capfd.readouterr()
    assert "pass, 1 thread" in out
    assert "linear 6" in out
    assert not err
    shown = "\n".join([*report.penalty(record["penalty"]), *report.fisher(record["fisher"])])
    assert "| flat vector (`torch.cat`) |" in shown
    assert "| pass, 1 thread |" in shown
    assert "| 0.1 M in 160 tensors, 1 thread |" in shown
    assert "4 tensors of 64" not in shown


@pytest.mark.parametrize(("numel", "n_tensors"), [(100_000, 160), (10_000_000, 160), (10_000, 100), (31_623, 1000)])
def test_net_shapes_have_the_size_asked_for(numel, n_tensors):
    shapes = ways.net_shapes(numel, n_tensors)
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
    case = ways.Case("counted", [(300, 300), (90_000,)], CPU)
    for name, way in ways.MAKERS[maker](case).items():
        with CountedBytes() as counted:
            way()
        assert counted.total == pytest.approx(ways.BYTES[name] * case.numel, rel=1e-3), name


def test_wrong_results_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(ways.wplfast.WeightPlasticityLoss, "add_grad_", lambda self: self())
    assert main(["penalty", "--quick"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "add_grad_" in err
    assert "nothing was timed" in err
    with pytest.raises(ways.WrongResultError, match="add_grad_: relative errors"):
        anchors.run(QUICK)


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_wrong_contenders_of_a_sweep_are_refused(monkeypatch, factor):
    def wrong(case):
        return {"cat": ways.backward_of(lambda: factor * ways.formula(case.theta, case.theta_hat, case.fisher))}

    monkeypatch.setattr(penalty, "MAKERS", {**ways.MAKERS, "flat": wrong})
    with pytest.raises(ways.WrongResultError, match="1,000 parameters in 1 tensors, cat"):
        penalty.sweep(QUICK, (1000,), (1,))


def test_penalties_are_what_the_formula_says_by_hand():
    theta = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)]
    for p in theta:
        p.grad = torch.zeros_like(p)
    pairs = [[(torch.zeros(2), torch.tensor([1.0, 0.5])), (torch.ones(2), torch.ones(2))], []]

    def run():
        theta[0].grad += ways.ALPHA * torch.tensor([1.0, 2.0])  # F d: 1 + 0 and 1 + 1
        return torch.tensor(ways.ALPHA / 2 * 4.0)  # F d^2: 1 + 2 and 0 + 1

    assert ways.errors_of(theta, pairs, run) == {"gradient": 0.0, "value": 0.0}
    assert ways.errors_of(theta, [pairs[0][:1], []], run)["value"] == pytest.approx(1 / 3)
    assert ways.errors_of(theta, [[], pairs[0][:0]], lambda: None) == {"gradient": 0.0}


def test_gradients_outside_an_active_set_are_wrong():
    walk = anchors.Walk(10_000, CPU)
    wpl = walk.penalty()
    fisher_, theta_hat = walk.step()
    wpl.consolidate(fisher_, theta_hat=theta_hat)
    names = anchors.share_of(walk, 0.25)
    assert len(names) == 40
    active = [pairs if name in names else [] for name, pairs in zip(walk.named, walk.anchors, strict=True)]
    ways.check("right", walk.theta, active, wpl.subset(names).add_grad_)
    with pytest.raises(ways.WrongResultError, match="wrong: relative errors"):
        ways.check("wrong", walk.theta, active, wpl.add_grad_)


def test_a_sweep_leaves_out_what_it_cannot_measure(monkeypatch, capsys):
    def loop(case):
        return {"compile": ways.backward_of(lambda: ways.formula(case.theta, case.theta_hat, case.fisher))}

    monkeypatch.setattr(penalty, "MAKERS", ways.MAKERS | {"compiled": loop})
    pairs = penalty.pairs_of((1000, 10_000), (1, 10, 100, 1000))
    assert pairs == [(1000, 1), (1000, 10), (10_000, 1), (10_000, 10), (10_000, 100)]
    few, many = penalty.sweep(QUICK, (5000,), (10, 200), compiled=True)
    assert few["compile_seconds"] > 0
    assert set(few["results"]) - set(many["results"]) == {"compile"}
    for record in (few, many):
        results = record["results"]
        assert record["rounds"] == 3
        for name, result in results.items():
            assert result["bytes"] == ways.FP32.bytes(name) * record["parameters"]
            rate = result["bytes"] / result["milliseconds"]["median"] / 1e6
            assert result["gigabytes_per_second"] == pytest.approx(rate)
        assert results["add_grad_"]["share_of_triad"]["median"] > 0
    monkeypatch.setattr(penalty, "available", lambda device: 0.0)
    assert penalty.sweep(QUICK, (5000,), (10,)) == []
    assert "left out for lack of memory: 5,000 parameters" in capsys.readouterr().err


def test_sweep_is_drawn_and_rendered(tmp_path):
    pytest.importorskip("matplotlib")
    path, image = tmp_path / "record.json", tmp_path / "figure.png"
    assert main(["penalty", "--quick", "--threads", "1", "2", "--json", str(path), "--plot", str(image)]) == 0
    record = json.loads(path.read_text())
    assert [run["threads"] for run in record["sweep"]] == [1, 2]
    assert [(r["parameters"] // 1000, r["tensors"]) for r in record["sweep"][0]["records"]] == [
        (1, 1),
        (1, 10),
        (10, 1),
        (10, 10),
    ]
    assert image.read_bytes().startswith(b"\x89PNG")
    shown = report.sweep(record["sweep"])
    assert any(line.startswith("| 1,000 | 1 |") for line in shown)
    assert shown[0].endswith("| triad |")
    assert len(report.sweep(record["sweep"], details=True)) == 2 + 4


def test_anchors_are_recorded_and_rendered(monkeypatch):
    found = anchors.run(QUICK)
    assert [line["anchors"] for line in found["merged"]] == list(anchors.QUICK_COUNTS)
    for line in found["merged"]:
        assert set(line["results"]) == {"add_grad_", "autograd", "apart, loop", "apart, foreach"}
        assert all(max(r["relative_error"].values()) < 1e-5 for r in line["results"].values())
    for line in found["active"]:
        assert line["elements"] == pytest.approx(line["share"], abs=0.03)
        assert line["tensors"] == pytest.approx(line["share"], abs=0.02)
    assert set(found["consolidate"]) == {"active_elements", "merge", "merge, active", "replace", "replace, active"}
    error = found["fisher_dtype"]["add_grad_, bfloat16"]["relative_error"]["gradient"]
    assert ways.TOLERANCE["gradient"] < error < anchors.NARROW["gradient"]
    shown = "\n".join(report.anchors([{"threads": 1, "records": found}]))
    for words in (
        "| K | `wpl.add_grad_()` |",
        "| `wpl.subset`, 100 % |",
        "| F in bfloat16 |",
        "| merge |",
        "| replace |",
    ):
        assert words in shown


def test_malloc_keeps_freed_memory():
    code = "from benchmarks.plumbing import malloc; print(malloc.keep()); malloc.give_back()"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(platform.libc_ver()[0] == "glibc")


def test_wrong_fisher_is_refused(monkeypatch):
    monkeypatch.setattr(fisher.Subject, "oracle", lambda self: {k: p + 1 for k, p in self.ordinary.named_parameters()})
    subject = fisher.subject_of(WORKLOADS["mlp"], CPU, quick=True)
    with pytest.raises(ways.WrongResultError, match="mlp: relative error"), fisher.steady(subject):
        pass


def test_peak_bytes_counts_what_is_held_at_once():
    def work():
        for _ in range(3):
            a = torch.zeros(1000)
            b = a + 1
            del a, b

    assert fisher.peak_bytes(work, CPU) == pytest.approx(8000, abs=256)


def test_rounds_prepare_and_keep_contenders_together():
    calls = []
    contenders = {
        "a": timing.Contender(lambda: calls.append("a"), lambda: calls.append("prepare")),
        "b": timing.Contender(lambda: calls.append("b"), lambda: None),
    }
    times = Budget(CPU, 5, 60).time(contenders)
    assert [len(measured) for measured in times.values()] == [5, 5]
    assert calls.count("a") == calls.count("prepare") == 6  # once to warm up
    assert len(Budget(CPU, 5, 0).time(contenders)["a"]) == 3


def test_ratio_goes_round_by_round():
    found = timing.ratio([2.0, 40.0, 9.0], [1.0, 20.0, 3.0, 7.0])
    assert (found["median"], found["best"]) == (2.0, 2.0)
    assert found["q3"] == 2.5


def test_a_contender_sits_out_after_its_time():
    slow = timing.Contender(lambda: None, lambda: None, seconds=0.0)
    times = Budget(CPU, 6, 60).time({"slow": slow, "b": timing.Contender(lambda: None)})
    assert [len(times["slow"]), len(times["b"])] == [3, 6]


@pytest.mark.filterwarnings("ignore")  # of peers, and of vmap about operations without a batching rule
@pytest.mark.parametrize("workload", ["mlp", "cnn", "decoder", "tied", "rnn"])
@pytest.mark.parametrize("peer", ["torch.func", "loop", "BackPACK", "Opacus"])
def test_peers_compute_the_same_fisher(peer, workload):
    if peer in peers.PACKAGES:
        pytest.importorskip(peers.PACKAGES[peer][0])
        if peer == "BackPACK" and workload not in ("mlp", "cnn"):
            pytest.skip("BackPACK has no rules for it")
    model = fisher.subject_of(WORKLOADS[workload], CPU, quick=True)
    expected = model.oracle()
    errors = []
    for way in peer_libraries.ways(len(model.batch[1]), model.ordinary)[peer]:
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


def test_distributed_quick(tmp_path):
    """One rank does what each of two does."""
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        record = distributed.measure(KNOWN["mlp"], QUICK)
    finally:
        torch.distributed.destroy_process_group()
    assert record["relative_error"] < 1e-4
    assert record["pairs"] == record["whole"]["pairs"] == QUICK.rounds
    fisher = 4 * record["parameters"]
    assert record["bytes_of_a_step"] == fisher
    assert record["collectives_of_a_call"]["all-reduce"] == {"calls": 1, "bytes": fisher}
    assert record["collectives_of_a_call"]["agreement"]["bytes"] < 10_000  # what ranks tell each other
    shown = "\n".join(distributed_report.ddp([{"threads": 1, "records": {"ddp": [record]}}], details=True))
    assert "| Fisher / step under DistributedDataParallel | pass, 1 thread | whole call, 1 thread |" in shown
    assert "784-1024-1024-10, N=256, 1 ranks" in shown


@NEEDS_GLOO
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process loads what ranks saved
def test_distributed_command(tmp_path, capsys):
    """Real ranks: what they send, keep and end up with, in one record."""
    path = tmp_path / "record.json"
    options = ("--quick", "--rounds", "3", "--threads", "1", "--workloads", "mlp", "--json", str(path))
    assert main(["distributed", *options]) == 0
    (run,) = json.loads(path.read_text())["distributed"]
    found = run["records"]
    assert set(found) == set(distributed.CASES)
    assert [record["pairs"] for record in (found["ddp"][0], found["fsdp2"])] == [3, 3]
    assert found["fsdp2"]["relative_error"] < fisher.TOLERANCE
    sent = found["fsdp2"]["collectives"]
    a_pass, agreement = dict(sent["batch of a pass"]), {"calls": 3, "bytes": 3 * 512}
    assert a_pass.pop("agreement") == agreement
    assert a_pass == sent["step"]
    assert sent["step"]["reduce-scatter"]["bytes"] >= found["fsdp2"]["bytes_of_parameters"]
    assert sent["consolidate"].keys() == {"agreement"}
    assert sent["wpl()"] == sent["add_grad_()"] == {"all-reduce": {"calls": 1, "bytes": 4}}
    if sys.platform == "linux":
        assert found["fsdp2"]["memory"]["bytes"]["pass"] > 0
    off = found["end-to-end"]["one_process"]
    assert max(off[name] for name in ("fisher_off", "loaded_off", "own_off")) < 1e-5
    assert off["penalty"] == pytest.approx(found["end-to-end"]["ranks"]["penalty"], rel=1e-4)
    shown = capsys.readouterr().out
    for words in (
        "Fisher / step under DistributedDataParallel",
        "Fisher / step under FSDP2",
        "batch of a pass",
        "F of a",
    ):
        assert words in shown
    with pytest.raises(SystemExit):
        main(["distributed", "zero"])
    assert "expected one of ddp, fsdp2, end-to-end" in capsys.readouterr().err


def test_memory_beside_the_contract_is_rendered():
    sizes = {"step": 120 << 20, "pass": 178 << 20, "shards of F": 58 << 20}
    record = {"shown": "decoder", "ranks": 2, "memory": {"shown": "wide", "ranks": 2, "bytes": sizes}}
    lines = distributed_report.resident([{"threads": 1, "records": {"fsdp2": record}}])
    assert lines[-2:] == ["| pass - step | 58.0 |", "| pass - step, over shards of F | 1.00 |"]
    record["memory"] = None
    assert "Linux" in distributed_report.resident([{"threads": 1, "records": {"fsdp2": record}}])[0]


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
    assert "| one-sample loop |" in report.peers(record["peers"])[0]
    assert main(["scaling", "--quick", "--threads", "1", "--json", str(path), "--plot", str(image)]) == 0
    record = json.loads(path.read_text())
    *timed, held = record["scaling"][0]["records"]
    assert [series["name"] for series in timed] == ["N", "T", "D", "C"]
    peaks = [point["peak_bytes"]["fisher"] for point in held["points"]]
    assert max(peaks) < 1.05 * min(peaks), "memory does not grow with the number of samples"
    assert image.read_bytes().startswith(b"\x89PNG")
    assert any("| C^" in line for line in report.scaling(record["scaling"]))


def test_peers_that_fail_are_shown(monkeypatch):
    def broken(model):
        raise NotImplementedError("no rule for this")

    late = peer_libraries.Way("late", broken)
    wrong = peer_libraries.Way("wrong", lambda model: lambda x, y: [torch.zeros_like(p) for p in model.parameters()])
    found = {"torch.func": [peer_libraries.Way("broken", broken)], "loop": [wrong, late]}
    found |= {"BackPACK": [wrong], "Opacus": [wrong]}
    monkeypatch.setattr(peers, "ways", lambda n, model: found)
    monkeypatch.setattr(peers, "PACKAGES", {"BackPACK": ("no_such_package", "no-such-package")})
    records = peers.run(QUICK, ["mlp"])
    (row,) = records
    assert row["contenders"]["torch.func"]["error"] == "NotImplementedError: no rule for this"
    assert row["contenders"]["loop"]["right"] is False
    assert row["contenders"]["loop"]["relative_error"] == pytest.approx(1)
    assert row["contenders"]["BackPACK"]["error"] == "not installed"
    tried = {way["setting"]: way for way in row["contenders"]["loop"]["tried"]}
    assert tried["late"]["error"] == peers.NOT_TRIED
    text = "\n".join(report.peers([{"threads": 1, "records": records}]))
    assert "fails: no rule for this" in text
    assert "**wrong** by 1" in text


def test_slope_is_the_exponent():
    assert scaling.slope([1, 2, 4, 8, 16], [9, 9, 4, 16, 64]) == pytest.approx(2)


def test_plot_is_refused_where_nothing_is_drawn(capsys):
    with pytest.raises(SystemExit):
        main(["fisher", "--quick", "--plot", "a.png"])
    assert "not fisher" in capsys.readouterr().err


def test_whole_calls_of_one_batch():
    (record,) = fisher.run(QUICK, ["mlp"], batches=1)
    assert (record["whole"]["batches"], record["whole"]["of"], record["whole"]["capped"]) == (1, 1, False)


def scaled():
    """A case of one's own: a scale."""
    return torch.nn.LayerNorm(6), (torch.randn(5, 3, 6), torch.zeros(5)), lambda y, _: y.square().sum((1, 2))


def test_a_rule_is_measured_on_and_off(tmp_path, capsys):
    path, before = tmp_path / "record.json", list(capture_rules.RULES)
    options = ("--quick", "--threads", "1", "--json", str(path))
    sys.modules["case_of_a_test"] = sys.modules[__name__]
    assert main(["rule", "case_of_a_test:scaled", *options]) == 0
    assert before == capture_rules.RULES
    record = json.loads(path.read_text())["rule"][0]["records"]
    assert record["on"]["rules"] == {"weight": ["norm"], "bias": ["norm"]}
    assert record["off"]["rules"] == {"weight": ["generic"], "bias": ["generic"]}
    for found in (record["on"], record["off"]):
        assert found["relative_error"] < fisher.TOLERANCE
        assert found["ratio"]["q1"] <= found["ratio"]["median"] <= found["ratio"]["q3"]
    out, _ = capsys.readouterr()
    assert "weight: norm, bias: norm" in out
    for arguments, words in ((["no_such_case"], "expected MODULE:CASE or one of linear,"), ([], "rule needs one")):
        with pytest.raises(SystemExit):
            main(["rule", *arguments])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in rule.CASES if name not in ("linear", "conv")])
def test_cases_of_rules_are_right(name, one_thread):
    model, batch, loss_fn = rule.CASES[name]()
    subject = fisher.Subject(model, [tuple(part[:3] for part in batch)], loss_fn, name)
    with fisher.steady(subject):
        served = {rule_ for rules in subject.report.rules.values() for rule_ in rules}
    others = {
        "small": "linear",
        "scores": "bilinear",
        "bags": "embedding bag",
        "experts": "batched matmul",
        "fft": "scale",
        "standardised": "conv",
        "complex": "linear",
        "cosine": "linear",
        "weight norm": "linear",
    }
    assert served == ({"linear", "matmul"} if name == "routed" else {others.get(name, name)})


def test_tables_are_aligned_on_the_console():
    shown = aligned(["words", "| a | b |", "|---|---|", "| 1\\* | long |", "", "end"])
    assert shown == "words\na   b\n--  ----\n1*  long\n\nend"


def test_a_slow_rule_is_not_repeated():
    subject = fisher.Subject(*_as_subject(rule.CASES["small"]()))
    assert rule.measure(subject, Budget(CPU, 40, 0.0))["pairs"] == 1


def _as_subject(case):
    model, batch, loss_fn = case
    return model, [batch], loss_fn


def test_steps_with_and_without_the_callback_are_neighbours_and_follow_each_other_alike():
    ways = [way_of(step) for step in range(20 * len(TURN) + 1)]
    follows = Counter(pairwise(ways))
    assert follows["without", "callback"] == follows["callback", "without"]
    assert follows["without", "without"] == follows["callback", "callback"]
    assert follows["loop", "without"] == follows["loop", "callback"]
    alone = [way for way in ways if way != "loop"]
    assert all({a, b} == {"without", "callback"} for a, b in zip(alone[::2], alone[1::2], strict=False))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own
def test_integrations_are_measured(tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed (the extra 'test')")
    path = tmp_path / "record.json"
    assert main(["integrations", "--quick", "--rounds", "3", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["integrations"][0]["records"]
    step = found["steps"][0]
    assert step["rounds"] == 4, "two pairs of steps a turn"
    penalty = step["penalty"]
    assert penalty["bytes"] == 20 * step["parameters"]
    assert 0 < penalty["milliseconds"]["median"] < step["milliseconds"]["callback"]["median"]
    assert penalty["roof_milliseconds"]["median"] > 0
    assert set(step["milliseconds"]) == {"without", "callback", "loop"}
    assert step["loop_over_callback"]["median"] > 0
    # Of least times: at these sizes one look of the garbage collector takes longer than an evaluation.
    assert found["fisher"]["fisher_over_evaluation"]["best"] > 1
    assert found["fisher"]["later_batch_over_evaluation"]["best"] > 1
    assert "trainer_fisher" in capsys.readouterr().out
