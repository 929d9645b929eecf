"""What data for calibration and healing is made of: texts, conversations, and prompts with their completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from service.sources.errors import UnreadableSource

TEXT, MESSAGES, PROMPT, COMPLETION = "text", "messages", "prompt", "completion"
"""The fields that are read of a row where the job names none."""
ASSISTANT = "assistant"
SHOWN = 10
Message = Mapping[str, Any]
"""`role` and `content`, strings both; what else it has is the chat template's to read."""


@dataclass(frozen=True)
class Text:
    """A text, or a part of one that goes on in the next row. Every token of it counts."""

    text: str
    where: str
    """What errors call the row: its place and its source."""
    ends: bool = True


@dataclass(frozen=True)
class Conversation:
    """Messages in the order in which they were said, and the numbers of those that count: the answers."""

    messages: tuple[Message, ...]
    answers: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Exchange:
    """A prompt as text and its completion, which alone counts; None where there is only a prompt."""

    prompt: str
    completion: str | None
    where: str


Row = Text | Conversation | Exchange


def row_of(value: Any, where: str, field: str | None = None) -> Row:
    """A row by the fields that it has: `messages`, `prompt` (and `completion`), or `text`, the first of them.

    A `field` that is named holds a text or messages. Raises: UnreadableSource naming the row and the field.
    """
    if not isinstance(value, Mapping):
        raise UnreadableSource(f"{where} is no object with fields.")
    found = {name: content for name, content in value.items() if content is not None}
    if field is not None:
        if field not in found:
            raise UnreadableSource(f"{where} has no field `{field}`; it has {listed(value)}.")
        return _row_in(field, found[field], where)
    if MESSAGES in found:
        return _row_in(MESSAGES, found[MESSAGES], where)
    if PROMPT in found:
        return _exchange(found[PROMPT], found.get(COMPLETION), where)
    if TEXT in found:
        return Text(_string(found[TEXT], f"`{TEXT}`", where), where)
    raise UnreadableSource(
        f"{where} has no field `{TEXT}`, `{MESSAGES}` or `{PROMPT}`; it has {listed(value)}. Name the field to read "
        "with data.field."
    )


def check_answered(row: Row) -> None:
    """Raises: UnreadableSource for a row that asks and has no answer on which a loss could fall."""
    if isinstance(row, Exchange) and row.completion is None:
        raise UnreadableSource(f"{row.where} has a `{PROMPT}` and no `{COMPLETION}`, {REMEDY}.")
    if isinstance(row, Conversation) and not row.answers:
        raise UnreadableSource(f"{row.where} has no message of the role `{ASSISTANT}`, {REMEDY}.")


REMEDY = "on which the loss could fall; with distillation.data: self the dense model answers"


def listed(found: Iterable[Any]) -> str:
    """The first names of some, for a message."""
    names = [str(name)[:80] for name in found]
    return (", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")) or "none"


def _row_in(field: str, content: Any, where: str) -> Row:
    if isinstance(content, str):
        return Text(_string(content, f"`{field}`", where), where)
    messages = _messages(content, field, where)
    return Conversation(messages, _said_by_the_model(messages), where)


def _exchange(prompt: Any, completion: Any, where: str) -> Row:
    """Of two strings; or of two lists of messages, as one conversation of which the second counts."""
    if isinstance(prompt, str):
        ours = None if completion is None else _string(completion, f"`{COMPLETION}`", where)
        return Exchange(_string(prompt, f"`{PROMPT}`", where), ours, where)
    asked = _messages(prompt, PROMPT, where)
    answered = () if completion is None else _messages(completion, COMPLETION, where)
    counted = tuple(len(asked) + number for number in _said_by_the_model(answered))
    return Conversation(asked + answered, counted, where)


def _said_by_the_model(messages: tuple[Message, ...]) -> tuple[int, ...]:
    return tuple(number for number, message in enumerate(messages) if message["role"] == ASSISTANT)


def _messages(content: Any, field: str, where: str) -> tuple[Message, ...]:
    if not isinstance(content, list) or not content:
        raise UnreadableSource(
            f"{where} has a field `{field}` that is neither a string nor a list of messages, each with `role` and "
            "`content`."
        )
    found = []
    for number, message in enumerate(content):
        if not isinstance(message, Mapping):
            raise UnreadableSource(f"{where}: `{field}[{number}]` is no object with `role` and `content`.")
        for key in ("role", "content"):
            _string(message.get(key), f"`{field}[{number}].{key}`", where)
        found.append({key: value for key, value in message.items() if value is not None})
    return tuple(found)


def _string(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UnreadableSource(f"{where}: {field} is no string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        odd = ord(error.object[error.start])
        raise UnreadableSource(
            f"{where}: {field} has half of a character, \\u{odd:04x}, at {error.start}; no tokenizer takes it."
        ) from error
    return value
