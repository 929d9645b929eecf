"""Data for calibration and healing: rows of files, S3 objects and hub data sets, read as far as they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Unpack

from huggingface_hub import HfApi

from service.sources.cards import check_card
from service.sources.errors import InvalidSource, UnreadableSource
from service.sources.forms import Beyond, Form, rows_in
from service.sources.hub import ANSWER_SECONDS, hub_failures
from service.sources.names import Builtin, HubDataset, LocalPath, S3Location, TextSource, parse_text_source
from service.sources.opening import open_file
from service.sources.ranged import ranged
from service.sources.rows import Conversation, Exchange, Row, Text, check_answered, row_of
from service.stopping import Check, go_on
from service.storage import ArtifactStore, ObjectNotFound, S3Options, StoreRefused, open_store

MAX_TEXT_BYTES = 1 << 30
"""Of what was unpacked, that are read unless somebody wants more."""
BEGINNING_BYTES = 1 << 16
"""What is read of a text before a job is accepted."""
BEGINNING_ROWS = 1000
SAID = 400
"""Characters of what the hub's library says of a data set that it cannot load."""
SPLIT = "train"
"""The split of a data set that is read where the job names none."""


@dataclass(frozen=True)
class Chosen:
    """What is read of a source: one field of each row, or those that `row_of` knows; one split of a hub data set."""

    field: str | None = None
    split: str | None = None


EVERYTHING = Chosen()


def check_text(
    source: str, chosen: Chosen = EVERYTHING, *, answered: bool = True, **s3: Unpack[S3Options]
) -> int | None:
    """The most bytes of text that are there; None where that is not known.

    Checks that the text is there, and begins as data does, where `answered` with answers to what it asks; of a data
    set, that its card lists what is read of it. Raises: SourceError, StoreUnavailable.
    """
    parsed = parse_text_source(source)
    check_chosen(parsed, chosen)
    match parsed:
        case LocalPath(path):
            with _faults_of(parsed), _opened(path) as file:
                return _begun(file, path.name, str(parsed), chosen, answered, os.fstat(file.fileno()).st_size)
        case S3Location() as location:
            store, name, size = _object(location, **s3)
            with _faults_of(parsed), ranged(store, name, size, go_on) as file:
                return _begun(file, name, str(location), chosen, answered, size)
        case HubDataset(repo) as dataset:
            with hub_failures(source):
                card = HfApi().dataset_info(repo, timeout=ANSWER_SECONDS).card_data
            check_card({} if card is None else vars(card), dataset, chosen.split or SPLIT, chosen.field)
        case Builtin():
            pass
    return None


def check_chosen(source: TextSource, chosen: Chosen) -> None:
    """Raises: InvalidSource for a split or a field of what has none."""
    if chosen.split is not None and not isinstance(source, HubDataset):
        raise InvalidSource("Only data sets on the hub have splits; leave it out.", param="data.split")
    if chosen.field is not None and (form := _form_of(source)) is not None and form.kind == "txt":
        raise InvalidSource("A .txt has no fields; leave it out.", param="data.field")
    if chosen.field is not None and isinstance(source, Builtin):
        raise InvalidSource(f"{source} has no fields; leave it out.", param="data.field")


def _form_of(source: TextSource) -> Form | None:
    match source:
        case LocalPath(path):
            return Form.of(path.name)
        case S3Location(_, key):
            return Form.of(key.rpartition("/")[2])
        case _:
            return None


def _begun(file: BinaryIO, name: str, what: str, chosen: Chosen, answered: bool, size: int) -> int | None:
    """Raises: UnreadableSource for what shows in the first bytes of a file of `size`."""
    if not size:
        raise UnreadableSource(f"{what} is empty.")
    form = Form.of(name)
    assert form is not None
    if form.kind == "parquet":
        _check_columns(file, what, size)
        return None
    text = 0
    asks = False
    with suppress(Beyond):
        for row in islice(rows_in(file, form, what, chosen.field, BEGINNING_BYTES), BEGINNING_ROWS):
            if answered:
                check_answered(row)
            text += len(row.text.encode()) if isinstance(row, Text) else 0
            asks = asks or not isinstance(row, Text)
        if size <= BEGINNING_BYTES and form.packed is None and not asks:
            return text
    return None if asks or form.packed is not None else size


MAGIC = b"PAR1"


def _check_columns(file: BinaryIO, what: str, size: int) -> None:
    """By the first bytes: what reads the rest, workers have."""
    if size < 3 * len(MAGIC) or file.read(len(MAGIC)) != MAGIC:
        raise UnreadableSource(f"{what} is no Parquet file.")


