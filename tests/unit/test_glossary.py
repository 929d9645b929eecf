"""The glossary names what is in the code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (?P<word>[^|]+) \| [^|]+ \| (?P<code>[^|]*`[^|]+\.py`[^|]*) \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "glossary.md").read_text())
FILE = re.compile(r"`([^`]+\.py)`")
NAME = re.compile(r"`([A-Za-z_]+)`")


def test_every_word_is_explained_once() -> None:
    words = [word for word, _ in ROWS]

    assert len(words) > 50
    assert [word for word in words if words.count(word) > 1] == []


def test_every_word_is_in_the_code_where_the_glossary_says() -> None:
    missing = []
    for word, code in ROWS:
        for part in code.split(", "):
            (file,) = FILE.findall(part)
            names = set(re.findall(r"\w+", (ROOT / file).read_text()))
            missing += [(word, name, file) for name in NAME.findall(part) if name not in names]

    assert missing == []
