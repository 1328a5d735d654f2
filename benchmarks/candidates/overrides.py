"""The library's launchers with another plan, for one thread at a time: candidates are compiled in many threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_LOCAL = threading.local()
_MISSING = object()


@contextmanager
def installed(*places: tuple[ModuleType, str]) -> Iterator[None]:
    """Let functions of modules, such as ``(fisher_linear, "choose_plan")``, return what :func:`given` says."""
    before = [(module, name, getattr(module, name)) for module, name in places]

    def asked(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*arguments: Any, **keywords: Any) -> Any:
            value = getattr(_LOCAL, "given", {}).get(name, _MISSING)
            return otherwise(*arguments, **keywords) if value is _MISSING else value

        return answer

    for module, name, function in before:
        setattr(module, name, asked(name, function))
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


@contextmanager
def given(**values: Any) -> Iterator[None]:
    """Make functions of these names return these values in this thread, where they were installed."""
    before = getattr(_LOCAL, "given", {})
    _LOCAL.given = values
    try:
        yield
    finally:
        _LOCAL.given = before


@contextmanager
def constants(module: ModuleType, **values: Any) -> Iterator[None]:
    """Change constants of a module that its functions look up when they are called; for all threads."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)
