"""Evaluation tasks that a job brings itself: multiple choice or answers in free text, in the terms of
lm-evaluation-harness.

The harness's own task files may import Python and render any Jinja template, which can run code. A job's may not: its
YAML is plain data, its keys are those of `InlineTask`, and its templates know `{{column}}` and nothing else.

A short template makes a long text of a long column. So a task that is checked is measured, not rendered; only the
worker that asks its questions makes them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, FiniteFloat, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pdtrim.contract.base import NO_NUL, SpecModel, WrittenAsItIs, storable
from pdtrim.contract.yaml_text import MAX_CHARACTERS as MAX_YAML
from pdtrim.contract.yaml_text import plain_data

MAX_TASKS = 32
MAX_DOCS = 10_000
MAX_CHARACTERS = 64_000_000
"""Of all that a model would be asked: every choice of every question, with the question before it."""
MAX_TARGET = 10_000
MAX_ANSWER_TOKENS = 4096
MAX_INDEX_DIGITS = 10
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")
PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z0-9_]+)\s*\}\}")
TEMPLATE_MARKS = ("{{", "{%", "{#")

Text = Annotated[str, Field(max_length=100_000, json_schema_extra=NO_NUL), AfterValidator(storable)]
Column = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")]
Cell = bool | int | FiniteFloat | Text | tuple[Text, ...]


class Question(NamedTuple):
    """What a model is asked: which of `choices` it finds the likeliest continuation of `text`."""

    text: str
    choices: list[str]
    target: int
    """Index of the right choice."""


class OpenQuestion(NamedTuple):
    """What a model is asked to go on from, and the answer that is right."""

    text: str
    target: str


class GenerationSpec(SpecModel):
    """Where an answer in free text ends."""

    until: tuple[Annotated[Text, Field(min_length=1, max_length=100)], ...] = Field(
        default=("\n\n",),
        max_length=16,
        description="Texts at the first of which the answer ends; they do not belong to it. The model's own end of "
        "text ends it too.",
        examples=[["\n"]],
    )
    max_gen_toks: int = Field(
        default=256, ge=1, le=MAX_ANSWER_TOKENS, description="Tokens of an answer, at most.", examples=[32]
    )


class InlineTask(SpecModel):
    """A task whose questions are in the job. Fields are called as in the harness's task files."""

    task: str = Field(
        min_length=1, max_length=128, pattern=f"^{NAME.pattern}$", description="Name.", examples=["arithmetic"]
    )
    output_type: Literal["multiple_choice", "generate_until"] = Field(
        default="multiple_choice",
        description="`multiple_choice`: the choice that the model finds likeliest has to be the right one. "
        "`generate_until`: the model's greedy answer has to be the right one, but for white space around it.",
    )
    docs: Annotated[tuple[dict[Column, Cell], ...], WrittenAsItIs()] = Field(
        min_length=1, max_length=MAX_DOCS, description="The questions: rows of named columns."
    )
    doc_to_text: Text = Field(
        description="What is asked: a column, or text with `{{column}}` for a column's value.",
        examples=["Question: {{question}}\nAnswer:"],
    )
    doc_to_choice: Text | tuple[Text, ...] | None = Field(
        default=None,
        description="The choices, of `multiple_choice` alone: a column that holds a list, or a list of texts with "
        "`{{column}}`.",
    )
    doc_to_target: int | Text = Field(
        description="The right choice: a number is its index from 0, a text is its text or else its index. A column, "
        "or text with `{{column}}`. Of `generate_until`, the right answer."
    )
    description: Text = Field(default="", description="Put before every question.")
    target_delimiter: Text = Field(default=" ", description="Between question and choice.")
    generation_kwargs: GenerationSpec | None = Field(
        default=None, description="Where the answers of `generate_until` end; of that alone."
    )

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        if self.output_type == "multiple_choice":
            if self.doc_to_choice is None:
                raise ValueError("a `multiple_choice` task needs `doc_to_choice`")
            if self.generation_kwargs is not None:
                raise ValueError("`generation_kwargs` is of `generate_until` tasks; no answer is generated here")
        elif self.doc_to_choice is not None:
            raise ValueError("a `generate_until` task has no `doc_to_choice`: its answers are free text")
        for text in (self.description, self.target_delimiter):
            if any(mark in text for mark in TEMPLATE_MARKS):
                raise ValueError("`description` and `target_delimiter` are plain text, not templates")
        _ = self.characters  # Raises what is wrong with a question.
        return self

    @cached_property
    def characters(self) -> int:
        """How many characters a model is asked in all: every choice of every question, with the question before it.

        Nothing is rendered to find out. Raises: ValueError naming the question that cannot be asked.
        """
        templates, asked = _Templates.of(self), 0
        for number, doc in enumerate(self.docs):
            try:
                asked += templates.characters(doc)
            except ValueError as error:
                raise ValueError(f"docs[{number}]: {error}") from error
        return asked

    @property
    def generation(self) -> GenerationSpec | None:
        """Where answers end; None of a task of choices."""
        return None if self.output_type == "multiple_choice" else self.generation_kwargs or GenerationSpec()

    def questions(self) -> list[Question]:
        """Every question of a task of choices, as it is asked."""
        templates = _Templates.of(self)
        return [templates.question(doc) for doc in self.docs]

    def open_questions(self) -> list[OpenQuestion]:
        """Every question of a task of free answers, as it is asked."""
        templates = _Templates.of(self)
        return [templates.open_question(doc) for doc in self.docs]


