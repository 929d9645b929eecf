"""A job's search, frontier, evaluation and estimate as tables for people, with Rich."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pdtrim.contract.estimate import Estimate
from pdtrim.contract.frontier import Frontier, FrontierPoint
from pdtrim.contract.results import EvaluationResult, RemovalResult
from pdtrim.display.tables import Sheet, bound_lines, controls_sheet, evaluation_sheets, listed, sensitivity_sheet


def report(evaluation: EvaluationResult) -> RenderableType:
    """What each checkpoint gave up, what it is worth and what it costs."""
    return Group(*map(_table, evaluation_sheets(evaluation)))


def search_report(removal: RemovalResult) -> RenderableType:
    """The nested pair beside its controls, bounds on perplexity, and each block's worth where it was measured."""
    bounds, worth = bound_lines(removal), removal.sensitivity
    parts: list[RenderableType] = [_table(controls_sheet(removal)), *bounds]
    return Group(*parts, *([""] if bounds else []), *([] if worth is None else [_table(sensitivity_sheet(worth))]))


def frontier_report(frontier: Frontier) -> RenderableType:
    """A line for every count: the best set and its loss, in each half; what the job chose is marked."""
    return Group(
        _curve("Prefill, or both halves", frontier.objective, frontier.prefill, frontier.chosen.prefill),
        _curve(
            f"Decode, where prefill gives up {listed(frontier.decode[0].removed)}",
            frontier.objective,
            frontier.decode,
            frontier.chosen.decode,
        ),
    )


def _curve(half: str, objective: str, points: Sequence[FrontierPoint], chosen: FrontierPoint) -> Table:
    title = f"{half}: {objective} before distillation"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    bounded = any(point.perplexity_increase is not None for point in points)
    for column in ("", "blocks", "loss", *(["perplexity"] if bounded else []), "gives up"):
        table.add_column(column, justify="left" if column in ("", "gives up") else "right")
    for point in points:
        mark = "→" if point.remove_blocks == chosen.remove_blocks else ""
        increase = "" if point.perplexity_increase is None else f"{point.perplexity_increase:+.1%}"
        removed = listed(f"{b}→{point.distilled[b]}" if b in point.distilled else b for b in point.removed)
        figures = (f"{point.loss:.4f}", *([increase] if bounded else []))
        table.add_row(mark, str(point.remove_blocks), *figures, removed)
    return table


def estimate_report(estimate: Estimate) -> RenderableType:
    """What a job would make and take, with the warnings last."""
    table = Table(
        title=f"{estimate.architecture}, estimated", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in ("", "blocks", "parameters", "weights", "KV cache a token"):
        table.add_column(column, justify="right" if column else "left")
    for one in (estimate.dense, *estimate.checkpoints):
        parameters = "" if one.parameters is None else f"{one.parameters:,}"
        table.add_row(one.role, str(one.blocks), parameters, _size(one.bytes), _size(one.kv_bytes_per_token))
    sets, memory = estimate.evaluations, estimate.memory_bytes
    lines = [
        f"Sets to evaluate, at most about: prefill {sets.prefill:,}, decode {sets.decode:,}, control {sets.control:,}",
        f"Memory, at least: search {_size(memory.search) or 'unknown'}, distillation "
        f"{_size(memory.distillation) or 'none'}",
    ]
    if estimate.earlier is not None:
        took = ", ".join(f"{stage} {seconds:,.0f} s" for stage, seconds in estimate.earlier.seconds.items())
        lines.append(f"On this model {estimate.earlier.job_id} took: {took}")
    lines += [f"\n! {warning.param or 'the job'}: {warning.message}" for warning in estimate.warnings]
    return Group(table, *map(Text, lines))


def _size(found: int | None) -> str:
    return "" if found is None else decimal(found)


def _table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column, numeric in zip(sheet.columns, sheet.numeric, strict=True):
        table.add_column(column, justify="right" if numeric else "left")
    for row in sheet.rows:
        table.add_row(*row)
    return table
