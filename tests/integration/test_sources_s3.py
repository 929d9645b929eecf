"""Models and texts that lie in S3, on a real server."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from service.sources import (
    Text,
    TooLargeSource,
    UnreadableSource,
    check_text,
    describe_model,
    download,
    fetch_model,
    fetch_rows,
)
from service.storage import ArtifactStore, StoreUnavailable, open_store
from service.storage.s3 import S3Store, s3_client
from tests.live_gateway import relay
from tests.servers import S3Server, free_ports
from tests.weights import safetensors_file

PART = 1 << 16
WEIGHTS = safetensors_file("a", "b", size=PART * 3 // 2)
"""Three parts, and a little for the header."""
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "tokenizer.json": b'{"model": {}}',
    "additional_chat_templates/tools.jinja": b"{{ x }}",
    "onnx/config.json": b"{}",
    "README.md": b"#",
}
FETCHED = ["README.md", "additional_chat_templates/tools.jinja", "config.json", "model.safetensors", "tokenizer.json"]


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
    assert described.weights == {"model.safetensors": len(WEIGHTS)}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("model.safetensors", safetensors_file("a.weight_scale"), "has the tensor 'a.weight_scale': its weights are"),
        ("model.safetensors", WEIGHTS[:-1], "model.safetensors of s3://.* is no safetensors file"),
        ("tokenizer.json", b"[]", "tokenizer.json of s3://.* is not a JSON object"),
    ],
)
def test_what_a_header_or_a_tokenizer_tells_is_told_at_submission(
    s3: S3Server, s3_url: str, store: ArtifactStore, name: str, content: bytes, complaint: str
) -> None:
    store.put_bytes(name, content)
    with pytest.raises(UnreadableSource, match=complaint):
        describe_model(s3_url, **s3.options)


def test_a_model_is_fetched_without_pickles(s3: S3Server, s3_url: str, store: ArtifactStore, tmp_path: Path) -> None:
    folder = fetch_model(s3_url, None, tmp_path / "model", **s3.options)

    assert names_in(folder) == FETCHED
    assert all((folder / name).read_bytes() == MODEL[name] for name in FETCHED)


def ranges_in(requests: list[bytes], name: str) -> list[str]:
    """The ranges of a file that were asked for."""
    return sorted(
        range_[1].decode()
        for request in requests
        if request.startswith(b"GET ") and f"/{name} ".encode() in request.split(b"\r\n")[0]
        if (range_ := re.search(rb"(?i)\r\nrange: bytes=(\d+)-", request))
    )


def test_a_fetch_that_broke_off_goes_on_where_it_was(
    s3: S3Server, s3_url: str, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PART_BYTES", PART)
    monkeypatch.setattr(download, "RETRY_PAUSES_S", ())
    true_range = S3Store.read_range

    def read_range(self: S3Store, key: str, start: int, end: int) -> Iterator[bytes]:
        if key == "model.safetensors" and start >= 2 * PART:
            raise StoreUnavailable("the connection broke off")
        return true_range(self, key, start, end)

    with monkeypatch.context() as broken:
        broken.setattr(S3Store, "read_range", read_range)
        with pytest.raises(StoreUnavailable, match="broke off"):
            fetch_model(s3_url, None, tmp_path / "model", **s3.options)
    assert "model.safetensors" not in names_in(tmp_path / "model")

    port = int(s3.endpoint_url.rpartition(":")[2])
    with relay(port, break_after=[]) as watched:
        fetch_model(s3_url, None, tmp_path / "model", **s3.options | {"endpoint_url": watched.url})

    assert ranges_in(watched.requests, "model.safetensors") == [str(2 * PART), str(3 * PART)]
    assert names_in(tmp_path / "model") == FETCHED
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_connection_that_breaks_is_opened_again(
    s3: S3Server, s3_url: str, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RETRY_PAUSES_S", (0.0, 0.0))
    port = int(s3.endpoint_url.rpartition(":")[2])

    # Each connection breaks after half of the weights, until some have broken.
    with relay(port, break_after=[len(WEIGHTS) // 2] * 2) as breaking:
        fetch_model(s3_url, None, tmp_path / "model", **s3.options | {"endpoint_url": breaking.url})

    assert len(ranges_in(breaking.requests, "model.safetensors")) == 3
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == WEIGHTS


def test_what_changed_in_s3_is_fetched_again_though_its_size_is_the_same(
    s3: S3Server, s3_url: str, store: ArtifactStore, tmp_path: Path
) -> None:
    fetch_model(s3_url, None, tmp_path / "model", **s3.options)
    changed = WEIGHTS[:-1] + b"!"
    store.put_bytes("model.safetensors", changed)
    store.delete_prefix("additional_chat_templates")

    fetch_model(s3_url, None, tmp_path / "model", **s3.options)

    assert (tmp_path / "model" / "model.safetensors").read_bytes() == changed
    assert names_in(tmp_path / "model") == [name for name in FETCHED if "/" not in name]


@pytest.mark.parametrize("upload", ["with its SHA-256", "as any client does", "in parts"])
def test_the_digest_that_s3_declares_is_checked(
    s3: S3Server, s3_url: str, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upload: str
) -> None:
    """What is damaged on the way is noticed, unless the object was uploaded in parts: only its header is held then."""
    whole = WEIGHTS + bytes(20 << 20) if upload == "in parts" else WEIGHTS
    (tmp_path / "weights").write_bytes(whole)
    if upload == "as any client does":
        client = s3_client(**s3.options)
        client.put_object(Bucket=s3.bucket, Key=f"{s3_url.rpartition('/')[2]}/model.safetensors", Body=whole)
    else:
        store.put_file("model.safetensors", tmp_path / "weights")
    true_range = S3Store.read_range

    def read_range(self: S3Store, key: str, start: int, end: int) -> Iterator[bytes]:
        data = b"".join(true_range(self, key, start, end))
        yield data[:-1] + b"?" if key == "model.safetensors" else data

    monkeypatch.setattr(S3Store, "read_range", read_range)

    expected = (
        "belong to no tensor" if upload == "in parts" else "model.safetensors of .* arrived damaged: its (md5|sha256)"
    )
    with pytest.raises((StoreUnavailable, UnreadableSource), match=expected):
        fetch_model(s3_url, None, tmp_path / "model", **s3.options)


def test_a_model_that_is_too_large_is_refused_before_the_first_byte(
    s3: S3Server, s3_url: str, store: ArtifactStore, tmp_path: Path
) -> None:
    total = sum(len(MODEL[name]) for name in FETCHED)

    told = rf"has {total} bytes in {len(FETCHED)} files.*at most {total - 1}\."
    with pytest.raises(TooLargeSource, match=told):
        describe_model(s3_url, None, max_bytes=total - 1, **s3.options)
    with pytest.raises(TooLargeSource, match=told):
        fetch_model(s3_url, None, tmp_path / "model", max_bytes=total - 1, **s3.options)
    assert not (tmp_path / "model").exists()


def test_objects_whose_names_are_no_keys_are_no_files_of_a_model(
    s3: S3Server, s3_url: str, store: ArtifactStore, tmp_path: Path
) -> None:
    key = f"{s3_url.rpartition('/')[2]}/odd#name?.json"
    s3_client(**s3.options).put_object(Bucket=s3.bucket, Key=key, Body=b"{}")

    assert names_in(fetch_model(s3_url, None, tmp_path / "model", **s3.options)) == FETCHED


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


def test_data_of_every_form_comes_from_s3(s3: S3Server, s3_url: str) -> None:
    rows = [{"text": "one"}, {"text": "two"}, {"id": 3}]
    lines = "\n".join(map(json.dumps, rows)).encode()
    table = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), table)
    contents = {
        "b.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines),
        "b.jsonl.zst": zstandard.compress(lines),
        "b.json": json.dumps(rows).encode(),
        "b.parquet": bytes(table.getvalue()),
    }
    store = open_store(s3_url, **s3.options)
    store.put_bytes("a.txt", b"one")
    check_text(f"{s3_url}/a.txt", **s3.options)
    assert list(fetch_rows(f"{s3_url}/a.txt", **s3.options)) == [Text("one", f"{s3_url}/a.txt")]
    for name, content in contents.items():
        store.put_bytes(name, content)
        read = fetch_rows(f"{s3_url}/{name}", **s3.options)
        assert [row.text for row in islice(read, 2) if isinstance(row, Text)] == ["one", "two"]
        with pytest.raises(UnreadableSource, match=rf"(line|row) 3 of {s3_url}/{name} has no field"):
            next(read)


def test_of_a_large_object_in_s3_only_the_beginning_is_fetched(s3: S3Server, s3_url: str) -> None:
    lines = b"".join(b'{"text": "%07d"}\n' % number for number in range(1_500_000))  # 30 MB
    open_store(s3_url, **s3.options).put_bytes("a.jsonl", lines)
    read = 0

    def count() -> None:
        nonlocal read
        read += 1

    rows = fetch_rows(f"{s3_url}/a.jsonl", check=count, **s3.options)
    assert [row.text for row in islice(rows, 2) if isinstance(row, Text)] == ["0000000", "0000001"]
    assert read == 1  # request, of 4 MiB


def test_an_object_that_is_not_there_is_refused_at_the_call(s3: S3Server, s3_url: str) -> None:
    for refused in (fetch_rows, check_text):
        with pytest.raises(UnreadableSource, match=r"b\.txt cannot be read"):
            refused(f"{s3_url}/b.txt", **s3.options)
