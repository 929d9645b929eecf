from __future__ import annotations

import builtins
import gzip
import json
import tracemalloc
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from service.sources import (
    Chosen,
    Conversation,
    Exchange,
    InvalidSource,
    Row,
    Text,
    UnreadableSource,
    check_text,
    fetch_rows,
    forms,
    texts,
)

ROWS: list[dict[str, Any]] = [{"text": "one\ntwo"}, {"id": 2, "text": ""}, {"text": "drei \u2028 vier"}]
ASKED = [{"role": "user", "content": "2 + 2?"}]
ANSWERED = [{"role": "assistant", "content": "4"}]


def lines(rows: list[Any]) -> bytes:
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def columns(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


FORMS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": lines,
    "a.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "a.jsonl.zst": lambda rows: zstandard.compress(lines(rows)),
    "a.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "b.json": lambda rows: b"\xef\xbb\xbf " + b" ".join(json.dumps(row, indent=1).encode() for row in rows),
    "a.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "a.json.zst": lambda rows: zstandard.compress(json.dumps(rows).encode()),
    "a.parquet": columns,
}


def written(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return (folder / name).as_uri()


def said(rows: list[Row]) -> str:
    assert all(isinstance(row, Text) for row in rows)
    return "".join(row.text for row in rows if isinstance(row, Text))


@pytest.mark.parametrize(("name", "pack"), [("a.txt", bytes), ("a.txt.gz", gzip.compress), ("a.txt.zst", None)])
def test_a_text_file_is_one_text(tmp_path: Path, name: str, pack: Callable[[bytes], bytes] | None) -> None:
    source = written(tmp_path, name, (pack or zstandard.compress)(b"\xef\xbb\xbfone\r\n\ntw\xc3\xb6\n"))

    assert list(fetch_rows(source)) == [Text("one\n\ntwö\n", source)]
    check_text(source)


@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_every_form_has_its_rows(tmp_path: Path, name: str) -> None:
    source = written(tmp_path, name, FORMS[name](ROWS))

    found = list(fetch_rows(source))

    assert [said([row]) for row in found] == ["one\ntwo", "", "drei \u2028 vier"]
    place = "line 5" if "jsonl" in name else "row 3"
    assert found[2].where == f"{place} of {source}"
    check_text(source)


@pytest.mark.parametrize("name", FORMS)
def test_conversations_and_completions_come_from_every_form(tmp_path: Path, name: str) -> None:
    rows = [{"messages": ASKED + ANSWERED, "text": "not read"}]
    (row,) = fetch_rows(written(tmp_path, name, FORMS[name](rows)))
    assert isinstance(row, Conversation)
    assert (list(row.messages), row.answers) == (ASKED + ANSWERED, (1,))

    (row,) = fetch_rows(written(tmp_path, name, FORMS[name]([{"prompt": "2 + 2?", "completion": "4"}])))
    assert isinstance(row, Exchange)
    assert (row.prompt, row.completion) == ("2 + 2?", "4")

    rows = [{"prompt": ANSWERED + ASKED, "completion": ANSWERED}]
    (row,) = fetch_rows(written(tmp_path, name, FORMS[name](rows)))
    assert isinstance(row, Conversation)
    assert (list(row.messages), row.answers) == ([*ANSWERED, *ASKED, *ANSWERED], (2,))


@pytest.mark.parametrize("name", FORMS)
def test_a_field_that_is_named_is_read_and_no_other(tmp_path: Path, name: str) -> None:
    rows = [{"body": "x", "said": ASKED + ANSWERED, "text": "not read"}]
    source = written(tmp_path, name, FORMS[name](rows))

    assert said(list(fetch_rows(source, Chosen(field="body")))) == "x"
    (row,) = fetch_rows(source, Chosen(field="said"))
    assert isinstance(row, Conversation)
    with pytest.raises(UnreadableSource, match=r"(row|line) 1 of .* has no field|has no column `other`; it has body"):
        list(fetch_rows(source, Chosen(field="other")))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON in UTF-8"),
        (b'{"Text": "x"}', "has no field `text`, `messages` or `prompt`; it has Text. .* data.field"),
        (b'{"text": 1}', ": `text` is no string"),
        (b'{"text": "\\ud800"}', r": `text` has half of a character, \\ud800"),
        (b'["text"]', "is no object"),
        (b'{"messages": "x", "prompt": 3}', "`messages`|is no string"),
        (b'{"messages": []}', "field `messages` that is neither a string nor a list of messages"),
        (b'{"messages": [{"role": "user"}]}', r": `messages\[0\].content` is no string"),
        (b'{"messages": [{"role": "user", "content": "a"}, 1]}', r": `messages\[1\]` is no object"),
        (b'{"prompt": "a", "completion": 1}', ": `completion` is no string"),
    ],
)
def test_a_bad_line_is_named_by_file_number_and_field(tmp_path: Path, line: bytes, complaint: str) -> None:
    source = written(tmp_path, "a.jsonl", b'{"text": "good"}\n\n' + line + b"\n" + b'{"text": ""}' * 9)
    rows = fetch_rows(source)

    assert said([next(rows)]) == "good"
    if line.startswith(b'{"messages": "x"'):
        assert said([next(rows)]) == "x"
        return
    with pytest.raises(UnreadableSource, match=rf"line 3 of file:///.*/a\.jsonl.*{complaint}"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"Text": 1}\n', "line 2 of .* has no field `text`"),
        ("a.jsonl", b'{"text": "good"}\n' * 9 + b"{", "line 10 of .* is not JSON"),
        ("a.json", b'[{"text": "good"}, {"Text": 1}]', "row 2 of .* has no field `text`"),
        ("a.json", b'[{"text": "good"}, {"text"', "row 2 of .* is not JSON"),
        ("a.json", b'{"data": {"text": "good"}}', "row 1 of .* has no field `text`.*it has data"),
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"ab\xff", "is not UTF-8: byte 2 is 0xff"),
        ("a.txt.gz", b"no gzip", "cannot be unpacked"),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "breaks off"),
        ("a.txt.zst", b"no zstd at all", "cannot be unpacked"),
        ("a.parquet", b"no parquet at all", "is no Parquet file"),
    ],
)
def test_what_shows_at_a_text_s_beginning_is_refused_without_reading_the_rest(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    source = written(tmp_path, name, content)
    with pytest.raises(UnreadableSource, match=complaint):
        check_text(source)


def test_what_only_a_worker_sees_of_a_parquet_file_is_told_there(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSource, match=r"has no column `messages` or `prompt` .*or `text`; it has Text\."):
        list(fetch_rows(written(tmp_path, "a.parquet", columns([{"Text": "x"}]))))
    with pytest.raises(UnreadableSource, match="is no Parquet file that can be read"):
        list(fetch_rows(written(tmp_path, "b.parquet", b"PAR1" + b"x" * 99 + b"PAR1")))
    with pytest.raises(UnreadableSource, match=r"row 2 of .*: `text` is no string|row 2 of .* has no field"):
        list(fetch_rows(written(tmp_path, "c.parquet", columns([{"text": "x"}, {"text": None}]))))


def test_questions_without_answers_are_refused_unless_the_model_answers_them(tmp_path: Path) -> None:
    for rows in ([{"prompt": "a"}], [{"messages": ASKED}]):
        source = written(tmp_path, "a.jsonl", lines(rows))
        with pytest.raises(UnreadableSource, match=r"line 1 of .* on which the loss could fall; .*data: self"):
            check_text(source)
        check_text(source, answered=False)
        assert len(list(fetch_rows(source))) == 1


def test_a_beginning_that_ends_in_the_middle_of_a_row_or_a_character_passes(tmp_path: Path) -> None:
    long = json.dumps({"text": "ö" * 999}, ensure_ascii=False).encode()
    for name, content in (
        ("a.jsonl", (long + b"\n") * 99),
        ("b.jsonl", json.dumps({"text": "x" * texts.BEGINNING_BYTES}).encode()),
        ("a.json", b"[" + b",".join([long] * 99) + b"]"),
        ("a.txt", ("x" + "ö" * texts.BEGINNING_BYTES).encode()),
        ("a.txt.gz", gzip.compress(("x" + "ö" * texts.BEGINNING_BYTES).encode())),
    ):
        check_text(written(tmp_path, name, content))


def test_the_most_text_that_there_can_be_is_told(tmp_path: Path) -> None:
    assert check_text(written(tmp_path, "a.txt", b"12345")) == 5
    assert check_text(written(tmp_path, "b.txt", b"x" * 99_999)) == 99_999
    assert check_text(written(tmp_path, "a.jsonl", b'{"text": "ab"}\n{"text": "c"}')) == 3
    assert check_text(written(tmp_path, "b.jsonl", lines([{"messages": ANSWERED}]))) is None
    assert check_text(written(tmp_path, "a.txt.gz", gzip.compress(b"12345", mtime=0))) is None


def test_a_text_comes_in_pieces_that_begin_where_lines_do(tmp_path: Path) -> None:
    text = "".join(f"def f_{n}(x):\n\n    return x + {n}\n\n\n" for n in range(20_000))
    rows = list(fetch_rows(written(tmp_path, "a.txt", text.encode())))

    assert said(rows) == text
    assert len(rows) > 9
    assert all(isinstance(row, Text) and row.text.startswith("def") for row in rows)
    assert [isinstance(row, Text) and row.ends for row in rows] == [False] * (len(rows) - 1) + [True]


@pytest.mark.parametrize("text", ["x" * 3_000_000, "word " * 600_000, " indented\n" * 300_000])
def test_a_text_without_lines_comes_in_pieces_all_the_same(tmp_path: Path, text: str) -> None:
    rows = list(fetch_rows(written(tmp_path, "a.txt", text.encode())))

    assert said(rows) == text
    assert all(isinstance(row, Text) and len(row.text) <= 2 * forms.LONGEST_PIECE for row in rows)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.json", "a.json.gz", "a.parquet"])
def test_no_more_of_a_file_is_held_than_is_asked_for(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"{number} " * 100} for number in range(40_000)]
    content = "".join(row["text"] + "\n" for row in rows).encode()  # some 20 MB
    packed: dict[str, Callable[[bytes], bytes]] = {
        "a.txt": bytes,
        "a.txt.gz": gzip.compress,
        "a.txt.zst": zstandard.compress,
    }
    source = written(tmp_path, name, packed[name](content) if name in packed else FORMS[name](rows))
    del content, rows

    tracemalloc.start()
    try:
        assert sum(1 for _ in islice(fetch_rows(source), 100)) == 100
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_reading_ends_at_the_bound(tmp_path: Path) -> None:
    source = written(tmp_path, "a.jsonl", b'{"text": "one"}\n' * 9)

    assert len(list(fetch_rows(source, max_bytes=3 * 16))) == 3
    assert len(list(fetch_rows(source, max_bytes=9 * 16))) == 9


