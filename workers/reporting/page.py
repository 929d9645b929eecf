"""The report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from functools import cache

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from pdtrim.contract.results import Plan
from pdtrim.display.quantities import size
from pdtrim.display.tables import SENSITIVITY_COLUMNS, Table, bound_lines, controls_table, folded, sensitivity_table
from workers.reporting.figures import DARK, INK, Drawing
from workers.reporting.findings import Findings


def render(findings: Findings, drawings: Iterable[Drawing]) -> str:
    """The report as HTML. Every number in it is one that a stage recorded."""
    plan = findings.plan
    return _template().render(
        findings=findings,
        spec=yaml.safe_dump(findings.spec.model_dump(mode="json", exclude_unset=True), sort_keys=False),
        facts=_facts(findings),
        evaluation=findings.evaluation_tables(),
        search=_search_tables(plan),
        bounds=bound_lines(plan),
        drawings={drawing.name: drawing for drawing in drawings},
        layer_map=plan.kv_layer_map,
        light=vars(INK),
        dark=vars(DARK),
    )


def _search_tables(plan: Plan) -> list[Table]:
    worth = plan.sensitivity
    of_blocks = [] if worth is None else [folded(sensitivity_table(worth), SENSITIVITY_COLUMNS)]
    return [controls_table(plan), *of_blocks]


def _facts(findings: Findings) -> list[tuple[str, str, str]]:
    """What readers look for first: what it is, the figure, and what it is to be seen beside."""
    models, pair = findings.models, findings.evaluation.pair
    kv, rule = pair.kv_bytes_per_request, pair.kv_tokens
    dense = models["dense"]
    facts = []
    for role in findings.roles:
        model = models[role]
        facts.append((f"{role}: blocks", str(model.blocks), f"of {dense.blocks}"))
        perplexity, before = model.perplexity.value, dense.perplexity.value
        facts.append((f"{role}: perplexity", f"{perplexity:.2f}", f"dense {before:.2f}"))
        faster = dense.inter_token_latency_ms / model.inter_token_latency_ms
        facts.append((f"{role}: next token", f"{faster:.2f}×", "as fast as dense"))
    sent = kv.sent if rule is None else rule.bytes_sent
    facts.append(("KV sent to decode", f"{sent / kv.dense_sent:.0%}", f"of {size(kv.dense_sent)}"))
    return facts


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