class _Template:
    """Text with `{{column}}` for a column's value; a column's name alone stands for its value."""

    def __init__(self, text: str) -> None:
        self._text = text
        # Literals and columns by turns, a literal first and last.
        self._parts = PLACEHOLDER.split(text)
        literals = "".join(self._parts[::2])
        self._is_one = not any(mark in literals for mark in TEMPLATE_MARKS)
        self._fixed = len(literals)
        self._columns = Counter(self._parts[1::2])

    def size(self, doc: Mapping[str, Cell]) -> int:
        """How long the text becomes. Raises: ValueError when there is no such column, or it is no template."""
        if self._text in doc:
            return len(_value(doc, self._text))
        if not self._is_one:
            raise ValueError("templates know {{column}} alone: no expressions, no statements, no filters")
        return self._fixed + sum(count * len(_value(doc, column)) for column, count in self._columns.items())

    def filled(self, doc: Mapping[str, Cell]) -> str:
        """The text itself, if it has a `size`."""
        if self._text in doc:
            return _value(doc, self._text)
        return "".join(_value(doc, part) if number % 2 else part for number, part in enumerate(self._parts))


Choice = str | _Template
"""One of a column's list, or what is made of a template."""


def _size(choice: Choice, doc: Mapping[str, Cell]) -> int:
    return len(choice) if isinstance(choice, str) else choice.size(doc)


def _filled(choice: Choice, doc: Mapping[str, Cell]) -> str:
    return choice if isinstance(choice, str) else choice.filled(doc)


def _value(doc: Mapping[str, Cell], column: str) -> str:
    found = doc.get(column)
    if found is None or isinstance(found, tuple):
        raise ValueError(f"there is no column {column!r} with a text or a number")
    return str(found)