def test_a_row_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "MAX_ROW_BYTES", 20)
    with pytest.raises(UnreadableSource, match=r"line 2 of .* has more than 20 bytes"):
        list(fetch_rows(written(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text": "' + b"a" * 99)))


def test_splits_and_fields_are_refused_where_there_are_none(tmp_path: Path) -> None:
    text, rows = written(tmp_path, "a.txt", b"x"), written(tmp_path, "a.jsonl", lines(ROWS))
    for source, chosen, param in (
        (rows, Chosen(split="train"), "data.split"),
        ("builtin:stdlib", Chosen(split="train"), "data.split"),
        (text, Chosen(field="text"), "data.field"),
        ("builtin:stdlib", Chosen(field="text"), "data.field"),
    ):
        with pytest.raises(InvalidSource, match="leave it out") as error:
            check_text(source, chosen)
        assert error.value.param == param


def test_a_missing_file_is_refused_at_the_call(tmp_path: Path) -> None:
    source = (tmp_path / "a.txt").as_uri()
    for refused in (partial(fetch_rows, source), partial(check_text, source)):
        with pytest.raises(UnreadableSource, match="is not a file on this machine"):
            refused()


def test_builtin_text_is_there_but_not_fetched() -> None:
    check_text("builtin:stdlib")

    with pytest.raises(InvalidSource, match="not fetched"):
        fetch_rows("builtin:stdlib")


@pytest.mark.parametrize("library", ["datasets", "pyarrow"])
def test_some_data_needs_the_workers_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str) -> None:
    true_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == library:
            raise ImportError(name)
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)

    source = written(tmp_path, "a.parquet", columns([{"text": "x"}]))
    with pytest.raises(UnreadableSource, match=r"pip install 'pdtrim\[worker\]'"):
        list(fetch_rows(source if library == "pyarrow" else "hf://datasets/acme/wiki"))
    check_text(source)
