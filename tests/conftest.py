"""Shared fixtures, and the device that tests run on: ``pytest --device cuda``.

Tests make tensors on the default device, so that one option moves them all. What is about the CPU stays there and says
why: a whole file in ``ABOUT_THE_CPU``, a test with ``@pytest.mark.cpu_only(reason)``. ``--device rehearsal`` needs no
GPU and finds tensors that meet across devices (see :mod:`rehearsal`; ``make rehearse`` for the files worth their time).
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wplfast import backends

sys.path.insert(0, str(Path(__file__).parent))

#: Files whose tests run on the CPU whatever the device.
ABOUT_THE_CPU = {
    "test_cpp.py": "the C++ backend",
    "test_functional_kept.py": "what the C++ backend keeps",
    "test_benchmarks.py": "the benchmarks' own code",
    "test_gpu_bench.py": "the benchmarks' own code",
    "test_selftest.py": "the command line, and what a self-test finds",
    "test_cli.py": "the command line, on files",
    "test_cli_fisher.py": "the command line, which takes its device as an option",
    "test_cli_resume.py": "the command line, and processes that are killed",
    "test_summary.py": "tables and pictures",
    "test_triton_aot.py": "compilation without a device",
    "test_triton_versions.py": "a pretended device",
    "test_docs.py": "examples as they stand",
    "test_two_models.py": "the demo takes its device as an argument",
    "test_examples.py": "scripts as they stand",
    "test_integration_lightning.py": "a CPU's Trainer",
    "test_integration_transformers.py": "a Trainer with use_cpu",
    "test_integration_transformers_fisher.py": "a Trainer with use_cpu, and gloo between processes",
    "test_pack.py": "packed rows on the CPU",
    "test_wheel.py": "what a wheel contains",
}
#: Files whose tests choose their device themselves.
OWN_DEVICE = {"test_triton_penalty.py", "test_triton_fisher.py"}

#: Files of few tests that take long, the longest first: begun last, one would leave all processes but its own idle.
LONG = ["test_triton_fisher.py", "test_cpp.py", "test_wheel.py", "test_fsdp2.py", "test_triton_penalty.py",
        "test_tiles.py", "test_examples.py", "test_triton_versions.py", "test_pack.py", "test_gpu_bench.py",
        "test_selftest.py", "test_triton_aot.py"]  # fmt: skip

RECORD = os.environ.get("WPLFAST_TEST_RECORD")  # a file that every test's start and outcome is appended to
LISTING = os.environ.get("WPLFAST_TEST_LISTING")  # a file for the names of all tests, and when each is run
CHOSEN = os.environ.get("WPLFAST_TEST_CHOSEN")  # a file with the tests to run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda", "rehearsal"], help="what tests run on")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only(reason): is about the CPU, and stays there under --device cuda")
    config.addinivalue_line("markers", "needs_cpp: is about the C++ backend: cpu_only, and skipped without it")
    config.addinivalue_line("markers", "not_rehearsed(reason): what the rehearsal device lacks")
    config.addinivalue_line("markers", "alone: measures time or memory, or fills the device: not beside other tests")
    name = config.getoption("device")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU")
    if name == "rehearsal":
        import rehearsal

        rehearsal.start()
    os.environ["WPLFAST_TEST_DEVICE"] = name  # for the processes that tests start
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.quicken()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if LISTING:
        turns = {}
        for item in items:
            alone = item.get_closest_marker("alone") is not None
            turns[item.nodeid] = "alone" if alone else "on the CPU" if stays_on_the_cpu(item) else "together"
        Path(LISTING).write_text(json.dumps(turns))
    if CHOSEN:
        chosen = set(Path(CHOSEN).read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]
    if hasattr(config, "workerinput"):  # one of several processes, to which files are dealt out in this order
        sizes = Counter(item.path.name for item in items)
        places = {name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: (places.get(item.path.name, len(LONG)), -sizes[item.path.name]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare garbage collections what was imported: those of tests look at what tests made, in a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()


def stays_on_the_cpu(item: pytest.Item) -> str | None:
    """Return why a test runs on the CPU whatever the device, or None."""
    mark = item.get_closest_marker("cpu_only")
    if item.get_closest_marker("needs_cpp"):
        return "the C++ backend"
    return str(mark.args[0]) if mark else ABOUT_THE_CPU.get(item.path.name)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread: small models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def usual_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the allocator of the process that runs the tests as it is, where benchmarks would set it."""
    from benchmarks.plumbing import malloc

    monkeypatch.setattr(malloc, "keep", lambda: True)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every new uninitialised tensor with NaN, and draw fresh inputs (the seed is printed on failure)."""
    seed = int(os.environ.get("WPLFAST_TEST_SEED", "0")) or torch.seed() % 2**31
    print(f"WPLFAST_TEST_SEED={seed}")
    torch.manual_seed(seed)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device that a test runs on; it is the default device, too."""
    name = request.config.getoption("device")
    if request.node.get_closest_marker("needs_cpp") and backends.serving("cpu") != "cpp":
        pytest.skip("of the C++ backend")
    if name == "rehearsal" and (mark := request.node.get_closest_marker("not_rehearsed")):
        pytest.skip(f"the rehearsal device lacks {mark.args[0]}")
    if name == "cpu" or stays_on_the_cpu(request.node) or request.node.path.name in OWN_DEVICE:
        yield torch.device("cpu")
        return
    torch.set_default_device(name)
    settings = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True  # oracles are exact, and repeat
    yield torch.device(name, 0)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = settings
    torch.set_default_device(None)


@pytest.fixture
def autocast_kind(device: torch.device) -> str:
    """The device type whose autocast is meant; the rehearsal device has none."""
    return device.type if device.type == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def _seed(device: torch.device) -> None:
    """Start every test from one seed, on the device."""
    torch.manual_seed(0)


# ---- what tests/gpu.py reads -----------------------------------------------------------------------------------------


def record(**entry: object) -> None:
    if RECORD:
        with open(RECORD, "a") as file:
            file.write(json.dumps(entry) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    record(test=nodeid, started=time.time())


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    result = yield
    report = result.get_result()
    if report.when != "call" and report.outcome == "passed":
        return
    entry: dict[str, object] = {"test": item.nodeid, "when": report.when, "outcome": report.outcome}
    entry["seconds"] = round(call.duration, 3)
    if hasattr(report, "wasxfail"):
        entry["outcome"] = "xfailed" if report.skipped else "xpassed"
    if report.skipped:
        entry["reason"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    if report.failed:
        entry["text"] = report.longreprtext[-6000:]
    if (why := stays_on_the_cpu(item)) and item.config.getoption("device") != "cpu":
        entry["cpu_only"] = why
    record(**entry)


def pytest_runtest_logfinish(nodeid: str) -> None:
    record(test=nodeid, finished=time.time())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # the context is lost: every later test of this process would fail
            record(test=nodeid, when="teardown", outcome="failed", seconds=0, text=f"lost the device: {error}")
            if RECORD:
                os._exit(70)


@pytest.fixture(autouse=True)
def torch_functions_stay_enabled():
    """A pass that left them disabled would see no operation in any later test."""
    yield
    enabled = torch._C._is_torch_function_enabled()
    if not enabled:
        torch._C._set_torch_function_state(torch._C._TorchFunctionState.ENABLED)
    assert enabled
