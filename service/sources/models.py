"""Dense models: what can be said of them without their weights, and their files in a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

from service.sources.download import fetch
from service.sources.errors import InvalidSource, TooLargeSource, UnreadableSource
from service.sources.files import BucketFiles, FolderFiles, HeldFiles, ModelFiles
from service.sources.hub import HubFiles
from service.sources.names import (
    HubModel,
    LocalPath,
    ModelSource,
    Permit,
    Reference,
    S3Location,
    anywhere,
    check_allowed,
    parse_model_source,
)
from service.sources.numbers import TensorBounds, check_numbers
from service.sources.quantisation import check_names, check_types
from service.sources.safetensors_header import TensorInfo
from service.sources.tokenizers import check_tokenizer
from service.sources.weights import (
    check_weights,
    headers_size,
    indexed_bytes,
    indexed_names,
    read_json,
    single_header,
    weight_names,
)
from service.stopping import Check, go_on
from service.storage import S3Options

CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_FILES = 5_000
SMALL_FILES = re.compile(r"README\.md|[^/]+\.(json|jinja|txt|model|tiktoken)|additional_chat_templates/[^/]+\.jinja")
LICENCES = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)[^/]*")
CHEAP_HEADER_BYTES = 4 << 20
"""Headers that are checked before a job is accepted; longer ones are the worker's to check."""


@dataclass(frozen=True)
class ModelDescription:
    """A model's configuration, the commit its revision resolved to (hub only), and its weight files' bytes."""

    config: dict[str, Any]
    revision: str | None
    weights: dict[str, int]
    tensors: Mapping[str, TensorInfo] | None = None
    """By the headers of all weight files, where these were read."""
    tensor_bytes: int | None = None
    """Of all tensors, as the index says where headers were not read."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(self.weights.values())


def describe_model(
    source: str,
    revision: str | None = None,
    *,
    max_bytes: int | None = None,
    permit: Permit = anywhere,
    **s3: Unpack[S3Options],
) -> ModelDescription:
    """What a model's `config.json` and file names tell; no weights are read, but their headers where that is cheap.

    It is for a local model, and elsewhere for one that is a single file, unless they are long.

    `permit` is asked of where each file of a local model lies.

    Raises: SourceError for a model that is not there, has no safetensors weights, no tokenizer or more than `max_bytes`
    in all; StoreUnavailable.
    """
    if source == str(Reference()) and revision is None:
        return _describe_reference(max_bytes)
    return _describe(_open(source, revision, permit, **s3), max_bytes)


@cache
def _describe_reference(max_bytes: int | None) -> ModelDescription:
    """Once for each process: what comes with the service does not change while it runs."""
    return _describe(_open(str(Reference()), None), max_bytes)


def _describe(files: FolderFiles | BucketFiles | HubFiles, max_bytes: int | None) -> ModelDescription:
    weights = weight_names(files)
    config = read_json(files, CONFIG, MAX_CONFIG_BYTES)
    _check_size(files, _needed(files, weights), max_bytes)
    sizes = {name: files.size(name) for name in weights}
    tensor_bytes = None
    if (tensors := _cheap_headers(files)) is not None:
        held = _bounds(files, config, tensors)
    else:
        names = indexed_names(files)
        check_names(files, files.names(), config, names)
        held = TensorBounds.in_index(names, sum(sizes.values()))
        tensor_bytes = indexed_bytes(files)
    check_numbers(config, held, f"{CONFIG} of {files}")
    check_tokenizer(files)
    commit = files.commit if isinstance(files, HubFiles) else None
    return ModelDescription(config, commit, sizes, tensors, tensor_bytes)


def _cheap_headers(files: FolderFiles | BucketFiles | HubFiles) -> Mapping[str, TensorInfo] | None:
    """Every tensor by the headers, of a folder or of the one weight file elsewhere; None where they are too long.

    Raises: UnreadableSource, StoreUnavailable.
    """
    if isinstance(files, FolderFiles):
        return check_weights(files) if headers_size(files) <= CHEAP_HEADER_BYTES else None
    return single_header(files, CHEAP_HEADER_BYTES)


def _bounds(files: ModelFiles, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> TensorBounds:
    """By a model's tensors, which are no quantised ones. Raises: UnreadableSource."""
    check_names(files, files.names(), config, tensors)
    check_types(files, tensors)
    return TensorBounds.in_headers(tensors)


def resolve_revision(source: str, revision: str | None = None) -> str | None:
    """The commit that a hub model's branch, tag or commit names now; None for other sources.

    Raises: SourceError, also for a revision of what is not on the hub; StoreUnavailable.
    """
    parsed = parse_model_source(source)
    _check_revision(parsed, revision)
    return HubFiles(parsed.repo, revision).commit if isinstance(parsed, HubModel) else None


