"""The submit form: fields made from the job's JSON Schema, what is typed into them as a specification, and errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from pydantic import ValidationError

from pdtrim.contract.spec import MAX_BLOCKS, JobSpec
from service.api.problems import field_and_reason
from service.api.suggestions import UNKNOWN_FIELD, with_suggestion
from service.ui.presets import Preset, preset_of, with_preset
from service.ui.texts import as_text, from_text

REST = "rest"
"""The field for what the other fields do not cover, as text."""
LABELS = "metadata"
MAX_ERRORS = 50
LONGEST_TOLD = 60
WHOLE = ""
"""Where errors go that belong to no field."""
SECTIONS: Mapping[str, Mapping[str, str]] = {
    "Model": {"name": "Name", "model.source": "Model", "model.revision": "Revision"},
    "Prefill gives up": {
        "prefill.remove_blocks": "Blocks",
        "prefill.max_perplexity_increase": "Perplexity may rise by",
        "prefill.kv_only_blocks": "Blocks kept for keys and values alone",
        "prefill.flops": "Or: share of FLOPs that stays",
    },
    "Decode gives up": {
        "decode.remove_blocks": "Blocks",
        "decode.max_perplexity_increase": "Perplexity may rise by",
        "decode.remove_attentions": "Attentions of other blocks",
        "decode.kv_bytes": "Or: share of KV bytes that stays",
        "decode.weight_bytes": "Or: share of weight bytes that stays",
    },
    "Text, calibration and search": {
        "data.source": "Text",
        "calibration.windows": "Calibration windows",
        "calibration.window_tokens": "Tokens a window",
        "calibration.copying": "Share with a prompt said again",
        "search.algorithm": "Algorithm",
        "search.objective": "Objective",
        "search.evaluations": "Sets for annealing",
    },
    "Width": {"prefill.mlp_width": "MLP channels, prefill", "decode.mlp_width": "MLP channels, decode"},
    "Distillation": {
        "distillation.enabled": "Distil",
        "distillation.heal_tokens": "Healing tokens",
        "distillation.trainable": "Trained",
        "distillation.learning_rate": "Learning rate",
        "distillation.gradient_accumulation": "Parts of a batch",
        "distillation.gradient_checkpointing": "Compute blocks again",
        "distillation.threshold": "Delete from cosine",
    },
    "Serving and evaluation": {
        "serving.first_token": "First token by",
        "kv_tokens.ratio": "Send KV tokens, less by",
        "evaluation.windows": "Validation windows",
    },
    "Running": {"queue": "Queue", "priority": "Priority", "precision": "Compute in", "seed": "Seed", LABELS: "Labels"},
}
"""The fields of the form by section, with what they are called there; all else about them is in the schema.

