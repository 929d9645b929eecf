"""Export and evaluation of models that do not fit their worker, beside the same of those that do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.whole_jobs import UP_TO_EXPORT, WholeJob
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import EvaluationResult, ExportResult
from pdtrim.contract.spec import JobSpec
from pdtrim.display.tables import models_table
from pdtrim.display.verdict import verdict
from tests.tiny_job import tiny_spec, write_tiny_model

pytestmark = pytest.mark.training
TINY = 1
"""Bytes of memory that nothing fits."""
JOBS: dict[str, dict[str, Any]] = {
    "pair": {},
    "pair of narrowed halves with a KV token rule": {
        "prefill": {"remove_blocks": 1, "mlp_width": 0.5},
        "decode": {"remove_blocks": 2, "mlp_width": 0.5},
        "kv_tokens": {"ratio": 2},
        "serving": {"first_token": "decode"},
    },
    "prefill of keys and values alone, decode of fewer MLPs": {
        "prefill": {"remove_blocks": 0, "kv_only_blocks": 1},
        "decode": {"remove_blocks": 1, "remove_mlps": 1},
        "distillation": {"enabled": False},
    },
    "unified": {"prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 1}},
}


def healed(folder: Path, changes: dict[str, Any]) -> WholeJob:
    """A job that did all but export and evaluation."""
    model = write_tiny_model(folder / "model")
    spec = JobSpec.model_validate(tiny_spec(model, **changes))
    job = WholeJob(spec, model, [spec.data.text or ""], folder / "job")
    job.run(UP_TO_EXPORT[:3])
    return job


def ended(job: WholeJob, folder: Path, memory_bytes: int | None) -> tuple[ExportResult, EvaluationResult]:
    """What export and evaluation find where they may take so much memory."""
    shutil.copytree(job.folder, folder)
    again = replace(job, folder=folder, results=dict(job.results), memory_bytes=memory_bytes)
    again.run([StageName.EXPORT, StageName.EVALUATION])
    export, evaluation = again.results[StageName.EXPORT], again.results[StageName.EVALUATION]
    assert isinstance(export, ExportResult)
    assert isinstance(evaluation, EvaluationResult)
    return export, evaluation


def numbers(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text and absence of a result, by where it stands."""
    if isinstance(content, dict | list):
        entries = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in entries:
            yield from numbers(value, f"{path}.{key}")
    else:
        yield path, content


@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS.keys())
def test_what_does_not_fit_is_proved_and_evaluated_as_what_does(changes: dict[str, Any], tmp_path: Path) -> None:
    job = healed(tmp_path, changes)
    (proved, resident), (proved_from_disk, streamed) = (
        ended(job, tmp_path / name, memory) for name, memory in (("resident", None), ("streamed", TINY))
    )
    assert (proved.way, resident.way) == ("resident", "resident")
    assert (proved_from_disk.way, streamed.way) == ("streamed", "streamed")
    assert all(proof.max_logit_difference <= 1e-5 for proof in proved_from_disk.checkpoints.values())
    # No file of weights larger than it may take, where there was one file.
    assert all(proved_from_disk.checkpoints[role].files > proof.files for role, proof in proved.checkpoints.items())

    speeds = {name for name in type(resident.models["dense"]).model_fields if "token" in name or "speed" in name}
    # More files have more headers.
    left_out: dict[str, Any] = {
        "models": {name: {*speeds, "bytes"} for name in resident.models},
        "way": True,
        "samples": True,  # of models that fit alone
    }
    assert (bool(resident.samples), streamed.samples) == (True, [])
    expected, found = (dict(numbers(one.model_dump(exclude=left_out))) for one in (resident, streamed))
    measured = {path for path, value in expected.items() if isinstance(value, float)}
    assert {path: found[path] for path in measured} == pytest.approx(
        {path: expected[path] for path in measured}, rel=1e-5, abs=1e-6
    )
    assert {path: found[path] for path in found.keys() - measured} == {
        path: expected[path] for path in expected.keys() - measured
    }

    assert {getattr(model, name) for model in streamed.models.values() for name in speeds} == {None}
    lines = {row[0]: row[1:] for row in models_table(streamed.models).rows}
    assert set(lines["first token, ms"]) == set(lines["each next token, ms"]) == {"does not fit"}
    assert not {"first token, decode", "next token, decode"} & {fact.name for fact in verdict(streamed).saved}
