"""An extension of Griffe: docstrings as mkdocstrings wants them.

They say ``Example:`` and ``Source:``, which Griffe takes for boxes, and have Sphinx's roles, which editors know.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_REPLACED = (
    (re.compile(r"^(\s*)Example:$", re.MULTILINE), r"\1Examples:"),
    (re.compile(r"^(\s*)Source: ", re.MULTILINE), r"\1**Source**: "),
    (re.compile(r":(?:attr|class|exc|func|meth|mod):(?=`)"), ""),
)


class Docstrings(griffe.Extension):
    """Rewrites every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one object's."""
        if obj.docstring:
            for pattern, text in _REPLACED:
                obj.docstring.value = pattern.sub(text, obj.docstring.value)
