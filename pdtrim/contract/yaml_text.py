"""Plain data from a YAML text of a stranger, within bounds: the core schema of YAML 1.2, and nothing beyond it.

Texts are parsed by libyaml where PyYAML has it, which every wheel of it does. What a text stands for is decided here,
so that none of PyYAML's constructors runs: they take time that grows with the square of a number's length, and fail in
ways of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

MAX_CHARACTERS = 200_000
MAX_DEPTH = 8
MAX_DIGITS = 40
LOADER: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
INTEGER = re.compile(r"[-+]?[0-9]+")
DECIMAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def plain_data(text: str) -> Any:
    """What a YAML text holds: mappings by text, lists, texts, numbers, true, false and null.

    Raises: ValueError when it is long, deep, or more than data: tags, anchors, aliases, several documents.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the YAML text has {len(text)} characters; at most {MAX_CHARACTERS} are read")
    try:
        return _document(yaml.parse(text, Loader=LOADER))
    except (yaml.YAMLError, UnicodeError, OverflowError) as error:
        raise ValueError(f"the YAML text cannot be read: {' '.join(str(error).split())}") from error


def _document(events: Iterator[yaml.Event]) -> Any:
    found: Any = None
    documents = 0
    for event in events:
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            raise ValueError("the YAML text has more than one document")
        if isinstance(event, yaml.NodeEvent):
            found = _node(event, events, 0)
    return found


def _node(event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Any:
    """The node that begins with `event`; reads to its end."""
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        raise ValueError("the YAML text has anchors or aliases, which are not read")
    if (tag := getattr(event, "tag", None)) is not None:
        raise ValueError(f"the YAML text has the tag {tag[:80]}; tags could run code and are not read")
    if isinstance(event, yaml.ScalarEvent):
        # The first says that the text is neither quoted nor a block: what it looks like, it is.
        return _scalar(event.value) if event.implicit[0] else event.value
    if depth == MAX_DEPTH:
        raise ValueError(f"the YAML text is nested more than {MAX_DEPTH} deep")
    if isinstance(event, yaml.SequenceStartEvent):
        return list(_items(events, depth, yaml.SequenceEndEvent))
    found: dict[str, Any] = {}
    items = _items(events, depth, yaml.MappingEndEvent)
    for key in items:
        if not isinstance(key, str):
            raise ValueError(f"the YAML text has a key that is no text: {str(key)[:80]}; put it into quotes")
        if key in found:
            raise ValueError(f"the YAML text has the key {key[:80]!r} twice")
        found[key] = next(items)
    return found


def _items(events: Iterator[yaml.Event], depth: int, end: type[yaml.Event]) -> Iterator[Any]:
    for event in events:
        if isinstance(event, end):
            return
        yield _node(event, events, depth + 1)


def _scalar(text: str) -> Any:
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"the YAML text has a number of {len(text)} digits; at most {MAX_DIGITS} are read")
        return int(text)
    return float(text) if DECIMAL.fullmatch(text) else text
