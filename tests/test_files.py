"""Files: whole or not there, checked when they are read, and considerate of what is at their path."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import socket
import stat
import threading
import tracemalloc
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch
from fisher_cases import batches, ce, mlp
from processes import run_python, started
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wplfast
from wplfast import Fisher, WeightPlasticityLoss, storage

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions, links and locks of POSIX")


def fisher(value: float = 1.0) -> Fisher:
    """A small Fisher with everything that a file has."""
    tensors = {"b": torch.full((2, 3), value), "a": torch.tensor(value, dtype=torch.float64), "c": torch.zeros(0, 4)}
    gradient = {name: -tensor for name, tensor in tensors.items()}
    return Fisher(tensors, 5, total_weight=2.5, mean_grad=gradient, metadata={"source": "ä test"})


def same(got: Fisher, right: Fisher) -> bool:
    """Whether two Fishers are the same in all that files keep."""
    return (
        list(got) == list(right)
        and all(torch.equal(got[n], right[n]) and got[n].dtype == right[n].dtype for n in right)
        and all(torch.equal(got.mean_grad[n], right.mean_grad[n]) for n in right)
        and (got.n_samples, got.total_weight, got.metadata) == (right.n_samples, right.total_weight, right.metadata)
    )


def names_in(folder) -> list[str]:
    return sorted(os.listdir(folder))


# ---- what is written ------------------------------------------------------------------------------------------------


def test_safetensors_reads_them(tmp_path):
    fisher().save(tmp_path / "f")
    tensors = load_file(tmp_path / "f")
    assert sorted(tensors) == [f"{part}.{name}" for part in ("fisher", "mean_grad") for name in "abc"]
    assert torch.equal(tensors["fisher.b"], torch.ones(2, 3))
    with safe_open(tmp_path / "f", "pt") as file:
        assert json.loads(file.metadata()["names"]) == ["b", "a", "c"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forms_of_tensors(tmp_path, dtype):
    base = torch.arange(24.0).to(dtype).view(4, 6)
    tensors = {
        "transposed": base.t(),
        "a view": base[1:3],
        "the same view": base[1:3],
        "every second": base[:, ::2],
        "expanded": base[:1].expand(5, 6),
        "scalar": base[2, 3],
        "empty": base[:, :0],
        "negated": torch._neg_view(-base),
        "wants grad": base.clone().requires_grad_(),
        "im Übermaß": base.clone(),
    }
    Fisher(tensors, 3).save(tmp_path / "f")
    got = Fisher.load(tmp_path / "f")
    assert list(got) == list(tensors)
    for name, tensor in tensors.items():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], tensor.detach()), name


def test_flag_and_metadata_are_kept(tmp_path):
    for reduced in (False, True):
        Fisher({"w": torch.ones(2)}, 1, reduced=reduced, metadata={"k": "v"}).save(tmp_path / "f")
        assert Fisher.load(tmp_path / "f").reduced is reduced
        assert Fisher.load(tmp_path / "f").metadata == {"k": "v"}


@pytest.mark.parametrize("kind", [str, os.fsencode, pathlib.Path, lambda p: os.path.relpath(p)])
def test_kinds_of_paths(tmp_path, kind):
    fisher().save(kind(str(tmp_path / "f")))
    assert same(Fisher.load(kind(str(tmp_path / "f"))), fisher())
    parameters = {"w": torch.ones(2, requires_grad=True)}
    wpl = WeightPlasticityLoss(parameters)
    wpl.consolidate({"w": torch.ones(2)})
    wpl.save(kind(str(tmp_path / "w")))
    wpl.load(kind(str(tmp_path / "w")))
    assert wpl.n_anchors == 1


def test_memory(tmp_path):
    """Saving copies nothing that is contiguous: Python's and NumPy's memory is traced, torch's is in the process's."""
    views = torch.rand(64, 2**18).unbind(0)  # 64 MB, of one buffer
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    Fisher({f"{i}": view for i, view in enumerate(views)}, 1).save(tmp_path / "f")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**21
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 2**10


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fisher", "penalty"])
def test_every_flipped_bit_is_found(tmp_path, kind):
    """One bit of each byte: an error, or (spaces, and the name of the checksum itself) the very same contents."""
    path, parameters = tmp_path / "f", {"w": torch.ones(3, requires_grad=True)}
    wpl = WeightPlasticityLoss(parameters)
    wpl.consolidate({"w": torch.tensor([1.0, 2.0, 3.0])})
    (fisher() if kind == "fisher" else wpl).save(path)
    whole = path.read_bytes()
    before = wpl.state_dict()
    missed = []
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            got = Fisher.load(path) if kind == "fisher" else wpl.load(path)
        except (ValueError, KeyError):
            pass
        else:
            if isinstance(got, Fisher):
                got.metadata = {key: value for key, value in got.metadata.items() if key == "source"}
                if not same(got, fisher()):
                    missed.append(place)
        assert all(torch.equal(before[key], value) for key, value in wpl.state_dict().items())
    assert not missed


def test_cut_anywhere(tmp_path):
    fisher().save(tmp_path / "f")
    whole = (tmp_path / "f").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:length])
        with pytest.raises(ValueError):
            Fisher.load(tmp_path / "f")


def rewrite(path, change) -> None:
    """Change a file's tensors and metadata, as a file of the first release: without a checksum."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata.pop("wplfast.crc32", None)
    change(tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def test_files_without_a_checksum(tmp_path):
    fisher().save(tmp_path / "f")
    rewrite(tmp_path / "f", lambda tensors, metadata: None)
    assert same(Fisher.load(tmp_path / "f"), fisher())


def test_a_changed_file_with_its_checksum(tmp_path):
    fisher().save(tmp_path / "f")
    with safe_open(tmp_path / "f", "pt") as file:
        metadata = file.metadata()
    save_file({n: t * 2 for n, t in load_file(tmp_path / "f").items()}, tmp_path / "f", metadata=metadata)
    with pytest.raises(ValueError, match="damaged, or something else changed it"):
        Fisher.load(tmp_path / "f")


FAULTS = {
    "NaN": (lambda t, m: t["fisher.b"][0].fill_(float("nan")), "'b'.*finite and not negative, got nan"),
    "inf": (lambda t, m: t["fisher.b"][1].fill_(float("inf")), "'b'.*finite"),
    "negative": (lambda t, m: t["fisher.a"].fill_(-1e-9), "'a'.*not negative"),
    "NaN in mean_grad": (lambda t, m: t["mean_grad.b"][0].fill_(float("nan")), r"mean_grad\['b'\] must be finite"),
    "integers": (lambda t, m: t.update({"fisher.b": t["fisher.b"].long()}), "floating point type, got torch.int64"),
    "complex": (lambda t, m: t.update({"fisher.b": t["fisher.b"].cfloat()}), "floating point type"),
    "integers in mean_grad": (lambda t, m: t.update({"mean_grad.b": t["mean_grad.b"].int()}), "floating point type"),
    "shape of mean_grad": (lambda t, m: t.update({"mean_grad.b": t["mean_grad.b"].t()}), r"shape \[2, 3\].*\[3, 2\]"),
    "part of mean_grad": (lambda t, m: t.pop("mean_grad.b"), r"lacks \['b'\]"),
    "more in mean_grad": (lambda t, m: t.update({"mean_grad.d": torch.ones(1)}), r"has \['d'\]"),
    "a tensor less": (lambda t, m: t.pop("fisher.b"), "must hold the names"),
    "a tensor more": (lambda t, m: t.update({"fisher.d": torch.ones(1)}), "must hold the names"),
    "another part": (lambda t, m: t.update({"other.d": torch.ones(1)}), r"fisher.NAME or mean_grad.NAME"),
    "no names": (lambda t, m: m.pop("names"), "lacks 'names'"),
    "no n_samples": (lambda t, m: m.pop("n_samples"), "lacks 'n_samples'"),
    "no total_weight": (lambda t, m: m.pop("total_weight"), "lacks 'total_weight'"),
    "names no JSON": (lambda t, m: m.update(names="[b"), "JSON list"),
    "names no list": (lambda t, m: m.update(names='{"b": 1}'), "JSON list"),
    "names no text": (lambda t, m: m.update(names="[1, 2]"), "JSON list"),
    "a name twice": (lambda t, m: m.update(names='["a", "b", "c", "b"]'), "different strings"),
    "negative n_samples": (lambda t, m: m.update(n_samples="-5"), "n_samples must be an integer"),
    "half a sample": (lambda t, m: m.update(n_samples="1.5"), "n_samples must be an integer"),
    "n_samples no number": (lambda t, m: m.update(n_samples="many"), "n_samples must be an integer"),
    "n_samples in other digits": (lambda t, m: m.update(n_samples="\u0665"), "n_samples must be an integer"),
    "NaN total_weight": (lambda t, m: m.update(total_weight="nan"), "total_weight must be finite"),
    "infinite total_weight": (lambda t, m: m.update(total_weight="inf"), "total_weight must be finite"),
    "negative total_weight": (lambda t, m: m.update(total_weight="-1.0"), "total_weight must be finite"),
    "total_weight no number": (lambda t, m: m.update(total_weight="1,5"), "total_weight must be a number"),
    "another kind": (lambda t, m: m.update({"wplfast.kind": "penalty"}), "must be a wplfast fisher file"),
    "another version": (lambda t, m: m.update({"wplfast.version": "99"}), "of version 1"),
    "no metadata": (lambda t, m: m.clear(), "must be a wplfast fisher file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_fisher_is(tmp_path, fault):
    change, message = FAULTS[fault]
    fisher().save(tmp_path / "f")
    rewrite(tmp_path / "f", change)
    with pytest.raises(ValueError, match=message):
        Fisher.load(tmp_path / "f")


PENALTY_FAULTS = {
    "NaN": lambda t, m: t["fisher.w"][0].fill_(float("nan")),
    "negative": lambda t, m: t["fisher.w"][0].fill_(-1.0),
    "more than float32 holds": lambda t, m: t.update({"fisher.w": torch.full((3,), 1e300, dtype=torch.float64)}),
    "integers": lambda t, m: t.update({"fisher.w": torch.ones(3, dtype=torch.int64)}),
    "complex": lambda t, m: t.update({"fisher.w": torch.ones(3, dtype=torch.complex64)}),
    "integer anchors": lambda t, m: t.update({"theta_hat.w": torch.ones(3, dtype=torch.int32)}),
    "inf in an anchor": lambda t, m: t["theta_hat.w"][0].fill_(float("inf")),
    "negative constant": lambda t, m: t["constant.w"].fill_(-1.0),
    "negative n_anchors": lambda t, m: t["n_anchors"].fill_(-3),
    "half an anchor": lambda t, m: t.update({"n_anchors": torch.tensor(1.5)}),
    "two n_anchors": lambda t, m: t.update({"n_anchors": torch.tensor([1, 1])}),
    "version no number": lambda t, m: t.update({"version": torch.tensor(1.0)}),
    "another shape": lambda t, m: t.update({"fisher.w": torch.ones(4)}),
    "a Fisher's file": lambda t, m: m.update({"wplfast.kind": "fisher"}),
}


@pytest.mark.parametrize("fault", PENALTY_FAULTS)
@pytest.mark.parametrize("through", ["load", "load_state_dict"])
def test_what_no_penalty_is(tmp_path, fault, through):
    wpl = WeightPlasticityLoss({"w": torch.ones(3, requires_grad=True)})
    wpl.consolidate({"w": torch.tensor([1.0, 2.0, 3.0])})
    wpl.save(tmp_path / "w")
    rewrite(tmp_path / "w", PENALTY_FAULTS[fault])
    before = wpl.state_dict()
    if through == "load":
        with pytest.raises(ValueError):
            wpl.load(tmp_path / "w")
    elif fault != "a Fisher's file":
        with pytest.raises(RuntimeError):
            wpl.load_state_dict(load_file(tmp_path / "w"))
    assert all(torch.equal(before[key], value) for key, value in wpl.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_what_load_refuses_is_not_saved(tmp_path, value):
    with pytest.raises(ValueError, match="must be finite and not negative"):
        fisher(value).save(tmp_path / "f")
    with pytest.raises(ValueError, match="finite"):
        (fisher(1e30).to(torch.float16)).save(tmp_path / "f")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"n_samples": -1}, ValueError),
        ({"n_samples": 1.5}, TypeError),
        ({"n_samples": 1, "total_weight": float("nan")}, ValueError),
        ({"n_samples": 1, "total_weight": -1.0}, ValueError),
        ({"n_samples": 1, "mean_grad": {}}, ValueError),
        ({"n_samples": 1, "mean_grad": {"w": torch.ones(3)}}, ValueError),
        ({"n_samples": 1, "tensors": {"w": [1.0, 2.0]}}, TypeError),
    ],
)
def test_what_cannot_be_made(options, error):
    with pytest.raises(error):
        Fisher(**{"tensors": {"w": torch.ones(2)}, **options})


