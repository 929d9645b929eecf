"""Source strings: parsed, canonical, and checked against the operator's allow list."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from service.sources.errors import ForbiddenSource, InvalidSource
from service.sources.forms import FORMS, Form
from service.storage.store import checked_key

MAX_LENGTH = 1024
BUCKET = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)*")
"""Amazon's have no `_`, others' do."""
HUB_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
HUB_URL = re.compile(r"https://huggingface\.co/(datasets/)?")
HUB_CONFIG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")


@dataclass(frozen=True)
class Reference:
    """The small model shipped with the service."""

    def __str__(self) -> str:
        return "reference"


@dataclass(frozen=True)
class Builtin:
    """Text that every worker has."""

    name: str

    def __str__(self) -> str:
        return f"builtin:{self.name}"


@dataclass(frozen=True)
class LocalPath:
    """A file or folder, absolute, its links and `..` resolved."""

    path: Path

    def __str__(self) -> str:
        return self.path.as_uri()


@dataclass(frozen=True)
class S3Location:
    """An object or a prefix in a bucket; an empty key is the whole bucket."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True)
class HubModel:
    """A model repository `organisation/name` on the Hugging Face hub."""

    repo: str

    def __str__(self) -> str:
        return f"hf://{self.repo}"


@dataclass(frozen=True)
class HubDataset:
    """A data set `organisation/name` on the hub, and the subset of it, if it has several."""

    repo: str
    config: str | None = None

    def __str__(self) -> str:
        return f"hf://datasets/{self.repo}" + (f"/{self.config}" if self.config else "")


ModelSource = Reference | LocalPath | S3Location | HubModel
TextSource = Builtin | LocalPath | S3Location | HubDataset
Permit = Callable[[Path], None]
"""Asked of where a file really lies. Raises: ForbiddenSource."""


def parse_model_source(text: str) -> ModelSource:
    """`reference`, `file:///folder`, `s3://bucket/prefix` or `hf://organisation/name`; `str()` is canonical.

    Raises: InvalidSource.
    """
    _check_characters(text)
    if text == "reference":
        return Reference()
    if text.startswith("file://"):
        return LocalPath(_local_path(text))
    if text.startswith("s3://"):
        return _s3_location(text)
    if text.startswith("hf://"):
        parts = text.removeprefix("hf://").split("/")
        if len(parts) != 2 or parts[0] == "datasets" or not all(map(HUB_NAME.fullmatch, parts)):
            raise InvalidSource("A model on the hub is given as hf://organisation/name.")
        return HubModel("/".join(parts))
    raise InvalidSource(
        "A model is given as reference, file:///folder, s3://bucket/prefix or hf://organisation/name."
        + _meant(text, hub="hf://")
    )


def parse_text_source(text: str) -> TextSource:
    """`builtin:stdlib`, `file:///….txt` or another of `FORMS`, `s3://…`, `hf://datasets/organisation/name[/subset]`.

    Raises: InvalidSource.
    """
    _check_characters(text)
    if text == "builtin:stdlib":
        return Builtin("stdlib")
    if text.startswith("file://"):
        local = LocalPath(_local_path(text))
        _check_suffix(local.path.name)
        return local
    if text.startswith("s3://"):
        remote = _s3_location(text)
        _check_suffix(remote.key)
        return remote
    if text.startswith("hf://datasets/"):
        parts = text.removeprefix("hf://datasets/").split("/")
        if len(parts) not in (2, 3) or not all(map(HUB_NAME.fullmatch, parts[:2])):
            raise InvalidSource("A data set on the hub is given as hf://datasets/organisation/name.")
        if not all(map(HUB_CONFIG.fullmatch, parts[2:])):
            raise InvalidSource("A data set's subset is given as hf://datasets/organisation/name/subset.")
        return HubDataset("/".join(parts[:2]), *parts[2:])
    raise InvalidSource(
        "A text is given as builtin:stdlib, file:///folder/file, s3://bucket/key or hf://datasets/organisation/name."
        + _meant(text, hub="hf://datasets/")
    )


