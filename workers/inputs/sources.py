"""A job's model and text, fetched into the scratch folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pdtrim.contract.spec import DataSpec, ModelSpec
from service.settings import Settings
from service.sources import (
    LocalPath,
    check_allowed,
    fetch_model,
    fetch_text_documents,
    hold_model,
    parse_model_source,
    parse_text_source,
)
from service.stopping import Check, go_on, interruptible


def model_folder(
    model: ModelSpec,
    revision: str | None,
    settings: Settings,
    held: Path,
    opened: ExitStack,
    check: Check = go_on,
) -> Path:
    """The folder with the model's files, headers checked: fetched into the scratch folder, or, of a local model, `held`
    as they are now until `opened` is closed.

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
    return interruptible(
        check,
        partial(
            fetch_model,
            model.source,
            revision or model.revision,
            settings.scratch_dir / "models" / name,
            max_bytes=settings.max_model_bytes,
            check=check,
            endpoint_url=settings.s3_endpoint_url,
            region=settings.s3_region,
        ),
    )


def text_documents(data: DataSpec, settings: Settings, check: Check = go_on) -> Iterable[str] | None:
    """The documents of a job's text; None for the Python standard library. Raises: SourceError."""
    if data.text is not None:
        return [data.text]
    if data.origin == "builtin:stdlib":
        return None
    check_allowed(parse_text_source(data.origin), settings.allowed_sources, settings.own_places)
    return fetch_text_documents(
        data.origin, check=check, endpoint_url=settings.s3_endpoint_url, region=settings.s3_region
    )