# ---- what is at the path --------------------------------------------------------------------------------------------


def test_new_files_have_the_mode_of_new_files(tmp_path):
    masks = (0o022, 0o077, 0o027, 0o000)
    code = (
        "import os, torch, wplfast; "
        f"[(os.umask(m), wplfast.Fisher({{'w': torch.ones(2)}}, 1).save(f'{tmp_path}/{{m}}')) for m in {masks}]"
    )
    done = run_python(code)
    assert done.returncode == 0, done.output
    for mask in masks:
        assert stat.S_IMODE((tmp_path / f"{mask}").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755, 0o444])
def test_replaced_files_keep_their_mode(tmp_path, mode):
    (tmp_path / "f").write_bytes(b"before")
    os.chmod(tmp_path / "f", mode)
    fisher().save(tmp_path / "f")
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode
    assert same(Fisher.load(tmp_path / "f"), fisher())


def test_nobody_touches_the_umask(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask is the whole process's"))
    fisher().save(tmp_path / "f")
    fisher().save(tmp_path / "f")


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("links", [1, 2])
def test_symbolic_links_stay(tmp_path, there, links):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    target = tmp_path / "elsewhere" / "f"
    if there:
        target.write_bytes(b"before")
    os.symlink("../elsewhere/f", tmp_path / "here" / "link1")
    os.symlink(tmp_path / "here" / "link1", tmp_path / "link2")
    link = (tmp_path / "here" / "link1", tmp_path / "link2")[links - 1]
    fisher().save(link)
    assert link.is_symlink()
    assert (tmp_path / "here" / "link1").is_symlink()
    assert not target.is_symlink()
    assert same(Fisher.load(target), fisher())
    assert names_in(tmp_path / "elsewhere") == ["f"]
    assert names_in(tmp_path / "here") == ["link1"]


def socket_at(path):
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: p / "no" / "f", FileNotFoundError, "there is no directory"),
        (lambda p: p, IsADirectoryError, "not a directory"),
        (lambda p: f"{p}/f/", IsADirectoryError, "not a directory"),
        (lambda p: "", (FileNotFoundError, IsADirectoryError), "must name a file"),
        (lambda p: "/dev/full", OSError, "not a device"),
        (lambda p: os.mkfifo(p / "pipe") or p / "pipe", OSError, "not a device, pipe"),
        (lambda p: socket_at(f"{p}/socket") or p / "socket", OSError, "not a device, pipe or socket"),
        (lambda p: os.symlink(p, p / "to a folder") or p / "to a folder", IsADirectoryError, "not a directory"),
        (lambda p: os.symlink("loop", p / "loop") or p / "loop", OSError, "symbolic links"),
        (lambda p: (p / "file").write_bytes(b"") or f"{p}/file/f", OSError, "there is no directory"),
        (lambda p: p / ("n" * 300), OSError, "too long"),
    ],
)
def test_where_nothing_can_be_saved(tmp_path, make, error, message):
    path = make(tmp_path)
    before = names_in(tmp_path)
    with pytest.raises(error, match=message) as raised:
        fisher().save(path)
    assert raised.value.filename == os.fspath(path)
    assert names_in(tmp_path) == before


