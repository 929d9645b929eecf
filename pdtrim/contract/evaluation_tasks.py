"""Evaluation tasks that a job brings itself: multiple choice, in the terms of lm-evaluation-harness.

The harness's own task files may import Python and render any Jinja template, which can run code. A job's may not: its
YAML has the core tags alone, its keys are those of `InlineTask`, and its templates know `{{column}}` and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import AfterValidator, Field, FiniteFloat, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pdtrim.contract.base import NO_NUL, SpecModel, storable

MAX_TASKS = 32
MAX_DOCS = 10_000
MAX_YAML = 200_000
MAX_YAML_DEPTH = 8
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")
PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z0-9_]+)\s*\}\}")
TEMPLATE_MARKS = ("{{", "{%", "{#")
CORE_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map"))

Text = Annotated[str, Field(max_length=100_000, json_schema_extra=NO_NUL), AfterValidator(storable)]
Column = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")]
Cell = bool | int | FiniteFloat | Text | tuple[Text, ...]


class Question(NamedTuple):
    """What a model is asked: which of `choices` it finds the likeliest continuation of `text`."""

    text: str
    choices: list[str]
    target: int
    """Index of the right choice."""


class InlineTask(SpecModel):
    """A multiple-choice task whose questions are in the job. Fields are called as in the harness's task files."""

    task: str = Field(
        min_length=1, max_length=128, pattern=f"^{NAME.pattern}$", description="Name.", examples=["arithmetic"]
    )
    output_type: Literal["multiple_choice"] = "multiple_choice"
    docs: tuple[dict[Column, Cell], ...] = Field(
        min_length=1, max_length=MAX_DOCS, description="The questions: rows of named columns."
    )
    doc_to_text: Text = Field(
        description="What is asked: a column, or text with `{{column}}` for a column's value.",
        examples=["Question: {{question}}\nAnswer:"],
    )
    doc_to_choice: Text | tuple[Text, ...] = Field(
        description="The choices: a column that holds a list, or a list of texts with `{{column}}`."
    )
    doc_to_target: int | Text = Field(
        description="The right choice: a number is its index from 0, a text is its text or else its index. A column, "
        "or text with `{{column}}`."
    )
    description: Text = Field(default="", description="Put before every question.")
    target_delimiter: Text = Field(default=" ", description="Between question and choice.")

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        for text in (self.description, self.target_delimiter):
            if any(mark in text for mark in TEMPLATE_MARKS):
                raise ValueError("`description` and `target_delimiter` are plain text, not templates")
        self.questions()
        return self

    def questions(self) -> list[Question]:
        """Every question as it is asked. Raises: ValueError naming the one that cannot be."""
        questions = []
        for number, doc in enumerate(self.docs):
            try:
                questions.append(self._question(doc))
            except ValueError as error:
                raise ValueError(f"docs[{number}]: {error}") from error
        return questions

    def _question(self, doc: Mapping[str, Cell]) -> Question:
        if isinstance(self.doc_to_choice, str):
            listed = doc.get(self.doc_to_choice)
            if not isinstance(listed, tuple):
                raise ValueError(f"doc_to_choice is {self.doc_to_choice!r}, which is no column with a list")
            choices = list(listed)
        else:
            choices = [_filled(template, doc) for template in self.doc_to_choice]
        if len(choices) < 2 or not all(choices):
            raise ValueError("there must be two choices or more, none of them empty")
        text = self.description + _filled(self.doc_to_text, doc)
        if not text:
            raise ValueError("the question is empty")
        return Question(text, choices, self._target(doc, choices))

    def _target(self, doc: Mapping[str, Cell], choices: list[str]) -> int:
        wanted: Any = self.doc_to_target
        if isinstance(wanted, str):
            wanted = doc[wanted] if type(doc.get(wanted)) is int else _filled(wanted, doc)
        if isinstance(wanted, str):
            if wanted in choices:
                return choices.index(wanted)
            wanted = int(wanted) if wanted.isdecimal() else wanted
        if isinstance(wanted, int) and 0 <= wanted < len(choices):
            return wanted
        raise ValueError(f"doc_to_target gives {str(wanted)[:80]!r}, which is neither a choice nor the index of one")


def _filled(template: str, doc: Mapping[str, Cell]) -> str:
    """A template with the columns' values in place of their names; a column's name alone stands for its value."""

    def value(column: str) -> str:
        found = doc.get(column)
        if found is None or isinstance(found, tuple):
            raise ValueError(f"there is no column {column!r} with a text or a number")
        return str(found)

    if template in doc:
        return value(template)
    if any(mark in PLACEHOLDER.sub("", template) for mark in TEMPLATE_MARKS):
        raise ValueError("templates know {{column}} alone: no expressions, no statements, no filters")
    return PLACEHOLDER.sub(lambda match: value(match[1]), template)


def parse_tasks(value: Any) -> Any:
    """A job's `evaluation.tasks`: names stay names, objects and YAML texts become `InlineTask`s.

    Raises: PydanticCustomError that names the task at fault.
    """
    if not isinstance(value, list | tuple):
        return value
    if len(value) > MAX_TASKS:
        raise _fault(None, f"at most {MAX_TASKS} tasks can be given")
    tasks = []
    for number, given in enumerate(value):
        try:
            tasks.append(_task(given))
        except ValidationError as error:
            first = error.errors()[0]
            field = "".join(f".{part}" for part in first["loc"][:1])
            raise _fault(number, first["msg"].removeprefix("Value error, "), field) from error
        except ValueError as error:
            raise _fault(number, str(error)) from error
    names = [task if isinstance(task, str) else task.task for task in tasks]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise _fault(number, f"the task {name} is given twice")
    return tuple(tasks)


def _task(given: Any) -> str | InlineTask:
    if not isinstance(given, str):
        return given if isinstance(given, InlineTask) else InlineTask.model_validate(given)
    if NAME.fullmatch(given):
        return given
    if ":" not in given:
        raise ValueError("a task is a name of letters, digits and _ . + -, an object, or YAML text")
    return InlineTask.model_validate(safe_yaml(given))


def safe_yaml(text: str) -> Any:
    """Plain data from YAML. Raises: ValueError when it is long, deep, or more than data: tags, anchors, aliases."""
    if len(text) > MAX_YAML:
        raise ValueError(f"the YAML text has {len(text)} characters; at most {MAX_YAML} are read")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise ValueError("the YAML text has anchors or aliases, which are not read")
            tag = getattr(event, "tag", None)
            if tag not in (None, "!", *CORE_TAGS):
                raise ValueError(f"the YAML text has the tag {tag}, which could run code and is not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_YAML_DEPTH:
                raise ValueError(f"the YAML text is nested more than {MAX_YAML_DEPTH} deep")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the YAML text cannot be read: {' '.join(str(error).split())}") from error


def _fault(number: int | None, reason: str, field: str = "") -> PydanticCustomError:
    place = "evaluation.tasks" if number is None else f"evaluation.tasks[{number}]{field}"
    # What the user wrote may hold braces, so it goes in as a value, not as the message's template.
    return PydanticCustomError("evaluation_task", "{reason}", {"reason": reason, "param": place})
