"""The record as a table, a figure, and a section of the results page: all searches have the same."""

from __future__ import annotations

from ..search.report import figure, markdown, table

__all__ = ["figure", "markdown", "table"]
