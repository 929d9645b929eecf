"""Searches with helpers that come, go, hang, fail or never come, in threads of this process on SQLite."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from sqlalchemy.exc import OperationalError
from sqlmodel import Session, select

from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from pdtrim.contract.spec import JobSpec
from service.db import evaluations, jobs, stages
from service.db.session import connect, migrate, transaction
from service.db.tables import ArtifactRow, EvaluationRow, HelperRow, StageRow, now
from service.settings import Settings
from service.storage import open_store
from tests.processes import wait_until
from tests.running import run_stage
from tests.stored_jobs import store_job
from tests.tiny_job import tiny_spec, write_tiny_model
from workers.inputs.models import numerics
from workers.pruning.search.batches import Evaluation
from workers.pruning.search.engine import NonFiniteLoss
from workers.running import fan_out as fanout
from workers.running import helper as helping
from workers.running.attempt import Worker
from workers.running.helper import help_search
from workers.running.lease import StopRequested

pytestmark = pytest.mark.training

PRODUCTS = ("plan.json", "search.json")


def start(data: Path, model: Path) -> Worker:
    settings = Settings(data_dir=data, allowed_sources=[model.as_uri()], lease_seconds=5, retry_seconds=0.2)
    engine = connect(settings.database_url)
    migrate(engine)
    return Worker(settings, engine, open_store(settings.artifacts_url), name="coordinator")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", blocks=7)


@pytest.fixture(scope="module")
def spec(model: Path) -> dict[str, Any]:
    """A job whose searches race and anneal, with everything that has an engine of its own."""
    return tiny_spec(
        model,
        decode={"remove_blocks": 3, "max_perplexity_increase": 50.0},
        calibration={"windows": 12, "window_tokens": 32},
        search={"evaluations": 20, "parallelism": 3},
        distillation={"enabled": False},
    )


@pytest.fixture(autouse=True)
def _share_what_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "LEAST_SHARE_S", 1e-9)


@pytest.fixture
def worker(tmp_path: Path, model: Path) -> Worker:
    return start(tmp_path, model)


def scored(worker: Worker, spec: dict[str, Any], **search: Any) -> str:
    spec = {**spec, "search": {**spec["search"], **search}}
    with transaction(worker.database) as session:
        job_id = store_job(session, JobSpec.model_validate(spec)).id
    run_stage(worker, job_id, StageName.SCORING)
    return job_id


def search(worker: Worker, job_id: str) -> None:
    """Run the removal stage, and no other: a stage that waits would keep helpers away."""
    run_stage(worker, job_id, StageName.REMOVAL)
    with transaction(worker.database) as session:
        if not JobStatus(jobs.get(session, job_id).status).final:
            jobs.request_cancel(session, job_id)


def stage(worker: Worker, job_id: str) -> StageRow:
    with transaction(worker.database) as session:
        return session.get_one(StageRow, (job_id, StageName.REMOVAL))


def products(worker: Worker, job_id: str) -> list[bytes]:
    with transaction(worker.database) as session:
        keys = dict(session.exec(select(ArtifactRow.name, ArtifactRow.key).where(ArtifactRow.job_id == job_id)).all())
    return [worker.store.get_bytes(keys[name]) for name in PRODUCTS]


def helpers(worker: Worker) -> list[HelperRow]:
    with transaction(worker.database) as session:
        return list(session.exec(select(HelperRow)))


@contextmanager
def helping_worker(worker: Worker, job_id: str, name: str, attempt: int = 1) -> Iterator[Thread]:
    """A worker in a thread that helps as soon as the stage runs."""
    other = replace(worker, database=connect(worker.settings.database_url), name=name)

    def work() -> None:
        wait_until(lambda: stage(other, job_id).status == StageStatus.RUNNING)
        help_search(other, job_id, attempt, numerics(), queues=["default"])

    thread = Thread(target=work, name=name)
    thread.start()
    yield thread
    thread.join(30)
    assert not thread.is_alive()
    other.database.dispose()


def hold_up_until(monkeypatch: pytest.MonkeyPatch, condition: Callable[[], bool]) -> None:
    """The search begins to look for helpers only then."""
    present = fanout.FanOut._present

    def wait(self: fanout.FanOut) -> int:
        wait_until(condition)
        return present(self)

    monkeypatch.setattr(fanout.FanOut, "_present", wait)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path, spec: dict[str, Any]) -> list[bytes]:
    """What the search ends with when nothing is shared."""
    worker = start(tmp_path_factory.mktemp("alone"), model)
    job_id = scored(worker, spec, parallelism=1)
    search(worker, job_id)
    assert (stage(worker, job_id).metrics["workers"], stage(worker, job_id).metrics["helpers_share"]) == (1, 0)
    return products(worker, job_id)


def test_with_any_number_of_workers_a_search_ends_with_the_same_bytes(
    worker: Worker, spec: dict[str, Any], alone: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    unhelped = scored(worker, spec)
    search(worker, unhelped)
    assert products(worker, unhelped) == alone
    assert stage(worker, unhelped).metrics["helpers_share"] == 0
    assert len(list((worker.settings.data_dir / "broker" / "messages").iterdir())) >= 2  # the invitations

    job_id = scored(worker, spec, parallelism=3)
    hold_up_until(monkeypatch, lambda: len(helpers(worker)) == 2)
    with helping_worker(worker, job_id, "a"), helping_worker(worker, job_id, "b"), helping_worker(worker, job_id, "c"):
        search(worker, job_id)
    assert products(worker, job_id) == alone
    metrics = stage(worker, job_id).metrics
    assert metrics["workers"] == 3
    assert 0.1 < metrics["helpers_share"] < 0.95
    with transaction(worker.database) as session:
        evaluations.forget(session)
        assert not [*session.exec(select(EvaluationRow)), *session.exec(select(HelperRow))]
    assert worker.settings.scratch_dir is not None
    assert not list((worker.settings.scratch_dir / "jobs").iterdir())


@pytest.mark.parametrize("fault", ["hangs", "finds no finite loss", "has lost its lease"])
def test_what_a_helper_does_not_finish_the_search_does_itself(
    fault: str, worker: Worker, spec: dict[str, Any], alone: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    over, begun = Event(), Event()

    def fail(context: object) -> Callable[[Evaluation], evaluations.Losses]:
        def evaluate(evaluation: Evaluation) -> evaluations.Losses:
            begun.set()
            if fault == "finds no finite loss":
                raise NonFiniteLoss("removing blocks [1] gives the loss nan on window 3")
            if fault == "has lost its lease":
                with transaction(worker.database) as session:
                    for row in session.exec(select(HelperRow)):
                        row.lease_expires_at = now() - timedelta(seconds=1)
            assert over.wait(60)
            return [[-1.0] * len(evaluation.piece.windows)] * len(evaluation.piece.candidates)

        return evaluate

    monkeypatch.setattr(helping, "_evaluator", fail)
    monkeypatch.setattr(fanout, "LEAST_PATIENCE_S", 0.3)
    hold_up_until(monkeypatch, lambda: bool(helpers(worker)))
    job_id = scored(worker, spec)
    with helping_worker(worker, job_id, "bad"):
        search(worker, job_id)
        over.set()
    assert begun.is_set()
    assert products(worker, job_id) == alone
    assert stage(worker, job_id).metrics["helpers_share"] == 0


def test_a_database_that_is_away_while_work_is_shared_changes_nothing(
    worker: Worker, spec: dict[str, Any], alone: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def at_times(query: Callable[..., Any], session: Session, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        found = query(session, *args)
        session.flush()
        if calls % 3 == 0:
            raise OperationalError("", {}, Exception("gone"))
        return found

    for name in ("offer", "answers", "take_back"):
        monkeypatch.setattr(evaluations, name, partial(at_times, getattr(evaluations, name)))
    hold_up_until(monkeypatch, lambda: bool(helpers(worker)))
    job_id = scored(worker, spec)
    with helping_worker(worker, job_id, "a"):
        search(worker, job_id)
    assert calls > 10
    assert products(worker, job_id) == alone


@pytest.mark.parametrize("asked", ["cancel", "pause", "take over"])
def test_a_helper_stops_within_seconds_when_its_search_does(
    asked: str, worker: Worker, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = scored(worker, spec)
    with transaction(worker.database) as session:
        held = stages.claim(session, job_id, StageName.REMOVAL, worker="w", lease_seconds=60)
    assert held is not None

    def endless(context: Any) -> Callable[[Evaluation], evaluations.Losses]:
        def evaluate(evaluation: Evaluation) -> evaluations.Losses:
            while True:
                context.check()
                time.sleep(0.01)

        return evaluate

    monkeypatch.setattr(helping, "_evaluator", endless)
    with helping_worker(worker, job_id, "a") as thread:
        wait_until(lambda: bool(helpers(worker)))
        with transaction(worker.database) as session:
            evaluations.offer(session, held, {1: json.loads(json.dumps(OFFERED))})
        wait_until(lambda: claimed_by(worker) is not None)
        with transaction(worker.database) as session:
            if asked == "take over":
                stages.release(session, held, "a fault", max_attempts=5, pause_seconds=10)
            else:
                (jobs.request_cancel if asked == "cancel" else jobs.request_pause)(session, job_id)
        started = time.monotonic()
        thread.join(30)
        assert time.monotonic() - started < 5
    with transaction(worker.database) as session:
        assert evaluations.helpers(session, held).present == 0


OFFERED = {
    "recipe": {
        "objective": "kl", "chunk_windows": 4, "prompt_tokens": 16, "prefill": None, "project_skipped": False,
    },
    "objective": "kl", "candidates": [[[1]]], "windows": [0, 4], "anchor": None,
}  # fmt: skip


def claimed_by(worker: Worker) -> str | None:
    with transaction(worker.database) as session:
        return session.exec(select(EvaluationRow.claimed_by)).one()


def test_a_helper_makes_room_for_a_stage_that_waits_and_leaves_when_nothing_comes(
    worker: Worker, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = scored(worker, spec)
    with transaction(worker.database) as session:
        held = stages.claim(session, job_id, StageName.REMOVAL, worker="w", lease_seconds=60)
    assert held is not None
    monkeypatch.setattr(helping, "STAGE_WAITS_S", 0.3)
    with helping_worker(worker, job_id, "a") as thread:
        wait_until(lambda: bool(helpers(worker)))
        with transaction(worker.database) as session:
            other = store_job(session, JobSpec.model_validate(spec)).id
        thread.join(10)
        assert not thread.is_alive()
    with helping_worker(worker, job_id, "b"):
        pass  # It does not even join.
    assert len(helpers(worker)) == 1

    with transaction(worker.database) as session:
        jobs.request_cancel(session, other)
    monkeypatch.setattr(helping, "IDLE_S", 0.5)
    with helping_worker(worker, job_id, "c"):
        pass
    assert len(helpers(worker)) == 2


def test_a_worker_that_computes_otherwise_does_not_help(
    worker: Worker, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = scored(worker, spec)
    with transaction(worker.database) as session:
        stages.claim(session, job_id, StageName.REMOVAL, worker="w", lease_seconds=60)
    of_search = numerics()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert numerics() != of_search
    help_search(worker, job_id, 1, of_search, queues=["default"])
    assert helpers(worker) == []


def test_a_cancelled_search_stops_while_it_waits_for_a_helper(
    worker: Worker, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = scored(worker, spec)
    over = Event()

    def stuck(context: object) -> Callable[[Evaluation], evaluations.Losses]:
        def evaluate(evaluation: Evaluation) -> evaluations.Losses:
            with transaction(worker.database) as session:
                jobs.request_cancel(session, job_id)
            assert over.wait(60)
            raise StopRequested

        return evaluate

    monkeypatch.setattr(helping, "_evaluator", stuck)
    monkeypatch.setattr(fanout, "LEAST_PATIENCE_S", 60)
    hold_up_until(monkeypatch, lambda: bool(helpers(worker)))
    with helping_worker(worker, job_id, "stuck"):
        search(worker, job_id)
        over.set()
    with transaction(worker.database) as session:
        assert jobs.get(session, job_id).status == JobStatus.CANCELLED
