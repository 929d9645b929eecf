"""The report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from functools import cache

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from pdtrim.contract.results import Plan, SearchRecord
from pdtrim.display import captions
from pdtrim.display.tables import (
    SENSITIVITY_COLUMNS,
    Table,
    bound_lines,
    budget_tables,
    controls_table,
    folded,
    parts_table,
    sensitivity_table,
)
from pdtrim.display.verdict import verdict
from workers.reporting.figures import DARK, INK, Drawing
from workers.reporting.findings import Findings


def render(findings: Findings, drawings: Iterable[Drawing]) -> str:
    """The report as HTML. Every number in it is one that a stage recorded."""
    plan = findings.plan
    return _template().render(
        findings=findings,
        spec=yaml.safe_dump(findings.spec.model_dump(mode="json", exclude_unset=True), sort_keys=False),
        verdict=verdict(findings.evaluation, bounds=plan.bounds),
        told=captions.VERDICT,
        samples=captions.SAMPLES,
        evaluation=findings.evaluation_tables(),
        search=_search_tables(plan, findings.search),
        bounds=bound_lines(plan),
        drawings={drawing.name: drawing for drawing in drawings},
        layer_map=plan.kv_layer_map,
        light=vars(INK),
        dark=vars(DARK),
    )


def _search_tables(plan: Plan, search: SearchRecord) -> list[Table]:
    worth = plan.sensitivity
    of_blocks = [] if worth is None else [folded(sensitivity_table(worth), SENSITIVITY_COLUMNS)]
    of_kept = parts_table(plan)
    return [
        controls_table(plan),
        *([] if of_kept is None else [of_kept]),
        *budget_tables(search.budgets),
        *of_blocks,
    ]


def data_uri(drawing: Drawing) -> str:
    """The figure as the source of an image. As one, its identifiers cannot meet those of others on the page."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.svg.encode()).decode()


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("workers.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment.get_template("report.html.jinja")