def fetch_model(
    source: str,
    revision: str | None,
    target: Path,
    *,
    max_bytes: int | None = None,
    make_room: Callable[[int], None] = lambda size: None,
    check: Check = go_on,
    **s3: Unpack[S3Options],
) -> Path:
    """A folder with the model's weights, configuration and tokenizer: `target`, or where the model is if it is local.

    `target` belongs to this one source: a fetch that was interrupted goes on, and what changed in S3 is fetched again.
    Before that, `make_room` is told how many bytes there will be.
    Nothing is fetched of a model whose files have more than `max_bytes` in all. Every weight file's header is checked,
    and by them the configuration's numbers. Asks `check` all the while.
    Raises: SourceError, StoreUnavailable, what `check` raises.
    """
    files = _open(source, revision, **s3)
    weights = weight_names(files)
    read_json(files, CONFIG, MAX_CONFIG_BYTES)
    needed = _needed(files, weights)
    _check_size(files, needed, max_bytes)
    if not isinstance(files, FolderFiles):
        make_room(sum(files.size(name) for name in needed))
        fetch(files, needed, target, check)
        files = FolderFiles(parse_model_source(source), target)
    # Of what came, which need not be what was there before.
    config = read_json(files, CONFIG, MAX_CONFIG_BYTES)
    check_numbers(config, _bounds(files, config, check_weights(files)), f"{CONFIG} of {files}")
    return files.folder


def hold_model(
    source: LocalPath, target: Path, opened: ExitStack, permit: Permit, *, max_bytes: int | None = None
) -> Path:
    """The new folder `target` with a local model's weights, configuration, tokenizer and licence as they are now.

    They are opened once, and checked as those of `fetch_model`; what lies there later is read by nobody. What is not a
    regular file is left out. Good until `opened` is closed. Raises: SourceError, what `permit` raises.
    """
    files = FolderFiles(source, source.path, permit)
    weights = weight_names(files)
    needed = _needed(files, weights)
    small = [name for name in needed if name not in weights]
    _check_size(files, needed, max_bytes)
    held = HeldFiles(files, needed, small, target, opened)
    weight_names(held)
    config = read_json(held, CONFIG, MAX_CONFIG_BYTES)
    check_numbers(config, _bounds(held, config, check_weights(held)), f"{CONFIG} of {files}")
    return target


def check_links(source: ModelSource, allowed: Sequence[str], never: Sequence[Path] = ()) -> None:
    """Hold what the links in a local model's folder lead to against the operator's allow list. Raises: SourceError."""
    if isinstance(source, LocalPath):
        files = FolderFiles(source, source.path)
        for name in files.names():
            check_allowed(LocalPath((files.folder / name).resolve()), allowed, never)


def reference_model() -> Path:
    """The folder of the model shipped with the service, found without importing the workers it lies among.

    Raises: UnreadableSource.
    """
    spec = find_spec("workers")
    for place in (spec.submodule_search_locations if spec else None) or []:
        if (folder := Path(place) / "reference_model").is_dir():
            return folder
    raise UnreadableSource("The reference model is not installed. Install the service from its wheel or repository.")


def _open(
    source: str, revision: str | None, permit: Permit = anywhere, **s3: Unpack[S3Options]
) -> FolderFiles | BucketFiles | HubFiles:
    parsed = parse_model_source(source)
    _check_revision(parsed, revision)
    match parsed:
        case Reference():
            return FolderFiles(parsed, reference_model())
        case LocalPath(path):
            return FolderFiles(parsed, path, permit)
        case S3Location():
            return BucketFiles(parsed, **s3)
        case HubModel(repo):
            return HubFiles(repo, revision)


def _check_revision(source: ModelSource, revision: str | None) -> None:
    if revision is not None and not isinstance(source, HubModel):
        raise InvalidSource("Only models on the hub have revisions; leave it out.", param="model.revision")


def _needed(files: ModelFiles, weights: Sequence[str]) -> list[str]:
    """The small files and the weights. Raises: UnreadableSource."""
    small = [name for name in files.names() if SMALL_FILES.fullmatch(name) or LICENCES.fullmatch(name)]
    return _bounded(files, [*small, *(name for name in weights if name not in small)])


def _bounded(files: ModelFiles, names: list[str]) -> list[str]:
    if len(names) > MAX_FILES:
        raise UnreadableSource(f"{files} has {len(names)} files; a model has at most {MAX_FILES}.")
    return names


def _check_size(files: ModelFiles, names: Sequence[str], max_bytes: int | None) -> None:
    if max_bytes is None:
        return
    total = sum(files.size(name) for name in names)
    if total > max_bytes:
        raise TooLargeSource(
            f"{files} has {total} bytes in {len(names)} files; this service takes models of at most {max_bytes}. The "
            "operator can raise PDTRIM_MAX_MODEL_BYTES."
        )
