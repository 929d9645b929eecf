"""Writes reference pages from what they describe: the schema of jobs, the OpenAPI document, settings, commands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer
from typer.cli import get_docs_for_click

from pdtrim.command import app as commands
from pdtrim.contract.spec import JobSpec
from service.app import TAGS, create_app
from service.settings import Settings
from workers import pruning

ROOT = Path(__file__).parents[1]
BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "≥ {} characters",
    "maxLength": "≤ {} characters",
    "minItems": "≥ {} items",
    "maxItems": "≤ {} items",
    "maxProperties": "≤ {} keys",
}
Schema = Mapping[str, Any]
Link = Callable[[str], str]
"""From a schema's name to what a table shows for it."""


def job() -> str:
    """Every field of a job, one table for each of its parts, by the path that errors name in `param`."""
    document = JobSpec.model_json_schema()
    definitions = document["$defs"]
    parts = list(_parts(document, definitions, ""))
    paths = {name: path for path, name, _ in reversed(parts)}
    texts = {name: _text(schema) for name, schema in definitions.items()}

    def link(name: str) -> str:
        return f"[object](#{_slug(paths[name])})" if name in paths else _kind(definitions[name], link)

    sections = []
    for path, _, schema in parts:
        title = f"## `{path}` {{: #{_slug(path)} }}" if path else "## Top level"
        table = _fields(schema, link, prefix=f"{path}." if path else "", texts=texts)
        sections.append(f"{title}\n\n{_text(schema)}\n\n{table}")
    return "\n\n".join(sections)


def _parts(schema: Schema, definitions: Schema, path: str, name: str = "") -> Iterator[tuple[str, str, Schema]]:
    """The objects that a job is made of, outermost first: path, schema's name, schema."""
    yield path, name, schema
    for field, property_ in schema["properties"].items():
        for inner in _references(property_):
            if "properties" in definitions[inner]:
                yield from _parts(definitions[inner], definitions, f"{path}.{field}" if path else field, inner)


def _references(schema: Schema) -> Iterator[str]:
    """The names of the schemas that one says a value may have, or a list's items."""
    if "$ref" in schema:
        yield schema["$ref"].rsplit("/", 1)[1]
    for member in (*schema.get("anyOf", ()), *filter(None, [schema.get("items")])):
        yield from _references(member)