The first three say what every job has to; the others are folded away.
"""
DEEPEST_JSON = 20
ROUNDS = 4
"""How often a specification is read to find all that is wrong: some checks are made only where others found nothing."""


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

    @property
    def unsaid(self) -> Sequence[str]:
        """Values that mean the default: a choice without one begins with what the service takes then."""
        default = _defaults()[self.path]
        return (default,) if default or not self.options else ("", self.options[0])

    @property
    def told(self) -> str:
        """Its value in a line."""
        value = ("yes" if self.value else "no") if self.kind == "checkbox" else self.value
        return value if len(value) <= LONGEST_TOLD else f"{value[:LONGEST_TOLD]}…"


@dataclass(frozen=True)
class Section:
    """Fields that belong together."""

    title: str
    fields: Sequence[Field]

    @property
    def faulty(self) -> bool:
        return any(field.errors for field in self.fields)

    @property
    def digest(self) -> str:
        """What it says beyond the defaults, in a line."""
        told = (f"{field.label} {field.told}" for field in self.fields if field.value not in field.unsaid)
        return ", ".join(told) or "as by default"


@dataclass(frozen=True)
class Form:
    """The form as it is shown: its sections, the text beside them, and errors that belong to none of its fields."""

    basics: Section
    halves: Sequence[Section]
    folded: Sequence[Section]
    rest: Field
    preset: Preset | None
    errors: Sequence[str] = ()

    @property
    def fields(self) -> list[Field]:
        return [
            *(field for section in (self.basics, *self.halves, *self.folded) for field in section.fields),
            self.rest,
        ]

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
    return _form(_defaults(), queues)


def begun_from(spec: JobSpec) -> dict[str, str]:
    """What somebody would have typed for a specification: what no field can say is in the text beside them."""
    whole, rest = spec.model_dump(mode="json"), spec.model_dump(mode="json", exclude_defaults=True)
    typed: dict[str, str] = {}
    for field in _fields()[:-1]:
        if field.kind == "labels":
            said = ", ".join(f"{key}={value}" for key, value in spec.metadata.items())
            if _labels(said) != spec.metadata:
                continue
            typed[field.path] = said
        else:
            typed[field.path] = _typed(_take(whole, field.path))
        _take(rest, field.path)
    typed[REST] = as_text(rest) if (rest := _without_empty(rest)) else ""
    return typed


def _take(content: Any, path: str) -> Any:
    """What is at a path, which is taken away; None where there is nothing."""
    *outer, name = path.split(".")
    for part in outer:
        content = content.get(part) if isinstance(content, dict) else None
    return content.pop(name, None) if isinstance(content, dict) else None


def _without_empty(content: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, one in content.items()
        if (value := _without_empty(one) if isinstance(one, dict) else one) not in ({}, None)
    }


def with_settings_of(typed: Mapping[str, str], preset: str) -> dict[str, str]:
    """What was typed, with the settings of a preset."""
    return with_preset(typed, preset, _defaults())


def filled(typed: Mapping[str, str], queues: Sequence[str], errors: Mapping[str, Sequence[str]] | None = None) -> Form:
    """The form as somebody filled it in, with errors at their fields."""
    return _form(typed, queues, errors or {})


def _form(typed: Mapping[str, str], queues: Sequence[str], errors: Mapping[str, Sequence[str]] | None = None) -> Form:
    known = errors or {}

    def shown(field: Field) -> Field:
        options = queues if field.path == "queue" else field.options
        return replace(field, value=typed.get(field.path, ""), errors=known.get(field.path, ()), options=options)

    made = iter(_fields())
    sections = [Section(title, [shown(next(made)) for _ in paths]) for title, paths in SECTIONS.items()]
    basics, prefill, decode, *folded = sections
    return Form(
        basics, (prefill, decode), folded, shown(next(made)), preset_of(typed, _defaults()), known.get(WHOLE, ())
    )


@cache
def _defaults() -> dict[str, str]:
    return {field.path: field.value for field in _fields()}


def to_spec(typed: Mapping[str, str]) -> JobSpec:
    """The specification that was typed. Raises: Unreadable, with all that is wrong."""
    errors: dict[str, list[str]] = {}
    content: dict[str, Any] = {}
    for field in _fields()[:-1]:
        text = typed.get(field.path, "").strip()
        if field.kind == "checkbox":
            _set(content, field.path, bool(text))
        elif text and field.kind == "labels":
            with _noted(errors):
                _set(content, field.path, _labels(text))
        elif text:
            _set(content, field.path, _number(text, field.kind))
    for required in ("prefill", "decode"):
        content.setdefault(required, {})
    with _noted(errors):
        _merge(content, _rest(typed.get(REST, "")))
    spec = _read(content, errors)
    if spec is None or errors:
        raise Unreadable(errors)
    return spec


@contextmanager
def _noted(errors: dict[str, list[str]]) -> Iterator[None]:
    """Go on after what cannot be read."""
    try:
        yield
    except Unreadable as unreadable:
        for at, reasons in unreadable.errors.items():
            errors.setdefault(at, []).extend(reasons)


def _read(content: dict[str, Any], errors: dict[str, list[str]]) -> JobSpec | None:
    """The specification that `content` is, if it is one; else every error is added to those of its field.

    Fields are checked first, and one against the other only where all of them will do: so what is wrong is taken out,
    and the rest read again.
    """
    for _ in range(ROUNDS):
        try:
            spec = JobSpec.model_validate(content)
        except ValidationError as error:
            found = error.errors()[:MAX_ERRORS]
            for one in found:
                _note(one, errors)
            if any(not one["loc"] for one in found):
                return None
            content = _without_faults(content, [one["loc"] for one in found])
        else:
            return spec
    return None


def _note(one: Any, errors: dict[str, list[str]]) -> None:
    told = with_suggestion(one, _schema(), _schema()) if one["type"] == UNKNOWN_FIELD else one
    path, reason = field_and_reason({**told, "loc": ("body", *one["loc"])})
    at = place(path)
    named = path is None or at == path or at.startswith(f"{path}.")
    said = reason if named else f"{path}: {reason}"
    if said not in errors.setdefault(at, []):
        errors[at].append(said)


def _without_faults(content: dict[str, Any], faults: Iterable[Sequence[int | str]]) -> dict[str, Any]:
    """The content without what is at fault. What is required is there, such that no check fails because of it."""
    kept = deepcopy(content)
    for path in faults:
        inside = kept
        for part in path[:-1]:
            if not isinstance(part, str) or not isinstance(inside.get(part), dict):
                inside.pop(str(part), None)
                break
            inside = inside[part]
        else:
            inside.pop(str(path[-1]), None)
        if path[0] == "model":
            kept["model"] = "reference"
        elif path[0] in ("prefill", "decode"):
            kept |= {half: {"remove_blocks": MAX_BLOCKS} for half in ("prefill", "decode")}
    return kept


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
        found = from_text(text)
        deep = _depth(found) > DEEPEST_JSON
    except ValueError as error:
        reason = str(error)
        raise Unreadable({REST: [f"{reason[:1].upper()}{reason[1:]}."]}) from error
    except RecursionError as error:
        raise Unreadable({REST: ["This is nested too deeply."]}) from error
    if not isinstance(found, dict):
        raise Unreadable({REST: ["Give fields and their values, such as `search: {protect: [0]}`."]})
    if deep:
        raise Unreadable({REST: ["This is nested too deeply."]})
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
        "More, as YAML or JSON",
        "Other parts of the specification, such as `search: {protect: [0]}`, or a whole job. It goes before what the "
        "fields say.",
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
