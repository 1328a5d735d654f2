"""Parts of a long run: cases one after another, each guarded, with the record on disk after every one of them.

A part runs in a process of its own. Where a case ends that process, or leaves the GPU unusable, the part is started
again and goes on after it: the record says what was done, and what was running.
"""

from __future__ import annotations

import copy
import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .record import write_json

EMPTY: dict[str, Any] = {"cases": {}, "errors": {}, "left_out": {}, "running": None, "wall_seconds": 0.0}
Cases = Mapping[str, Callable[[], dict]]
LATE = "no time was left"


class WrongCaseError(RuntimeError):
    """A case was measured, but its result is wrong; ``record`` is what was measured."""

    def __init__(self, message: str, record: dict[str, Any]) -> None:
        super().__init__(message)
        self.record = record


def load(path: Path) -> dict[str, Any]:
    """Return a part's record, an empty one where there is none; a case that was running did not end."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else copy.deepcopy(EMPTY)
    if record["running"] is not None:
        record["errors"][record["running"]] = "the process ended, or was ended for lack of time, in this case"
        record["running"] = None
    return record


def run(cases: Cases, path: Path, seconds: float, works: Callable[[], bool] = lambda: True) -> dict[str, Any]:
    """Run the cases that a record does not hold yet, and write it after each.

    Args:
        cases: by name.
        path: where the record is and goes.
        seconds: after that, no further case begins.
        works: tells after each case whether the device still works; the part ends where it does not.
    """
    record, started = load(path), time.perf_counter()
    record["left_out"] = {}
    record.pop("lost", None)
    for name, case in cases.items():
        if name in record["cases"] or name in record["errors"]:
            continue
        if time.perf_counter() - started > seconds:
            record["left_out"][name] = LATE
            continue
        record["running"] = name
        write_json(path, record)
        _guarded(name, case, record)
        record |= {"running": None, "wall_seconds": round(time.perf_counter() - started, 1)}
        if not works():
            record["lost"] = name  # the next process goes on without it
            break
    write_json(path, record)
    return record


def _guarded(name: str, case: Callable[[], dict], record: dict[str, Any]) -> None:
    """Run one case and record its result or its traceback."""
    started = time.perf_counter()
    try:
        result = case()
    except WrongCaseError as error:
        result, record["errors"][name] = error.record, str(error)
    except Exception:
        result, record["errors"][name] = None, traceback.format_exc(limit=-12)
    if result is not None:
        record["cases"][name] = {**result, "wall_seconds": round(time.perf_counter() - started, 2)}
    gc.collect()
