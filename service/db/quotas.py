"""Quotas: how many jobs a project may have queued and running, and how many bytes of artifacts it may keep.

A key may have quotas of its own, which count the jobs that were made with it; both hold. Everything is counted from
the jobs themselves, so whatever ends, pauses or deletes one gives back what it held. Whoever counts in order to take
holds the project's lock until the transaction ends.

A running quota refuses nothing: jobs wait in the queue. Such a job has no message under way (`sent_at` is empty) until
`Slots`, which the reconciler asks, has one for it, or a worker that was woken for another finds it the most urgent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, func, literal_column, or_, true
from sqlmodel import Session, col, select

from pdtrim.contract.access import Quotas
from pdtrim.contract.errors import ArtifactQuotaExceeded, QueueQuotaExceeded
from pdtrim.contract.jobs import JobStatus, StageStatus
from service.db.tables import ApiKeyRow, JobRow, StageRow

NONE = Quotas()
HELD_BACK = "Waits until fewer jobs of its project or key run."
RUNNING = (JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.CANCELLING)
"""A job between two of its stages keeps its place; one that is being stopped still has a worker."""
WAITING = (JobStatus.QUEUED,)


@dataclass(frozen=True)
class _Share:
    """Jobs that are counted together, and how much of everything they may have."""

    name: str
    jobs: ColumnElement[bool]
    most: Quotas


def admit(session: Session, project: str, api_key: str | None, of_project: Quotas) -> bool:
    """Make sure that a job more may be queued. False when it is to be held back, as no more may run.

    Raises: QueueQuotaExceeded, ArtifactQuotaExceeded.
    """
    shares = _shares(session, project, api_key, of_project)
    if not shares:
        return True
    _lock(session, project)
    for share in shares:
        queued, kept = share.most.max_queued_jobs, share.most.max_artifact_bytes
        if queued is not None and _count(session, share, WAITING) >= queued:
            raise QueueQuotaExceeded(
                f"{share.name} has {queued} queued jobs, the most it may. Cancel some, or try again when some began."
            )
        if kept is not None and (held := _bytes(session, share)) >= kept:
            raise ArtifactQuotaExceeded(
                f"{share.name} keeps {held} bytes of artifacts and may keep {kept}. Delete jobs that are not needed: "
                "DELETE /v1/jobs/{id}."
            )
    return all(_has_room(session, share, (*RUNNING, *WAITING)) for share in shares)


def may_run(session: Session, job: JobRow, max_running_jobs: int | None) -> bool:
    """Whether a locked job that waits may begin to run."""
    shares = _shares(session, job.project, job.api_key, Quotas(max_running_jobs=max_running_jobs))
    limited = [share for share in shares if share.most.max_running_jobs is not None]
    if limited:
        _lock(session, job.project)
    return all(_has_room(session, share, RUNNING) for share in limited)


def _shares(session: Session, project: str, api_key: str | None, of_project: Quotas) -> list[_Share]:
    """What a job counts in, where that is limited at all."""
    ours = and_(col(JobRow.project) == project, col(JobRow.deleted_at).is_(None))
    shares = [_Share(f"Project {project}", ours, of_project)]
    limits = None if api_key is None else _limits(session, api_key)
    if limits is not None:
        shares.append(_Share(f"The key {api_key}", and_(ours, col(JobRow.api_key) == api_key), limits))
    return [share for share in shares if share.most != NONE]


def _limits(session: Session, api_key: str) -> Quotas | None:
    # Past the unit of work, as `jobs.insert_new` is.
    columns = [getattr(ApiKeyRow, name) for name in Quotas.model_fields]
    row = session.connection().execute(select(*columns).where(ApiKeyRow.prefix == api_key)).first()
    return None if row is None else Quotas.model_validate(row)


def _lock(session: Session, project: str) -> None:
    """Keep everyone else from counting a project's jobs. SQLite lets one transaction in at a time anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(project, 0))))


def _count(session: Session, share: _Share, states: Sequence[JobStatus]) -> int:
    return session.exec(select(func.count()).where(share.jobs, col(JobRow.status).in_(states))).one()


def _has_room(session: Session, share: _Share, states: Sequence[JobStatus]) -> bool:
    most = share.most.max_running_jobs
    return most is None or _count(session, share, states) < most


def _bytes(session: Session, share: _Share) -> int:
    # The zero is literal so that the database sees that its index of such jobs will do.
    held = select(func.coalesce(func.sum(JobRow.artifact_bytes), 0))
    return int(session.exec(held.where(share.jobs, col(JobRow.artifact_bytes) > literal_column("0"))).one())


def hold_back(row: StageRow) -> None:
    """Have a queued stage wait until there is a slot for its job."""
    row.sent_at, row.sends, row.message = None, 0, HELD_BACK


class Slots:
    """How many jobs more may begin to run, by project and by key; each `take` leaves one less.

    A job takes one too whose stage was `sent`: it will be running soon.
    """

    def __init__(self, session: Session, max_running_jobs: int | None, *, sent: ColumnElement[bool]) -> None:
        self._of_project = max_running_jobs
        limit = col(ApiKeyRow.max_running_jobs)
        self._of_key = dict(session.exec(select(ApiKeyRow.prefix, limit).where(limit.is_not(None))).all())
        self._projects: Counter[str] = Counter()
        self._keys: Counter[str] = Counter()
        if self._of_project is None and not self._of_key:
            return
        whose = (col(JobRow.project), col(JobRow.api_key))
        running = select(*whose, func.count()).where(col(JobRow.status).in_(RUNNING))
        beginning = (
            select(*whose, func.count())
            .join(StageRow)
            .where(col(JobRow.status) == JobStatus.QUEUED, col(StageRow.status) == StageStatus.QUEUED, sent)
        )
        for query in (running, beginning):
            for project, api_key, jobs in session.execute(query.group_by(*whose)):
                self._count(project, api_key, jobs)

    @property
    def left(self) -> ColumnElement[bool]:
        """The condition on jobs that are not held back for certain."""
        projects = [name for name, jobs in self._projects.items() if not self._below(jobs, self._of_project)]
        keys = [name for name, jobs in self._keys.items() if not self._below(jobs, self._of_key.get(name))]
        if not projects and not keys:
            return true()
        key = col(JobRow.api_key)
        free = and_(col(JobRow.project).not_in(projects), or_(key.is_(None), key.not_in(keys)))
        return or_(col(JobRow.status) != JobStatus.QUEUED, free)

    def take(self, project: str, api_key: str | None) -> bool:
        """Take a slot for a job, if there is one."""
        free = self._below(self._projects[project], self._of_project) and (
            api_key is None or self._below(self._keys[api_key], self._of_key.get(api_key))
        )
        if free:
            self._count(project, api_key, 1)
        return free

    def _count(self, project: str, api_key: str | None, jobs: int) -> None:
        self._projects[project] += jobs
        if api_key is not None:
            self._keys[api_key] += jobs

    @staticmethod
    def _below(jobs: int, most: int | None) -> bool:
        return most is None or jobs < most
