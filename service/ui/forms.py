"""The submit form: fields made from the job's JSON Schema, what is typed into them as a specification, and errors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from pydantic import ValidationError

from pdtrim.contract.spec import JobSpec
from service.api.problems import field_and_reason
from service.api.suggestions import UNKNOWN_FIELD, with_suggestion

REST = "rest"
"""The field for JSON that the other fields do not cover."""
LABELS = "metadata"
MAX_ERRORS = 50
WHOLE = ""
"""Where errors go that belong to no field."""
SECTIONS: Mapping[str, Mapping[str, str]] = {
    "Model": {"model.source": "Model", "model.revision": "Revision"},
    "Prefill gives up": {
        "prefill.remove_blocks": "Blocks",
        "prefill.max_perplexity_increase": "Perplexity may rise by",
        "prefill.mlp_width": "MLP channels kept",
    },
    "Decode gives up": {
        "decode.remove_blocks": "Blocks",
        "decode.max_perplexity_increase": "Perplexity may rise by",
        "decode.mlp_width": "MLP channels kept",
    },
    "Calibration and search": {
        "data.source": "Text",
        "calibration.windows": "Calibration windows",
        "calibration.window_tokens": "Tokens a window",
        "search.algorithm": "Algorithm",
        "search.objective": "Objective",
        "search.evaluations": "Sets for annealing",
    },
    "Distillation": {
        "distillation.enabled": "Distil",
        "distillation.heal_tokens": "Healing tokens",
        "distillation.threshold": "Delete from cosine",
    },
    "Serving and evaluation": {
        "serving.first_token": "First token by",
        "kv_tokens.ratio": "Send KV tokens, less by",
        "evaluation.windows": "Validation windows",
    },
    "Running": {"queue": "Queue", "priority": "Priority", "seed": "Seed", LABELS: "Labels"},
}
"""The fields of the form by section, with what they are called there; all else about them is in the schema."""
DEEPEST_JSON = 20


@dataclass(frozen=True)
class Field:
    """A field of the form. `path` is its dotted path in the specification and its name in the form."""

    path: str
    label: str
    description: str
    kind: Literal["text", "integer", "number", "select", "checkbox", "labels"]
    value: str = ""
    required: bool = False
    minimum: float | None = None
    maximum: float | None = None
    options: Sequence[str] = ()
    placeholder: str = ""
    errors: Sequence[str] = ()

    @property
    def id(self) -> str:
        return f"field-{self.path.replace('.', '-')}"


@dataclass(frozen=True)
class Form:
    """The form as it is shown: its sections, the JSON beside them, and errors that belong to none of its fields."""

    sections: Mapping[str, Sequence[Field]]
    rest: Field
    errors: Sequence[str] = ()

    @property
    def fields(self) -> list[Field]:
        return [*(field for fields in self.sections.values() for field in fields), self.rest]

    @property
    def faulty(self) -> list[Field]:
        return [field for field in self.fields if field.errors]


class Unreadable(Exception):
    """What was typed is no specification; `errors` are by field."""

    def __init__(self, errors: Mapping[str, Sequence[str]]) -> None:
        super().__init__("the form has errors")
        self.errors = errors


def blank(queues: Sequence[str]) -> Form:
    """The form with every default filled in."""
    return _form({field.path: field.value for field in _fields()}, queues)


def filled(typed: Mapping[str, str], queues: Sequence[str], errors: Mapping[str, Sequence[str]] | None = None) -> Form:
    """The form as somebody filled it in, with errors at their fields."""
    return _form(typed, queues, errors or {})


def _form(typed: Mapping[str, str], queues: Sequence[str], errors: Mapping[str, Sequence[str]] | None = None) -> Form:
    known = errors or {}

    def shown(field: Field) -> Field:
        options = queues if field.path == "queue" else field.options
        return replace(field, value=typed.get(field.path, ""), errors=known.get(field.path, ()), options=options)

    made = iter(_fields())
    sections = {title: [shown(next(made)) for _ in paths] for title, paths in SECTIONS.items()}
    return Form(sections, shown(next(made)), known.get(WHOLE, ()))


def to_spec(typed: Mapping[str, str]) -> JobSpec:
    """The specification that was typed. Raises: Unreadable."""
    content: dict[str, Any] = {}
    for field in _fields()[:-1]:
        text = typed.get(field.path, "").strip()
        if field.kind == "checkbox":
            _set(content, field.path, bool(text))
        elif text:
            _set(content, field.path, _labels(text) if field.kind == "labels" else _number(text, field.kind))
    for required in ("prefill", "decode"):
        content.setdefault(required, {})
    _merge(content, _rest(typed.get(REST, "")))
    try:
        return JobSpec.model_validate(content)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for one in error.errors()[:MAX_ERRORS]:
            told = with_suggestion(one, _schema(), _schema()) if one["type"] == UNKNOWN_FIELD else one
            path, reason = field_and_reason({**told, "loc": ("body", *one["loc"])})
            at = place(path)
            named = path is None or at == path or at.startswith(f"{path}.")
            found.setdefault(at, []).append(reason if named else f"{path}: {reason}")
        raise Unreadable(found) from error


@cache
def _schema() -> Mapping[str, Any]:
    return JobSpec.model_json_schema()


def place(path: str | None) -> str:
    """The field at which an error about a specification's `path` is shown."""
    if path is None:
        return WHOLE
    if is_field(path):
        return path
    inner = (field.path for field in _fields() if field.path.startswith(f"{path}."))
    outer = (field.path for field in _fields() if path.startswith(f"{field.path}."))
    return next(inner, next(outer, REST))


