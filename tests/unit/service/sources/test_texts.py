from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from service.sources import InvalidSource, UnreadableSource, check_text, fetch_text_documents, texts


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (path := tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntw\xc3\xb6\n")

    assert list(fetch_text_documents(path.as_uri())) == ["one\n\ntwö\n"]


def test_a_jsonl_file_has_a_document_a_line(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo"}, {"id": 2, "text": ""}, {"text": "drei \u2028 vier"}]
    (path := tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))

    assert list(fetch_text_documents(path.as_uri())) == ["one\ntwo", "", "drei \u2028 vier"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON in UTF-8"),
        (b'{"Text": "x"}', "no field `text`"),
        (b'{"text": 1}', "no field `text`"),
        (b'["text"]', "no field `text`"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, complaint: str) -> None:
    (path := tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    documents = fetch_text_documents(path.as_uri())

    assert next(documents) == "good"
    with pytest.raises(UnreadableSource, match=rf"line 3 of file:///.*/a\.jsonl .*{complaint}"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"Text": 1}\n', "line 2 of .* has no field `text`"),
        ("a.jsonl", b'{"text": "good"}\n' * 9 + b"{", "line 10 of .* is not JSON"),
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"ab\xff", "is not UTF-8"),
    ],
)
def test_what_shows_at_a_text_s_beginning_is_refused_without_reading_the_rest(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (path := tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableSource, match=complaint):
        check_text(path.as_uri())


def test_a_beginning_that_ends_in_the_middle_of_a_line_or_a_character_passes(tmp_path: Path) -> None:
    (lines := tmp_path / "a.jsonl").write_text((json.dumps({"text": "ö" * 999}, ensure_ascii=False) + "\n") * 99)
    (one := tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * texts.BEGINNING_BYTES}))
    (text := tmp_path / "a.txt").write_text("x" + "ö" * texts.BEGINNING_BYTES)
    for path in (lines, one, text):
        check_text(path.as_uri())


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "a.txt").write_bytes(b"ab\xff")

    with pytest.raises(UnreadableSource, match=r"a\.txt is not UTF-8: byte 2 is 0xff"):
        list(fetch_text_documents(path.as_uri()))


def test_a_large_file_is_refused_at_the_call(tmp_path: Path) -> None:
    (path := tmp_path / "a.txt").write_bytes(b"12345")

    assert list(fetch_text_documents(path.as_uri(), max_bytes=5)) == ["12345"]
    for refused in (fetch_text_documents, check_text):
        with pytest.raises(UnreadableSource, match="has 5 bytes; a text may have 4"):
            refused(path.as_uri(), max_bytes=4)


def test_a_missing_file_is_refused_at_the_call(tmp_path: Path) -> None:
    for refused in (fetch_text_documents, check_text):
        with pytest.raises(UnreadableSource, match="is not a file on this machine"):
            refused((tmp_path / "a.txt").as_uri())


def test_builtin_text_is_there_but_not_fetched() -> None:
    check_text("builtin:stdlib")

    with pytest.raises(InvalidSource, match="not fetched"):
        fetch_text_documents("builtin:stdlib")


def test_a_data_set_needs_the_workers_library(monkeypatch: pytest.MonkeyPatch) -> None:
    true_import = builtins.__import__

    def without_datasets(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)

    with pytest.raises(UnreadableSource, match=r"pip install 'pdtrim\[worker\]'"):
        fetch_text_documents("hf://datasets/acme/wiki")
