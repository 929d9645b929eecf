"""Alerts and the dashboard ask for metrics that there are, and the dashboard for all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import promql_parser
import pytest
import yaml
from prometheus_client.metrics_core import Metric

from service.api.metrics import GatewayMetrics
from service.db.session import connect, migrate
from tests.chart.rendering import CHART, EVERYTHING, ROOT, of_kind, render
from workers.running.metrics import WorkerMetrics

ALERTS = [
    rule for group in yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
DASHBOARD = json.loads((CHART / "files" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


def selected(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads. Raises: ValueError when it is none."""
    expression = expression.replace("$__rate_interval", "5m")
    promql_parser.parse(expression)
    return set(re.findall(r"\b(?:pdtrim|process)_[a-z_]+", expression))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What gateways and workers export: each family's name and type as they stand in the text, with its series."""
    database = connect(f"sqlite:///{tmp_path_factory.mktemp('metrics')}/jobs.db")
    migrate(database)
    gateway, worker = GatewayMetrics(), WorkerMetrics()
    with gateway.of_jobs(database, ["default"]):
        families = [*gateway.registry.collect(), *worker.registry.collect()]
    database.dispose()
    return {family.name: set(_series(family)) for family in families}


def _series(family: Metric) -> Iterator[str]:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
    return (family.name + suffix for suffix in suffixes)


@pytest.mark.parametrize("expression", [*EXPRESSIONS, *(rule["expr"] for rule in ALERTS)])
def test_every_expression_reads_metrics_that_are_exported(exported: dict[str, set[str]], expression: str) -> None:
    names = selected(expression)
    assert names
    assert names <= set().union(*exported.values())


def test_the_dashboard_shows_every_metric_that_the_documentation_lists() -> None:
    page = (ROOT / "docs" / "operations" / "observing.md").read_text()
    table = re.search(r"\| metric \| where \| \|\n(.*?)\n\n", page, re.DOTALL)
    assert table is not None
    listed = {name for row in table[1].splitlines() for name in re.findall(r"`(pdtrim_\w+)`", row.split("|")[1])}
    shown = {name for expression in EXPRESSIONS for name in selected(expression)}
    without_suffix = {re.sub(r"_(bucket|count|sum)$", "", name) for name in shown}
    assert len(listed) > 5
    assert listed - without_suffix == set()


def test_panels_lie_side_by_side_and_ask_the_chosen_source() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}


def test_what_was_checked_is_what_the_chart_installs() -> None:
    documents = render(EVERYTHING)
    assert of_kind(documents, "PrometheusRule")["pdtrim"]["spec"]["groups"][0]["rules"] == ALERTS
    board = of_kind(documents, "ConfigMap")["pdtrim-dashboard"]
    assert json.loads(board["data"]["pdtrim.json"]) == DASHBOARD
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
