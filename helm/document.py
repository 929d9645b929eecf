"""Writes what the chart says of itself: its README's table of values, and the service's settings in its schema.

`make chart-docs` runs it after a change of values.yaml or of the service's settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr

from service.settings import Settings

CHART = Path(__file__).parent / "pdtrim"
BEGIN, END = "<!-- values: made by `make chart-docs` -->", "<!-- end of values -->"
OURS = {
    "PDTRIM_API_KEY",
    "PDTRIM_ARTIFACTS_URL",
    "PDTRIM_BROKER_URL",
    "PDTRIM_DATABASE_URL",
    "PDTRIM_DATA_DIR",
    "PDTRIM_HOST",
    "PDTRIM_HUB_PUSH_TOKEN",
    "PDTRIM_PORT",
    "PDTRIM_QUEUES",
    "PDTRIM_RECONCILE_IN_GATEWAY",
    "PDTRIM_S3_ENDPOINT_URL",
    "PDTRIM_S3_PUBLIC_ENDPOINT_URL",
    "PDTRIM_S3_REGION",
    "PDTRIM_SCRATCH_DIR",
    "PDTRIM_SESSION_SECRET",
    "PDTRIM_SHUTDOWN_SECONDS",
    "PDTRIM_WORKER_METRICS_PORT",
}
"""What the chart sets itself, or reads from Secrets. No other secret belongs into its values either."""


def documented(
    node: yaml.MappingNode, values: dict[str, Any], lines: list[str], path: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Each value's path, default and description: the lines above it from `# --` on.

    Raises: ValueError for one without.
    """
    for key, value in node.value:
        name = f"{path}.{key.value}" if path else key.value
        text = _comment_above(lines, key.start_mark.line)
        if text is not None:
            yield name, json.dumps(values[key.value], ensure_ascii=False), text
        elif isinstance(value, yaml.MappingNode):
            yield from documented(value, values[key.value], lines, name)
        else:
            raise ValueError(f"{name} has no line `# -- …` above it")


def _comment_above(lines: list[str], line: int) -> str | None:
    found: list[str] = []
    while line and lines[line - 1].strip().startswith("#"):
        line -= 1
        found.insert(0, lines[line].strip().removeprefix("#").strip())
        if found[0].startswith("--"):
            return " ".join(found).removeprefix("--").strip()
    return None


def table(values: str) -> str:
    """The values as a table in Markdown."""
    node = yaml.compose(values)
    assert isinstance(node, yaml.MappingNode)
    rows = documented(node, yaml.safe_load(values), values.splitlines())
    cells = ((f"`{name}`", f"`{default}`", text.replace("|", "\\|")) for name, default, text in rows)
    return "\n".join(["| value | default | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in cells)])


def readme(text: str, values: str) -> str:
    """The chart's README with a current table."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(values)}\n{END}{rest.split(END)[1]}"


def settings() -> dict[str, Any]:
    """JSON Schema of the settings that `settings` in the values may hold."""
    secret = {name for name, field in Settings.model_fields.items() if SecretStr in _types(field.annotation)}
    model = Settings.model_json_schema()
    found = model["properties"]
    named = {f"PDTRIM_{name.upper()}": found[name] for name in sorted(found.keys() - secret)}
    dropped = ("title", "default", "format")
    properties = {
        name: {key: value for key, value in property.items() if key not in dropped}
        for name, property in named.items()
        if name not in OURS
    }
    text = json.dumps(properties)
    for name, definition in model.get("$defs", {}).items():
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(definition))
    return {"type": "object", "additionalProperties": False, "properties": json.loads(text)}


def _types(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", (annotation,))


def schema(text: str) -> str:
    """The values' schema with the service's current settings."""
    parsed = json.loads(text)
    parsed["properties"]["settings"] = settings()
    return json.dumps(parsed, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    for path, made in (
        (CHART / "README.md", lambda text: readme(text, (CHART / "values.yaml").read_text())),
        (CHART / "values.schema.json", schema),
    ):
        path.write_text(made(path.read_text()))


if __name__ == "__main__":
    main()
