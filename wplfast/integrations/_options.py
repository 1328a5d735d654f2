"""Options that integrations pass on to ``fisher_diagonal``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from ..fisher.diagonal import fisher_diagonal


def check_options(function: Callable[..., Any], options: Iterable[str]) -> None:
    """Refuse an option that neither a function nor ``fisher_diagonal`` has, in the name of the former.

    Raises:
        TypeError: if there is one.
    """
    known = {
        name
        for of in (function, fisher_diagonal)
        for name, parameter in inspect.signature(of).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{hint}")
