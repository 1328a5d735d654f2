"""``wplfast show``, ``diff``, ``merge`` and ``check``, on files whose numbers are known."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import model, saved
from safetensors.torch import save_file

from wplfast import Fisher, cli, storage
from wplfast.cli import diff
from wplfast.cli.diff import spearman, top_overlap
from wplfast.fisher.files import stamps


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fisher(seed: int = 0, n: int = 4, **options: Any) -> Fisher:
    """A Fisher of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"body.0.weight": (30, 20), "body.0.bias": (30,), "body.1.weight": (7,), "head.weight": (3, 30)}
    return Fisher({name: torch.rand(shape, generator=generator) ** 4 for name, shape in shapes.items()}, n, **options)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Run a command; return what it printed: all of it on one of the two streams."""
    assert cli.main(arguments) == code
    told = capsys.readouterr()
    if code == 2:
        assert told.out == ""
        assert re.fullmatch(rf"wplfast {arguments[0]}: error: .+\n", told.err), told.err
        return told.err
    return told.out


# ---- show -----------------------------------------------------------------------------------------------------------


def test_show_prints_the_summary_and_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    found = fisher(metadata={"source": "a test", "data": "d.csv"}, theta_hat=dict(fisher()))
    found.save("F")
    told = run(capsys, "show", "F")
    assert told.endswith(f"{found.summary()}\n")
    assert re.match(r"source +a test\ndata +d\.csv\ntheta_hat +kept\n", told)
    assert str(found.summary(1)) in run(capsys, "show", "F", "--depth", "1")
    plain = json.loads(run(capsys, "show", "F", "--json", "--depth", "1"))
    assert plain == {
        "file": "F",
        "source": "a test",
        "data": "d.csv",
        "theta_hat": "kept",
        **found.summary(1).to_dict(),
    }
    assert "\x1b" not in told


def test_show_draws(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    fisher().save("F")
    run(capsys, "show", "F", "--plot", "F.svg")
    assert "<svg" in (here / "F.svg").read_text()


def test_show_shortens_names_in_a_terminal_alone(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{'module.' * 40}weight"
    Fisher({name: torch.ones(3)}, 1).save("F")
    assert name.removesuffix(".weight") in run(capsys, "show", "F")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert max(map(len, run(capsys, "show", "F").splitlines())) == 80


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch: Any) -> None:
    fisher().save("F")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert cli.main(["show", "F"]) == 0
        monkeypatch.undo()


@pytest.mark.parametrize("command", [["show", "F"], ["diff", "F", "F"], ["merge", "F", "G", "-o", "H"], ["check", "F"]])
def test_what_is_no_fisher(command: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fisher(1).save("G")
    code = 1 if command[0] == "check" else 2
    assert "No such file" in run(capsys, *command, code=2)
    for content, message in [(b"", "not a whole safetensors file"), (b"F" * 100, "not a whole safetensors file")]:
        (here / "F").write_bytes(content)
        assert message in run(capsys, *command, code=code)
    save_file({"w": torch.ones(2)}, here / "F")
    assert "must be a wplfast fisher file of version 1, got kind None" in run(capsys, *command, code=code)
    (here / "F").unlink()
    (here / "F").mkdir()
    assert "directory" in run(capsys, *command, code=2)
    assert not (here / "H").exists()


def damaged(path: Path, kind: str) -> str:
    """Write a file that no Fisher writes; return what is said of it."""
    if kind == "a flipped byte":
        fisher(2).save(path)
        content = bytearray(path.read_bytes())
        content[-3] ^= 0x40
        path.write_bytes(content)
        return "is damaged, or something else changed it"
    part, entry = ("mean_grad", "nan") if kind == "a mean gradient" else ("fisher", kind)
    found = fisher(2, mean_grad=dict(fisher(3)))
    (dict(found) if part == "fisher" else found.mean_grad)["head.weight"].view(-1)[5] = float(entry)
    tensors = {f"fisher.{name}": tensor for name, tensor in found.items()}
    tensors |= {f"mean_grad.{name}": tensor for name, tensor in found.mean_grad.items()}
    storage.save(path, tensors, "fisher", stamps(list(found), 1, 1.0))  # with a checksum that is right
    return rf"{path.name}: {part}\['head.weight'\] must be finite"


@pytest.mark.parametrize("kind", ["a flipped byte", "nan", "inf", "-1", "a mean gradient"])
@pytest.mark.parametrize(
    "command",
    ["show F", "show F --json", "show F --plot F.png", "diff F G", "diff G F", "diff G F --json", "merge G F -o H"],
)
def test_a_damaged_file_is_an_error_and_not_a_table(
    command: str, kind: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fisher(1).save("G")
    said = damaged(here / "F", kind)
    assert re.search(said, run(capsys, *command.split(), code=2))
    assert not (here / "H").exists()
    assert not (here / "F.png").exists()


# ---- diff -----------------------------------------------------------------------------------------------------------


def test_rank_correlation_is_that_of_scipy() -> None:
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(0)
    for levels in (2, 5, 10_000):  # many ties, few
        a, b = (torch.randint(levels, (500,), generator=generator).double() for _ in range(2))
        b = b + a / 2
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert torch.isnan(torch.tensor(spearman(torch.ones(3), torch.rand(3))))


def test_overlap_of_the_largest() -> None:
    values = torch.arange(300.0)
    other = values.clone()
    other[299], other[0] = 0.0, 500.0
    assert top_overlap(values, values) == 1
    assert top_overlap(values, other) == pytest.approx(2 / 3)
    assert top_overlap(values, -values + 300) == 0
    sparse = torch.zeros(1000)
    sparse[:2] = 1  # fewer than 1 % are not 0: zeros are none of the largest
    assert top_overlap(sparse, sparse.roll(1)) == 0.5


def test_diff_compares_modules(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = fisher(0), fisher(1)
    a.save("A")
    Fisher({**a, "head.weight": b["head.weight"]}, 9).save("B")
    found = json.loads(run(capsys, "diff", "A", "B", "--json"))
    rows = {row["module"]: row for row in found["modules"]}
    assert list(rows) == ["body.0", "body.1", "head"]
    assert rows["body.0"]["elements"] == 630
    for key in ("cosine", "rank_correlation", "top_overlap"):
        assert rows["body.0"][key] == pytest.approx(1)
    x, y = a["head.weight"].flatten().double(), b["head.weight"].flatten().double()
    assert rows["head"]["cosine"] == pytest.approx(float(x @ y / x.norm() / y.norm()))
    assert rows["head"]["rank_correlation"] == pytest.approx(spearman(x, y))
    whole = Fisher({**a, "head.weight": b["head.weight"]}, 9).flat.double()
    assert found["total"]["cosine"] == pytest.approx(float(torch.cosine_similarity(a.flat.double(), whole, 0)))
    assert found["left_out"] == {}
    lines = run(capsys, "diff", "A", "B", "--depth", "1").splitlines()
    assert [line.split()[0] for line in lines] == ["module", "body", "head", "total"]
    assert lines[1].split()[1:] == ["637", "1.0000", "1.0000", "100.0", "%"]


def test_diff_of_more_than_can_be_ranked(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(diff, "RANKED", 300)
    fisher(0).save("A")
    fisher(1).save("B")
    found = json.loads(run(capsys, "diff", "A", "B", "--json"))
    assert [row["sampled"] for row in found["modules"]] == [True, False, False]
    a, b = fisher(0).flat[:630].double(), fisher(1).flat[:630].double()
    assert found["modules"][0]["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, 0)))  # of all
    assert abs(found["modules"][0]["rank_correlation"] - spearman(a, b)) < 0.15
    assert re.search(r"body\.0 +630 +0\.\d+ +~", run(capsys, "diff", "A", "B"))


def test_what_is_ranked_of_a_large_matrix_has_all_columns(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """F differs most between columns: every 16th entry of rows of 64 would be of four of them."""
    monkeypatch.setattr(diff, "RANKED", 256)
    columns = torch.rand(2, 64)
    fishers = [(column + 0.01 * torch.rand(64, 64)).contiguous() for column in columns]
    for path, matrix in zip("AB", fishers, strict=True):
        Fisher({"body.weight": matrix}, 9).save(path)
    found = json.loads(run(capsys, "diff", "A", "B", "--json"))["modules"][0]
    assert found["sampled"]
    assert abs(found["rank_correlation"] - spearman(*(f.flatten().double() for f in fishers))) < 0.05


def test_diff_says_what_cannot_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    fisher().save("A")
    other = dict(fisher(1)) | {"head.weight": torch.ones(5, 30), "new.weight": torch.ones(2)}
    Fisher({name: tensor for name, tensor in other.items() if "bias" not in name}, 1).save("B")
    left_out = json.loads(run(capsys, "diff", "A", "B", "--json"))["left_out"]
    assert left_out == {
        "body.0.bias": "only in A", "head.weight": "shapes [3, 30] and [5, 30]", "new.weight": "only in B",
    }  # fmt: skip
    assert cli.main(["diff", "A", "B"]) == 0
    assert "wplfast diff: left out body.0.bias: only in A\n" in capsys.readouterr().err
    Fisher({"x": torch.ones(2)}, 1).save("C")
    assert "no parameters in common" in run(capsys, "diff", "A", "C", code=2)


# ---- merge ----------------------------------------------------------------------------------------------------------


def test_merge_is_the_mean_by_sample_counts(capsys: pytest.CaptureFixture[str]) -> None:
    anchors = {name: tensor + 1 for name, tensor in fisher(9).items()}
    parts = [
        fisher(i, n, total_weight=w, mean_grad=dict(fisher(i + 5)), metadata={"source": "s"}, theta_hat=hat)
        for i, n, w, hat in [(0, 4, 2.5, anchors), (1, 1, 1.0, None), (2, 6, 6.0, anchors)]
    ]
    for i, part in enumerate(parts):
        part.save(f"F{i}")
    assert "11 samples of 3 files" in run(capsys, "merge", "F0", "F1", "F2", "-o", "F")
    merged, expected = Fisher.load("F"), parts[0] + parts[1] + parts[2]
    assert list(merged) == list(expected)
    assert (merged.n_samples, merged.total_weight, merged.metadata["source"]) == (11, 9.5, "s")
    for name in expected:
        assert torch.allclose(merged[name], expected[name], rtol=1e-6)
        assert torch.allclose(merged.mean_grad[name], expected.mean_grad[name], rtol=1e-6)
        assert torch.equal(merged.theta_hat[name], anchors[name])


def test_merge_keeps_the_widest_type(capsys: pytest.CaptureFixture[str]) -> None:
    fisher(0).to(torch.bfloat16).save("A")
    fisher(1).to(torch.float64).save("B")
    run(capsys, "merge", "A", "B", "-o", "C")
    merged = Fisher.load("C")
    assert merged["head.weight"].dtype == torch.float64
    assert torch.equal(
        merged["head.weight"], (fisher(0)["head.weight"].bfloat16().double() + fisher(1)["head.weight"]) / 2
    )


def test_merge_may_replace_one_of_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    fisher(0).save("A")
    fisher(1).save("B")
    expected = fisher(0) + fisher(1)
    run(capsys, "merge", "A", "B", "-o", "A")
    assert torch.allclose(Fisher.load("A").flat, expected.flat)
    assert "holds samples that are in A already" in run(capsys, "merge", "A", "B", "-o", "A", code=2)


def test_the_same_samples_are_not_counted_twice(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fisher(0).save("A")
    (here / "link").symlink_to("A")
    (here / "copy").write_bytes((here / "A").read_bytes())
    fisher(0, metadata={"provenance": "d.csv, seed 0"}).save("P")
    fisher(1, metadata={"provenance": "d.csv, seed 0"}).save("Q")
    fisher(2).save("B")
    for pair in [("A", "A"), ("A", "link"), ("A", "copy"), ("P", "Q")]:
        assert f"{pair[1]} holds samples that are in {pair[0]} already" in run(
            capsys, "merge", *pair, "-o", "C", code=2
        )
    run(capsys, "merge", "B", "P", "-o", "C")
    assert "Q holds samples that are in C already" in run(capsys, "merge", "C", "Q", "-o", "D", code=2)
    assert not (here / "D").exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Fisher({"w": torch.ones(2)}, 1), "B lacks 4 of 4 names"),
        (
            Fisher({**fisher(), "head.weight": torch.ones(2, 2)}, 1),
            "'head.weight' has the shape [3, 30] in A, [2, 2] in B",
        ),
        (fisher(1, theta_hat=dict(fisher(8))), "theta_hat of 'body.0.weight' in B is not that in A"),
        (fisher(1, metadata={"fisher_type": "mc"}), "fisher_type is empirical in A, mc in B"),
    ],
)
def test_what_does_not_add_up(other: Fisher, message: str, capsys: pytest.CaptureFixture[str], here: Path) -> None:
    fisher(0, theta_hat=dict(fisher(7)), metadata={"fisher_type": "empirical"}).save("A")
    other.save("B")
    assert message in run(capsys, "merge", "A", "B", "-o", "C", code=2)
    assert not (here / "C").exists()
    assert "two files or more" in run(capsys, "merge", "A", "-o", "C", code=2)


def test_a_damaged_file_is_not_merged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fisher(0).save("A")
    fisher(1).save("B")
    content = bytearray((here / "B").read_bytes())
    content[-5] ^= 4
    (here / "B").write_bytes(content)
    assert "B is damaged" in run(capsys, "merge", "A", "B", "-o", "C", code=2)


# ---- check ----------------------------------------------------------------------------------------------------------


def test_check_of_a_whole_file(capsys: pytest.CaptureFixture[str]) -> None:
    fisher(mean_grad=dict(fisher(1)), theta_hat={name: -tensor for name, tensor in fisher().items()}).save("F")
    assert run(capsys, "check", "F") == "F: ok (4 parameters, 4 samples)\n"
    assert json.loads(run(capsys, "check", "F", "--json")) == {"file": "F", "ok": True, "problems": []}


def write(tensors: dict[str, torch.Tensor], names: list[str]) -> None:
    """Write a file that no Fisher would: its checksum is right."""
    storage.save("F", tensors, "fisher", {"names": json.dumps(names), "n_samples": "1", "total_weight": "1.0"})


@pytest.mark.parametrize(
    ("tensors", "problems"),
    [
        ({"fisher.w": torch.tensor([1.0, float("nan")])}, ["fisher of 'w' has 1 entries that are NaN"]),
        ({"fisher.w": torch.tensor([float("inf"), 1.0])}, ["fisher of 'w' has 1 entries that are infinite"]),
        ({"fisher.w": torch.tensor([-2.0, -1.0])}, ["fisher of 'w' has 2 negative entries, -2 is the least"]),
        ({"fisher.w": torch.tensor([1])}, ["fisher of 'w' must be of a floating point type, got torch.int64"]),
        (
            {"fisher.w": torch.ones(1), "theta_hat.v": torch.tensor([float("nan")])},
            ["theta_hat of 'v' has 1 entries that are NaN", "theta_hat holds other names than the Fisher: ['v', 'w']"],
        ),
        ({"w": torch.ones(1)}, ["F: tensors must be named fisher.NAME or mean_grad.NAME or theta_hat.NAME, got 'w'"]),
    ],
)
def test_check_finds_what_no_fisher_is(tensors: Any, problems: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    write(tensors, ["w"])
    assert json.loads(run(capsys, "check", "F", "--json", code=1))["problems"] == problems
    lines = run(capsys, "check", "F", code=1).splitlines()
    assert lines[:-1] == [f"WRONG {problem}" for problem in problems]
    assert lines[-1].startswith(f"F: {len(problems)} problem")


def test_check_finds_a_flipped_bit_and_a_cut_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fisher().save("F")
    content = bytearray((here / "F").read_bytes())
    content[-8] ^= 1
    (here / "F").write_bytes(content)
    assert "WRONG F is damaged, or something else changed it" in run(capsys, "check", "F", code=1)
    (here / "F").write_bytes(content[:-100])
    assert "WRONG F is not a whole safetensors file" in run(capsys, "check", "F", code=1)


def test_check_against_models(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    folder = saved("gpt2", here)
    Fisher({name: torch.ones_like(p) for name, p in model("gpt2").named_parameters()}, 1).save("F")
    run(capsys, "check", "F", "--model", folder)
    Fisher({"transformer.wte.weight": torch.ones(3, 8), "lm.weight": torch.ones(2)}, 1).save("F")
    told = run(capsys, "check", "F", "--model", folder, code=1)
    assert "WRONG 1 of 2 names are no parameters of the model: ['lm.weight']" in told
    assert "WRONG 'transformer.wte.weight' has the shape [3, 8], in the model [36, 8]" in told
    (here / "ours.py").write_text("import torch\ndef f(): return torch.nn.Linear(3, 2), None\ndef g(): return 3\n")
    monkeypatch.setattr(sys, "path", [str(here), *sys.path])
    Fisher({"weight": torch.ones(2, 3)}, 1).save("F")
    run(capsys, "check", "F", "--model", "ours:f")
    assert "must return a model" in run(capsys, "check", "F", "--model", "ours:g", code=2)
    assert "absent: there is no such folder" in run(capsys, "check", "F", "--model", "absent", code=2)
    sys.modules.pop("ours")


@pytest.mark.parametrize("command", [m.__name__.rpartition(".")[2] for m in cli.COMMANDS])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert re.search(rf"examples?:\s+wplfast {command}", capsys.readouterr().out)
