"""Values that the chart does not know, or of another type, are refused; what it says of them is current."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import helm_python
import pytest
import yaml

from service.settings import Settings
from tests.chart.rendering import CHART, ROOT, SCENARIOS, chart, of_kind, render

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


@pytest.fixture(scope="module")
def document() -> ModuleType:
    """The script behind `make chart-docs`."""
    spec = spec_from_file_location("document", ROOT / "helm" / "document.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := module_from_spec(spec))
    return module


def mistakes() -> Iterator[dict[str, Any]]:
    """Values with one mistake each."""
    for name in VALUES:
        # Free form: Kubernetes' own, or names that are the user's.
        if isinstance(VALUES[name], dict) and name not in ("commonLabels", "pools"):
            yield {name: {"unknown": 1}}
    yield {"unknown": 1}
    yield {"gateway": {"replicas": "two"}}
    yield {"gateway": {"replicas": -1}}
    yield {"gateway": {"image": {"digest": "sha256:123"}}}
    yield {"gateway": {"image": {"pullPolicy": "Sometimes"}}}
    yield {"gateway": {"resources": {"limits": {"memory": "1 GB"}}}}
    yield {"gateway": {"resources": {"limit": {}}}}
    yield {"gateway": {"tolerations": [{"keys": "gpu"}]}}
    yield {"gateway": {"topologySpreadConstraints": [{"maxSkew": 1}]}}
    yield {"gateway": {"service": {"port": 0}}}
    yield {"worker": {"queues": "gpu"}}
    yield {"pools": {"default": {"gpus": 1}}}
    yield {"pools": {"default": {"gpu": {"count": "1"}}}}
    yield {"pools": {"default": {"autoscaling": {"maxReplicas": 0}}}}
    yield {"pools": {"Big": {}}}
    yield {"pools": {"big": {"queues": ["a'); DROP TABLE jobs; --"]}}}
    yield {"pools": {"big": {"queues": ["a", "a"]}}}
    yield {"pools": {"big": {"queues": []}}}
    yield {"defaultQueue": ""}
    yield {"settings": {"PDTRIM_QUEUES": ["a"]}}
    yield {"settings": {"PDTRIM_OIDC_SCOPES": {"engineer": "everything"}}}
    yield {"pools": {"big": {"scratch": {"size": 100}}}}
    yield {"settings": {"PDTRIM_RETENTION_DAY": 1}}
    yield {"settings": {"PDTRIM_RETENTION_DAYS": "soon"}}
    yield {"settings": {"PDTRIM_LOG_LEVEL": "LOUD"}}
    yield {"settings": {"PDTRIM_API_KEY": "a secret in a ConfigMap"}}
    yield {"settings": {"PDTRIM_DATABASE_URL": "postgresql+psycopg://u:p@h/n"}}
    yield {"store": {"url": "gs://bucket"}}
    yield {"database": {"existingSecret": ""}}
    yield {"apiKey": {"existingSecret": ""}}
    yield {"httpRoute": {"enabled": True}}
    yield {"environment": [{"value": "1"}]}
    yield {"monitoring": {"serviceMonitor": {"interval": "soon"}}}


@pytest.mark.parametrize("values", list(mistakes()), ids=json.dumps)
def test_unknown_and_mistyped_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmValuesError):
        chart().validate_schema(values)
    with pytest.raises(helm_python.HelmError):
        render(values)


@pytest.mark.parametrize("values", SCENARIOS.values(), ids=SCENARIOS.keys())
def test_good_values_are_taken(values: dict[str, Any]) -> None:
    chart().validate_schema(values)


def test_the_readmes_pools_are_ones_that_the_chart_takes() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (CHART / "README.md").read_text(), re.DOTALL)
    values = yaml.safe_load(example)
    chart().validate_schema(values)
    assert of_kind(render(values), "Deployment").keys() >= {f"pdtrim-worker-{pool}" for pool in values["pools"]}


def objects(schema: Any, path: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema of an object within a schema, with its place."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield path, schema
        for name, part in schema.items():
            yield from objects(part, f"{path}/{name}")
    elif isinstance(schema, list):
        for number, part in enumerate(schema):
            yield from objects(part, f"{path}/{number}")


def test_the_schema_leaves_nothing_open_but_what_goes_to_kubernetes_as_it_is() -> None:
    open_ones = {path for path, schema in objects(SCHEMA) if schema.get("additionalProperties", True) is True}
    assert open_ones == {"#/$defs/kubernetes", "#/properties/global"}


def test_every_value_has_a_schema_and_every_schema_a_value() -> None:
    def names(schema: dict[str, Any], values: dict[str, Any], path: str = "") -> None:
        if "$ref" in schema:
            schema = SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        if schema.get("type") != "object" or schema.get("additionalProperties") is not False:
            return
        if path in ("/settings", *(f"/{part}/affinity" for part in ("gateway", "reconciler", "worker"))):
            return
        assert schema["properties"].keys() - {"global"} == values.keys(), path
        for name, value in values.items():
            names(schema["properties"][name], value, f"{path}/{name}")

    names(SCHEMA, VALUES)


def test_the_table_of_values_and_the_schemas_settings_are_current(document: ModuleType) -> None:
    """If not: `make chart-docs`."""
    text = (CHART / "README.md").read_text()
    assert document.readme(text, (CHART / "values.yaml").read_text()) == text
    text = (CHART / "values.schema.json").read_text()
    assert document.schema(text) == text


def test_every_setting_is_the_users_or_the_charts(document: ModuleType) -> None:
    assert {f"PDTRIM_{name.upper()}" for name in Settings.model_fields} == (
        SCHEMA["properties"]["settings"]["properties"].keys() | document.OURS
    )
