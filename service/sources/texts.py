"""Text for calibration and healing: documents from files, S3 objects and hub data sets."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Unpack

from huggingface_hub import HfApi

from service.sources.cards import check_card
from service.sources.errors import InvalidSource, UnreadableSource
from service.sources.hub import ANSWER_SECONDS, hub_failures
from service.sources.names import Builtin, HubDataset, LocalPath, S3Location, parse_text_source
from service.sources.opening import open_file
from service.stopping import Check, go_on
from service.storage import ArtifactStore, ObjectNotFound, S3Options, StoreRefused, open_store

MAX_TEXT_BYTES = 1 << 30
BEGINNING_BYTES = 1 << 16
"""What is read of a text before a job is accepted."""
SPLIT = "train"


def check_text(source: str, *, max_bytes: int = MAX_TEXT_BYTES, **s3: Unpack[S3Options]) -> None:
    """Whether the text is there, not too large, and begins as a text does; of a data set, whether its card lists what
    is read of it. Raises: SourceError, StoreUnavailable.
    """
    match parse_text_source(source):
        case LocalPath(path):
            _check_file(path, max_bytes)
            try:
                with _opened(path) as file:
                    beginning = file.read(BEGINNING_BYTES)
            except OSError as error:
                raise UnreadableSource(f"{path.as_uri()} cannot be read: {error.strerror}.") from error
            _check_beginning(beginning, path.suffix, path.as_uri())
        case S3Location() as location:
            store = _check_object(location, max_bytes, **s3)
            name = location.key.rpartition("/")[2]
            beginning = b"".join(store.read_range(name, 0, BEGINNING_BYTES))
            _check_beginning(beginning, Path(name).suffix, str(location))
        case HubDataset(repo) as dataset:
            with hub_failures(source):
                card = HfApi().dataset_info(repo, timeout=ANSWER_SECONDS).card_data
            check_card({} if card is None else vars(card), dataset, SPLIT)
        case Builtin():
            pass


def _check_beginning(data: bytes, suffix: str, what: str) -> None:
    """Raises: UnreadableSource for what shows in the first bytes of a text."""
    if not data:
        raise UnreadableSource(f"{what} is empty.")
    if len(data) == BEGINNING_BYTES:  # The last line, or character, may go on.
        end = data.rfind(b"\n") + 1 if suffix == ".jsonl" else data.rfind(b" ") + 1
        data = data[:end]
    for _ in _documents(lambda: io.BytesIO(data), suffix, what):
        pass


def fetch_text_documents(
    source: str, *, max_bytes: int = MAX_TEXT_BYTES, check: Check = go_on, **s3: Unpack[S3Options]
) -> Iterator[str]:
    """The documents of a text: a `.txt` is one, a `.jsonl` has one a line, a hub data set one a row of `train`.

    A file of more than `max_bytes` is refused; a hub data set is read up to that many and no further. What is wrong
    with the source as a whole is raised at the call, what is wrong with a line when the line is reached.
    Asks `check` as a file of S3 comes. Raises: SourceError; StoreUnavailable; what `check` raises.
    """
    match parse_text_source(source):
        case LocalPath(path):
            _check_file(path, max_bytes)
            return _documents(lambda: _opened(path), path.suffix, path.as_uri())
        case S3Location() as location:
            return _object_documents(_check_object(location, max_bytes, **s3), location, check)
        case HubDataset() as dataset:
            return _dataset_documents(_load_dataset(dataset), dataset, max_bytes)
        case Builtin() as builtin:
            raise InvalidSource(f"{builtin} is made by the worker's calibration, not fetched.")


def _check_file(path: Path, max_bytes: int) -> None:
    if not path.is_file():
        raise UnreadableSource(
            f"{path.as_uri()} is not a file on this machine. Check the path, and that it is mounted."
        )
    _check_size(path.stat().st_size, max_bytes, path.as_uri())


def _check_object(location: S3Location, max_bytes: int, **s3: Unpack[S3Options]) -> ArtifactStore:
    folder, _, name = location.key.rpartition("/")
    store = open_store(f"s3://{location.bucket}/{folder}", **s3)
    try:
        _check_size(store.stat(name).size, max_bytes, str(location))
    except (ObjectNotFound, StoreRefused) as error:
        raise UnreadableSource(f"{location} cannot be read: {error}") from error
    return store


def _check_size(size: int, max_bytes: int, what: str) -> None:
    if size > max_bytes:
        raise UnreadableSource(f"{what} has {size} bytes; a text may have {max_bytes}. Give an excerpt of it.")


def _object_documents(store: ArtifactStore, location: S3Location, check: Check) -> Iterator[str]:
    with TemporaryDirectory(prefix="pdtrim-text-") as folder:
        name = location.key.rpartition("/")[2]
        store.download(name, Path(folder) / name, check)
        path = Path(folder) / name
        yield from _documents(lambda: path.open("rb"), path.suffix, str(location))


def _opened(path: Path) -> BinaryIO:
    """The file that lay there without links when it was allowed, or none. Raises: OSError."""
    return os.fdopen(open_file(path), "rb")


def _documents(open_text: Callable[[], BinaryIO], suffix: str, what: str) -> Iterator[str]:
    try:
        with open_text() as lines:
            if suffix == ".txt":
                yield lines.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_of(line, f"line {number} of {what}")
    except UnicodeDecodeError as error:
        raise UnreadableSource(
            f"{what} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}."
        ) from error
    except OSError as error:
        raise UnreadableSource(f"{what} cannot be read: {error.strerror}.") from error


def _text_of(line: bytes, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnreadableSource(f"{where} is not JSON in UTF-8: {error}.") from error
    return _text_field(row, where)


def _text_field(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UnreadableSource(f"{where} has no field `text` with a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        odd = ord(error.object[error.start])
        raise UnreadableSource(
            f"{where} has half of a character, \\u{odd:04x}, at {error.start}; no tokenizer takes it."
        ) from error
    return text


def _load_dataset(dataset: HubDataset) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UnreadableSource(
            f"{dataset} needs the library `datasets`, which workers have: pip install 'pdtrim[worker]'."
        ) from error
    try:
        with hub_failures(str(dataset)):
            return datasets.load_dataset(dataset.repo, name=dataset.config, split=SPLIT, streaming=True)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        # Unknown configuration or split, no data files, or a loading script, which the library no longer runs.
        raise UnreadableSource(f"{dataset} cannot be loaded: {str(error).splitlines()[0]}") from error
    except FileNotFoundError as error:
        raise UnreadableSource(f"{dataset} cannot be loaded: {error}") from error


def _dataset_documents(rows: Any, dataset: HubDataset, max_bytes: int) -> Iterator[str]:
    read = 0
    with hub_failures(str(dataset)):
        for number, row in enumerate(rows, start=1):
            text = _text_field(row, f"row {number} of {dataset}")
            read += len(text.encode())
            if read > max_bytes:
                return
            yield text
