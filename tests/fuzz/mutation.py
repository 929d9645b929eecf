"""Changes of JSON that leave it JSON: what changes bytes alone seldom gets past the first brace."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**25,
    "", "a", "\x00", "\ud800", "\u202e", "é" * 300, "../x", "{{a}}", "reference", [], {}, [[]], [0], [0, 1], ["a", "b"],
    "F4", "F6_E2M3", "BF16", "F64", "file:///etc", "s3://bucket/x", "hf://a/b", "task: a\ndocs: []", "&a [*a]",
]  # fmt: skip


def changed_json(data: bytes, random_: random.Random) -> bytes:
    """JSON with some of its values, keys or members changed. Raises: ValueError, RecursionError when it is none."""
    content = json.loads(data)
    for _ in range(random_.choice([1, 1, 1, 2, 4])):
        content = _changed(content, random_)
    return json.dumps(content, ensure_ascii=random_.random() < 0.5).encode("utf-8", "surrogatepass")


def changed_header(data: bytes, random_: random.Random) -> bytes:
    """A safetensors file with its header changed, its length as it is then, and its data longer or shorter at times.

    Raises: ValueError, RecursionError when the file has no JSON header.
    """
    length = int.from_bytes(data[:8], "little")
    header, body = changed_json(data[8 : 8 + length], random_), data[8 + length :]
    body = (body + bytes(16))[: max(0, len(body) + random_.choice([0, 0, 0, 1, -1, 8]))]
    return struct.pack("<Q", len(header)) + header + body


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with every key or index in it."""
    found: list[tuple[Any, Any]] = []
    left = [content]
    while left:
        one = left.pop()
        members = list(one.items()) if isinstance(one, dict) else list(enumerate(one)) if isinstance(one, list) else []
        found += [(one, key) for key, _ in members]
        left += [member for _, member in members]
    return found


def _changed(content: Any, random_: random.Random) -> Any:
    places = _places(content)
    if not places:
        return copy.deepcopy(random_.choice(ODD_VALUES))
    container, key = random_.choice(places)
    kind = random_.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1:
        other, other_key = random_.choice(places)
        container[key] = copy.deepcopy(other[other_key])
    elif kind == 2 and isinstance(container, dict):
        container[random_.choice(["", "a", "a\x00", "seed", "__metadata__", "data", "b" * 70])] = container[key]
    elif kind == 3 and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif kind == 4 and type(container[key]) in (int, float):
        container[key] += random_.choice([1, -1, 8, 0.25])
    else:
        container[key] = copy.deepcopy(random_.choice(ODD_VALUES))
    return content
