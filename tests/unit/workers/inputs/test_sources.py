from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from pdtrim.contract.spec import JobSpec, ModelSpec
from service.settings import Settings
from service.sources import ForbiddenSource, Text, TooLargeSource, UnreadableSource
from tests.gateway import write_model
from tests.tiny_job import tiny_spec
from workers.inputs.sources import data_rows, model_folder

FILES = {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "models" / "tiny")


def settings_for(model: Path, **changes: Any) -> Settings:
    return Settings(data_dir=model.parent.parent / "data", allowed_sources=[model.parent.as_uri()], **changes)


@contextmanager
def held(model: Path, **changes: int) -> Iterator[Path]:
    """The folder of the model that a stage reads."""
    with TemporaryDirectory() as folder, ExitStack() as opened:
        settings = settings_for(model, **changes)
        yield model_folder(ModelSpec(source=model.as_uri()), None, settings, Path(folder) / "model", opened)


def fetched(model: Path, **changes: int) -> set[str]:
    with held(model, **changes) as folder:
        return {path.name for path in folder.iterdir()}


def test_a_model_is_checked_once_more_before_a_stage_reads_it(model: Path, tmp_path: Path) -> None:
    assert fetched(model) == FILES

    (model / "LICENSE").symlink_to(tmp_path)
    assert fetched(model) == FILES  # No file, so nothing is read of it.
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


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "model.safetensors"])
def test_a_file_that_is_swapped_under_a_stage_is_read_as_it_was(model: Path, tmp_path: Path, name: str) -> None:
    (model / "LICENSE").write_text("Apache")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    before = (model / name).read_bytes()
    with held(model) as folder:
        (model / name).unlink()
        (model / name).symlink_to(secret)

        assert (folder / name).read_bytes() == before
        copied = shutil.copyfile(folder / name, tmp_path / "copied")
        assert copied.read_bytes() == before
    with pytest.raises(ForbiddenSource), held(model):
        pass


def test_folders_pipes_and_sockets_are_left_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "LICENSES").mkdir()
    (model / "LICENSES" / "MIT").write_text("MIT")
    os.mkfifo(model / "NOTICE")
    os.mkfifo(model / "generation_config.json")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(model)  # A socket's path is short.
        listener.bind("LICENSE.sock")

        assert fetched(model) == FILES


def test_links_to_what_is_allowed_are_followed(model: Path) -> None:
    """As in the cache of the hub's client."""
    blobs = model.parent / "blobs"
    blobs.mkdir()
    (model / "model.safetensors").rename(blobs / "0123")
    (model / "model.safetensors").symlink_to("../blobs/0123")

    with held(model) as folder:
        assert (folder / "model.safetensors").read_bytes() == (blobs / "0123").read_bytes()


def test_what_the_service_keeps_is_no_source(tmp_path: Path) -> None:
    model = write_model(tmp_path / "data" / "scratch" / "models" / "theirs")
    settings = Settings(data_dir=tmp_path / "data", allowed_sources=[tmp_path.as_uri()])
    with ExitStack() as opened, pytest.raises(ForbiddenSource, match="own files"):
        model_folder(ModelSpec(source=model.as_uri()), None, settings, tmp_path / "held", opened)
    ours = write_model(tmp_path / "models" / "ours")
    (ours / "LICENSE").symlink_to(model / "config.json")
    with ExitStack() as opened, pytest.raises(ForbiddenSource, match="own files"):
        model_folder(ModelSpec(source=ours.as_uri()), None, settings, tmp_path / "held", opened)


def test_a_text_is_not_read_through_a_link_that_came_later(tmp_path: Path) -> None:
    text = tmp_path / "texts" / "a.txt"
    text.parent.mkdir()
    text.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    settings = Settings(data_dir=tmp_path / "data", allowed_sources=[text.parent.as_uri()])
    spec = JobSpec.model_validate(tiny_spec(tmp_path, data={"source": text.as_uri()}))

    rows = data_rows(spec, settings)
    (tmp_path / "secret.txt").write_text("secret")
    text.unlink()
    text.symlink_to(tmp_path / "secret.txt")

    # It was opened when it was allowed.
    assert list(rows or ()) == [Text("one\ntwo", text.as_uri())]
    with pytest.raises(ForbiddenSource):
        data_rows(spec, settings)
