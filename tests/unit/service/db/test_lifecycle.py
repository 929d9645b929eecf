"""What users, workers and the reconciler do to jobs, in any order, against a model of what may come of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine as Database
from sqlmodel import Session, col, select

from pdtrim.contract.access import DEFAULT_PROJECT
from pdtrim.contract.errors import (
    JobNotCancellable,
    JobNotDeletable,
    JobNotFound,
    JobNotPausable,
    JobNotResumable,
    PDTrimError,
)
from pdtrim.contract.jobs import ErrorInfo, JobStatus, StageName, StageStatus
from pdtrim.contract.spec import JobSpec
from service.db import deletion, jobs, stages
from service.db.session import connect, migrate, transaction
from service.db.stages import Claim, LeaseLost, NewArtifact
from service.db.tables import ArtifactRow, EventRow, JobRow, StageRow, now
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})
STAGES = list(StageName)
EXAMPLES = int(os.environ.get("STATE_MACHINE_EXAMPLES", "60"))
MAX_ATTEMPTS = 2
MAX_JOBS = 2
AT_HAND = (StageStatus.QUEUED, StageStatus.RUNNING, StageStatus.PAUSED)
WORKERS_ACTS = ["finish", "finish", "fail", "stop", "release", "leave", "renew", "report"]
OTHER_ACTS = ["fall_silent", "reconcile", "reconcile", "retire_the_living", "remove"]
# Deleting is rare, as little can happen afterwards.
USERS_ACTS = [*["cancel", "pause", "pause", "resume", "resume", "resume"] * 2, "delete"]
STOPPED = ("job.paused", "job.failed", "job.cancelled")


@dataclass
class Expected:
    """What is to be true of a job."""

    status: JobStatus = JobStatus.QUEUED
    stages: list[StageStatus] = field(default_factory=lambda: [StageStatus.QUEUED] + [StageStatus.PENDING] * 4)
    attempts: list[int] = field(default_factory=lambda: [0] * 5)
    counted: list[int] = field(default_factory=lambda: [0] * 5)
    """Attempts since the last resume."""
    silent: bool = False
    """The lease of the running stage ran out."""
    deleted: bool = False
    removed: bool = False

    @property
    def running(self) -> int | None:
        return self.stages.index(StageStatus.RUNNING) if StageStatus.RUNNING in self.stages else None

    @property
    def turn(self) -> int:
        """The first stage that has not succeeded; the last when all have."""
        return next((i for i, status in enumerate(self.stages) if status != StageStatus.SUCCEEDED), 4)

    def can_be_claimed(self, position: int) -> bool:
        return not self.deleted and self.stages[position] == StageStatus.QUEUED

    def holds(self, claim: Claim) -> bool:
        position = STAGES.index(claim.stage)
        return not self.deleted and self.running == position and self.attempts[position] == claim.attempt

    def cancel_rest(self) -> None:
        self.stages = [s if s == StageStatus.SUCCEEDED else StageStatus.CANCELLED for s in self.stages]
        self.status = JobStatus.CANCELLED

    def fail(self, position: int) -> None:
        self.stages = [StageStatus.CANCELLED if s == StageStatus.PENDING else s for s in self.stages]
        self.stages[position] = StageStatus.FAILED
        self.status = JobStatus.FAILED

    def stop(self) -> bool:
        """What follows when no worker holds a stage of a job that was asked to stop."""
        if self.status == JobStatus.CANCELLING:
            self.cancel_rest()
        elif self.status == JobStatus.PAUSING:
            self.stages[self.turn] = StageStatus.PAUSED
            self.status = JobStatus.PAUSED
        else:
            return False
        return True

    def hand_back(self, position: int) -> None:
        if self.stop():
            return
        if self.counted[position] >= MAX_ATTEMPTS:
            self.fail(position)
        else:
            self.stages[position] = StageStatus.QUEUED


class Lifecycle(RuleBasedStateMachine):
    """`database` is one of SQLite that all runs share; each run looks at the jobs it created."""

    database: Database

    job_ids = Bundle("job_ids")

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[str, Expected] = {}
        self.claims: dict[str, list[Claim]] = {}

    def change(self, refusal: type[Exception] | None, action: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do something in a transaction of its own that is to be refused with `refusal`, or done when that is None."""
        if refusal is None:
            with transaction(self.database) as session:
                return action(session, *args, **kwargs)
        with pytest.raises(refusal) as refused, transaction(self.database) as session:
            action(session, *args, **kwargs)
        if isinstance(refused.value, PDTrimError) and refused.value.status == 409:
            job_id = args[0]
            assert f"{job_id} is {self.expected[job_id].status}:" in refused.value.message
        return None

    @initialize(target=job_ids, finished=st.integers(0, 4))
    def first_job(self, finished: int) -> str:
        return self.create_job(finished)

    @rule(target=job_ids, finished=st.integers(0, 4))
    def create(self, finished: int) -> Any:
        return multiple() if len(self.expected) == MAX_JOBS else self.create_job(finished)

    def create_job(self, finished: int) -> str:
        with transaction(self.database) as session:
            job_id = store_job(session, SPEC).id
        self.expected[job_id], self.claims[job_id] = Expected(), []
        for position in range(finished):
            self.take(job_id, position, alive=True)
            self.finish(job_id, back=0)
        return job_id

    # Workers

    @rule(job_id=job_ids, position=st.none() | st.integers(0, 4), alive=st.booleans())
    def claim(self, job_id: str, position: int | None, alive: bool) -> None:
        self.take(job_id, self.expected[job_id].turn if position is None else position, alive)

    def take(self, job_id: str, position: int, alive: bool) -> None:
        job, stage = self.expected[job_id], STAGES[position]
        claimable = job.can_be_claimed(position)
        claim = self.change(None, stages.claim, job_id, stage, worker="w", lease_seconds=600 if alive else -1)
        assert (claim is not None) == claimable
        if claim is None:
            return
        self.claims[job_id].append(claim)
        job.status, job.stages[position], job.silent = JobStatus.RUNNING, StageStatus.RUNNING, not alive
        job.attempts[position] += 1
        job.counted[position] += 1
        assert claim == Claim(job_id, stage, job.attempts[position])

    def record(
        self, job_id: str, back: int, action: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[int, Any] | None:
        """Record something under the last claim but `back`. Returns its stage and what came back; None if refused."""
        job, claims = self.expected[job_id], self.claims[job_id][-1 - back :][:1]
        if not claims:
            return None
        counts = job.holds(claims[0])
        answer = self.change(None if counts else LeaseLost, action, claims[0], *args, **kwargs)
        return (STAGES.index(claims[0].stage), answer) if counts else None

    @rule(job_id=job_ids, act=st.sampled_from(WORKERS_ACTS), back=st.sampled_from([0, 0, 0, 1]))
    def work(self, job_id: str, act: str, back: int) -> None:
        getattr(self, act)(job_id, back)

    def finish(self, job_id: str, back: int) -> None:
        job = self.expected[job_id]
        artifact = NewArtifact("plan.json", job_id, f"file:///{job_id}", 3, "0" * 64)
        recorded = self.record(job_id, back, stages.complete, artifacts=[artifact], metrics={}, versions={})
        if recorded is None:
            return
        position, following = recorded
        job.stages[position] = StageStatus.SUCCEEDED
        if position == 4:
            job.status = JobStatus.SUCCEEDED
        elif not job.stop():
            job.stages[position + 1] = StageStatus.QUEUED
        assert following == (STAGES[position + 1] if StageStatus.QUEUED in job.stages else None)

    def fail(self, job_id: str, back: int) -> None:
        if recorded := self.record(job_id, back, stages.fail, ErrorInfo(code="x", message="x")):
            self.expected[job_id].fail(recorded[0])

    def stop(self, job_id: str, back: int) -> None:
        if self.record(job_id, back, stages.stopped):
            self.expected[job_id].stop()

    def release(self, job_id: str, back: int) -> None:
        if recorded := self.record(job_id, back, stages.release, "a fault", max_attempts=MAX_ATTEMPTS, pause_seconds=1):
            self.expected[job_id].hand_back(recorded[0])

    def leave(self, job_id: str, back: int) -> None:
        if recorded := self.record(job_id, back, stages.hand_back):
            job, position = self.expected[job_id], recorded[0]
            if not job.stop():
                job.stages[position] = StageStatus.QUEUED
                job.counted[position] -= 1

    def renew(self, job_id: str, back: int) -> None:
        if recorded := self.record(job_id, back, stages.renew, lease_seconds=600):
            job = self.expected[job_id]
            job.silent = False
            assert recorded[1] == (job.status in (JobStatus.CANCELLING, JobStatus.PAUSING))

    def report(self, job_id: str, back: int) -> None:
        self.record(job_id, back, stages.record_progress, progress=0.5, message="halfway", data={})

    # Time and the reconciler

    @rule(job_id=job_ids, act=st.sampled_from(OTHER_ACTS))
    def go_on(self, job_id: str, act: str) -> None:
        getattr(self, act)(job_id)

    def fall_silent(self, job_id: str) -> None:
        job = self.expected[job_id]
        if job.running is not None and not job.removed:
            with transaction(self.database) as session:
                row = session.get_one(StageRow, (job_id, STAGES[job.running]))
                row.lease_expires_at = now() - timedelta(seconds=1)
            job.silent = True

    def reconcile(self, _: str) -> None:
        found = [(job_id, stage) for job_id, stage in self.change(None, stages.expired) if job_id in self.expected]
        silent = {
            job_id: job.running for job_id, job in self.expected.items() if job.running is not None and job.silent
        }
        assert {job_id: STAGES.index(stage) for job_id, stage in found} == silent
        for job_id, stage in found:
            self.change(None, stages.retire, job_id, stage, max_attempts=MAX_ATTEMPTS)
            self.expected[job_id].hand_back(STAGES.index(stage))

    def retire_the_living(self, job_id: str) -> None:
        job = self.expected[job_id]
        if not job.silent:
            self.change(None, stages.retire, job_id, STAGES[job.turn], max_attempts=0)

    def remove(self, job_id: str) -> None:
        self.change(None, deletion.remove, job_id)
        self.expected[job_id].removed = self.expected[job_id].deleted

    # Users

    @rule(job_id=job_ids, act=st.sampled_from(USERS_ACTS))
    def ask(self, job_id: str, act: str) -> None:
        getattr(self, act)(job_id)

    def cancel(self, job_id: str) -> None:
        job = self.expected[job_id]
        if job.deleted:
            self.change(JobNotFound, jobs.request_cancel, job_id)
        elif job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
            self.change(JobNotCancellable, jobs.request_cancel, job_id)
        else:
            self.change(None, jobs.request_cancel, job_id)
            if job.running is not None:
                job.status = JobStatus.CANCELLING
            else:
                job.cancel_rest()

    def pause(self, job_id: str) -> None:
        job = self.expected[job_id]
        if job.deleted:
            self.change(JobNotFound, jobs.request_pause, job_id)
        elif job.status.final or job.status == JobStatus.CANCELLING:
            self.change(JobNotPausable, jobs.request_pause, job_id)
        else:
            self.change(None, jobs.request_pause, job_id)
            if job.status != JobStatus.PAUSED:
                job.status = JobStatus.PAUSING
                if job.running is None:
                    job.stop()

    def resume(self, job_id: str) -> None:
        job = self.expected[job_id]
        if job.deleted:
            self.change(JobNotFound, jobs.resume, job_id)
        elif job.status not in (JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED):
            self.change(JobNotResumable, jobs.resume, job_id)
        else:
            _, stage = self.change(None, jobs.resume, job_id)
            assert stage == STAGES[job.turn]
            job.stages = [s if s == StageStatus.SUCCEEDED else StageStatus.PENDING for s in job.stages]
            job.stages[job.turn], job.counted[job.turn] = StageStatus.QUEUED, 0
            job.status = JobStatus.QUEUED

    def delete(self, job_id: str) -> None:
        job = self.expected[job_id]
        if job.deleted:
            self.change(JobNotFound, deletion.mark, job_id)
        elif not (job.status.final or job.status == JobStatus.PAUSED):
            self.change(JobNotDeletable, deletion.mark, job_id)
        else:
            self.change(None, deletion.mark, job_id)
            job.deleted = True

    # What is true at all times

    @invariant()
    def the_database_is_as_expected(self) -> None:
        with transaction(self.database) as session:
            # These jobs are the newest, so that others can only come behind them.
            listed = {row.id for row in jobs.page(session, DEFAULT_PROJECT, limit=MAX_JOBS)[0]}
            for job_id, job in self.expected.items():
                assert (job_id in listed) == (not job.deleted)
                check(session, job_id, job)


def check(session: Session, job_id: str, job: Expected) -> None:
    row = session.get(JobRow, job_id)
    rows = jobs.stages(session, [job_id])[job_id]
    events = session.exec(
        select(EventRow.number, EventRow.type, EventRow.stage)
        .where(EventRow.job_id == job_id)
        .order_by(col(EventRow.number))
    ).all()
    artifacts = session.exec(select(ArtifactRow.stage).where(ArtifactRow.job_id == job_id)).all()
    if job.removed:
        assert (row, rows, list(events), list(artifacts)) == (None, [], [], [])
        return
    assert row is not None
    assert (row.status, row.deleted_at is not None) == (job.status, job.deleted)
    assert (row.finished_at is not None, row.error is not None) == (job.status.final, job.status == JobStatus.FAILED)
    assert [stage.status for stage in rows] == job.stages
    assert [stage.attempt for stage in rows] == job.attempts
    check_stages(rows)
    assert [number for number, _, _ in events] == list(range(1, row.last_event + 1))
    check_events([type_ for _, type_, _ in events], job.status)
    done = [stage.name for stage in rows if stage.status == StageStatus.SUCCEEDED]
    assert [stage for _, type_, stage in events if type_ == "stage.succeeded"] == done
    assert sorted(artifacts) == sorted(done)


def check_stages(rows: list[StageRow]) -> None:
    """One stage is at work at most, none before the one before it is done; and only what is at work has a lease."""
    assert sum(row.status in AT_HAND for row in rows) <= 1
    for earlier, later in pairwise(rows):
        if later.status not in (StageStatus.PENDING, StageStatus.CANCELLED):
            assert earlier.status == StageStatus.SUCCEEDED
    for row in rows:
        assert (row.lease_expires_at is not None) == (row.status == StageStatus.RUNNING)
        assert (row.error is not None) == (row.status == StageStatus.FAILED)
        assert (row.paused_at is not None) == (row.status == StageStatus.PAUSED)


def check_events(types: list[str], status: JobStatus) -> None:
    """Nothing happens after an end but a resume, and never after success."""
    assert types[0] == "job.created"
    for event, following in pairwise(types):
        assert event != "job.succeeded"
        if event in ("job.failed", "job.cancelled"):
            assert following == "job.resumed"
        if event == "job.paused":
            assert following in ("job.resumed", "job.cancelled")
        if following == "job.resumed":
            assert event in STOPPED
    if status.final or status == JobStatus.PAUSED:
        assert types[-1] == f"job.{status}"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = connect(f"sqlite:///{tmp_path}/jobs.db")
    migrate(database)
    yield database
    database.dispose()


def test_jobs_keep_their_rules_whatever_happens_in_whatever_order(database: Database) -> None:
    shared = database

    class OnDatabase(Lifecycle):
        database = shared

    run_state_machine_as_test(
        OnDatabase,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