def fetch_rows(
    source: str,
    chosen: Chosen = EVERYTHING,
    *,
    max_bytes: int = MAX_TEXT_BYTES,
    check: Check = go_on,
    **s3: Unpack[S3Options],
) -> Iterator[Row]:
    """The rows of a source: a `.txt` is one text, which comes in pieces; other files and data sets have many rows.

    It is read as rows are asked for, up to `max_bytes` of unpacked text and no further. What is wrong with the source
    as a whole is raised at the call, what is wrong with a row when it is reached. Asks `check` as bytes of S3 come.
    Raises: SourceError; StoreUnavailable; what `check` raises.
    """
    parsed = parse_text_source(source)
    check_chosen(parsed, chosen)
    match parsed:
        case LocalPath(path):
            return _file_rows(_opened(path), path.name, str(parsed), chosen, max_bytes)
        case S3Location() as location:
            store, name, size = _object(location, **s3)
            return _file_rows(ranged(store, name, size, check), name, str(location), chosen, max_bytes)
        case HubDataset() as dataset:
            return _dataset_rows(_load_dataset(dataset, chosen.split or SPLIT), dataset, chosen, max_bytes)
        case Builtin() as builtin:
            raise InvalidSource(f"{builtin} is made by the worker's calibration, not fetched.")


def _opened(path: Path) -> BinaryIO:
    """The file that lay there without links when it was allowed. Raises: UnreadableSource."""
    if not path.is_file():
        raise UnreadableSource(
            f"{path.as_uri()} is not a file on this machine. Check the path, and that it is mounted."
        )
    try:
        return os.fdopen(open_file(path), "rb")
    except OSError as error:
        raise UnreadableSource(f"{path.as_uri()} cannot be read: {error.strerror}.") from error


def _object(location: S3Location, **s3: Unpack[S3Options]) -> tuple[ArtifactStore, str, int]:
    """Where the object is, its name there, and its bytes. Raises: UnreadableSource, StoreUnavailable."""
    folder, _, name = location.key.rpartition("/")
    store = open_store(f"s3://{location.bucket}/{folder}", **s3)
    try:
        return store, name, store.stat(name).size
    except (ObjectNotFound, StoreRefused) as error:
        raise UnreadableSource(f"{location} cannot be read: {error}") from error


def _file_rows(file: BinaryIO, name: str, what: str, chosen: Chosen, max_bytes: int) -> Iterator[Row]:
    form = Form.of(name)
    assert form is not None
    with _faults_of(what), file, suppress(Beyond):
        yield from rows_in(file, form, what, chosen.field, max_bytes)


@contextmanager
def _faults_of(what: object) -> Iterator[None]:
    """What goes wrong in the middle of reading a file or an object. Raises: UnreadableSource."""
    try:
        yield
    except OSError as error:
        raise UnreadableSource(f"{what} cannot be read: {error.strerror or error}.") from error
    except (ObjectNotFound, StoreRefused) as error:
        raise UnreadableSource(f"{what} cannot be read: {error}") from error


def _load_dataset(dataset: HubDataset, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UnreadableSource(
            f"{dataset} needs the library `datasets`, which workers have: pip install 'pdtrim[worker]'."
        ) from error
    try:
        with hub_failures(str(dataset)):
            return datasets.load_dataset(dataset.repo, name=dataset.config, split=split, streaming=True)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        # Unknown configuration or split, no data files, or a loading script, which the library no longer runs.
        raise UnreadableSource(f"{dataset} cannot be loaded: {' '.join(str(error).split())[:SAID]}") from error
    except FileNotFoundError as error:
        raise UnreadableSource(f"{dataset} cannot be loaded: {error}") from error


def _dataset_rows(rows: Any, dataset: HubDataset, chosen: Chosen, max_bytes: int) -> Iterator[Row]:
    read = 0
    with hub_failures(str(dataset)):
        for number, value in enumerate(rows, start=1):
            row = row_of(value, f"row {number} of {dataset}", chosen.field)
            read += _bytes_of(row)
            if read > max_bytes:
                return
            yield row


def _bytes_of(row: Row) -> int:
    match row:
        case Text(text):
            return len(text.encode())
        case Exchange(prompt, completion):
            return len(prompt.encode()) + len((completion or "").encode())
        case Conversation(messages):
            return sum(len(message["content"].encode()) for message in messages)
