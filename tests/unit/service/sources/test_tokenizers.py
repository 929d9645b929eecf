"""Tokenizers that are missing, or show at once that they are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.sources import UnreadableSource, describe_model, reference_model, tokenizers
from tests.gateway import write_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
OWN_CODE = json.dumps({"auto_map": {"AutoTokenizer": ["tokenization.Own", None]}}).encode()


def model(folder: Path, files: dict[str, bytes]) -> str:
    write_model(folder)
    (folder / "tokenizer.json").unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder.as_uri()


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": b'{"model": {"type": "BPE"}}'},
        {"tokenizer.json": b'{"model": {"type": "BPE"}}', "tokenizer_config.json": OWN_CODE},
        {"tokenizer.model": b"sentencepiece"},
        {"spiece.model": b"sentencepiece", "tokenizer_config.json": b'{"tokenizer_class": "XLNetTokenizer"}'},
        {"vocab.json": b"{}", "merges.txt": b""},
        {"vocab.txt": b"[UNK]"},
        {"qwen.tiktoken": b"IQ== 0"},
    ],
)
def test_tokenizers_of_every_kind_pass(files: dict[str, bytes], tmp_path: Path) -> None:
    assert describe_model(model(tmp_path, files)).revision is None


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "has no tokenizer: neither tokenizer.json nor tokenizer.model. Save the tokenizer beside the weights"),
        ({"tokenizer_config.json": b"{}", "merges.txt": b""}, "has no tokenizer"),
        ({"tokenizer.json": POINTER}, "tokenizer.json of .* is a Git LFS pointer in place of the file: run git lfs"),
        ({"tokenizer.model": POINTER}, "tokenizer.model of .* is a Git LFS pointer"),
        ({"tokenizer.json": b"{"}, "tokenizer.json of .* is not JSON"),
        ({"tokenizer.json": b'{"model": 7}'}, "tokenizer.json of .* describes no tokenizer: it has no model"),
        (
            {"tokenizer.model": b"x", "tokenizer_config.json": OWN_CODE},
            "needs code of its own, by auto_map in tokenizer_",
        ),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_a_sentence(files: dict[str, bytes], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableSource, match=complaint):
        describe_model(model(tmp_path, files))


def test_a_tokenizer_too_large_to_look_into_is_left_to_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "MAX_READ_BYTES", 3)
    describe_model(model(tmp_path, {"tokenizer.json": b"none"}))


def test_the_reference_model_s_own_passes() -> None:
    assert (reference_model() / "tokenizer.json").stat().st_size < tokenizers.MAX_READ_BYTES
