"""A job's search and evaluation as tables for people, with Rich."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from service.sheets import Sheet, bound_lines, controls_sheet, evaluation_sheets, sensitivity_sheet


def report(evaluation: Mapping[str, Any]) -> RenderableType:
    """The evaluation stage's metrics: what each checkpoint gave up, what it is worth and what it costs."""
    return Group(*map(_table, evaluation_sheets(evaluation)))


def search_report(removal: Mapping[str, Any]) -> RenderableType:
    """The removal stage's metrics: the nested pair beside its controls, bounds on perplexity, each block's worth."""
    bounds = bound_lines(removal)
    parts: list[RenderableType] = [_table(controls_sheet(removal)), *bounds]
    return Group(*parts, *([""] if bounds else []), _table(sensitivity_sheet(removal["sensitivity"])))


def _table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column, numeric in zip(sheet.columns, sheet.numeric, strict=True):
        table.add_column(column, justify="right" if numeric else "left")
    for row in sheet.rows:
        table.add_row(*row)
    return table
