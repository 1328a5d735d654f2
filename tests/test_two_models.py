"""The two-model experiment, tiny, and its reader of IDX files with files that are damaged."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not installed

from benchmarks.experiments import page
from benchmarks.experiments.data.digits import DataError, load_split, read_idx
from benchmarks.experiments.harness.training import batch_squared, batches
from benchmarks.experiments.two_models import __main__ as two_models
from benchmarks.experiments.two_models import report, training
from benchmarks.experiments.two_models.training import METHODS, TUNED, Run, Setup, Trained
from benchmarks.plumbing.record import write_bytes

TINY = ("--iterations", "20", "--seeds", "1", "--grid", "0.1", "100", "--workers", "0")


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mnist(tmp_path):
    """A folder with 200 random images of 5 x 4 pixels in MNIST's files, the labels gzipped."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (200, 5, 4)), rng.integers(0, 10, 200)
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(images))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels), mtime=0))
    return folder, images, labels


def test_smoke_run_writes_everything(tmp_path, capsys):
    assert two_models.main([*TINY, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "two_models.json").read_text())
    assert (tmp_path / "two_models.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two_models.json", "two_models.png"]
    assert [panel["level"] for panel in record["panels"]] == [None, 0.56, 0.435, 0.36]
    assert record["data"]["train"] + record["data"]["validation"] + record["data"]["test"] == 1797
    assert record["versions"]["torch"] == torch.__version__
    for panel in record["panels"]:
        assert panel["methods"].keys() == METHODS.keys()
        frozen = panel["methods"]["frozen"]
        assert abs(frozen["forgetting"]["mean"]) < 0.5  # rounding of another batch size may flip a digit
        assert panel["methods"]["none"]["cost_b"]["mean"] == 0
        for method in TUNED:
            rows = panel["grid"][method]
            best = max(rows, key=lambda row: row["score"])
            assert [row["strength"] for row in rows] == [0.1, 100.0]
            assert panel["methods"][method]["strength"] == best["strength"]
            assert [run["alpha"] for run in panel["methods"][method]["runs"]] == best["alphas"]
    table = capsys.readouterr().out
    assert all(table.count(name) >= 4 for name in METHODS.values())


def test_runs_repeat_and_methods_start_alike():
    setup = Setup(iterations_a=20, iterations_b=10, evaluate_every=5)
    trained = training.train_a((setup, None, 0))
    again = training.train_a((setup, None, 0))
    assert all(np.array_equal(trained.state[name], again.state[name]) for name in trained.state)
    runs = [training.train_b((setup, trained, "wpl", 10.0)) for _ in range(2)]
    runs.append(training.train_b((setup, trained, "none", None)))
    assert runs[0] == runs[1]
    assert runs[0].iterations == [0, 5, 10]
    assert {(run.accuracy_a[0], run.accuracy_b[0]) for run in runs} == {(trained.accuracy, runs[2].accuracy_b[0])}


def test_level_stops_training_of_a():
    setup = Setup(iterations_a=500)
    trained = training.train_a((setup, 0.43, 0))
    assert trained.iterations < 500
    assert abs(trained.accuracy - 0.43) < 0.15


def test_penalties_scale_by_their_own_fisher():
    setup = Setup(iterations_a=20, iterations_b=1)
    trained = training.train_a((setup, None, 0))
    for method in TUNED:
        run = training.train_b((setup, trained, method, 5.0))
        mean = np.concatenate([f.ravel() for f in trained.fishers[method].values()]).mean()
        assert run.alpha * mean == pytest.approx(5.0, rel=1e-5)


def test_batch_squared_by_hand():
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(model.weight)
    images = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    loader = [(images, torch.tensor([0, 1])), (images[:1], torch.tensor([1]))]
    # p = 1/2: the gradient of row c is (1/2 - [label = c]) x; batch 1 has the mean of two, batch 2 one sample.
    first = torch.tensor([[-0.5, 1.0], [0.5, -1.0]])
    second = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    expected = (first.square() + second.square()) / 2
    torch.testing.assert_close(batch_squared(model, dict(model.named_parameters()), loader, 2)["weight"], expected)


def test_batches_cover_an_epoch_in_the_order_of_the_seed():
    part = torch.arange(10), torch.arange(10)
    drawn, again = batches(part, 3, 0), batches(part, 3, 0)
    epochs = [torch.cat([next(drawn)[1] for _ in range(3)]).tolist() for _ in range(2)]
    assert all(len(set(labels)) == 9 for labels in epochs)
    assert epochs[0] != epochs[1]
    assert torch.cat([next(again)[1] for _ in range(3)]).tolist() == epochs[0]
    assert len(next(batches(part, 99, 0))[1]) == 10


def test_summary_by_hand():
    setup = Setup(end_evaluations=1)
    trained = [Trained(0.5, seed, accuracy, 7, {}, {}) for seed, accuracy in enumerate((0.5, 0.7))]

    def runs(method, strength, a, b, validation=0.0):
        return [Run(method, s, strength, 1.0, [0, 25], [0.5, a], [0.1, b], validation, validation) for s in range(2)]

    everything = [*runs("none", None, 0.2, 0.9), *runs("frozen", None, 0.6, 0.8)]
    for method in TUNED:
        everything += [*runs(method, 1.0, 0.5, 0.7, 0.3), *runs(method, 10.0, 0.56, 0.85, 0.6)]
    panel = report.summarise(setup, trained, everything)
    wpl = panel["methods"]["wpl"]
    assert wpl["strength"] == 10.0
    assert panel["best_at_edge_of_grid"] == list(TUNED)
    assert panel["methods"]["none"]["forgetting"]["mean"] == pytest.approx(40)
    assert wpl["forgetting"]["mean"] == pytest.approx(4)
    assert wpl["reduction_percent"] == pytest.approx(90)
    assert wpl["cost_b"]["mean"] == pytest.approx(5)
    assert wpl["worst_forgetting"]["seeds"] == pytest.approx([0, 20])