def is_field(path: str | None) -> bool:
    return any(field.path == path for field in _fields())


def _set(content: dict[str, Any], path: str, value: Any) -> None:
    *outer, name = path.split(".")
    for part in outer:
        content = content.setdefault(part, {})
    content[name] = value


def _merge(content: dict[str, Any], over: Mapping[str, Any]) -> None:
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(content.get(name), dict):
            _merge(content[name], value)
        else:
            content[name] = value


def _number(text: str, kind: str) -> int | float | str:
    """What a number says; another text stays, so that its check can say what is wrong with it."""
    try:
        return int(text) if kind == "integer" else float(text) if kind == "number" else text
    except ValueError:
        return text


def _labels(text: str) -> dict[str, str]:
    pairs = [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise Unreadable({LABELS: [f"Write labels as key=value, separated by commas: {wrong[0][:80]!r} has no `=`."]})
    return {key.strip(): value.strip() for key, _, value in (pair.partition("=") for pair in pairs)}


def _rest(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
        deep = _depth(found) > DEEPEST_JSON
    except json.JSONDecodeError as error:
        reason = f"This is not JSON: {error.msg} in line {error.lineno}, column {error.colno}."
        raise Unreadable({REST: [reason]}) from error
    except RecursionError as error:
        raise Unreadable({REST: ["This JSON is nested too deeply."]}) from error
    if not isinstance(found, dict):
        raise Unreadable({REST: ["Give a JSON object, such as {}."]})
    if deep:
        raise Unreadable({REST: ["This JSON is nested too deeply."]})
    return found


def _depth(value: Any) -> int:
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


@cache
def _fields() -> tuple[Field, ...]:
    """Every field with its default, the last one for the rest."""
    schema = JobSpec.model_json_schema()
    made = [_field(schema, path, label) for section in SECTIONS.values() for path, label in section.items()]
    rest = Field(
        REST,
        "More, as JSON",
        'Other parts of the specification, such as `{"search": {"protect": [0]}}`. It goes before what the fields say.',
        "text",
    )
    return (*made, rest)


def _field(schema: Mapping[str, Any], path: str, label: str) -> Field:
    node: Mapping[str, Any] = schema
    required = True
    for part in path.split("."):
        inside = _resolved(schema, node)
        required = required and part in inside.get("required", ())
        node = inside["properties"][part]
    found = {**_resolved(schema, node), **{key: node[key] for key in ("description", "default") if key in node}}
    default = found.get("default")
    return Field(
        path,
        label,
        found.get("description", ""),
        "labels" if path == LABELS else _kind(found, path),
        value=_typed(default),
        required=required,
        minimum=found.get("minimum"),
        maximum=found.get("maximum"),
        options=found.get("enum", ()),
        placeholder=str((node.get("examples") or found.get("examples") or [""])[0]) if default is None else "",
    )


def _kind(found: Mapping[str, Any], path: str) -> Literal["text", "integer", "number", "select", "checkbox"]:
    if "enum" in found or path == "queue":
        return "select"
    kinds: dict[str, Literal["integer", "number", "checkbox"]] = {
        "integer": "integer",
        "number": "number",
        "boolean": "checkbox",
    }
    return kinds.get(found.get("type", ""), "text")


def _typed(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else ""
    return "" if default is None or default == {} else str(default)


def _resolved(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema with its reference followed; of alternatives, the first that is not null."""
    if "$ref" in node:
        return _resolved(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
    if "anyOf" in node:
        return _resolved(schema, next(one for one in node["anyOf"] if one.get("type") != "null"))
    return node
