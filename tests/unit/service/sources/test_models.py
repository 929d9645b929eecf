from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from service.sources import UnreadableSource, describe_model, fetch_model, reference_model, resolve_revision
from service.sources.errors import InvalidSource


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"12345")
    return folder


def shard(model: Path, weight_map: object, *shards: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in shards:
        (model / name).write_bytes(b"123")


def test_a_folder_is_described_and_used_where_it_is(model: Path, tmp_path: Path) -> None:
    described = describe_model(model.as_uri())

    assert described.config == {"model_type": "llama"}
    assert (described.weights, described.weight_bytes) == ({"model.safetensors": 5}, 5)
    assert described.revision is None
    assert fetch_model(model.as_uri(), None, tmp_path / "target") == model
    assert not (tmp_path / "target").exists()


def test_the_reference_model_is_found_without_importing_the_workers() -> None:
    script = (
        "import sys; from service.sources import describe_model, reference_model; "
        "described = describe_model('reference'); "
        "print(reference_model().name, described.weight_bytes > 0, 'workers' in sys.modules, 'torch' in sys.modules)"
    )

    printed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout

    assert printed.split() == ["reference_model", "True", "False", "False"]
    assert fetch_model("reference", None, Path("unused")) == reference_model()


def test_shards_are_those_that_the_index_names(model: Path) -> None:
    shard(model, {"a": "x-2.safetensors", "b": "x-1.safetensors", "c": "x-2.safetensors"}, "x-1.safetensors",
          "x-2.safetensors", "consolidated.safetensors")  # fmt: skip

    assert describe_model(model.as_uri()).weights == {"x-1.safetensors": 3, "x-2.safetensors": 3}


def test_a_missing_shard_is_named(model: Path) -> None:
    shard(model, {"a": "x-1.safetensors", "b": "x-2.safetensors"}, "x-1.safetensors")

    with pytest.raises(UnreadableSource, match=r"lacks 1 of 2 shards, the first is x-2\.safetensors"):
        describe_model(model.as_uri())


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin"])
def test_an_index_may_name_only_safetensors_files_beside_it(model: Path, name: str) -> None:
    shard(model, {"a": name})

    with pytest.raises(UnreadableSource, match="no safetensors file beside it"):
        describe_model(model.as_uri())


@pytest.mark.parametrize("weight_map", [None, {}, []])
def test_an_index_without_a_map_is_refused(model: Path, weight_map: object) -> None:
    shard(model, weight_map)

    with pytest.raises(UnreadableSource, match="no weight_map"):
        describe_model(model.as_uri())


def test_a_folder_of_pickles_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")

    for refused in (describe_model, lambda source: fetch_model(source, None, tmp_path / "target")):
        with pytest.raises(UnreadableSource, match=r"only pickle weights \(pytorch_model\.bin\).*Convert") as caught:
            refused(model.as_uri())
        assert caught.value.code == "source_unreadable"


def test_a_folder_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()

    with pytest.raises(UnreadableSource, match=r"neither model\.safetensors nor"):
        describe_model(model.as_uri())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "not a JSON object"),
        (b" " * (1 << 20) + b"{}", "more than 1048576 are not read"),
    ],
)
def test_a_config_that_is_none_is_refused(model: Path, content: bytes, complaint: str) -> None:
    (model / "config.json").write_bytes(content)

    with pytest.raises(UnreadableSource, match=complaint):
        describe_model(model.as_uri())


def test_a_missing_config_is_named(model: Path) -> None:
    (model / "config.json").unlink()

    with pytest.raises(UnreadableSource, match=r"has no config\.json"):
        fetch_model(model.as_uri(), None, model)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableSource, match=r"file:///.*/missing is not a folder on this machine"):
        describe_model((tmp_path / "missing").as_uri())


@pytest.mark.parametrize("source", ["reference", "file:///models/a", "s3://bucket/a"])
def test_only_the_hub_has_revisions(source: str) -> None:
    assert resolve_revision(source) is None
    with pytest.raises(InvalidSource, match="Only models on the hub") as caught:
        resolve_revision(source, "main")
    assert caught.value.param == "model.revision"
