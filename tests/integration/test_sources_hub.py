"""The hub's client against a local stand-in for the hub."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.sources import (
    TooLargeSource,
    UnreadableSource,
    check_text,
    describe_model,
    download,
    fetch_model,
    models,
    resolve_revision,
)
from service.storage import StoreUnavailable
from tests.hub import COMMIT, REPOSITORY, Hub, arriving_bytes, serve_hub, use_hub
from tests.servers import free_ports
from tests.weights import safetensors_file

SOURCE = f"hf://{REPOSITORY}"
PART = 1 << 16
WEIGHTS = safetensors_file("a", "b", size=PART * 3 // 2)
"""Three parts, and a little for the header."""
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "tokenizer.json": b'{"model": {}}',
    "chat_template.jinja": b"{{ x }}",
    "onnx/config.json": b"{}",
    "README.md": b"#",
}
FETCHED = ["README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(MODEL) as hub:
        use_hub(monkeypatch, hub.url)
        yield hub


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetches in small parts, and without pauses."""
    monkeypatch.setattr(download, "PART_BYTES", PART)
    monkeypatch.setattr(download, "RETRY_PAUSES_S", (0.0,))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".pdtrim-"))


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_a_revision_resolves_to_its_commit(hub: Hub, revision: str | None) -> None:
    assert resolve_revision(SOURCE, revision) == COMMIT


def test_a_model_is_described_at_one_commit_without_its_weights(hub: Hub) -> None:
    described = describe_model(SOURCE, "v1")

    assert described.config == {"model_type": "llama"}
    assert (described.revision, described.weights) == (COMMIT, {"model.safetensors": len(WEIGHTS)})
    # Of the weights only the header, whose length stands in the first eight bytes.
    header = 7 + int.from_bytes(WEIGHTS[:8], "little")
    assert [asked for asked in hub.downloads if asked[0] == "model.safetensors"] == [
        ("model.safetensors", "bytes=0-7"),
        ("model.safetensors", f"bytes=0-{header}"),
    ]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model.safetensors": safetensors_file("a.weight_scale")}, "has the tensor 'a.weight_scale': its weights are"),
        ({"model.safetensors": WEIGHTS[:-1]}, "model.safetensors of .* is no safetensors file"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json of .* describes no tokenizer"),
    ],
)
def test_what_a_header_or_a_tokenizer_tells_is_told_at_submission(
    hub: Hub, changes: dict[str, bytes], complaint: str
) -> None:
    hub.files |= changes
    with pytest.raises(UnreadableSource, match=complaint):
        describe_model(SOURCE)


def test_a_model_without_a_tokenizer_is_refused(hub: Hub) -> None:
    del hub.files["tokenizer.json"]
    with pytest.raises(UnreadableSource, match=f"hf://{REPOSITORY} at {COMMIT} has no tokenizer"):
        describe_model(SOURCE)


def test_a_header_that_is_too_long_is_left_to_the_worker(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "CHEAP_HEADER_BYTES", 10)
    hub.files["model.safetensors"] = safetensors_file("a.weight_scale")
    assert describe_model(SOURCE).weight_bytes == len(hub.files["model.safetensors"])


def test_a_model_is_fetched_without_pickles(hub: Hub, tmp_path: Path) -> None:
    folder = fetch_model(SOURCE, "v1", tmp_path / "model")

    assert names_in(folder) == FETCHED
    assert all((folder / name).read_bytes() == MODEL[name] for name in FETCHED)
    assert "pytorch_model.bin" not in {name for name, _ in hub.downloads}


def weights_asked_for(hub: Hub) -> list[int]:
    """Where the parts of the weights that were asked for begin."""
    return sorted(
        int(wanted.removeprefix("bytes=").partition("-")[0])
        for name, wanted in hub.downloads
        if name == "model.safetensors" and wanted is not None
    )


