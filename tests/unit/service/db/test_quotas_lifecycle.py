"""Quotas while users, workers, the broker and the reconciler do anything in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine as Database
from sqlmodel import Session, col, select

from pdtrim.contract.access import Quotas
from pdtrim.contract.errors import (
    JobNotCancellable,
    JobNotDeletable,
    JobNotFound,
    JobNotPausable,
    JobNotResumable,
    QueueQuotaExceeded,
)
from pdtrim.contract.jobs import ErrorInfo, JobStatus
from pdtrim.contract.queues import Priority
from pdtrim.contract.spec import JobSpec
from service.db import deletion, jobs, stages
from service.db.session import connect, migrate, transaction
from service.db.stages import Claim, LeaseLost
from service.db.tables import JobRow, now
from service.db.urgency import most_urgent
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})
LIMITS = Quotas(max_running_jobs=2, max_queued_jobs=3)
USERS = {
    "pause": jobs.request_pause,
    "cancel": jobs.request_cancel,
    "resume": lambda session, job_id: jobs.resume(session, job_id, limits=LIMITS),
    "delete": deletion.mark,
}
WITH_WORKERS = (JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.CANCELLING)
PROJECTS = count()


class Life(RuleBasedStateMachine):
    """`engine` is a SQLite database that all runs share; each run has a project and queues of its own, and ends all its
    jobs.
    """

    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.project = f"project-{next(PROJECTS)}"
        self.queues = [f"{self.project}-{name}" for name in "ab"]
        self.jobs: list[str] = []
        self.messages: list[str] = []
        """The queue of each."""
        self.claims: list[Claim] = []
        self.hours = 0

    @initialize()
    def all_is_used_up(self) -> None:
        for _ in range(2):
            self.submit(0, Priority.NORMAL)
            self.wake(self.messages.pop(), self.queues)
        for _ in range(3):
            self.submit(1, Priority.NORMAL)

    @rule(queue=st.integers(0, 1), priority=st.sampled_from(Priority))
    def submit(self, queue: int, priority: Priority) -> None:
        spec = SPEC.model_copy(update={"queue": self.queues[queue], "priority": priority})
        try:
            with transaction(self.database) as session:
                job_id = store_job(session, spec, project=self.project, limits=LIMITS).id
                self.send(session, job_id)
                self.jobs.append(job_id)
        except QueueQuotaExceeded:
            assert self.states()[JobStatus.QUEUED] == LIMITS.max_queued_jobs

    @rule(data=st.data(), what=st.sampled_from(["pause", "pause", "resume", "resume", "cancel", "delete"]))
    def ask(self, data: st.DataObject, what: str) -> None:
        job_id = data.draw(st.sampled_from(self.jobs[-6:]))
        try:
            with transaction(self.database) as session:
                USERS[what](session, job_id)
                if what == "resume":
                    self.send(session, job_id)
        except QueueQuotaExceeded:
            assert self.states()[JobStatus.QUEUED] == LIMITS.max_queued_jobs
        except (JobNotFound, JobNotPausable, JobNotCancellable, JobNotResumable, JobNotDeletable):
            assert self.states().total() <= len(self.jobs)

    @rule(data=st.data(), lost=st.sampled_from([False, False, False, True]), takes_all=st.booleans())
    def deliver(self, data: st.DataObject, lost: bool, takes_all: bool) -> None:
        if self.messages:
            queue = self.messages.pop(data.draw(st.integers(0, len(self.messages) - 1)))
            if not lost:
                self.wake(queue, self.queues if takes_all else [queue])

    @rule(queue=st.integers(0, 1), takes_all=st.booleans())
    def repeat(self, queue: int, takes_all: bool) -> None:
        """A message that nobody needs."""
        self.wake(self.queues[queue], self.queues if takes_all else [self.queues[queue]])

    @rule(data=st.data(), outcome=st.sampled_from(["complete", "complete", "fail", "release", "stop", "hand back"]))
    def work(self, data: st.DataObject, outcome: str) -> None:
        if self.claims:
            self.end(self.claims.pop(data.draw(st.integers(0, len(self.claims) - 1))), outcome)

    @rule(hours=st.sampled_from([0, 0, 1]))
    def sweep(self, hours: int) -> None:
        self.hours += hours
        at = now() + timedelta(hours=self.hours)
        with transaction(self.database) as session:
            due = stages.due(session, resend_seconds=1, max_running_jobs=LIMITS.max_running_jobs, at=at)
            queues = jobs.queues(session, [job_id for job_id, _ in due])
        self.messages += [queues[job_id] for job_id, _ in due]

    @invariant()
    def nothing_exceeds_its_quota(self) -> None:
        states = self.states()
        assert states[JobStatus.QUEUED] <= 3
        assert sum(states[status] for status in WITH_WORKERS) <= 2

    def teardown(self) -> None:
        """However it came to this: what waits gets its turn, as long as those that run end."""
        for _ in range(10 * len(self.jobs)):
            states = self.states()
            if not any(states[status] for status in (JobStatus.QUEUED, *WITH_WORKERS)):
                return
            self.sweep(1)
            while self.messages or self.claims:
                for queue in [self.messages.pop() for _ in range(len(self.messages))]:
                    self.wake(queue, [queue])
                while self.claims:
                    self.end(self.claims.pop(), "complete")
        raise AssertionError(f"some wait for ever: {states}")

    def send(self, session: Session, job_id: str) -> None:
        if jobs.is_sent(jobs.stages(session, [job_id])[job_id]):
            self.messages += jobs.queues(session, [job_id]).values()

    def wake(self, queue: str, taken_from: Sequence[str]) -> None:
        """As `workers.running.attempt.run_most_urgent` does."""
        most = LIMITS.max_running_jobs
        with transaction(self.database) as session:
            found = most_urgent(session, taken_from, max_running_jobs=most)
            if found is None:
                return
            claim = stages.claim(session, *found, worker="w", lease_seconds=9999, max_running_jobs=most)
        assert claim is not None
        self.claims.append(claim)
        if not claim.answers(queue):
            self.messages.append(queue)

    def end(self, claim: Claim, outcome: str) -> None:
        error = ErrorInfo(code="x", message="x")
        with transaction(self.database) as session:
            try:
                if outcome == "complete":
                    following = stages.complete(session, claim, artifacts=[], metrics={}, versions={})
                    self.messages += [] if following is None else [claim.queue]
                elif outcome == "fail":
                    stages.fail(session, claim, error)
                elif outcome == "release":
                    stages.release(session, claim, "x", max_attempts=2, pause_seconds=10)
                elif outcome == "hand back":
                    stages.hand_back(session, claim)
                    self.messages.append(claim.queue)
                elif jobs.get(session, claim.job_id).status in stages.STOPPING:
                    stages.stopped(session, claim)
                else:
                    self.claims.append(claim)
            except LeaseLost:
                assert jobs.get(session, claim.job_id).status != JobStatus.RUNNING

    def states(self) -> Counter[Any]:
        with transaction(self.database) as session:
            found = select(JobRow.status).where(JobRow.project == self.project, col(JobRow.deleted_at).is_(None))
            return Counter(session.exec(found).all())


def test_in_any_order_quotas_hold_and_nothing_waits_for_ever(tmp_path: Path) -> None:
    class OnDatabase(Life):
        database = connect(f"sqlite:///{tmp_path}/jobs.db")

    migrate(OnDatabase.database)
    run_state_machine_as_test(
        OnDatabase,
        settings=settings(
            max_examples=10,
            stateful_step_count=40,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],  # Each run ends all its jobs: shrinking one takes minutes.
            suppress_health_check=list(HealthCheck),
        ),
    )
    OnDatabase.database.dispose()