def _meant(text: str, *, hub: str) -> str:
    """What a source without its scheme may have meant, as a sentence; nothing where that cannot be told."""
    repo = HUB_URL.sub("", text)
    if (
        not text.startswith(("/", ".", "~"))
        and len(parts := repo.split("/")) == 2
        and all(map(HUB_NAME.fullmatch, parts))
    ):
        return f" Did you mean {hub}{repo}?"
    if text.startswith("/"):
        return f" Did you mean file://{quote(text)}?"
    if text.startswith(("./", "../", "~")):
        return " A path on this machine is given whole, as file:///home/me/model."
    return ""


def anywhere(path: Path) -> None:
    """Permits every place."""


def check_prefix(prefix: str) -> None:
    """Raises: ValueError naming an entry of the allow list that could match nothing."""
    _matches(Reference(), prefix)


def check_allowed(source: ModelSource | TextSource, allowed: Sequence[str], never: Sequence[Path] = ()) -> None:
    """Hold a source against the operator's URI prefixes, which match on a path boundary, and against the service's own
    folders, which are `never` a source: other projects' files lie there. Raises: ForbiddenSource.
    """
    if isinstance(source, LocalPath) and any(source.path.is_relative_to(folder) for folder in never):
        raise ForbiddenSource(
            "The service keeps its own files there, which are no source. Copy what you need elsewhere."
        )
    if any(_matches(source, prefix) for prefix in allowed):
        return
    # What a link resolved to is nobody's business, so the message does not repeat the canonical form.
    raise ForbiddenSource(
        "This source is not on the allow list (links are followed before the check). "
        f"Allowed are: {', '.join(allowed)}. The operator can add it to PDTRIM_ALLOWED_SOURCES."
    )


def _matches(source: ModelSource | TextSource, prefix: str) -> bool:
    if prefix.startswith("file://"):
        folder = _local_path(prefix)
        return isinstance(source, LocalPath) and source.path.is_relative_to(folder)
    if prefix.startswith(("s3://", "hf://")):
        start = prefix.rstrip("/")
        return not isinstance(source, LocalPath) and f"{source}/".startswith(f"{start}/")
    if prefix == "builtin:":
        return isinstance(source, Builtin)
    if prefix == "reference" or prefix.startswith("builtin:"):
        return str(source) == prefix
    raise ValueError(
        f"PDTRIM_ALLOWED_SOURCES has the entry {prefix!r}, which is neither reference nor begins with builtin:, "
        "file://, s3:// or hf://"
    )


def _check_characters(text: str) -> None:
    if len(text) > MAX_LENGTH:
        raise InvalidSource(f"A source has at most {MAX_LENGTH} characters.")
    if text != text.strip() or not text.isprintable():
        raise InvalidSource("A source has no control characters, and no blanks around it.")


def _check_suffix(name: str) -> None:
    if Form.of(name.rpartition("/")[2]) is None:
        raise InvalidSource(f"A text is a file whose name ends in {FORMS}.")


def _local_path(text: str) -> Path:
    try:
        parts = urlsplit(text)
        path = unquote(parts.path, errors="strict")
    except ValueError as error:
        raise InvalidSource(f"This is no file URL: {error}.") from error
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not path.startswith("/"):
        raise InvalidSource("A local path is given as file:///absolute/path, with %3F for ? and %23 for #.")
    _check_characters(path)
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:
        # Python 3.11 reports a circle of links as RuntimeError, 3.13 as OSError.
        raise InvalidSource("The path does not resolve: its links go round in a circle.") from error


def _s3_location(text: str) -> S3Location:
    bucket, _, key = text.removeprefix("s3://").partition("/")
    key = key.rstrip("/")
    if not 3 <= len(bucket) <= 63 or not BUCKET.fullmatch(bucket):
        raise InvalidSource("An S3 source is given as s3://bucket/prefix, the bucket in lower case.")
    try:
        return S3Location(bucket, checked_key(key) if key else "")
    except ValueError as error:
        raise InvalidSource(
            "The part of an S3 source after the bucket is a relative path, without `.`, `..`, empty parts or any of "
            '\\?#%*"<>|^`{}[].'
        ) from error