def test_a_fetch_that_broke_off_goes_on(hub: Hub, tmp_path: Path, in_parts: None) -> None:
    hub.broken = {"model.safetensors": PART * 5 // 2}
    with pytest.raises(StoreUnavailable, match=rf"{hub.url}|arrived with {PART * 5 // 2} bytes"):
        fetch_model(SOURCE, None, tmp_path / "model")
    assert names_in(tmp_path / "model") == [name for name in FETCHED if name != "model.safetensors"]
    hub.broken = {}
    hub.downloads.clear()

    fetch_model(SOURCE, None, tmp_path / "model")

    # The configuration is read once more for the checks; the tokenizer and the template stay as they are.
    assert {name for name, _ in hub.downloads} == {"config.json", "model.safetensors"}
    assert weights_asked_for(hub) == [2 * PART, 3 * PART]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_fetch_that_was_killed_goes_on_where_it_was(hub: Hub, tmp_path: Path, in_parts: None) -> None:
    hub.stalled = {"model.safetensors": PART * 5 // 2}
    script = (
        "from pathlib import Path; from service.sources import download, fetch_model\n"
        f"download.PART_BYTES = {PART}\n"
        f"fetch_model({SOURCE!r}, None, Path({str(tmp_path / 'model')!r}))\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as fetching:
        deadline = time.monotonic() + 60
        while arriving_bytes(tmp_path / "model") < 2 * PART:
            assert fetching.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        fetching.kill()
    hub.stalled = {}
    hub.downloads.clear()

    fetch_model(SOURCE, None, tmp_path / "model")

    assert weights_asked_for(hub) == [2 * PART, 3 * PART]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == WEIGHTS
    assert names_in(tmp_path / "model") == FETCHED


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_what_arrives_damaged_is_fetched_anew(hub: Hub, tmp_path: Path, in_parts: None, name: str) -> None:
    hub.damaged = {name}
    with pytest.raises(StoreUnavailable, match=rf"{name} of {SOURCE} at {COMMIT} arrived damaged: its sha"):
        fetch_model(SOURCE, None, tmp_path / "model")
    assert name not in names_in(tmp_path / "model")
    hub.damaged = set()

    fetch_model(SOURCE, None, tmp_path / "model")

    assert (tmp_path / "model" / name).read_bytes() == MODEL[name]


def test_two_that_fetch_the_same_model_fetch_it_once(hub: Hub, tmp_path: Path, in_parts: None) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: fetch_model(SOURCE, None, tmp_path / "model"), range(2)))

    assert weights_asked_for(hub) == [0, PART, 2 * PART, 3 * PART]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_model_that_is_too_large_is_refused_before_the_first_byte(hub: Hub, tmp_path: Path) -> None:
    total = sum(len(MODEL[name]) for name in FETCHED)
    told = rf"has {total} bytes in {len(FETCHED)} files.*at most {total - 1}\..*MAX_MODEL"
    with pytest.raises(TooLargeSource, match=told):
        describe_model(SOURCE, None, max_bytes=total - 1)
    with pytest.raises(TooLargeSource, match=told):
        fetch_model(SOURCE, None, tmp_path / "model", max_bytes=total - 1)

    assert {name for name, _ in hub.downloads} == {"config.json"}
    assert not (tmp_path / "model").exists()
    assert describe_model(SOURCE, None, max_bytes=total).weight_bytes == len(WEIGHTS)


def test_weights_that_are_none_are_refused_once_they_are_here(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = b"\x80\x02}q\x00X" * 100

    with pytest.raises(UnreadableSource, match=rf"model\.safetensors of {SOURCE}.*a pickle under another name.*again"):
        fetch_model(SOURCE, None, tmp_path / "model")


def test_only_pickles_are_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]

    with pytest.raises(UnreadableSource, match=rf"{SOURCE} at {COMMIT} has only pickle weights \(pytorch_model\.bin\)"):
        fetch_model(SOURCE, None, tmp_path / "model")

    assert hub.downloads == []


def test_an_unknown_revision_or_repository_is_named(hub: Hub) -> None:
    with pytest.raises(UnreadableSource, match="no such revision"):
        resolve_revision(SOURCE, "v2")
    with pytest.raises(UnreadableSource, match=r"hf://acme/other does not exist on .*HF_TOKEN"):
        resolve_revision("hf://acme/other")


@pytest.mark.parametrize(
    ("status", "code", "complaint"),
    [
        (403, "GatedRepo", "is gated: accept its licence"),
        (403, "DisabledRepo", "disabled|closed to the service"),
        (401, "", "closed to the service"),
    ],
)
def test_what_is_closed_is_the_requests_fault(hub: Hub, status: int, code: str, complaint: str) -> None:
    hub.refusal = (status, code)

    with pytest.raises(UnreadableSource, match=complaint):
        describe_model(SOURCE)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_may_recover(hub: Hub, status: int) -> None:
    hub.refusal = (status, "")

    with pytest.raises(StoreUnavailable, match=rf"{hub.url} did not give {SOURCE}: .*{status}.*HF_ENDPOINT"):
        describe_model(SOURCE)


def test_a_hub_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    use_hub(monkeypatch, f"http://127.0.0.1:{port}")

    for ask in (resolve_revision, describe_model, lambda source: fetch_model(source, COMMIT, tmp_path / "model")):
        with pytest.raises(StoreUnavailable, match=rf"http://127\.0\.0\.1:{port} did not give"):
            ask(SOURCE)
    with pytest.raises(StoreUnavailable, match=str(port)):
        check_text("hf://datasets/acme/wiki")


def run(script: str, hub: Hub, home: Path) -> list[str]:
    """What `script` prints in a process of its own whose hub is the stand-in."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_endpoint_comes_from_the_environment(hub: Hub, tmp_path: Path) -> None:
    script = f"from service.sources import resolve_revision; print(resolve_revision({SOURCE!r}, 'v1'))"

    assert run(script, hub, tmp_path) == [COMMIT]


@pytest.mark.slow
def test_a_data_set_is_streamed_as_far_as_the_bound(tmp_path: Path) -> None:
    script = (
        "from service.sources import SourceError, check_text, fetch_rows\n"
        f"source = 'hf://datasets/{REPOSITORY}'\n"
        "check_text(source)\n"
        "print(*(row.text for row in fetch_rows(source)))\n"
        "print(*(row.text for row in fetch_rows(source, max_bytes=4)))\n"
        "for wrong in (source + '/other', source + '-missing'):\n"
        "    try:\n"
        "        fetch_rows(wrong)\n"
        "    except SourceError as error:\n"
        "        print(error.code, 'cannot be loaded' in str(error))\n"
    )
    with serve_hub({"train.jsonl": b'{"text": "r1"}\n{"text": "r2"}\n{"text": "r3"}\n'}, "datasets") as hub:
        printed = run(script, hub, tmp_path)

    assert printed == ["r1 r2 r3", "r1 r2", "source_unreadable True", "source_unreadable True"]


CARD = b"""---
configs:
- config_name: wiki-2
  data_files: [{split: train, path: wiki-2/train.jsonl}, {split: test, path: wiki-2/test.jsonl.gz}]
- config_name: chat
  data_files: [{split: train_sft, path: chat.jsonl}]
---
"""


@pytest.mark.slow
def test_subsets_splits_and_fields_of_a_data_set_can_be_named(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    files = {
        "README.md": CARD,
        "wiki-2/train.jsonl": b'{"text": "", "page": "p1"}\n{"text": "r2", "page": "p2"}\n',
        "wiki-2/test.jsonl.gz": gzip.compress(b'{"text": "t1", "page": "p3"}\n'),
        "chat.jsonl": json.dumps({"messages": turns}).encode(),
    }
    script = (
        "from service.sources import Chosen, SourceError, fetch_rows\n"
        "def show(source, *chosen):\n"
        "    try:\n"
        f"        print(*fetch_rows('hf://datasets/{REPOSITORY}' + source, Chosen(*chosen)), sep=' ')\n"
        "    except SourceError as error:\n"
        "        print(error)\n"
        "show('/wiki-2', 'text')\n"
        "show('/wiki-2', 'page', 'test')\n"
        "show('/wiki-2', 'title')\n"
        "show('/wiki-2', None, 'other')\n"
        "show('/chat', None, 'train_sft')\n"
        "show('')\n"
    )
    with serve_hub(files, "datasets") as hub:
        train, test, title, other, chat, none = run(script, hub, tmp_path)

    assert "text=''" in train
    assert "text='r2'" in train
    assert "text='p3'" in test
    assert "p1" not in test
    assert title.startswith(f"row 1 of hf://datasets/{REPOSITORY}/wiki-2 has no field `title`; it has text, page")
    assert "cannot be loaded" in other
    assert "other" in other
    assert "Conversation" in chat
    assert "answers=(1,)" in chat
    assert "1 + 1?" in chat
    assert "cannot be loaded" in none
    assert "wiki-2" in none
