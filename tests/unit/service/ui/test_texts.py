"""Specifications as text: what is written is read as it was."""

from __future__ import annotations

from typing import Any

import pytest

from service.ui.texts import as_text, from_text


def test_plain_parts_are_written_as_yaml() -> None:
    content = {"search": {"protect": [0, 11]}, "evaluation": {"tasks": ["arc_easy"]}}
    assert as_text(content) == "search:\n  protect:\n  - 0\n  - 11\nevaluation:\n  tasks:\n  - arc_easy\n"


@pytest.mark.parametrize(
    "content",
    [
        {"metadata": {"run": "1e3", "day": "2026-01-05", "flag": "yes", "none": "null", "number": "12"}},
        {"data": {"text": "two\nlines\twith tab, <b>markup</b> and ünïcode " + "long " * 50}},
        {"data": {"text": "x" * 300_000}},
        {"a": [{"b": 1.5, "c": None, "d": True}] * 2, "ratio": 1e-7},
    ],
)
def test_what_is_written_is_read_as_the_same(content: Any) -> None:
    assert from_text(as_text(content)) == content


def test_json_may_be_indented_by_tabs() -> None:
    assert from_text('{\n\t"search": {"protect": [0]}\n}') == {"search": {"protect": [0]}}
