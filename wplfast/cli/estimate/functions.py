"""Functions of the user's, ``module:function``: found in the current directory and among what is installed."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any


def is_function(text: str) -> bool:
    """Tell whether an argument names a function rather than a file."""
    return not os.path.exists(text) and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text) is not None


def call(text: str, option: str) -> Any:
    """Import ``module:function`` and call it without arguments.

    Args:
        text: the argument.
        option: its name, for messages.

    Raises:
        ValueError: if there is no such function, or it fails; with the place where.
    """
    function = _imported(text, option)
    try:
        return function()
    except Exception as error:
        raise ValueError(f"{option} {text}: {told(error)}") from error


def told(error: BaseException) -> str:
    """Say what an error of a user's code is, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.relpath(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _imported(text: str, option: str) -> Callable[[], Any]:
    """Import a function.

    Raises:
        ValueError: if that fails.
    """
    module_name, _, name = text.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(
                f"{option} {text}: there is no module {module_name!r} in {os.getcwd()} or among those installed"
            ) from error
        raise ValueError(f"{option} {text}: {told(error)}") from error
    except Exception as error:
        raise ValueError(f"{option} {text}: {told(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise ValueError(f"{option} {text}: {module_name} has no function {name!r}; it has {own or 'none'}")
    return function  # type: ignore[no-any-return]
