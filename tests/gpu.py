"""All tests on a GPU in one call: ``python tests/gpu.py``, or ``make gpu-test``. See CONTRIBUTING.md, "On a GPU".

Tests are dealt out in batches to processes of their own, so that a crash, a hang or a lost device costs one test, and
what is done by the time limit is reported in any case. Those marked ``alone`` follow, in one process, and those that
stay on the CPU come last. Nothing is left out silently: skips are listed with their reasons, tests that stay on the CPU
are counted, and a test that was not reached is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sanitize

ROOT = Path(__file__).parent.parent
BATCH = 60  # tests that one process gets
OUTCOMES = ("passed", "failed", "skipped", "xfailed", "xpassed", "crashed", "timed out", "not reached")
BAD = {"failed", "xpassed", "crashed", "timed out", "not reached"}


@dataclass
class Job:
    """A process of pytest over some tests, and what it has reported so far."""

    tests: list[str]
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    read: int = 0
    current: tuple[str, float] | None = None
    done: set[str] = field(default_factory=set)

    def start(self, options: argparse.Namespace) -> None:
        """Start the process."""
        self.folder.mkdir(parents=True)
        (self.folder / "tests").write_text("\n".join(self.tests))
        self.process = pytest_process(
            [*sorted({test.split("::")[0] for test in self.tests})],
            options,
            self.folder / "log",
            WPLFAST_TEST_CHOSEN=str(self.folder / "tests"),
            WPLFAST_TEST_RECORD=str(self.folder / "record"),
        )
        self.started = time.time()

    def entries(self) -> list[dict[str, Any]]:
        """Return what was recorded since the last call."""
        path = self.folder / "record"
        if not path.exists():
            return []
        lines = path.read_text().split("\n")[:-1]  # the last one may be half written
        fresh, self.read = lines[self.read :], len(lines)
        entries = [json.loads(line) for line in fresh]
        for entry in entries:
            if "started" in entry:
                self.current = entry["test"], entry["started"]
            if "finished" in entry:
                self.current = None
                self.done.add(entry["test"])
        return [entry for entry in entries if "outcome" in entry]

    def kill(self) -> None:
        """End the process and what it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def pytest_process(
    arguments: list[str], options: argparse.Namespace, log: Path, **environment: str
) -> subprocess.Popen[bytes]:
    """Start pytest in a session of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    command += ["--tb=short", f"--device={options.device}", *arguments]
    threads = str(max(1, (os.cpu_count() or 1) // options.processes))
    common = {"OMP_NUM_THREADS": threads, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    common["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **common, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class Run:
    """All tests of a run, and what became of them."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.started = time.time()
        self.results: dict[str, dict[str, Any]] = {}
        self.tests: dict[str, str] = {}  # and in which turn each is run
        self.problems: list[str] = []
        self._n_jobs = 0

    @property
    def left(self) -> float:
        """Return the seconds until the limit, less what the report takes."""
        return self.options.limit - 10 - (time.time() - self.started)

    def collect(self) -> None:
        """List the tests."""
        listing, log = self.folder / "listing", self.folder / "collect.log"
        process = pytest_process(
            ["--collect-only", *self.options.tests], self.options, log, WPLFAST_TEST_LISTING=str(listing)
        )
        try:
            process.wait(max(1.0, self.left))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        if process.returncode != 0 or not listing.exists():
            self.problems.append(f"collection failed: {log.read_text()[-3000:]}")
        if listing.exists():
            self.tests = json.loads(listing.read_text())

    def execute(self) -> None:
        """Run everything, until it is done or time is up."""
        for turn, at_once in (
            ("together", self.options.processes),
            ("alone", 1),
            ("on the CPU", self.options.processes),
        ):
            files: dict[str, list[str]] = defaultdict(list)
            for test, when in self.tests.items():
                if when == turn:
                    files["" if turn == "alone" else test.split("::")[0]].append(test)
            size = len(self.tests) if turn == "alone" else BATCH
            batches = [tests[k : k + size] for tests in files.values() for k in range(0, len(tests), size)]
            self._drain([self._job(tests) for tests in sorted(batches, key=len, reverse=True)], at_once)
        for test in self.tests:
            self.results.setdefault(test, {"test": test, "outcome": "not reached", "seconds": 0.0})

    def _job(self, tests: list[str]) -> Job:
        self._n_jobs += 1
        return Job(tests, self.folder / f"job{self._n_jobs}")

    def _drain(self, waiting: list[Job], at_once: int) -> None:
        """Run jobs, some at once; what a job leaves undone goes to another one."""
        running: list[Job] = []
        while (waiting or running) and self.left > 0:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
                running[-1].start(self.options)
            time.sleep(0.2)
            for job in list(running):
                ended = job.process is not None and job.process.poll() is not None
                for entry in job.entries():
                    self._take(entry)
                slow = job.current is not None and time.time() - job.current[1] > self.options.test_limit
                stuck = not job.done and not job.current and time.time() - job.started > 2 * self.options.test_limit
                if not (ended or slow or stuck):
                    continue
                running.remove(job)
                job.kill()
                waiting += self._rest(job, "timed out" if slow else "crashed")
        for job in running:
            job.kill()
            for entry in job.entries():
                self._take(entry)
            if job.current:
                self._take({"test": job.current[0], "outcome": "timed out", "seconds": 0.0, "text": "the run's limit"})

    def _take(self, entry: dict[str, Any]) -> None:
        """Keep a test's outcome; a failure after its end counts more than how it went."""
        known = self.results.get(entry["test"])
        if known is None or entry["outcome"] in BAD:
            self.results[entry["test"]] = {**(known or {}), **entry}

    def _rest(self, job: Job, why: str) -> list[Job]:
        """Report the test in which a job ended, and return a job for those after it."""
        log = (job.folder / "log").read_text(errors="replace")[-3000:]
        if job.current is not None:
            test, started = job.current
            job.done.add(test)
            self._take({"test": test, "outcome": why, "seconds": round(time.time() - started, 1), "text": log})
        rest = [test for test in job.tests if test not in job.done]
        if rest and not job.done:  # not one test was reached: the next job would not do better
            self.problems.append(f"a process ended before its first test: {log}")
            return []
        return [self._job(rest)] if rest else []


