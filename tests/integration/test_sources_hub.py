"""The hub's client against a local stand-in for the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from service.sources import UnreadableSource, check_text, describe_model, fetch_model, resolve_revision
from service.storage import StoreUnavailable
from tests.hub import COMMIT, REPOSITORY, Hub, serve_hub
from tests.servers import free_ports

SOURCE = f"hf://{REPOSITORY}"
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights" * 1000,
    "pytorch_model.bin": b"pickle",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "onnx/config.json": b"{}",
    "README.md": b"#",
}
FETCHED = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Send the hub's client to `url`, as HF_ENDPOINT does when the process starts."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(MODEL) as hub:
        use(monkeypatch, hub.url)
        yield hub


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_a_revision_resolves_to_its_commit(hub: Hub, revision: str | None) -> None:
    assert resolve_revision(SOURCE, revision) == COMMIT


def test_a_model_is_described_at_one_commit_without_its_weights(hub: Hub) -> None:
    described = describe_model(SOURCE, "v1")

    assert described.config == {"model_type": "llama"}
    assert (described.revision, described.weights) == (COMMIT, {"model.safetensors": 7000})
    assert [name for name, _ in hub.downloads] == ["config.json"]


def test_a_model_is_fetched_without_pickles(hub: Hub, tmp_path: Path) -> None:
    folder = fetch_model(SOURCE, "v1", tmp_path / "model")

    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == FETCHED
    assert all((folder / name).read_bytes() == MODEL[name] for name in FETCHED)
    assert "pytorch_model.bin" not in {name for name, _ in hub.downloads}


def test_a_fetch_that_broke_off_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.broken = {"model.safetensors"}
    with pytest.raises(StoreUnavailable, match=hub.url):
        fetch_model(SOURCE, None, tmp_path / "model")
    hub.broken = set()
    hub.downloads.clear()

    fetch_model(SOURCE, None, tmp_path / "model")

    # The configuration is read once more for the checks; the tokenizer and the template stay as they are.
    assert {name for name, _ in hub.downloads} == {"config.json", "model.safetensors"}
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


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
    use(monkeypatch, f"http://127.0.0.1:{port}")

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


def test_a_data_set_is_streamed_as_far_as_the_bound(tmp_path: Path) -> None:
    script = (
        "from service.sources import SourceError, check_text, fetch_text_documents\n"
        f"source = 'hf://datasets/{REPOSITORY}'\n"
        "check_text(source)\n"
        "print(*fetch_text_documents(source))\n"
        "print(*fetch_text_documents(source, max_bytes=4))\n"
        "for wrong in (source + '/other', source + '-missing'):\n"
        "    try:\n"
        "        fetch_text_documents(wrong)\n"
        "    except SourceError as error:\n"
        "        print(error.code, 'cannot be loaded' in str(error))\n"
    )
    with serve_hub({"train.jsonl": b'{"text": "r1"}\n{"text": "r2"}\n{"text": "r3"}\n'}, "datasets") as hub:
        printed = run(script, hub, tmp_path)

    assert printed == ["r1 r2 r3", "r1 r2", "source_unreadable True", "source_unreadable True"]
