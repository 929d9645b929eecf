from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdtrim.contract.spec import ModelSpec
from service.settings import Settings
from service.sources import ForbiddenSource, TooLargeSource, UnreadableSource
from tests.gateway import write_model
from workers.inputs.sources import model_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "models" / "tiny")


def settings_for(model: Path, **changes: Any) -> Settings:
    return Settings(data_dir=model.parent.parent / "data", allowed_sources=[model.parent.as_uri()], **changes)


def fetched(model: Path, **changes: int) -> Path:
    return model_folder(ModelSpec(source=model.as_uri()), None, settings_for(model, **changes))


def test_a_model_is_checked_once_more_before_a_stage_reads_it(model: Path, tmp_path: Path) -> None:
    assert fetched(model) == model

    (model / "LICENSE").symlink_to(tmp_path)
    assert fetched(model) == model  # No file, so nothing is read of it.
    (tmp_path / "secret").write_text("secret")
    (model / "NOTICE").symlink_to(tmp_path / "secret")
    with pytest.raises(ForbiddenSource):
        fetched(model)


def test_weights_that_are_none_fail_the_stage(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"weights of another kind")

    with pytest.raises(UnreadableSource, match=r"model\.safetensors of file:///.* is no safetensors file"):
        fetched(model)


def test_a_model_that_grew_too_large_fails_the_stage(model: Path) -> None:
    with pytest.raises(TooLargeSource, match="PDTRIM_MAX_MODEL_BYTES"):
        fetched(model, max_model_bytes=9)
