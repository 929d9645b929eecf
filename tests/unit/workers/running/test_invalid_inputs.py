"""Models and texts that cannot be worked with: refused before the work, with the field, the token or the line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pdtrim.contract.errors import PDTrimError
from pdtrim.contract.jobs import JobStatus, StageName
from pdtrim.contract.spec import JobSpec
from service.checking import preflight
from service.db import jobs
from service.db.session import connect, migrate, transaction
from service.settings import Settings
from service.storage import open_store
from tests.running import run_stage
from tests.stored_jobs import store_job
from tests.tiny_job import tiny_spec, write_tiny_model
from workers.running.attempt import Worker

pytestmark = pytest.mark.training

ABSENT = object()
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
MALFORMED: dict[str, dict[str, Any]] = {
    "a size as text": {"hidden_size": "32"},
    "a size that is null": {"intermediate_size": None},
    "a size of zero": {"hidden_size": 0},
    "a size below zero": {"vocab_size": -1},
    "a size that is true": {"hidden_size": True},
    "a size for each block": {"intermediate_size": [48, 48, 48, 48, 48]},
    "a size that tensors do not have": {"intermediate_size": 40},
    "no vocabulary": {"vocab_size": ABSENT},
    "a smaller vocabulary": {"vocab_size": 100},
    "no heads": {"num_attention_heads": 0},
    "heads that do not divide the hidden size": {"num_attention_heads": 6, "head_dim": None},
    "heads of keys that do not divide the heads": {"num_key_value_heads": 3},
    "fewer than no heads of keys": {"num_key_value_heads": -2},
    "an odd size of heads": {"head_dim": 7},
    "an activation that nobody knows": {"hidden_act": "magic"},
    "no activation": {"hidden_act": None},
    "a rotary embedding that nobody knows": {"rope_parameters": {**ROPE, "rope_type": "magic"}},
    "a rotary embedding that is text": {"rope_parameters": "linear"},
    "a rotary embedding without its factor": {"rope_parameters": {**ROPE, "rope_type": "yarn"}},
    "a base as text": {"rope_parameters": {**ROPE, "rope_theta": "big"}},
    "an epsilon as text": {"rms_norm_eps": "small"},
    "ties as text": {"tie_word_embeddings": "yes"},
    "a context as text": {"max_position_embeddings": "128"},
    "too few types of layers": {"layer_types": ["full_attention"]},
    "types of layers that nobody knows": {"layer_types": ["odd"] * 5},
    "a dtype that is a number": {"dtype": 7},
    "padding beyond the vocabulary": {"pad_token_id": 9999},
    "outputs that are no objects": {"return_dict": False},
    "biases that are not there": {"attention_bias": True},
}
NAMED = {
    "no vocabulary": "embed_tokens",
    "a smaller vocabulary": "embed_tokens",
    "a size that tensors do not have": r"layers\.0\.mlp\.gate_proj",
    "heads that do not divide the hidden size": "attention heads",
    "a rotary embedding that nobody knows": "rope_type = 'magic'",
    "a base as text": "'str' and 'Tensor'",
    "a dtype that is a number": "dtype = 7",
    "padding beyond the vocabulary": "Padding_idx",
    "outputs that are no objects": "'tuple'",
    "an odd size of heads": "even",
    "too few types of layers": "layer_types",
    "types of layers that nobody knows": "layer_types",
    "biases that are not there": r"k_proj\.bias",
}
"""What a refusal names where it is not the field: a tensor, or what the library found."""


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    allowed = ["builtin:", tmp_path.as_uri()]
    settings = Settings(
        data_dir=tmp_path / "data", allowed_sources=allowed, scratch_dir=tmp_path / "scratch", lease_seconds=60
    )
    database = connect(settings.database_url)
    migrate(database)
    return Worker(settings, database, open_store(settings.artifacts_url), name="test")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def edit(model: Path, name: str, change: dict[str, Any]) -> None:
    content = json.loads((model / name).read_text()) | change
    (model / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ABSENT}))


def refusal(worker: Worker, spec: dict[str, Any]) -> tuple[str, str, str | None]:
    """Code, message and field with which a job is refused: when it is submitted, or by its first stage."""
    asked = JobSpec.model_validate(spec)
    try:
        preflight.check(asked, worker.settings)
    except PDTrimError as error:
        return error.code, error.message, error.param
    with transaction(worker.database) as session:
        job_id = store_job(session, asked).id
    run_stage(worker, job_id, StageName.SCORING)
    with transaction(worker.database) as session:
        job = jobs.get(session, job_id)
    assert job.status == JobStatus.FAILED
    assert job.error is not None
    return job.error["code"], job.error["message"], job.error["param"]


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_configuration_is_refused_by_what_is_wrong_with_it(kind: str, worker: Worker, model: Path) -> None:
    edit(model, "config.json", MALFORMED[kind])

    code, message, param = refusal(worker, tiny_spec(model))

    assert code in ("source_unreadable", "model_unsupported")
    assert param == "model.source"
    (field, *_) = MALFORMED[kind]
    assert re.search(NAMED.get(kind, field), message), message
    assert len(message) < 600
    assert str(worker.settings.scratch_dir) not in message


def test_a_tokenizer_s_file_that_is_none_is_named(worker: Worker, model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": 7}')

    code, message, param = refusal(worker, tiny_spec(model))

    assert (code, param) == ("source_unreadable", "model.source")
    assert "tokenizer.json" in message
    assert "describes no tokenizer" in message


def test_a_token_without_an_embedding_is_named_before_the_work(worker: Worker, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    added = {"id": 5000, "content": "value_", "special": False, "single_word": False}
    tokenizer["added_tokens"].append(added | {"lstrip": False, "rstrip": False, "normalized": False})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))

    code, message, param = refusal(worker, tiny_spec(model))

    assert (code, param) == ("invalid_request", "model.source")
    assert "the token 'value_', which is number 4096 of the model's tokenizer, but the model embeds 4096" in message


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (r'{"text": "half \ud83d"}', r"has half of a character, \ud83d, at 5"),
        ('{"Text": "x"}', "has no field `text`"),
        ("{", "is not JSON"),
    ],
)
def test_a_bad_line_is_named_and_no_other_remedy_is_told(
    worker: Worker, model: Path, tmp_path: Path, line: str, complaint: str
) -> None:
    first, later = tmp_path / "first.jsonl", tmp_path / "later.jsonl"
    good = json.dumps({"text": "value = 1\n" * 20})
    first.write_text(f"{good}\n{line}\n")
    later.write_text(f"{good}\n" * 2000 + f"{line}\n")  # Beyond what is looked at when a job is submitted.

    for path, number in ((first, 2), (later, 2001)):
        much = {"heal_tokens": 1_000_000}  # So much that the line is reached.
        code, message, param = refusal(worker, tiny_spec(model, data={"source": path.as_uri()}, distillation=much))
        assert (code, param) == ("source_unreadable", "data.source")
        assert f"line {number} of {path.as_uri()}" in message
        assert complaint in message
        assert "window_tokens" not in message


def test_too_little_text_is_told_with_its_remedy(worker: Worker, model: Path) -> None:
    for text, told in (("too short", "data.text"), ("too short " * 40, "data")):
        code, message, param = refusal(worker, tiny_spec(model, data={"text": text}))

        assert (code, param) == ("invalid_request", told)
        assert "12 windows" in message or "12 are the least" in message
        assert "Give more text" in message
        assert "a smaller calibration.window_tokens" in message
