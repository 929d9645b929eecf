"""Models and texts that lie in S3, on a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.sources import UnreadableSource, check_text, describe_model, fetch_model, fetch_text_documents
from service.storage import ArtifactStore, StoreUnavailable, open_store
from service.storage.s3 import S3Store
from tests.servers import S3Server, free_ports

MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "tokenizer.json": b"{}",
    "additional_chat_templates/tools.jinja": b"{{ x }}",
    "onnx/config.json": b"{}",
    "README.md": b"#",
}
FETCHED = ["additional_chat_templates/tools.jinja", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def store(s3: S3Server, s3_url: str) -> ArtifactStore:
    """A model below the prefix."""
    store = open_store(s3_url, **s3.options)
    for name, data in MODEL.items():
        store.put_bytes(name, data)
    return store


def names_in(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.startswith(".pdtrim-"))


def test_a_model_is_described_without_its_weights(s3: S3Server, s3_url: str, store: ArtifactStore) -> None:
    described = describe_model(s3_url, **s3.options)

    assert described.config == {"model_type": "llama"}
    assert described.weights == {"model.safetensors": 7}


def test_a_model_is_fetched_without_pickles(s3: S3Server, s3_url: str, store: ArtifactStore, tmp_path: Path) -> None:
    folder = fetch_model(s3_url, None, tmp_path / "model", **s3.options)

    assert names_in(folder) == FETCHED
    assert all((folder / name).read_bytes() == MODEL[name] for name in FETCHED)


def test_a_fetch_that_broke_off_goes_on(
    s3: S3Server, s3_url: str, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_download = S3Store.download
    downloaded: list[str] = []

    def download(self: S3Store, key: str, path: Path) -> None:
        if key == "model.safetensors" and len(downloaded) < 4:
            downloaded.append("broken off")
            raise StoreUnavailable("the connection broke off")
        downloaded.append(key)
        true_download(self, key, path)

    monkeypatch.setattr(S3Store, "download", download)
    with pytest.raises(StoreUnavailable, match="broke off"):
        fetch_model(s3_url, None, tmp_path / "model", **s3.options)
    before = list(downloaded)
    fetch_model(s3_url, None, tmp_path / "model", **s3.options)

    assert downloaded[len(before) :] == ["model.safetensors"]
    assert names_in(tmp_path / "model") == FETCHED


def test_what_changed_in_s3_is_fetched_again_though_its_size_is_the_same(
    s3: S3Server, s3_url: str, store: ArtifactStore, tmp_path: Path
) -> None:
    fetch_model(s3_url, None, tmp_path / "model", **s3.options)
    store.put_bytes("model.safetensors", b"WEIGHTS")
    store.delete_prefix("additional_chat_templates")

    fetch_model(s3_url, None, tmp_path / "model", **s3.options)

    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"WEIGHTS"
    assert names_in(tmp_path / "model") == [name for name in FETCHED if "/" not in name]


def test_a_prefix_with_nothing_below_it_is_no_model(s3: S3Server, s3_url: str) -> None:
    with pytest.raises(UnreadableSource, match=rf"{s3_url} has neither"):
        fetch_model(s3_url, None, Path("unused"), **s3.options)


def test_a_bucket_that_is_not_there_is_the_requests_fault(s3: S3Server) -> None:
    with pytest.raises(UnreadableSource, match="NoSuchBucket"):
        describe_model("s3://nowhere-to-be-found/model", **s3.options)
    with pytest.raises(UnreadableSource, match="nowhere-to-be-found"):
        check_text("s3://nowhere-to-be-found/text.txt", **s3.options)


def test_a_server_that_is_not_there_may_come_back(s3: S3Server) -> None:
    (port,) = free_ports(1)
    options = {**s3.options, "endpoint_url": f"http://127.0.0.1:{port}"}

    with pytest.raises(StoreUnavailable, match=str(port)):
        describe_model("s3://bucket/model", **options)  # type: ignore[arg-type]


def test_texts_come_from_s3(s3: S3Server, s3_url: str) -> None:
    store = open_store(s3_url, **s3.options)
    store.put_bytes("a.txt", b"one")
    store.put_bytes("b.jsonl", b'{"text": "one"}\n{"text": "two"}\n{}\n')

    check_text(f"{s3_url}/a.txt", **s3.options)
    assert list(fetch_text_documents(f"{s3_url}/a.txt", **s3.options)) == ["one"]
    documents = fetch_text_documents(f"{s3_url}/b.jsonl", **s3.options)
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(UnreadableSource, match=rf"line 3 of {s3_url}/b\.jsonl"):
        next(documents)


def test_a_text_in_s3_is_looked_at_before_it_is_fetched(s3: S3Server, s3_url: str) -> None:
    open_store(s3_url, **s3.options).put_bytes("a.txt", b"12345")

    with pytest.raises(UnreadableSource, match="has 5 bytes"):
        fetch_text_documents(f"{s3_url}/a.txt", max_bytes=4, **s3.options)
    with pytest.raises(UnreadableSource, match=r"b\.txt cannot be read"):
        fetch_text_documents(f"{s3_url}/b.txt", **s3.options)
