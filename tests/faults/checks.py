"""What has to hold when a fault run is over."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlmodel import Session, select

from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from service.db.session import transaction
from service.db.tables import ArtifactRow, EventRow, JobRow, StageRow
from service.queue import celery_app
from service.storage import ArtifactStore, ObjectNotFound
from tests.faults.cluster import Cluster
from tests.faults.inject import SECRET
from tests.faults.workload import LABEL, Follower, Planned

PASSING = (
    "fell silent", "StoreUnavailable", "OperationalError", "No space left on device", "os error 28", "is being stopped",
)  # fmt: skip
"""What the loss of an attempt to an injected fault looks like."""
REFUSING = ("not on the allow list", "cannot be read")
"""And what refusing an exchanged file does."""


@dataclass(frozen=True)
class Violation:
    """Something that does not hold; of a job, if it is one job's matter."""

    what: str
    job_id: str | None = None


def outcome_of(job: JobRow) -> str:
    """The job's status, or why it failed."""
    return str(job.error["code"]) if job.status == JobStatus.FAILED and job.error else str(job.status)


def check_jobs(cluster: Cluster, planned: Sequence[Planned], ids: Mapping[int, str]) -> Iterator[Violation]:
    """Each job of the plan exists once, and ended as it has to."""
    with transaction(cluster.database) as session:
        rows = session.exec(select(JobRow)).all()
        found = {job.number: [row for row in rows if row.labels.get(LABEL) == str(job.number)] for job in planned}
        for job in planned:
            those = found[job.number]
            if job.deleted:
                if those or (left := list(cluster.store.list_keys(f"jobs/{ids[job.number]}"))):
                    yield Violation(f"job {job.number} was deleted, and left {those or left}")
                continue
            if len(those) != 1:
                yield Violation(f"job {job.number} exists {len(those)} times: {[row.id for row in those]}")
                continue
            row = those[0]
            if row.id != ids.get(job.number):
                yield Violation(f"job {job.number} was answered as {ids.get(job.number)}", row.id)
            yield from _check_job(session, row, job, cluster.settings.max_attempts)
            yield from _check_artifacts(session, cluster.store, row)
            yield from _check_secret(session, cluster.store, row)


def _check_job(session: Session, job: JobRow, planned: Planned, max_attempts: int) -> Iterator[Violation]:
    stages = session.exec(select(StageRow).where(StageRow.job_id == job.id)).all()
    events = session.exec(select(EventRow).where(EventRow.job_id == job.id)).all()
    events = sorted(events, key=lambda event: event.number)
    if [event.number for event in events] != list(range(1, job.last_event + 1)):
        yield Violation(f"events are numbered {[event.number for event in events]}, last {job.last_event}", job.id)
    outcome = outcome_of(job)
    exhausted_by_faults = outcome == "attempts_exhausted" and not planned.poison
    if outcome not in planned.outcomes and not exhausted_by_faults:
        yield Violation(f"ended {outcome}, not {planned.outcome}: {job.error}", job.id)
    for row in stages:
        of_stage = [event for event in events if event.stage == row.name]
        counts = Counter(event.type for event in of_stage)
        attempts = [event.data["attempt"] for event in of_stage if event.type == "stage.started"]
        lost = [event.message for event in of_stage if event.type in ("stage.requeued", "stage.failed")]
        if row.lease_expires_at is not None or row.status in (StageStatus.RUNNING, StageStatus.QUEUED):
            yield Violation(f"{row.name} is {row.status} with a lease until {row.lease_expires_at}", job.id)
        if counts["stage.succeeded"] != (row.status == StageStatus.SUCCEEDED):
            yield Violation(f"{row.name} is {row.status} with {counts['stage.succeeded']} success events", job.id)
        if attempts != list(range(1, row.attempt + 1)):
            yield Violation(f"{row.name} was claimed {row.attempt} times, but started as {attempts}", job.id)
        if len(lost) != row.attempt - counts["stage.succeeded"]:
            yield Violation(f"{row.name} lost {row.attempt} attempts with {len(lost)} reasons: {lost}", job.id)
        if row.attempt - row.attempts_forgiven > max_attempts:
            yield Violation(f"{row.name} was tried {row.attempt} times", job.id)
        if outcome != planned.outcome or planned.poison or planned.outcome == "succeeded":
            words = (*PASSING, *REFUSING) if planned.folder else PASSING
            unexplained = [reason for reason in lost if not any(word in reason for word in words)]
            if unexplained:
                yield Violation(f"{row.name} lost attempts to no fault that was injected: {unexplained}", job.id)
    statuses = {StageName(row.name): row.status for row in stages}
    if outcome == "succeeded" and set(statuses.values()) != {StageStatus.SUCCEEDED}:
        yield Violation(f"succeeded with stages {statuses}", job.id)


def _check_artifacts(session: Session, store: ArtifactStore, job: JobRow) -> Iterator[Violation]:
    """What is recorded is in the store, byte for byte."""
    rows = session.exec(select(ArtifactRow).where(ArtifactRow.job_id == job.id)).all()
    if job.status == JobStatus.SUCCEEDED and {row.stage for row in rows} != set(StageName):
        yield Violation(f"has artifacts of {sorted({row.stage for row in rows})} only", job.id)
    for row in rows:
        try:
            content = store.get_bytes(row.key)
        except ObjectNotFound:
            yield Violation(f"{row.key} is recorded, but not in the store", job.id)
            continue
        if (len(content), hashlib.sha256(content).hexdigest()) != (row.size, row.sha256):
            yield Violation(f"{row.key} holds other bytes than were recorded", job.id)


def _check_secret(session: Session, store: ArtifactStore, job: JobRow) -> Iterator[Violation]:
    """No checkpoint has what an exchanged file led to."""
    for row in session.exec(select(ArtifactRow).where(ArtifactRow.job_id == job.id, ArtifactRow.stage == "export")):
        if SECRET.encode() in store.get_bytes(row.key):
            yield Violation(f"{row.key} has the content of a file that was none of the job's business", job.id)


def check_followers(cluster: Cluster, followers: Sequence[Follower], seconds: float) -> Iterator[Violation]:
    """A stream of events that was followed through the faults had each of them, in order."""
    for follower in followers:
        if not follower.join(seconds):
            yield Violation(f"a stream of its events did not end; it got to {follower.numbers[-1:]}", follower.job_id)
            continue
        with transaction(cluster.database) as session:
            job = session.get_one(JobRow, follower.job_id)
        if follower.error or follower.numbers != list(range(1, job.last_event + 1)):
            yield Violation(f"a stream of its events had {follower.numbers} {follower.error}", follower.job_id)


def check_workers(cluster: Cluster) -> Iterator[Violation]:
    """Every worker that runs still listens to the broker."""
    expected = len([member for member in cluster.members if member.kind == "worker"])
    app = celery_app(cluster.settings.broker_url)
    # Of its own: a pooled connection may be from before a restart of the broker.
    with app.connection_for_write() as connection:
        answers = app.control.ping(timeout=10.0, limit=expected, connection=connection) or []
    if len(answers) != expected:
        yield Violation(f"only {answers} of {expected} workers answer on the broker")


def tell_events(cluster: Cluster, job_id: str) -> str:
    """A job's events, a line each."""
    with transaction(cluster.database) as session:
        rows = session.exec(select(EventRow).where(EventRow.job_id == job_id)).all()
    return "\n".join(
        f"{row.number:4} {row.created_at:%H:%M:%S.%f} {row.type:16} {row.stage or '':12} {row.message} {row.data}"
        for row in sorted(rows, key=lambda row: row.number)
        if row.type != "stage.progress"
    )
