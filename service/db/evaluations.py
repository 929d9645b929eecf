"""Queries on evaluations that a search offers to other workers, its helpers.

The search never depends on them: what it offers it also takes back, and it needs no row to go on. A helper belongs to
one attempt at the stage and counts as long as it renews its lease; whatever it claimed is free again when it does not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, exists, func, or_, update
from sqlalchemy.sql.elements import ColumnElement
from sqlmodel import Session, col, select
from uuid_utils import uuid7

from pdtrim.contract.errors import JobNotFound
from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from service.db import jobs, stages
from service.db.stages import Claim, LeaseLost
from service.db.tables import EvaluationRow, HelperRow, JobRow, StageRow, now

COORDINATOR = "coordinator"
"""Who claims what the search does itself."""
Losses = list[list[float]]


@dataclass(frozen=True)
class Helpers:
    """How many help now, and how many ever joined this attempt."""

    present: int
    joined: int


@dataclass(frozen=True)
class Answer:
    """What a helper found, and the worker that it is."""

    number: int
    losses: Losses
    worker: str


def join(session: Session, held: Claim, *, worker: str, lease_seconds: float) -> str | None:
    """Help with an attempt; the helper's id, or None when that is over or has as many helpers as its job asked for."""
    try:
        job = jobs.lock(session, held.job_id)
    except JobNotFound:
        return None
    row = session.get_one(StageRow, (held.job_id, held.stage), populate_existing=True)
    asked = job.spec["search"].get("parallelism", 1)
    if (
        job.status != JobStatus.RUNNING
        or not _runs(row.status, row.attempt, held)
        or helpers(session, held).present >= asked - 1
    ):
        return None
    helper = HelperRow(
        id=f"help_{uuid7().hex}",
        job_id=held.job_id,
        attempt=held.attempt,
        worker=worker,
        lease_expires_at=now() + timedelta(seconds=lease_seconds),
    )
    session.add(helper)
    session.flush()
    return helper.id


def renew(session: Session, held: Claim, *, helper: str, lease_seconds: float) -> bool:
    """Renew a helper's lease. True when it is to stop: the job is cancelled or paused. Raises: LeaseLost."""
    status = _check_runs(session, held)
    session.exec(
        update(HelperRow)
        .where(col(HelperRow.id) == helper)
        .values(lease_expires_at=now() + timedelta(seconds=lease_seconds))
        .execution_options(synchronize_session=False)
    )
    return status in stages.STOPPING


def leave(session: Session, helper: str) -> None:
    """Help no longer; what was claimed is there for others."""
    session.exec(update(HelperRow).where(col(HelperRow.id) == helper).values(lease_expires_at=now()))


def _runs(status: str, attempt: int, held: Claim) -> bool:
    return status == StageStatus.RUNNING and attempt == held.attempt


def _check_runs(session: Session, held: Claim) -> JobStatus:
    """The job's status. Raises: LeaseLost when the attempt is over."""
    found = session.exec(
        select(JobRow.status, StageRow.status, StageRow.attempt)
        .join(StageRow, col(StageRow.job_id) == JobRow.id)
        .where(JobRow.id == held.job_id, StageRow.name == held.stage, jobs.EXISTS)
    ).first()
    if found is None or not _runs(found[1], found[2], held):
        raise LeaseLost(f"{held.stage} of {held.job_id}: attempt {held.attempt} is over")
    return JobStatus(found[0])


def helpers(session: Session, held: Claim) -> Helpers:
    """Who helps with an attempt."""
    present = func.count().filter(col(HelperRow.lease_expires_at) > now())
    row = session.exec(select(present, func.count()).select_from(HelperRow).where(*_of(HelperRow, held))).one()
    return Helpers(*row)


def offer(session: Session, held: Claim, payloads: Mapping[int, Any]) -> None:
    """Offer numbered evaluations in place of all that were offered before. Raises: LeaseLost."""
    stages.check_current(session, held)
    session.exec(delete(EvaluationRow).where(col(EvaluationRow.job_id) == held.job_id))
    session.add_all(
        EvaluationRow(job_id=held.job_id, attempt=held.attempt, number=number, payload=payload)
        for number, payload in payloads.items()
    )


def answers(session: Session, held: Claim, numbers: Collection[int]) -> list[Answer]:
    """What helpers found of some evaluations."""
    rows = session.exec(
        select(EvaluationRow, HelperRow.worker)
        .join(HelperRow, col(HelperRow.id) == EvaluationRow.claimed_by)
        .where(*_of(EvaluationRow, held), col(EvaluationRow.number).in_(numbers))
        .where(col(EvaluationRow.result).is_not(None))
    )
    return [Answer(row.number, row.result or [], worker) for row, worker in rows]


def take_back(session: Session, held: Claim, numbers: Collection[int]) -> int | None:
    """The first of some evaluations that no helper is about to answer; from now on the search does it itself.

    Asked again, it may give the same one: who was interrupted does not know what was recorded.
    """
    free = or_(_free(held), col(EvaluationRow.claimed_by) == COORDINATOR)
    return _claim(session, held, COORDINATOR, (col(EvaluationRow.number).in_(numbers), free), descending=False)


def claim(session: Session, held: Claim, *, helper: str) -> tuple[int, dict[str, Any]] | None:
    """An evaluation for a helper, from the end that the search comes to last. Raises: LeaseLost."""
    _check_runs(session, held)
    number = _claim(session, held, helper, (_free(held),), descending=True)
    if number is None:
        return None
    row = session.get_one(EvaluationRow, (held.job_id, held.attempt, number))
    return number, row.payload


def answer(session: Session, held: Claim, number: int, losses: Losses, *, helper: str) -> None:
    """Record what a helper found, unless its claim on it is gone."""
    session.exec(
        update(EvaluationRow)
        .where(*_of(EvaluationRow, held), col(EvaluationRow.number) == number, col(EvaluationRow.claimed_by) == helper)
        .values(result=losses)
        .execution_options(synchronize_session=False)
    )


def forget(session: Session) -> None:
    """Delete what belongs to attempts that are over."""
    for table in (EvaluationRow, HelperRow):
        running = exists().where(
            col(StageRow.job_id) == table.job_id,
            col(StageRow.name) == StageName.REMOVAL,
            col(StageRow.status) == StageStatus.RUNNING,
            col(StageRow.attempt) == table.attempt,
        )
        session.exec(delete(table).where(~running).execution_options(synchronize_session=False))


def _of(table: type[EvaluationRow] | type[HelperRow], held: Claim) -> tuple[ColumnElement[bool], ...]:
    return col(table.job_id) == held.job_id, col(table.attempt) == held.attempt


def _free(held: Claim) -> ColumnElement[bool]:
    present = select(HelperRow.id).where(*_of(HelperRow, held), col(HelperRow.lease_expires_at) > now())
    claimed_by = col(EvaluationRow.claimed_by)
    return or_(claimed_by.is_(None), (claimed_by != COORDINATOR) & claimed_by.not_in(present))


def _claim(
    session: Session, held: Claim, who: str, wanted: tuple[ColumnElement[bool], ...], *, descending: bool
) -> int | None:
    """The first unanswered evaluation that no other process is just claiming."""
    number = col(EvaluationRow.number)
    row = session.exec(
        select(EvaluationRow)
        .where(*_of(EvaluationRow, held), col(EvaluationRow.result).is_(None), *wanted)
        .order_by(number.desc() if descending else number)
        .limit(1)
        .with_for_update(skip_locked=True)
    ).first()
    if row is None:
        return None
    row.claimed_by = who
    session.flush()
    return row.number
