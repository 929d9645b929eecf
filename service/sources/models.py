"""Dense models: what can be said of them without their weights, and their files in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Unpack

from service.sources.errors import InvalidSource, UnreadableSource
from service.sources.hub import HubFiles
from service.sources.names import HubModel, LocalPath, ModelSource, Reference, S3Location, parse_model_source
from service.storage import ObjectNotFound, S3Options, StoreRefused, open_store
from service.storage.local import written_whole

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 64 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SMALL_FILES = re.compile(r"[^/]+\.(json|jinja|txt|model|tiktoken)|additional_chat_templates/[^/]+\.jinja")
FETCHED = ".pdtrim-fetched.json"


@dataclass(frozen=True)
class ModelDescription:
    """A model's configuration, the commit its revision resolved to (hub only), and its weight files' bytes."""

    config: dict[str, Any]
    revision: str | None
    weights: dict[str, int]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(self.weights.values())


class ModelFiles(Protocol):
    """The files of one model, wherever they are. `str()` names it in messages."""

    def names(self) -> Sequence[str]: ...

    def size(self, name: str) -> int: ...

    def read(self, name: str) -> bytes: ...


class FolderFiles:
    """A model in a local folder. Raises: UnreadableSource."""

    def __init__(self, source: ModelSource, folder: Path) -> None:
        self.folder = folder
        self._source = source
        if not folder.is_dir():
            raise UnreadableSource(
                f"{self} is not a folder on this machine. Check the path, and that it is mounted here."
            )

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> list[str]:
        try:
            return sorted(
                path.relative_to(self.folder).as_posix()
                for pattern in ("*", "additional_chat_templates/*")
                for path in self.folder.glob(pattern)
                if path.is_file()
            )
        except OSError as error:
            raise UnreadableSource(f"{self} cannot be listed: {error.strerror}.") from error

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise UnreadableSource(f"{name} of {self} cannot be read: {error.strerror}.") from error


class BucketFiles:
    """A model below an S3 prefix. Raises: UnreadableSource, StoreUnavailable."""

    def __init__(self, source: S3Location, **s3: Unpack[S3Options]) -> None:
        self._source = source
        self._store = open_store(str(source), **s3)
        try:
            self._names = [name for name in self._store.list_keys("") if name.count("/") <= 1]
        except StoreRefused as error:
            raise UnreadableSource(f"{self} cannot be listed: {error}") from error

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> list[str]:
        return self._names

    def size(self, name: str) -> int:
        return self._store.stat(name).size

    def read(self, name: str) -> bytes:
        return self._store.get_bytes(name)

    def fetch(self, names: Sequence[str], target: Path) -> None:
        """Download files into `target`; those fetched before and unchanged since stay."""
        record = target / FETCHED
        fetched: dict[str, str] = json.loads(record.read_bytes()) if record.exists() else {}
        for name in sorted(fetched.keys() - set(names)):
            (target / name).unlink(missing_ok=True)
            del fetched[name]
        for name in names:
            self._fetch(name, target, fetched)
            with written_whole(record) as file:
                file.write(json.dumps(fetched, indent=2, sort_keys=True).encode())

    def _fetch(self, name: str, target: Path, fetched: dict[str, str]) -> None:
        path = target / name
        try:
            found = self._store.stat(name)
            if fetched.get(name) == found.version and path.is_file() and path.stat().st_size == found.size:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            self._store.download(name, path)
        except (ObjectNotFound, StoreRefused) as error:
            raise UnreadableSource(f"{name} of {self} cannot be read: {error}") from error
        if (size := path.stat().st_size) != found.size:
            path.unlink()
            raise UnreadableSource(f"{name} of {self} changed while it was fetched: {size} bytes, not {found.size}.")
        fetched[name] = found.version


def describe_model(source: str, revision: str | None = None, **s3: Unpack[S3Options]) -> ModelDescription:
    """What a model's `config.json` and file names tell; no weights are read.

    Raises: SourceError for a model that is not there or has no safetensors weights; StoreUnavailable.
    """
    files = _open(source, revision, **s3)
    return ModelDescription(
        config=_read_json(files, CONFIG, MAX_CONFIG_BYTES),
        revision=files.commit if isinstance(files, HubFiles) else None,
        weights={name: files.size(name) for name in _weight_names(files)},
    )


def resolve_revision(source: str, revision: str | None = None) -> str | None:
    """The commit that a hub model's branch, tag or commit names now; None for other sources.

    Raises: SourceError, also for a revision of what is not on the hub; StoreUnavailable.
    """
    parsed = parse_model_source(source)
    _check_revision(parsed, revision)
    return HubFiles(parsed.repo, revision).commit if isinstance(parsed, HubModel) else None


def fetch_model(source: str, revision: str | None, target: Path, **s3: Unpack[S3Options]) -> Path:
    """A folder with the model's weights, configuration and tokenizer: `target`, or where the model is if it is local.

    `target` belongs to this one source: a fetch that was interrupted goes on, and what changed in S3 is fetched again.
    Raises: SourceError, StoreUnavailable.
    """
    files = _open(source, revision, **s3)
    weights = _weight_names(files)
    _read_json(files, CONFIG, MAX_CONFIG_BYTES)
    if isinstance(files, FolderFiles):
        return files.folder
    target.mkdir(parents=True, exist_ok=True)
    files.fetch([*(name for name in files.names() if SMALL_FILES.fullmatch(name)), *weights], target)
    return target


def reference_model() -> Path:
    """The folder of the model shipped with the service, found without importing the workers it lies among.

    Raises: UnreadableSource.
    """
    spec = find_spec("workers")
    for place in (spec.submodule_search_locations if spec else None) or []:
        if (folder := Path(place) / "reference_model").is_dir():
            return folder
    raise UnreadableSource("The reference model is not installed. Install the service from its wheel or repository.")


def _open(source: str, revision: str | None, **s3: Unpack[S3Options]) -> FolderFiles | BucketFiles | HubFiles:
    parsed = parse_model_source(source)
    _check_revision(parsed, revision)
    match parsed:
        case Reference():
            return FolderFiles(parsed, reference_model())
        case LocalPath(path):
            return FolderFiles(parsed, path)
        case S3Location():
            return BucketFiles(parsed, **s3)
        case HubModel(repo):
            return HubFiles(repo, revision)


def _check_revision(source: ModelSource, revision: str | None) -> None:
    if revision is not None and not isinstance(source, HubModel):
        raise InvalidSource("Only models on the hub have revisions; leave it out.", param="model.revision")


def _weight_names(files: ModelFiles) -> list[str]:
    """The safetensors files that make up the model, as transformers would choose them."""
    names = set(files.names())
    if SINGLE in names:
        return [SINGLE]
    if INDEX not in names:
        if pickles := sorted(name for name in names if name.endswith(PICKLES)):
            raise UnreadableSource(
                f"{files} has only pickle weights ({', '.join(pickles[:5])}), which can run code when they are loaded. "
                "Convert them to safetensors."
            )
        raise UnreadableSource(f"{files} has neither {SINGLE} nor {INDEX}.")
    mapped = _read_json(files, INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise UnreadableSource(f"{INDEX} of {files} has no weight_map.")
    shards = sorted({str(shard) for shard in mapped.values()})
    if strange := [shard for shard in shards if "/" in shard or not shard.endswith(".safetensors")]:
        raise UnreadableSource(f"{INDEX} of {files} names {strange[0]!r}, which is no safetensors file beside it.")
    if missing := [shard for shard in shards if shard not in names]:
        raise UnreadableSource(f"{files} lacks {len(missing)} of {len(shards)} shards, the first is {missing[0]}.")
    return shards


def _read_json(files: ModelFiles, name: str, limit: int) -> dict[str, Any]:
    if name not in files.names():
        raise UnreadableSource(f"{files} has no {name}; a model is a folder as transformers saves it.")
    if (size := files.size(name)) > limit:
        raise UnreadableSource(f"{name} of {files} has {size} bytes; more than {limit} are not read.")
    try:
        content = json.loads(files.read(name))
    except (ValueError, RecursionError) as error:
        raise UnreadableSource(f"{name} of {files} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UnreadableSource(f"{name} of {files} is not a JSON object.")
    return content