@dataclass(frozen=True)
class _Templates:
    """What an inline task makes its questions of."""

    description: str
    text: _Template
    choices: str | Sequence[_Template] | None
    """The column that lists them, or one template each; None where answers are free text."""
    delimiter: str
    target: int | str
    named: _Template
    """The target, where it is text."""

    @classmethod
    def of(cls, task: InlineTask) -> _Templates:
        listed = task.doc_to_choice
        return cls(
            task.description,
            _Template(task.doc_to_text),
            listed if listed is None or isinstance(listed, str) else [_Template(choice) for choice in listed],
            task.target_delimiter,
            task.doc_to_target,
            _Template(str(task.doc_to_target)),
        )

    def characters(self, doc: Mapping[str, Cell]) -> int:
        """How many are asked in a question. Raises: ValueError when it cannot be."""
        if self.choices is None:
            return self._open_characters(doc)
        choices = self._choices(doc)
        sizes = [_size(choice, doc) for choice in choices]
        if len(choices) < 2 or not all(sizes):
            raise ValueError("there must be two choices or more, none of them empty")
        text = self._asked(doc)
        self._right(doc, choices)
        return len(choices) * (text + len(self.delimiter)) + sum(sizes)

    def question(self, doc: Mapping[str, Cell]) -> Question:
        """The question itself, of one that can be asked."""
        choices = self._choices(doc)
        text = self.description + self.text.filled(doc)
        return Question(text, [_filled(choice, doc) for choice in choices], self._right(doc, choices))

    def open_question(self, doc: Mapping[str, Cell]) -> OpenQuestion:
        """The same of a question whose answer is free text."""
        return OpenQuestion(self.description + self.text.filled(doc), self.named.filled(doc))

    def _open_characters(self, doc: Mapping[str, Cell]) -> int:
        if not 0 < self.named.size(doc) <= MAX_TARGET:
            raise ValueError(f"the right answer has to be a text of 1 to {MAX_TARGET} characters")
        return self._asked(doc) + self.named.size(doc)

    def _asked(self, doc: Mapping[str, Cell]) -> int:
        """Characters before the answer. Raises: ValueError when there are none."""
        if not (text := len(self.description) + self.text.size(doc)):
            raise ValueError("the question is empty")
        return text

    def _choices(self, doc: Mapping[str, Cell]) -> Sequence[Choice]:
        if self.choices is None:
            return ()
        if not isinstance(self.choices, str):
            return self.choices
        listed = doc.get(self.choices)
        if not isinstance(listed, tuple):
            raise ValueError(f"doc_to_choice is {self.choices!r}, which is no column with a list")
        return listed

    def _right(self, doc: Mapping[str, Cell], choices: Sequence[Choice]) -> int:
        """Index of the right choice. Raises: ValueError when there is none."""
        wanted: Any = doc[self.target] if isinstance(self.target, str) and type(doc.get(self.target)) is int else None
        if isinstance(self.target, int):
            wanted = self.target
        if wanted is None:
            size = self.named.size(doc)
            if size > MAX_TARGET:
                raise ValueError(
                    f"doc_to_target gives {size} characters; at most {MAX_TARGET} are compared with choices"
                )
            wanted = self.named.filled(doc)
            for number, choice in enumerate(choices):
                # Of the choices, only those as long as the target are looked at.
                if _size(choice, doc) == size and _filled(choice, doc) == wanted:
                    return number
            wanted = int(wanted) if wanted.isdecimal() and size < MAX_INDEX_DIGITS else wanted
        if isinstance(wanted, int) and 0 <= wanted < len(choices):
            return wanted
        raise ValueError(f"doc_to_target gives {str(wanted)[:80]!r}, which is neither a choice nor the index of one")


def parse_tasks(value: Any) -> Any:
    """A job's `evaluation.tasks`: names stay names, objects and YAML texts become `InlineTask`s.

    Raises: PydanticCustomError that names the task at fault.
    """
    if not isinstance(value, list | tuple):
        return value
    if len(value) > MAX_TASKS:
        raise _fault(None, f"at most {MAX_TASKS} tasks can be given")
    tasks = []
    written = 0
    for number, given in enumerate(value):
        written += len(given) if isinstance(given, str) else 0
        if written > MAX_YAML:
            raise _fault(number, f"the YAML texts have {written} characters up to here; at most {MAX_YAML} are read")
        try:
            tasks.append(_task(given))
        except ValidationError as error:
            first = error.errors()[0]
            field = "".join(f".{part}" for part in first["loc"][:1])
            raise _fault(number, first["msg"].removeprefix("Value error, "), field) from error
        except ValueError as error:
            raise _fault(number, str(error)) from error
    asked = sum(task.characters for task in tasks if isinstance(task, InlineTask))
    if asked > MAX_CHARACTERS:
        raise _fault(None, f"the tasks would ask {asked} characters of the model; at most {MAX_CHARACTERS} are asked")
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
    return InlineTask.model_validate(plain_data(given))


def _fault(number: int | None, reason: str, field: str = "") -> PydanticCustomError:
    place = "evaluation.tasks" if number is None else f"evaluation.tasks[{number}]{field}"
    # What the user wrote may hold braces, so it goes in as a value, not as the message's template.
    return PydanticCustomError("evaluation_task", "{reason}", {"reason": reason, "param": place})
