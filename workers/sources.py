"""A job's model and text, fetched into the scratch folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from service.contract.spec import DataSpec, ModelSpec
from service.settings import Settings
from service.sources import fetch_model, fetch_text_documents


def model_folder(model: ModelSpec, revision: str | None, settings: Settings) -> Path:
    """The folder with the model's files, fetched into the scratch folder unless it is already local.

    Raises: SourceUnreadable.
    """
    assert settings.scratch_dir is not None
    name = hashlib.sha256(f"{model.source}@{revision}".encode()).hexdigest()[:24]
    return fetch_model(
        model.source,
        revision or model.revision,
        settings.scratch_dir / "models" / name,
        endpoint_url=settings.s3_endpoint_url,
        region=settings.s3_region,
    )


def text_documents(data: DataSpec, settings: Settings) -> Iterable[str] | None:
    """The documents of a job's text; None for the Python standard library. Raises: SourceUnreadable."""
    if data.text is not None:
        return [data.text]
    if data.origin == "builtin:stdlib":
        return None
    return fetch_text_documents(data.origin, endpoint_url=settings.s3_endpoint_url, region=settings.s3_region)
