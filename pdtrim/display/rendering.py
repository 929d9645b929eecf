"""Tables and pages for terminal and notebook, with Rich. What users wrote is shown as it is, never read as markup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from pdtrim.contract.estimate import Estimate
from pdtrim.contract.frontier import Frontier
from pdtrim.contract.results import EvaluationResult, RemovalResult
from pdtrim.display.tables import (
    SENSITIVITY_COLUMNS,
    Table,
    bound_lines,
    budget_tables,
    controls_table,
    effort_lines,
    estimate_facts,
    estimate_stages,
    estimate_table,
    evaluation_tables,
    folded,
    frontier_tables,
    parts_table,
    sample_tables,
    sensitivity_table,
    took,
)
from pdtrim.display.verdict import Mark, Verdict

VERDICT_STYLES: Mapping[Mark, str] = {"good": "bold green", "fair": "bold yellow", "bad": "bold red"}


def rendered(table: Table) -> RichTable:
    """A table as Rich shows it."""
    title = Text(table.title) if table.title else None
    made = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column, numeric in zip(table.columns, table.numeric, strict=True):
        made.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*map(Text, row))
    return made


def evaluation_report(evaluation: EvaluationResult) -> RenderableType:
    """What each checkpoint gave up, what it is worth and what it costs."""
    parts: list[RenderableType] = [*map(rendered, evaluation_tables(evaluation))]
    for table in sample_tables(evaluation.samples):
        # A table's own title is no wider than the table.
        parts += [Text(table.title), rendered(replace(table, title=""))]
    return Group(*parts)


def verdict_report(found: Verdict) -> RenderableType:
    """What was saved and what it costs, with what is bad marked."""
    facts = [
        f"  {fact.name}: {fact.value} {fact.beside}{' (bad)' if fact.mark == 'bad' else ''}"
        for fact in (*found.saved, *found.costs)
    ]
    return Group(Text(found.sentence, style=VERDICT_STYLES[found.mark]), *map(Text, facts), "")


def search_report(removal: RemovalResult) -> RenderableType:
    """The pair beside its controls, what the search took, bounds on perplexity, and each block's worth."""
    parts: list[RenderableType] = [rendered(controls_table(removal))]
    if (of_kept := parts_table(removal)) is not None:
        parts.append(rendered(of_kept))
    parts += map(rendered, budget_tables(removal.budgets))
    if lines := [*effort_lines(removal), *bound_lines(removal)]:
        parts += [*lines, ""]
    if removal.sensitivity is not None:
        parts.append(rendered(folded(sensitivity_table(removal.sensitivity), SENSITIVITY_COLUMNS)))
    return Group(*parts)


def frontier_report(frontier: Frontier) -> RenderableType:
    """A line for every count: the best set and its loss, in each half; what the job chose is marked."""
    return Group(*map(rendered, frontier_tables(frontier)))


def estimate_report(estimate: Estimate) -> RenderableType:
    """What a job would make and take, with the warnings last."""
    lines = [f"{name}: {value}" for name, value in estimate_facts(estimate).items()]
    if estimate.earlier is not None:
        lines.append(f"Times by {estimate.earlier.job_id} on this model, scaled: {took(estimate)}")
    lines += [f"\n! {warning.param or 'the job'}: {warning.message}" for warning in estimate.warnings]
    tables = [estimate_table(estimate), estimate_stages(estimate)]
    return Group(*(rendered(table) for table in tables if table is not None), *map(Text, lines))
