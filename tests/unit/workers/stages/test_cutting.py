"""Jobs cut from the frontier of another, run in this process on SQLite and a local store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pdtrim.contract.frontier import ExportSpec, Frontier
from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from pdtrim.contract.results import Plan
from pdtrim.contract.spec import JobSpec
from service.checking.frontier import read_frontier
from service.db import artifacts, deletion, jobs
from service.db.session import connect, migrate, transaction
from service.db.tables import JobRow, StageRow
from service.settings import Settings
from service.storage import job_prefix, open_store
from tests.running import run_stage
from tests.stored_jobs import store_job
from tests.tiny_job import tiny_spec, write_tiny_model
from workers.running.attempt import Worker

pytestmark = pytest.mark.training


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    models = (tmp_path / "models").as_uri()
    settings = Settings(data_dir=tmp_path / "data", allowed_sources=["builtin:", models], retry_seconds=0.2)
    engine = connect(settings.database_url)
    migrate(engine)
    return Worker(settings, engine, open_store(settings.artifacts_url), name="test")


def create(worker: Worker, spec: JobSpec, cut_from: str | None = None) -> str:
    with transaction(worker.database) as session:
        return store_job(session, spec, cut_from=cut_from).id


def cut(worker: Worker, parent: str, prefill: int, decode: int) -> str:
    """What the gateway does on `POST /v1/jobs/{id}/exports`."""
    wanted = ExportSpec.model_validate({"prefill": {"remove_blocks": prefill}, "decode": {"remove_blocks": decode}})
    read_frontier(worker.database, worker.store, parent).cut(prefill=prefill, decode=decode)
    with transaction(worker.database) as session:
        spec = wanted.job(JobSpec.model_validate(jobs.get(session, parent).spec))
    return create(worker, spec, cut_from=parent)


def run(worker: Worker, job_id: str, *stages: StageName) -> dict[str, Any]:
    """The metrics of the last of some stages."""
    for stage in stages:
        run_stage(worker, job_id, stage)
        with transaction(worker.database) as session:
            row = session.get_one(StageRow, (job_id, stage))
        assert row.status == StageStatus.SUCCEEDED, row.error
    return row.metrics


def content(worker: Worker, job_id: str, stage: StageName, name: str) -> bytes:
    with transaction(worker.database) as session:
        row = artifacts.named(session, job_id, stage, name)
    assert row is not None
    return worker.store.get_bytes(row.key)


def loaded_blocks(worker: Worker, job_id: str, role: str, folder: Path) -> int:
    for name in ("config.json", "model.safetensors"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content(worker, job_id, StageName.EXPORT, f"{role}/{name}"))
    blocks: int = AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers
    return blocks


def test_another_export_takes_over_scores_and_search_and_outlives_the_job_it_was_cut_from(
    worker: Worker, tmp_path: Path
) -> None:
    spec = tiny_spec(write_tiny_model(tmp_path / "models" / "tiny"), decode={"remove_blocks": 3})
    parent = create(worker, JobSpec.model_validate(spec))
    scored = run(worker, parent, StageName.SCORING)
    searched = run(worker, parent, StageName.REMOVAL)
    visited = content(worker, parent, StageName.REMOVAL, "search.json")
    frontier = read_frontier(worker.database, worker.store, parent)
    of_two = next(point for point in frontier.decode if point.remove_blocks == 2)

    child = cut(worker, parent, 1, 2)
    assert run(worker, child, StageName.SCORING) == scored
    removal = run(worker, child, StageName.REMOVAL)
    with transaction(worker.database) as session:
        session.get_one(JobRow, parent).status = JobStatus.SUCCEEDED
        deletion.mark(session, parent)
    worker.store.delete_prefix(job_prefix(parent))
    assert content(worker, child, StageName.REMOVAL, "search.json") == visited
    evaluation = run(worker, child, StageName.DISTILLATION, StageName.EXPORT, StageName.EVALUATION)

    removed = {
        half: sorted([*removal[half]["deleted"], *map(int, removal[half]["distilled"])])
        for half in ("prefill", "decode")
    }
    assert removed == {"prefill": frontier.chosen.prefill.removed, "decode": of_two.removed}
    assert removal["prefill"] == searched["prefill"]
    assert removal["losses"]["prefill"] == pytest.approx(frontier.chosen.prefill.loss)
    assert removal["losses"]["decode"] == pytest.approx(of_two.loss)
    assert evaluation["models"]["decode"]["blocks"] == 3
    assert loaded_blocks(worker, child, "decode", tmp_path / "decode") == 3
    plan = Plan.model_validate_json(content(worker, child, StageName.REMOVAL, "plan.json"))
    assert Frontier.from_plan(child, plan).decode == frontier.decode
    grandchild = cut(worker, child, 1, 3)
    again = run(worker, grandchild, StageName.SCORING, StageName.REMOVAL)
    assert (again["prefill"], again["decode"]) == (searched["prefill"], searched["decode"])


def test_equal_counts_are_cut_as_one_checkpoint(worker: Worker, tmp_path: Path) -> None:
    spec = tiny_spec(write_tiny_model(tmp_path / "models" / "tiny"), prefill={"remove_blocks": 2})
    spec |= {"serving": {"first_token": "prefill"}}
    spec |= {"distillation": {"enabled": False}}
    parent = create(worker, JobSpec.model_validate(spec))
    run(worker, parent, StageName.SCORING, StageName.REMOVAL)

    child = cut(worker, parent, 1, 1)
    exported = run(worker, child, *list(StageName)[:4])

    assert list(exported["checkpoints"]) == ["unified"]
    of_one = read_frontier(worker.database, worker.store, parent).unified[1]
    pdtrim = json.loads(content(worker, child, StageName.EXPORT, "unified/pdtrim.json"))
    assert pdtrim["serving"] == {"first_token": "prefill"}  # As its parent.
    assert set(range(5)) - set(pdtrim["kept_blocks"]) == set(of_one.removed)


def test_a_job_whose_parent_was_deleted_too_soon_says_so(worker: Worker, tmp_path: Path) -> None:
    spec = JobSpec.model_validate(tiny_spec(write_tiny_model(tmp_path / "models" / "tiny")))
    child = create(worker, spec, cut_from="job_" + "0" * 32)

    run_stage(worker, child, StageName.SCORING)

    with transaction(worker.database) as session:
        error = jobs.get(session, child).error
    assert error is not None
    assert error["code"] == "parent_deleted"