def machine(device: str) -> dict[str, Any]:
    """Describe what the tests ran on."""
    import numpy
    import torch
    import triton

    from wplfast import backends

    facts: dict[str, Any] = {
        "device": device,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "cpus": os.cpu_count(),
        "backends": {"cpu": backends.serving("cpu"), "cuda": backends.serving("cuda")},
        "missing": backends.missing(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "capability": [properties.major, properties.minor]}
        facts |= {"gpu_memory": properties.total_memory, "cudnn": torch.backends.cudnn.version()}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    for key, command in {"nvidia_smi": query, "commit": ["git", "-C", str(ROOT), "rev-parse", "HEAD"]}.items():
        try:
            facts[key] = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            facts[key] = f"unknown: {error}"
    return facts


def report(run: Run, facts: dict[str, Any], sanitizer: dict[str, Any] | None) -> dict[str, Any]:
    """Bring together what goes into the JSON file."""
    results = list(run.results.values())
    files: dict[str, dict[str, Any]] = defaultdict(lambda: {"seconds": 0.0, "on_cpu": 0, **dict.fromkeys(OUTCOMES, 0)})
    for result in results:
        row = files[result["test"].split("::")[0]]
        row[result["outcome"]] += 1
        row["seconds"] += result.get("seconds", 0.0)
        row["on_cpu"] += "cpu_only" in result
    on_cpu: dict[str, list[str]] = defaultdict(list)
    for result in results:
        if "cpu_only" in result:
            on_cpu[result["cpu_only"]].append(result["test"])
    return {
        "machine": facts,
        "seconds": round(time.time() - run.started, 1),
        "counts": dict(Counter(result["outcome"] for result in results)),
        "problems": run.problems,
        "failures": [result for result in results if result["outcome"] in BAD],
        "skips": [{k: r.get(k, "") for k in ("test", "reason")} for r in results if r["outcome"] == "skipped"],
        "on_cpu": {reason: len(tests) for reason, tests in on_cpu.items()},
        "files": {name: {**row, "seconds": round(row["seconds"], 1)} for name, row in sorted(files.items())},
        "slowest": [(r["test"], r["seconds"]) for r in sorted(results, key=lambda r: -r.get("seconds", 0.0))[:25]],
        "sanitizer": sanitizer,
    }


def table(found: dict[str, Any]) -> str:
    """Return failures, skips by reason, and one row for each file."""
    lines = []
    for failure in found["failures"][:40]:
        reason = (failure.get("text") or "").strip().splitlines()
        lines.append(f"{failure['outcome'].upper()} {failure['test']}  {reason[-1][:160] if reason else ''}")
    skips = Counter(skip["reason"].removeprefix("Skipped: ") for skip in found["skips"])
    lines += [f"SKIPPED {count:4} {reason[:150]}" for reason, count in skips.most_common()]
    lines += [f"ON THE CPU {count:4} {reason}" for reason, count in found["on_cpu"].items()]
    lines += [f"PROBLEM {problem[-1500:]}" for problem in found["problems"]]
    shown = ("passed", "failed", "crashed", "timed out", "not reached", "skipped", "on_cpu", "seconds")
    lines.append(f"{'':34}" + "".join(f"{name:>12}" for name in shown))
    total: Counter[str] = Counter()
    for name, row in found["files"].items():
        total.update({key: row[key] for key in shown})
        lines.append(f"{name:34}" + "".join(f"{row[key] or '':>12}" for key in shown))
    lines.append(f"{'all':34}" + "".join(f"{round(total[key], 1) or '':>12}" for key in shown))
    facts, sanitizer = found["machine"], found["sanitizer"]
    lines.append(f"sanitizer: {sanitizer['result'] if sanitizer else 'not run'}")
    lines.append(
        f"{facts.get('gpu', 'no GPU')}, torch {facts['torch']}, triton {facts['triton']}, {found['seconds']:.0f} s:"
        f" {'PASSED' if passed(found) else 'FAILED'}"
    )
    return "\n".join(lines)


def passed(found: dict[str, Any]) -> bool:
    """Tell whether all that was asked for was run and passed."""
    clean = found["sanitizer"] is None or found["sanitizer"]["result"] != "errors"
    return not found["failures"] and not found["problems"] and bool(found["counts"].get("passed")) and clean


def main() -> int:
    """Run, write the JSON file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=os.environ.get("OUT", "out"), help="folder for gpu-tests.json")
    parser.add_argument("--device", default="cuda", choices=["cuda", "rehearsal", "cpu"])
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=400, help="seconds for everything")
    parser.add_argument("--test-limit", type=float, default=200, help="seconds for one test")
    parser.add_argument("--sanitize", action="store_true", help="compute-sanitizer beside the tests")
    parser.add_argument("tests", nargs="*", help="default: all")
    options = parser.parse_args()
    os.environ.setdefault("WPLFAST_REQUIRE", "triton" if options.device == "cuda" else "")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        facts = machine(options.device)
    except Exception as error:
        print(f"the package does not start: {error}", file=sys.stderr)
        return 2
    if options.device == "cuda" and "gpu" not in facts:
        print("torch sees no GPU: nothing was tested (--device rehearsal needs none)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options, Path(folder))
        checking = sanitize.start(Path(folder)) if options.sanitize else None
        try:
            run.collect()
            run.execute()
        finally:
            sanitizer = checking.finish(max(5.0, run.left)) if checking else None
            for test in run.tests:
                run.results.setdefault(test, {"test": test, "outcome": "not reached", "seconds": 0.0})
            found = report(run, facts, sanitizer)
            (out / "gpu-tests.json").write_text(json.dumps(found, indent=1))
    print(table(found))
    return 0 if passed(found) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the package may not be installed
    sys.exit(main())
