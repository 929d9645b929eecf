"""A job's model and text, fetched into the scratch folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pdtrim.contract.spec import JobSpec, ModelSpec
from pdtrim.contract.windows import wanted_windows
from service.settings import Settings
from service.sources import (
    Chosen,
    LocalPath,
    Row,
    Text,
    check_allowed,
    check_answered,
    fetch_model,
    fetch_rows,
    hold_model,
    parse_model_source,
    parse_text_source,
)
from service.sources.texts import MAX_TEXT_BYTES
from service.stopping import Check, go_on, interruptible
from workers.inputs.model_cache import ModelCache

BYTES_A_TOKEN = 64
"""What is read at the most for each token that is asked for, beyond `MAX_TEXT_BYTES`."""


def model_folder(
    model: ModelSpec,
    revision: str | None,
    settings: Settings,
    held: Path,
    opened: ExitStack,
    check: Check = go_on,
) -> Path:
    """The folder with the model's files, headers checked, good until `opened` is closed: fetched into the scratch
    folder, or, of a local model, `held` as they are now.

    Raises: SourceError, StoreUnavailable, what `check` raises.
    """
    assert settings.scratch_dir is not None
    # The gateway checked this too, but a link may lead elsewhere by now.
    source = parse_model_source(model.source)
    check_allowed(source, settings.allowed_sources, settings.own_places)
    if isinstance(source, LocalPath):
        most = settings.max_model_bytes
        return interruptible(check, partial(hold_model, source, held, opened, settings.permit, max_bytes=most))
    name = hashlib.sha256(f"{model.source}@{revision}".encode()).hexdigest()[:24]
    cache = ModelCache(settings.scratch_dir / "models", settings.model_cache_bytes)
    target = opened.enter_context(cache.using(name))
    return interruptible(
        check,
        partial(
            fetch_model,
            model.source,
            revision or model.revision,
            target,
            max_bytes=settings.max_model_bytes,
            make_room=partial(cache.make_room, name, check=check),
            check=check,
            endpoint_url=settings.s3_endpoint_url,
            region=settings.s3_region,
        ),
    )


def data_rows(spec: JobSpec, settings: Settings, check: Check = go_on) -> Iterator[Row] | None:
    """The rows of a job's data, to be read as far as they are needed; None for the Python standard library.

    Where rows hold no text, reading ends some time. Raises: SourceError.
    """
    data = spec.data
    if data.text is not None:
        return iter([Text(data.text, "data.text")])
    if data.origin == "builtin:stdlib":
        return None
    check_allowed(parse_text_source(data.origin), settings.allowed_sources, settings.own_places)
    tokens = sum(wanted_windows(spec).values()) * spec.calibration.window_tokens
    rows = fetch_rows(
        data.origin,
        Chosen(data.field, data.split),
        max_bytes=max(MAX_TEXT_BYTES, BYTES_A_TOKEN * tokens),
        check=check,
        endpoint_url=settings.s3_endpoint_url,
        region=settings.s3_region,
    )
    return rows if spec.distillation.data == "self" else map(_answered, rows)


def _answered(row: Row) -> Row:
    check_answered(row)
    return row
