"""Runs one stage of one job: claim, load inputs, run, push artifacts, record, wake the next."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session
from structlog.contextvars import bound_contextvars

from pdtrim.contract.errors import JobNotFound, ParentDeleted, PDTrimError
from pdtrim.contract.jobs import RESULTS, ErrorInfo, StageName
from pdtrim.contract.results import Result
from pdtrim.contract.spec import JobSpec
from service import queue
from service.db import artifacts, jobs, stages
from service.db.session import DATABASE_FAULTS, transaction
from service.db.stages import Claim, LeaseLost, NewArtifact
from service.db.tables import ArtifactRow, JobRow
from service.observing import tracing
from service.settings import Settings
from service.stopping import Check
from service.storage import ArtifactStore, ObjectNotFound, StoreRefused, job_prefix
from workers.inputs.faults import PatientStore, may_pass, patient
from workers.inputs.sources import model_folder, text_documents
from workers.running.fan_out import FanOut
from workers.running.lease import Lease, StopRequested, WorkerStopping
from workers.running.metrics import Outcome, WorkerMetrics
from workers.running.scratch import attempt_folder
from workers.stages import STAGES, TAKEN_OVER
from workers.stages.context import Parent, Report, StageContext, StoredInput

MANIFEST = "manifest.json"
VERSIONED = ("pdtrim", "torch", "transformers", "tokenizers", "safetensors")
Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Worker:
    """A worker process: what it reads from, writes to, and is called; how it ends when a stage hangs, and whether it is
    to end soon.
    """

    settings: Settings
    engine: Engine
    store: ArtifactStore
    name: str
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)
    abandon: Callable[[], None] = lambda: None
    stopping: Callable[[], bool] = lambda: False

    def persistent_store(self, check: Check) -> PatientStore:
        """The store for a stage that `check` may stop."""
        return PatientStore(self.store, self.settings.retry_seconds, check)

    def transact(self, change: Callable[[Session], Answer]) -> Answer:
        """Change the database in one transaction, which is tried again while the database is away."""

        def once() -> Answer:
            with transaction(self.engine) as session:
                return change(session)

        return patient(self.settings.retry_seconds)(once)


@dataclass(frozen=True)
class Finished:
    """What a finished stage leaves; the content of its manifest."""

    result: Result
    versions: dict[str, str]
    artifacts: list[NewArtifact]


def run_stage(worker: Worker, job_id: str, stage: StageName) -> None:
    """Run a stage if it is there to be taken; whatever happens is recorded, and nothing is recorded twice."""
    with bound_contextvars(job_id=job_id, stage=stage.value, worker=worker.name):
        held = worker.transact(
            lambda session: stages.claim(
                session,
                job_id,
                stage,
                worker=worker.name,
                lease_seconds=worker.settings.lease_seconds,
                deadline_seconds=worker.settings.stage_deadline_seconds,
                max_running_jobs=worker.settings.max_running_jobs,
            )
        )
        if held is None:
            log.info("the stage is not there to be taken")
            return
        with bound_contextvars(attempt=held.attempt):
            tracing.describe(job_id=job_id, stage=stage.value, worker=worker.name, attempt=held.attempt)
            log.info("stage started")
            started = time.monotonic()
            outcome, following = _run_held(worker, held)
            seconds = time.monotonic() - started
            worker.metrics.stage_ended(stage, outcome, seconds)
            tracing.describe(outcome=outcome.value)
            if outcome not in (Outcome.SUCCEEDED, Outcome.STOPPED, Outcome.HANDED_BACK):
                tracing.fail()
            log.info("stage ended", extra={"outcome": outcome.value, "seconds": round(seconds, 3)})
            if following is not None:
                queue.try_to_send(worker.settings, job_id, following, held.route)


def _run_held(worker: Worker, held: Claim) -> tuple[Outcome, StageName | None]:
    """Run a claimed stage to an outcome that is recorded; with it, the stage to wake a worker for."""
    settings = worker.settings
    try:
        with Lease(
            worker.engine,
            held,
            seconds=settings.lease_seconds,
            abandon=worker.abandon,
            stopping=worker.stopping,
        ) as lease:
            finished = _finished_before(worker, held, lease.check) or _execute(worker, held, lease.check)
            lease.check()
            following = _record(worker, held, finished)
        size = sum(artifact.size for artifact in finished.artifacts)
        worker.metrics.artifact_bytes.labels(held.stage.value).inc(size)
        return Outcome.SUCCEEDED, following
    except LeaseLost as error:
        log.warning("stepping back: %s", error)
        return Outcome.LEASE_LOST, None
    except StopRequested:
        return _conclude(worker, held, Outcome.STOPPED, lambda session: stages.stopped(session, held)), None
    except WorkerStopping:
        outcome = _conclude(worker, held, Outcome.HANDED_BACK, lambda session: stages.hand_back(session, held))
        return outcome, held.stage if outcome == Outcome.HANDED_BACK else None
    except Exception as error:
        # The border of the process: every failure becomes the job's error, or costs an attempt.
        if may_pass(error):
            log.exception("the stage met a fault that may pass")
            reason, most = f"{type(error).__name__}: {error}".splitlines()[0], settings.max_attempts
            return _conclude(
                worker, held, Outcome.RELEASED, lambda session: stages.release(session, held, reason, max_attempts=most)
            ), None
        log.exception("the stage failed")
        info = _describe(error)
        return _conclude(worker, held, Outcome.FAILED, lambda session: stages.fail(session, held, info)), None


def _describe(error: Exception) -> ErrorInfo:
    if isinstance(error, PDTrimError):
        return ErrorInfo(code=error.code, message=error.message, param=error.param)
    if isinstance(error, StoreRefused):
        return ErrorInfo(code="store_refused", message=str(error))
    if isinstance(error, ValueError):
        return ErrorInfo(code="invalid_input", message=str(error))
    # PyTorch's CPU allocator raises a plain RuntimeError.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
        return ErrorInfo(code="out_of_memory", message=str(error).splitlines()[0])
    return ErrorInfo(code="internal_error", message=f"{type(error).__name__}: {error}")


def _conclude(worker: Worker, held: Claim, outcome: Outcome, change: Callable[[Session], None]) -> Outcome:
    """Record an outcome; returns what it came to."""
    try:
        worker.transact(change)
    except LeaseLost as error:
        log.warning("stepping back: %s", error)
        return Outcome.LEASE_LOST
    except SQLAlchemyError:
        log.exception("the outcome of %s could not be recorded; the lease will run out", held)
        return Outcome.UNRECORDED
    return outcome


def _attempt_prefix(held: Claim, attempt: int | None = None) -> str:
    return f"{job_prefix(held.job_id)}/{held.stage}/{attempt or held.attempt}"


def _finished_before(worker: Worker, held: Claim, check: Check) -> Finished | None:
    """The result of an earlier attempt that wrote its manifest but died before it was recorded."""
    store = worker.persistent_store(check)
    for attempt in range(held.attempt - 1, 0, -1):
        try:
            manifest = json.loads(store.get_bytes(f"{_attempt_prefix(held, attempt)}/{MANIFEST}"))
        except ObjectNotFound:
            continue
        log.info("the stage was finished by attempt %d", attempt)
        found = [NewArtifact(**entry) for entry in manifest["artifacts"]]
        return Finished(RESULTS[held.stage].model_validate(manifest["metrics"]), manifest["versions"], found)
    return None


def _execute(worker: Worker, held: Claim, check: Check) -> Finished:
    assert worker.settings.scratch_dir is not None
    with attempt_folder(worker.settings.scratch_dir, held) as workdir:
        context = stage_context(worker, held, workdir, check, _publisher(worker, held))
        run = STAGES[held.stage]
        if context.parent is not None:
            run = TAKEN_OVER[held.stage]
        elif held.stage == StageName.REMOVAL and (workers := context.spec.search.parallelism) > 1:
            context.fan_out = FanOut(worker.engine, worker.settings, held, workers=workers, check=check)
        result = run(context)
        return _push(worker, held, context.out, result, check)


def _publisher(worker: Worker, held: Claim) -> Report:
    def publish(progress: float, message: str, figures: dict[str, Any]) -> None:
        try:
            with transaction(worker.engine) as session:
                stages.report(session, held, progress=progress, message=message, data=figures)
        except DATABASE_FAULTS as error:
            # No reason to stop working: whether the stage is still ours, the lease finds out.
            log.warning("progress of %s is not recorded: %s", held, error)

    return publish


def stage_context(worker: Worker, held: Claim, workdir: Path, check: Check, publish: Report) -> StageContext:
    """What a stage, or who helps with it, may touch; the model's files are fetched. Raises: as `model_folder`."""

    def read(session: Session) -> tuple[JobRow, list[ArtifactRow], Parent | None]:
        job = jobs.get(session, held.job_id)
        recorded = [row for name in StageName for row in artifacts.of_stage(session, held.job_id, name)]
        if job.cut_from is None or held.stage not in TAKEN_OVER:
            return job, recorded, None
        return job, recorded + artifacts.of_stage(session, job.cut_from, held.stage), _parent(session, job, held.stage)

    job, recorded, parent = worker.transact(read)
    spec = JobSpec.model_validate(job.spec)
    publish(0.0, "Loading the model.", {})
    return StageContext(
        job_id=held.job_id,
        spec=spec,
        model_dir=model_folder(spec.model, job.model_revision, worker.settings, check),
        model_revision=job.model_revision,
        workdir=workdir,
        inputs={(StageName(row.stage), row.name): StoredInput(row.key, row.sha256) for row in recorded},
        store=worker.persistent_store(check),
        state_prefix=f"{job_prefix(held.job_id)}/{held.stage}/state",
        documents=lambda: text_documents(spec.data, worker.settings, check),
        check=check,
        publish=publish,
        parent=parent,
    )


