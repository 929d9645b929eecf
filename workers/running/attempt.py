"""Runs the most urgent stage: claim, load inputs, run, push artifacts, record, wake a worker for the next."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session
from structlog.contextvars import bound_contextvars

from pdtrim.contract.errors import JobNotFound, ParentDeleted, PDTrimError
from pdtrim.contract.jobs import RESULTS, ErrorInfo, StageName
from pdtrim.contract.results import Result
from service import queue
from service.db import artifacts, jobs, stages
from service.db.session import DATABASE_FAULTS, transaction
from service.db.specs import spec_of
from service.db.stages import Claim, LeaseLost, NewArtifact
from service.db.tables import ArtifactRow, JobRow
from service.db.urgency import most_urgent
from service.observing import tracing
from service.queue import WakeUp
from service.settings import Settings
from service.stopping import Check
from service.storage import ArtifactStore, ObjectNotFound, StoreRefused, StoreUnavailable, job_prefix
from workers.inputs.faults import PatientStore, may_pass, patient
from workers.inputs.models import give_back_memory
from workers.inputs.sources import data_rows, model_folder
from workers.running.lease import Lease, StopRequested, WorkerStopping
from workers.running.metrics import Outcome, WorkerMetrics
from workers.running.scratch import attempt_folder
from workers.stages import STAGES, TAKEN_OVER
from workers.stages.context import Figure, Parent, Say, StageContext, StoredInput

MANIFEST = "manifest.json"
VERSIONED = ("pdtrim", "torch", "transformers", "tokenizers", "safetensors")
STATES_OF_USE = frozenset({StageName.REMOVAL})
"""Stages whose state outlives them: jobs that are cut from this one go on from what its search measured."""
Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Worker:
    """A worker process: what it reads from, writes to, and is called; how it ends when a stage hangs, and whether it is
    to end soon.
    """

    settings: Settings
    database: Database
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
            with transaction(self.database) as session:
                return change(session)

        return patient(self.settings.retry_seconds)(once)


@dataclass(frozen=True)
class Finished:
    """What a finished stage leaves; the content of its manifest."""

    result: Result
    versions: dict[str, str]
    artifacts: list[NewArtifact]


def run_most_urgent(worker: Worker, queues: Sequence[str], woken_by: WakeUp) -> None:
    """Run the most urgent stage of some queues, if one is due.

    For every stage that was sent, a message is under way in its queue, until a worker is woken and takes one of them.
    When it takes another stage instead, or is to end and takes none, its message goes back to where it came from.
    """
    if worker.stopping():
        queue.try_to_send(worker.settings, woken_by)
        return
    claim = _claim(worker, queues)
    if claim is None:
        log.info("nothing is due", extra={"worker": worker.name})
        return
    if not claim.answers(woken_by.queue):
        queue.try_to_send(worker.settings, woken_by)
    run(worker, claim)


def _claim(worker: Worker, queues: Sequence[str]) -> Claim | None:
    """The right to the most urgent stage; None when nothing is due."""

    def take(session: Session) -> tuple[bool, Claim | None]:
        found = most_urgent(session, queues, max_running_jobs=worker.settings.max_running_jobs)
        if found is None:
            return False, None
        return True, stages.claim(
            session,
            *found,
            worker=worker.name,
            lease_seconds=worker.settings.lease_seconds,
            deadline_seconds=worker.settings.stage_deadline_seconds,
            max_running_jobs=worker.settings.max_running_jobs,
        )

    while True:
        found, claim = worker.transact(take)
        if claim is not None or not found:
            return claim
        # Another worker was faster: with this stage, or with a job that took the last slot of the project.


def run(worker: Worker, claim: Claim) -> None:
    """Run a claimed stage; whatever happens is recorded, and nothing is recorded twice."""
    with (
        tracing.receiving(queue.message_name(claim.stage), claim.trace),
        bound_contextvars(job_id=claim.job_id, stage=claim.stage.value, worker=worker.name, attempt=claim.attempt),
    ):
        tracing.describe(job_id=claim.job_id, stage=claim.stage.value, worker=worker.name, attempt=claim.attempt)
        log.info("stage started")
        started = time.monotonic()
        outcome, following = _to_an_outcome(worker, claim)
        seconds = time.monotonic() - started
        worker.metrics.stage_ended(claim.stage, outcome, seconds)
        tracing.describe(outcome=outcome.value)
        if outcome not in (Outcome.SUCCEEDED, Outcome.STOPPED, Outcome.HANDED_BACK):
            tracing.fail()
        log.info("stage ended", extra={"outcome": outcome.value, "seconds": round(seconds, 3)})
        if following is not None:
            queue.try_to_send(worker.settings, WakeUp(claim.job_id, following, claim.queue))


def _to_an_outcome(worker: Worker, claim: Claim) -> tuple[Outcome, StageName | None]:
    """Run a claimed stage to an outcome that is recorded; with it, the stage to wake a worker for."""
    settings = worker.settings
    try:
        with Lease(
            worker.database,
            claim,
            seconds=settings.lease_seconds,
            abandon=worker.abandon,
            stopping=worker.stopping,
        ) as lease:
            finished = _finished_before(worker, claim, lease.check) or _execute(worker, claim, lease.check)
            lease.check()
            following = _record(worker, claim, finished)
        _forget_state(worker, claim)
        size = sum(artifact.size for artifact in finished.artifacts)
        worker.metrics.artifact_bytes.labels(claim.stage.value).inc(size)
        return Outcome.SUCCEEDED, following
    except LeaseLost as error:
        log.warning("stepping back: %s", error)
        return Outcome.LEASE_LOST, None
    except StopRequested:
        return _conclude(worker, claim, Outcome.STOPPED, lambda session: stages.stopped(session, claim)), None
    except WorkerStopping:
        outcome = _conclude(worker, claim, Outcome.HANDED_BACK, lambda session: stages.hand_back(session, claim))
        return outcome, claim.stage if outcome == Outcome.HANDED_BACK else None
    except Exception as error:
        # The border of the process: every failure becomes the job's error, or costs an attempt.
        if may_pass(error):
            log.exception("the stage met a fault that may pass")
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            give_back = partial(
                stages.release,
                claim=claim,
                reason=reason,
                max_attempts=settings.max_attempts,
                pause_seconds=settings.resend_seconds,
            )
            return _conclude(worker, claim, Outcome.RELEASED, give_back), None
        log.exception("the stage failed")
        info = _describe(error)
        return _conclude(worker, claim, Outcome.FAILED, lambda session: stages.fail(session, claim, info)), None


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


def _conclude(worker: Worker, claim: Claim, outcome: Outcome, change: Callable[[Session], None]) -> Outcome:
    """Record an outcome; returns what it came to."""
    try:
        worker.transact(change)
    except LeaseLost as error:
        log.warning("stepping back: %s", error)
        return Outcome.LEASE_LOST
    except SQLAlchemyError:
        log.exception("the outcome of %s could not be recorded; the lease will run out", claim)
        return Outcome.UNRECORDED
    return outcome


def _forget_state(worker: Worker, claim: Claim) -> None:
    """Delete what a stage that succeeded saved to go on from."""
    if claim.stage in STATES_OF_USE:
        return
    try:
        worker.store.delete_prefix(_state_prefix(claim))
    except (StoreUnavailable, StoreRefused) as error:
        # The stage is done all the same; this goes with the job.
        log.warning("the state of %s stays in the store: %s", claim, error)


def _state_prefix(claim: Claim) -> str:
    return f"{job_prefix(claim.job_id)}/{claim.stage}/state"


def _attempt_prefix(claim: Claim, attempt: int | None = None) -> str:
    return f"{job_prefix(claim.job_id)}/{claim.stage}/{attempt or claim.attempt}"


def _finished_before(worker: Worker, claim: Claim, check: Check) -> Finished | None:
    """The result of an earlier attempt that wrote its manifest but died before it was recorded."""
    store = worker.persistent_store(check)
    for attempt in range(claim.attempt - 1, 0, -1):
        try:
            manifest = json.loads(store.get_bytes(f"{_attempt_prefix(claim, attempt)}/{MANIFEST}"))
        except ObjectNotFound:
            continue
        log.info("the stage was finished by attempt %d", attempt)
        found = [NewArtifact(**entry) for entry in manifest["artifacts"]]
        return Finished(RESULTS[claim.stage].model_validate(manifest["metrics"]), manifest["versions"], found)
    return None


def _execute(worker: Worker, claim: Claim, check: Check) -> Finished:
    assert worker.settings.scratch_dir is not None
    give_back_memory()  # Else the last stage's models would still be there beside this one's.
    with attempt_folder(worker.settings.scratch_dir, claim) as workdir, ExitStack() as opened:
        context = _stage_context(worker, claim, workdir, opened, check, _progress_recorder(worker, claim))
        run = STAGES[claim.stage] if context.parent is None else TAKEN_OVER[claim.stage]
        return _push(worker, claim, context.out, run(context), check)


def _progress_recorder(worker: Worker, claim: Claim) -> Say:
    def publish(progress: float, message: str, figures: Mapping[str, Figure]) -> None:
        try:
            with transaction(worker.database) as session:
                stages.record_progress(session, claim, progress=progress, message=message, data=figures)
        except DATABASE_FAULTS as error:
            # No reason to stop working: whether the stage is still ours, the lease finds out.
            log.warning("progress of %s is not recorded: %s", claim, error)

    return publish


def _stage_context(
    worker: Worker, claim: Claim, workdir: Path, opened: ExitStack, check: Check, publish: Say
) -> StageContext:
    """What a stage may touch; the model's files are fetched, or open until `opened` is closed.

    Raises: as `model_folder`.
    """

    def read(session: Session) -> tuple[JobRow, list[ArtifactRow], Parent | None]:
        job = jobs.get(session, claim.job_id)
        recorded = [row for name in StageName for row in artifacts.of_stage(session, claim.job_id, name)]
        if job.cut_from is None or claim.stage not in TAKEN_OVER:
            return job, recorded, None
        return (
            job,
            recorded + artifacts.of_stage(session, job.cut_from, claim.stage),
            _parent(session, job, claim.stage),
        )

    job, recorded, parent = worker.transact(read)
    spec = spec_of(job)
    publish(0.0, "Loading the model.", {})
    return StageContext(
        job_id=claim.job_id,
        spec=spec,
        source_dir=model_folder(spec.model, job.model_revision, worker.settings, workdir / "model", opened, check),
        model_revision=job.model_revision,
        workdir=workdir,
        inputs={(StageName(row.stage), row.name): StoredInput(row.key, row.sha256) for row in recorded},
        store=worker.persistent_store(check),
        state_prefix=_state_prefix(claim),
        rows=lambda: data_rows(spec, worker.settings, check),
        check=check,
        publish=publish,
        parent=parent,
        memory_bytes=worker.settings.memory_bytes,
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


def _push(worker: Worker, claim: Claim, folder: Path, result: Result, check: Check) -> Finished:
    """Upload every file below `folder`, then the manifest that makes them count."""
    prefix, store = _attempt_prefix(claim), worker.persistent_store(check)
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
        "job": claim.job_id,
        "stage": claim.stage,
        "attempt": claim.attempt,
        "metrics": result.model_dump(mode="json"),
        "versions": finished.versions,
        "artifacts": [asdict(artifact) for artifact in pushed],
    }
    store.put_bytes(f"{prefix}/{MANIFEST}", json.dumps(manifest, indent=2, sort_keys=True).encode())
    return finished


def _record(worker: Worker, claim: Claim, finished: Finished) -> StageName | None:
    metrics = finished.result.model_dump(mode="json")
    return worker.transact(
        lambda session: stages.complete(
            session, claim, artifacts=finished.artifacts, metrics=metrics, versions=finished.versions
        )
    )