def test_long_names(tmp_path):
    path = tmp_path / ("n" * 255)
    fisher().save(path)
    assert same(Fisher.load(path), fisher())


def test_what_is_not_a_file_is_not_read(tmp_path):
    with pytest.raises(IsADirectoryError):
        Fisher.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Fisher.load(tmp_path / "no")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Fisher.load(tmp_path / "empty")


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10, 500, 100_000])
@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk(tmp_path, limit, there):
    if there:
        fisher().save(tmp_path / "f")
    before = names_in(tmp_path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(OSError) as raised:
            Fisher({"w": torch.ones(200_000)}, 1).save(tmp_path / "f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(tmp_path / "f")
    assert names_in(tmp_path) == before
    assert not there or same(Fisher.load(tmp_path / "f"), fisher())


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_every_step_may_fail(tmp_path, monkeypatch, call, error):
    fisher().save(tmp_path / "f")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)) as raised:
        fisher(2.0).save(tmp_path / "f")
    monkeypatch.undo()
    assert not isinstance(error, OSError) or raised.value.errno == errno.ENOSPC
    assert names_in(tmp_path) == ["f"]
    assert same(Fisher.load(tmp_path / "f"), fisher())


def test_what_files_do_not_hold(tmp_path):
    for tensor in (torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="must be a dense tensor"):
            storage.save(tmp_path / "f", {"w": tensor}, "fisher", {})
    with pytest.raises(TypeError, match="metadata must map str to str"):
        Fisher({"w": torch.ones(2)}, 1, metadata={"n": 3}).save(tmp_path / "f")
    assert names_in(tmp_path) == []