def _parent(session: Session, job: JobRow, stage: StageName) -> Parent:
    """What the job that another was cut from has of a stage. Raises: ParentDeleted."""
    assert job.cut_from is not None
    try:
        jobs.get(session, job.cut_from)
    except JobNotFound as error:
        raise ParentDeleted(
            f"Job {job.cut_from}, from whose frontier this one was cut, was deleted before its results were taken "
            "over. Cut the export from another job, or submit it as a job of its own."
        ) from error
    found = next(row for row in jobs.stages(session, [job.cut_from])[job.cut_from] if row.name == stage)
    result = RESULTS[stage].model_validate(found.metrics)
    return Parent(job.cut_from, result, f"{job_prefix(job.cut_from)}/{stage}/state")


def _push(worker: Worker, held: Claim, folder: Path, result: Result, check: Check) -> Finished:
    """Upload every file below `folder`, then the manifest that makes them count."""
    prefix, store = _attempt_prefix(held), worker.persistent_store(check)
    pushed = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        check()
        name = path.relative_to(folder).as_posix()
        stored = store.put_file(f"{prefix}/{name}", path)
        pushed.append(
            NewArtifact(name=name, key=f"{prefix}/{name}", uri=stored.uri, size=stored.size, sha256=stored.sha256)
        )
    finished = Finished(result, {name: version(name) for name in VERSIONED}, pushed)
    manifest = {
        "format_version": 1,
        "job": held.job_id,
        "stage": held.stage,
        "attempt": held.attempt,
        "metrics": result.model_dump(mode="json"),
        "versions": finished.versions,
        "artifacts": [asdict(artifact) for artifact in pushed],
    }
    store.put_bytes(f"{prefix}/{MANIFEST}", json.dumps(manifest, indent=2, sort_keys=True).encode())
    return finished


def _record(worker: Worker, held: Claim, finished: Finished) -> StageName | None:
    metrics = finished.result.model_dump(mode="json")
    return worker.transact(
        lambda session: stages.complete(
            session, held, artifacts=finished.artifacts, metrics=metrics, versions=finished.versions
        )
    )