def test_split_is_by_seed_and_disjoint(mnist):
    folder, images, labels = mnist
    split = load_split(str(folder), 3)
    assert split.sizes == {"train": 140, "validation": 20, "test": 40}
    assert split.shape == (20,)
    again, other = load_split(str(folder), 3), load_split(str(folder), 4)
    assert torch.equal(split.test[0], again.test[0])
    assert not torch.equal(split.test[0], other.test[0])
    pixels = torch.cat([part[0] for part in (split.train, split.validation, split.test)])
    expected = torch.tensor(images.reshape(200, 20), dtype=torch.float32) / 255
    assert torch.equal(pixels.sort(0).values, expected.sort(0).values)
    counts = torch.cat([part[1] for part in (split.train, split.validation, split.test)]).bincount(minlength=10)
    assert counts.tolist() == np.bincount(labels, minlength=10).tolist()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_round_trip(tmp_path, pack):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "file"
    path.write_bytes(pack(idx(array)))
    assert np.array_equal(read_idx(path), array)


GOOD = idx(np.arange(24).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "got 0 bytes"),
        (GOOD[:3], "got 3 bytes"),
        (GOOD[:9], "truncated in its header of 16 bytes, got 9"),
        (GOOD[:-1], r"expected 24 bytes for shape \[2, 3, 4\], got 23"),
        (GOOD + b"x", "got 25"),
        (b"\x01" + GOOD[1:], "magic"),
        (GOOD[:2] + b"\x0d" + GOOD[3:], "magic"),
        (GOOD[:3] + b"\x00" + GOOD[4:], "magic"),
        (struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3), "got 0"),
        (gzip.compress(GOOD, mtime=0)[:-9], "cannot be read"),
        (gzip.compress(GOOD, mtime=0)[:5] + b"garbage" * 9, "cannot be read"),
    ],
)
def test_damaged_idx_file(tmp_path, content, words):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def remove_labels(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()


def truncate_images(folder):
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])


def few_digits(folder):
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((3, 5, 4))))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(3)))


def swap_kinds(folder):
    (folder / "t10k-images-idx3-ubyte").write_bytes(
        gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    )


def wrong_labels(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.full(200, 11)))


def empty_folder(folder):
    for path in folder.iterdir():
        path.unlink()


def no_folder(folder):
    empty_folder(folder)
    folder.rmdir()


@pytest.mark.parametrize(
    "damage", [remove_labels, truncate_images, few_digits, swap_kinds, wrong_labels, empty_folder, no_folder]
)
def test_bad_data_is_one_line_and_leaves_results_alone(mnist, tmp_path, capsys, damage):
    folder = mnist[0]
    damage(folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "two_models.json").write_text("old")
    assert two_models.main([*TINY, "--data", str(folder), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert [path.read_text() for path in out.iterdir()] == ["old"]


@pytest.mark.parametrize(
    "options", [["--seeds", "0"], ["--seeds", "x"], ["--iterations", "0"], ["--grid", "-1"], ["--workers", "-1"]]
)
def test_bad_option_exits_with_2(options, capsys):
    with pytest.raises(SystemExit) as caught:
        two_models.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_bad_device_is_one_line(device, tmp_path, capsys):
    assert two_models.main([*TINY, "--device", device, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: --device")


def test_out_that_is_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert two_models.main([*TINY, "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "result"
    write_bytes(path, b"old")
    with pytest.raises(TypeError):
        write_bytes(path, "text")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# ---- the page of results ---------------------------------------------------------------------------------------------


def test_the_tables_on_the_page_are_those_of_the_records():
    text = page.PAGE.read_text()
    assert text == page.render(text), "run `python -m benchmarks.experiments.page`"
    marked = page.MARKED.findall(text)
    assert text.count("<!-- table") == text.count("<!-- end -->") == len(marked)
    shown = {record for _, _, records, _ in marked for record in records.split()}
    experiments = ("two_models", "permuted_pixels", "lora_domains", "ewc", "text_search", "image_search", "fine_tuning")
    assert shown == {path.stem for path in page.RESULTS.glob("*.json") if path.stem.startswith(experiments)}
    assert all(f"results/{name}.png" in text for name in shown)


@pytest.mark.parametrize(
    "name",
    [
        "two_models_digits",
        "permuted_pixels_digits",
        "lora_domains",
        "ewc_digits",
        "text_search_help_norm",
        "fine_tuning_mnist",
    ],
)
def test_figures_are_made_from_records(name):
    record = json.loads((page.RESULTS / f"{name}.json").read_text())
    images = page.report_of(record).figures(record)
    assert all(image.startswith(b"\x89PNG") for image in images.values())
    assert all((page.RESULTS / f"{name}{part}.png").exists() for part in images)