def _stop_in_a_save(target: pathlib.Path, pipe: Connection) -> None:
    """Save a Fisher, but stop in the middle until something comes through the pipe."""
    fsync = os.fsync

    def stop(descriptor: int) -> None:
        pipe.send("here")
        pipe.recv()
        os.fsync = fsync

    os.fsync = stop
    Fisher({"w": torch.ones(200_000)}, 1).save(target)


def writer(target: pathlib.Path) -> tuple[BaseProcess, Connection]:
    """Start a process that stops in the middle of a save; return it once it did, and what lets it go on."""
    ours, its = multiprocessing.Pipe()
    process = started(_stop_in_a_save, target, its)
    assert ours.poll(60), "the process does not save"
    assert ours.recv() == "here"
    return process, ours


def test_killed_writers_are_tidied_up_after(tmp_path):
    for name in ("f", "g"):
        process, _ = writer(tmp_path / name)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert len(names_in(tmp_path)) == 2
    fisher().save(tmp_path / "f")
    assert len(names_in(tmp_path)) == 2  # that of the other path is its own next writer's
    fisher().save(tmp_path / "g")
    assert names_in(tmp_path) == ["f", "g"]


def test_writers_that_live_are_left_alone(tmp_path):
    process, pipe = writer(tmp_path / "f")
    fisher().save(tmp_path / "f")
    assert len(names_in(tmp_path)) == 2
    assert same(Fisher.load(tmp_path / "f"), fisher())
    pipe.send("go on")
    process.join()
    assert process.exitcode == 0
    assert names_in(tmp_path) == ["f"]
    assert torch.equal(Fisher.load(tmp_path / "f")["w"], torch.ones(200_000))  # who ends last remains


def test_threads_that_save_to_one_path(tmp_path):
    errors: list[BaseException] = []

    def work(value):
        try:
            for _ in range(15):
                fisher(value).save(tmp_path / "f")
                assert float(Fisher.load(tmp_path / "f")["a"]) in (1.0, 2.0, 3.0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(float(i + 1),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names_in(tmp_path) == ["f"]


def test_a_loaded_fisher_does_not_hang_on_its_file(tmp_path):
    computed = wplfast.fisher_diagonal(mlp(), batches(), ce, with_grad=True)
    computed.save(tmp_path / "f")
    loaded = Fisher.load(tmp_path / "f")
    with open(tmp_path / "f", "r+b") as file:  # not replaced, as save does it, but written over and cut
        file.write(b"\xff" * 4000)
        file.truncate(100)
    assert torch.equal(loaded.flat, computed.flat.cpu())
