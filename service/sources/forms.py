"""The forms of files that hold data, by their names, and their rows, read no further than somebody asks for them."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

import ijson
import zstandard

from service.sources.errors import UnreadableSource
from service.sources.rows import COMPLETION, MESSAGES, PROMPT, TEXT, Row, Text, listed, row_of

NAME = re.compile(r".+?\.(?:(?P<kind>txt|jsonl|json)(?:\.(?P<packed>gz|zst))?|(?P<columns>parquet))")
FORMS = ".txt, .jsonl, .json, each also with .gz or .zst behind it, or .parquet"
Kind = Literal["txt", "jsonl", "json", "parquet"]
Packed = Literal["gz", "zst"]

BUFFER_BYTES = 1 << 16
MAX_ROW_BYTES = 64 << 20
PIECE_CHARACTERS = 1 << 16
"""A text comes in pieces of about so many."""
LONGEST_PIECE = 1 << 20
"""Where no line begins for so long, a text is cut at a blank, or anywhere."""
LINE_START = re.compile(r"(?<=\n)(?=\S)")
"""Tokenizers hardly ever join white space at a line's start to the line before, and never anything else."""
ROWS_AT_ONCE = 16
"""Of a Parquet file."""
BOM = codecs.BOM_UTF8


class Beyond(Exception):
    """A file has more bytes than were to be read."""


@dataclass(frozen=True)
class Form:
    """How a file holds its rows, and by what it was made smaller."""

    kind: Kind
    packed: Packed | None = None

    @classmethod
    def of(cls, name: str) -> Form | None:
        """By the end of a file's name; None where it is none of `FORMS`."""
        found = NAME.fullmatch(name)
        if found is None:
            return None
        return cls(cast(Kind, found["kind"] or found["columns"]), cast(Packed | None, found["packed"]))


class Bounded(io.RawIOBase):
    """The first `limit` bytes of a file. Reading on raises Beyond, if there is more."""

    def __init__(self, file: io.RawIOBase | BinaryIO, limit: int) -> None:
        self._file, self._left = file, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left) or 1) or b""
        if data and not self._left:
            raise Beyond
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)


def rows_in(file: BinaryIO, form: Form, what: str, field: str | None, max_bytes: int) -> Iterator[Row]:
    """The rows of an open file, which errors call `what`; of `field` alone, if one is named.

    It is read as far as rows are asked for. Raises: UnreadableSource naming line or row, and field; Beyond after
    `max_bytes` of what was unpacked; OSError.
    """
    with _said_of(what):
        if form.kind == "parquet":
            yield from _parquet_rows(file, what, field)
            return
        plain = io.BufferedReader(Bounded(_unpacked(file, form.packed), max_bytes), BUFFER_BYTES)
        if form.kind == "txt":
            yield from _texts(plain, what)
        elif form.kind == "jsonl":
            yield from _lines(plain, what, field)
        else:
            yield from _objects(plain, what, field)


def _unpacked(file: BinaryIO, packed: Packed | None) -> BinaryIO:
    if packed == "gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb"))
    if packed == "zst":
        return cast(BinaryIO, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    return file


@contextmanager
def _said_of(what: str) -> Iterator[None]:
    """What goes wrong with a file as a whole, in our words."""
    try:
        yield
    except EOFError as error:
        raise UnreadableSource(f"{what} breaks off in its middle.") from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UnreadableSource(f"{what} cannot be unpacked: {error}.") from error


def _texts(file: io.BufferedReader[Bounded], what: str) -> Iterator[Row]:
    """One text in pieces, the last of which ends it."""
    bytes_of = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(bytes_of, translate=True)
    read, text = 0, ""
    while True:
        data = file.read1(BUFFER_BYTES)
        kept = len(bytes_of.getstate()[0])
        try:
            text += decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            place, odd = read - kept + error.start, error.object[error.start]
            raise UnreadableSource(f"{what} is not UTF-8: byte {place} is 0x{odd:02x}.") from error
        read += len(data)
        if not data:
            yield Text(text, what)
            return
        while (border := _border(text)) is not None:
            yield Text(text[:border], what, ends=False)
            text = text[border:]


def _border(text: str) -> int | None:
    """Where the first piece of a text ends; None while it is not long enough."""
    if (start := LINE_START.search(text, PIECE_CHARACTERS)) is not None:
        return start.start()
    if len(text) < LONGEST_PIECE:
        return None
    return text.rfind(" ", PIECE_CHARACTERS) if " " in text[PIECE_CHARACTERS:] else len(text)


def _lines(file: io.BufferedReader[Bounded], what: str, field: str | None) -> Iterator[Row]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        where = f"line {number} of {what}"
        if len(line) > MAX_ROW_BYTES:
            raise UnreadableSource(f"{where} has more than {MAX_ROW_BYTES} bytes.")
        if line.strip():
            yield row_of(_json(line, where), where, field)


def _json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnreadableSource(f"{where} is not JSON in UTF-8: {error}.") from error


def _objects(file: io.BufferedReader[Bounded], what: str, field: str | None) -> Iterator[Row]:
    """The objects of a list, or those that stand one after the other."""
    beginning = file.peek(BUFFER_BYTES)
    if beginning.startswith(BOM):
        beginning = beginning.removeprefix(file.read(len(BOM)))
    in_list = beginning.lstrip().startswith(b"[")
    number = 0
    try:
        for value in ijson.items(file, "item" if in_list else "", multiple_values=not in_list):
            number += 1
            yield row_of(value, f"row {number} of {what}", field)
    except ijson.JSONError as error:
        reason = str(error).splitlines()[0]
        raise UnreadableSource(f"row {number + 1} of {what} is not JSON in UTF-8: {reason}.") from error


def _parquet_rows(file: BinaryIO, what: str, field: str | None) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UnreadableSource(f"{what} needs pyarrow, which workers have: pip install 'pdtrim[worker]'.") from error
    try:
        opened = ParquetFile(file)
        names = opened.schema_arrow.names
        wanted = (MESSAGES, PROMPT, COMPLETION, TEXT) if field is None else (field,)
        columns = [name for name in names if name in wanted]
        if not columns:
            raise UnreadableSource(
                f"{what} has no column {' or '.join(f'`{name}`' for name in wanted)}; it has {listed(names)}."
            )
        number = 0
        for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
            for value in batch.to_pylist():
                number += 1
                yield row_of(value, f"row {number} of {what}", field)
    except ArrowException as error:
        raise UnreadableSource(f"{what} is no Parquet file that can be read: {str(error).splitlines()[0]}.") from error
