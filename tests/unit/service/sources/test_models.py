from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from service.sources import (
    ForbiddenSource,
    InvalidSource,
    TooLargeSource,
    UnreadableSource,
    check_links,
    describe_model,
    fetch_model,
    models,
    parse_model_source,
    reference_model,
    resolve_revision,
    weights,
)
from tests.weights import safetensors_file

WEIGHTS = safetensors_file("a", "b")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def shard(model: Path, weight_map: object, **shards: str) -> None:
    """Replace the model's weights by an index and shards, each with the tensors that its text names."""
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, tensors in shards.items():
        (model / f"{name}.safetensors").write_bytes(safetensors_file(*tensors.split()))


def refuse(model: Path, complaint: str) -> None:
    """Both the gateway and the worker refuse the model."""
    for refused in (describe_model, lambda source: fetch_model(source, None, Path("unused"))):
        with pytest.raises(UnreadableSource, match=complaint):
            refused(model.as_uri())


def test_a_folder_is_described_and_used_where_it_is(model: Path, tmp_path: Path) -> None:
    described = describe_model(model.as_uri())

    assert described.config == {"model_type": "llama"}
    assert (described.weights, described.weight_bytes) == ({"model.safetensors": len(WEIGHTS)}, len(WEIGHTS))
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
    shard(model, {"a": "y.safetensors", "b": "x.safetensors", "c": "y.safetensors"}, x="b", y="c a", consolidated="a")

    assert list(describe_model(model.as_uri()).weights) == ["x.safetensors", "y.safetensors"]
    assert fetch_model(model.as_uri(), None, Path("unused")) == model


def test_a_whole_file_goes_before_an_index_as_in_transformers(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')

    assert list(describe_model(model.as_uri()).weights) == ["model.safetensors"]


def test_a_missing_shard_is_named(model: Path) -> None:
    shard(model, {"a": "x.safetensors", "b": "y.safetensors"}, x="a")

    refuse(model, r"lacks 1 of 2 shards, the first is y\.safetensors")


def test_a_tensor_that_its_shard_lacks_is_named(model: Path) -> None:
    shard(model, {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"}, x="a", y="b d")

    refuse(model, r"y\.safetensors of .* lacks the tensor 'c' that model\.safetensors\.index\.json says it holds")


def test_a_tensor_in_two_shards_is_refused(model: Path) -> None:
    shard(model, {"a": "x.safetensors", "b": "y.safetensors"}, x="a b", y="b")

    refuse(model, r"x\.safetensors of .* holds the tensor 'b', which is in y\.safetensors by")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_header_that_lies_is_refused_before_a_job_is_accepted(model: Path, sharded: bool) -> None:
    if sharded:
        shard(model, {"a": "model-1.safetensors"})
    name = "model-1.safetensors" if sharded else "model.safetensors"
    (model / name).write_bytes(WEIGHTS[:-1])

    refuse(model, rf"{name} of file:///.* is no safetensors file: the tensor 'b' is said to lie at bytes 4 to 8 of 7\.")


def test_long_headers_are_left_to_the_worker(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "CHEAP_HEADER_BYTES", 10)
    (model / "model.safetensors").write_bytes(WEIGHTS[:-1])

    assert describe_model(model.as_uri()).weight_bytes == len(WEIGHTS) - 1
    with pytest.raises(UnreadableSource, match="no safetensors file"):
        fetch_model(model.as_uri(), None, Path("unused"))


def test_a_model_with_an_adapter_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/other/model"}')

    refuse(model, r"has an adapter_config\.json\. Merge")


def test_a_model_may_be_as_large_as_the_operator_says(model: Path) -> None:
    (model / "notes.txt").write_bytes(bytes(100))
    total = sum(path.stat().st_size for path in model.iterdir())

    assert describe_model(model.as_uri(), max_bytes=total).weight_bytes == len(WEIGHTS)
    for refused in (describe_model, lambda source, **most: fetch_model(source, None, Path("unused"), **most)):
        with pytest.raises(TooLargeSource, match=rf"has {total} bytes in 4 files; .* at most {total - 1}") as caught:
            refused(model.as_uri(), max_bytes=total - 1)
    assert (caught.value.code, caught.value.status) == ("model_too_large", 422)


def test_links_may_lead_only_where_the_operator_allows(model: Path, tmp_path: Path) -> None:
    blobs, elsewhere = tmp_path / "blobs", tmp_path / "elsewhere"
    for folder in (blobs, elsewhere):
        folder.mkdir()
        (folder / "weights").write_bytes(WEIGHTS)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(blobs / "weights")
    source, allowed = parse_model_source(model.as_uri()), [model.as_uri(), blobs.as_uri()]

    check_links(source, allowed)
    (model / "LICENSE").symlink_to(elsewhere / "weights")
    with pytest.raises(ForbiddenSource, match="links are followed"):
        check_links(source, allowed)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "folder/a.safetensors", ""])
def test_an_index_may_name_only_safetensors_files_beside_it(model: Path, name: str) -> None:
    shard(model, {"a": name})

    refuse(model, "no safetensors file beside it")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, {"a": None}, {"a": ["x.safetensors"]}])
def test_an_index_without_a_map_is_refused(model: Path, weight_map: object) -> None:
    shard(model, weight_map)

    refuse(model, "no weight_map from tensors to files")


def test_an_index_is_read_up_to_a_bound(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(model, {"a": "x.safetensors"}, x="a")
    monkeypatch.setattr(weights, "MAX_INDEX_BYTES", 10)

    refuse(model, "more than 10 are not read")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl", "a.pickle"])
def test_an_index_of_pickles_is_refused_by_name(model: Path, name: str) -> None:
    shard(model, {"a": name})
    (model / name).write_bytes(b"pickle")

    refuse(model, rf"names '{name}', a pickle.*Convert")


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00X\x04\x00", b"PK\x03\x04\x00\x00\x08\x08\x00\x00"])
def test_a_pickle_under_another_name_is_refused(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)

    refuse(model, r"model\.safetensors of .* a pickle under another name")


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