def http() -> str:
    """Every operation of the HTTP interface, by noun, then the schemas of what it answers."""
    document = create_app(Settings()).openapi()
    schemas = document["components"]["schemas"]
    of_jobs = JobSpec.model_json_schema()["$defs"]
    named = [name for name in schemas if not name.startswith("JobSpec-") and name not in of_jobs]

    def link(name: str) -> str:
        if name.startswith("JobSpec-"):
            return "[job specification](job.md)"
        if "enum" in schemas[name] or name not in named:
            return _kind(schemas[name], link)
        return f"[{_title(name)}](#{_slug(_title(name))})"

    operations = [
        (operation["tags"][0], f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    sections = []
    for tag in TAGS:
        sections.append(f"## {tag['name'].capitalize()}\n\n{tag['description']}")
        sections += [_operation(title, one, link) for name, title, one in operations if name == tag["name"]]
    sections.append("## Messages to webhooks")
    called = document["paths"]["/v1/webhooks"]["post"]["callbacks"]
    sections += [_operation(name, way["post"], link) for name, ways in called.items() for way in ways.values()]
    sections.append("## Objects")
    for name in named:
        if "properties" in (schema := schemas[name]):
            sections.append(f"### {_title(name)}\n\n{_text(schema)}\n\n{_fields(schema, link)}")
    return "\n\n".join(sections)


def _operation(title: str, operation: Schema, link: Link) -> str:
    parts = [f"### `{title}` {{: #{operation['operationId']} }}", f"**{operation['summary']}.**", _text(operation)]
    if parameters := operation.get("parameters"):
        rows = [(f"`{one['name']}`", one["in"], _kind(one["schema"], link), _text(one)) for one in parameters]
        parts.append(_table(("parameter", "in", "type", ""), rows))
    if body := operation.get("requestBody"):
        content = body["content"]["application/json"]
        parts.append(f"Body: {_kind(content['schema'], link)}")
        parts += [_example(one["summary"], one["value"]) for one in content.get("examples", {}).values()]
    rows = [(code, _text(answer), _content(answer, link)) for code, answer in sorted(operation["responses"].items())]
    parts.append(_table(("status", "", "body"), rows))
    for code, answer in operation["responses"].items():
        for media in answer.get("content", {}).values():
            if code < "300" and isinstance(media.get("example"), (dict, list)):
                parts.append(_example(f"An answer of {code}", media["example"]))
    return "\n\n".join(part for part in parts if part)


def _content(answer: Schema, link: Link) -> str:
    """What an answer holds: problems by their codes, the rest by its schema."""
    for media, content in answer.get("content", {}).items():
        if media == "application/problem+json":
            return "problem " + ", ".join(f"`{code}`" for code in content["examples"])
        kind = _kind(content.get("schema", {}), link)
        return kind if media == "application/json" else f"`{media}`" + (f": {kind}" if kind else "")
    return ""


def settings() -> str:
    """Every variable that the service reads, with its default."""
    document = Settings.model_json_schema()
    rows = []
    for name, schema in document["properties"].items():
        default = schema.get("default")
        shown = "" if default in (None, "") else f"`{default if isinstance(default, str) else json.dumps(default)}`"
        rows.append((f"`PDTRIM_{name.upper()}`", shown, _text(schema)))
    return _table(("variable", "default", "meaning"), rows)


def cli() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    group = typer.main.get_command(commands)
    made = get_docs_for_click(obj=group, ctx=typer.Context(group), name="pdtrim", indent=1)
    # Every command has a section anyway, and is cut short here.
    made = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", made)
    # As headings they would be code, which a table of contents shows badly.
    return re.sub(r"^(#+) `(.*)`$", r"\1 \2", made, flags=re.MULTILINE)


def measurements() -> str:
    """benchmarks/RESULTS.md."""
    return _without_title(ROOT / "benchmarks" / "RESULTS.md")


def chart() -> str:
    """The README of the Helm chart."""
    return _without_title(ROOT / "helm" / "pdtrim" / "README.md").replace("(../../README.md)", "(../index.md)")


def changelog() -> str:
    """What changed from version to version."""
    return _without_title(ROOT / "CHANGELOG.md")


def reading_order() -> str:
    """In which order the method's files are read, as its package says."""
    _, _, listed = (pruning.__doc__ or "").partition("\n\nmodel/")
    return f"```text\nmodel/{listed.rstrip()}\n```"


def _without_title(path: Path) -> str:
    return path.read_text().split("\n", 1)[1]


PARTS: Mapping[str, Callable[[], str]] = {
    made.__name__: made for made in (job, http, settings, cli, measurements, chart, changelog, reading_order)
}
"""What `<!-- generated: … -->` may name."""


def _fields(schema: Schema, link: Link, *, prefix: str = "", texts: Mapping[str, str] = MappingProxyType({})) -> str:
    """A table of an object's properties; what says nothing of itself is described by `texts`, by its schema's name."""
    required = schema.get("required", ())
    rows = []
    for name, field in schema["properties"].items():
        default = field.get("default")
        scalar = default is not None and not isinstance(default, dict)
        shown = "required" if name in required else f"`{json.dumps(default)}`" if scalar else ""
        text = _text(field) or " ".join(texts.get(inner, "") for inner in _references(field))
        rows.append((f"`{prefix}{name}`", shown, _kind(field, link), text))
    return _table(("field", "default", "type", ""), rows)


def _kind(schema: Schema, link: Link) -> str:
    """A schema in words: `integer, ≥ 1, ≤ 64`."""
    if "$ref" in schema:
        return link(schema["$ref"].rsplit("/", 1)[1])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if members := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(member, link) for member in members))
    kind = {"string": "text"}.get(schema.get("type", ""), schema.get("type", ""))
    if kind == "array":
        kind = f"list of {_kind(schema.get('items', {}), link)}"
    if schema.get("format") == "date-time":
        kind = "time"
    return ", ".join([kind, *(text.format(_number(schema[key])) for key, text in BOUNDS.items() if key in schema)])


def _number(value: float) -> str:
    """Whole numbers without a fraction, large round ones as powers."""
    if value >= 10**6 and re.fullmatch("10+", digits := f"{value:.0f}"):
        return f"1e{len(digits) - 1}"
    return f"{int(value):,}" if value == int(value) else str(value)


def _text(described: Schema) -> str:
    return " ".join(described.get("description", "").split())


def _example(title: str, value: Any) -> str:
    """A folded block of JSON."""
    lines = json.dumps(value, indent=2, ensure_ascii=False).splitlines()
    return "\n".join([f'??? example "{title}"', "", "    ```json", *(f"    {line}" for line in lines), "    ```"])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    escaped = (tuple(cell.replace("|", "\\|") for cell in row) for row in rows)
    lines = [head, tuple("---" for _ in head), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _title(name: str) -> str:
    """`Page_Job_` is a page of jobs."""
    page = re.fullmatch(r"Page_(\w+)_", name)
    return f"Page of {page[1]}" if page else name


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-") or "top-level"
