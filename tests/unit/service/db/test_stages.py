"""Claims, leases and results of stages, on SQLite; tests/integration runs them on PostgreSQL too."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import Engine as Database
from sqlmodel import Session

from pdtrim.contract.errors import JobNotPausable
from pdtrim.contract.jobs import ErrorInfo, JobStatus, StageName, StageStatus
from pdtrim.contract.spec import JobSpec
from service.db import artifacts, events, jobs, stages
from service.db.session import connect, transaction
from service.db.stages import Claim, LeaseLost, NewArtifact
from service.db.tables import JobRow, StageRow, now
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})


def create_job(database: Database, *, deadline_seconds: float | None = None) -> str:
    with transaction(database) as session:
        return store_job(session, SPEC.model_copy(update={"deadline_seconds": deadline_seconds})).id


def begun_long_ago(database: Database, job_id: str, *, seconds: float) -> None:
    with transaction(database) as session:
        row = session.get_one(StageRow, (job_id, StageName.SCORING))
        row.started_at = now() - timedelta(seconds=seconds)


def take(
    database: Database,
    job_id: str,
    stage: StageName = StageName.SCORING,
    *,
    lease_seconds: float = 60,
    deadline_seconds: float | None = None,
) -> Claim:
    with transaction(database) as session:
        claim = stages.claim(
            session, job_id, stage, worker="w", lease_seconds=lease_seconds, deadline_seconds=deadline_seconds
        )
    assert claim is not None
    return claim


def retire(database: Database, job_id: str, *, max_attempts: int = 5) -> None:
    with transaction(database) as session:
        stages.retire(session, job_id, StageName.SCORING, max_attempts=max_attempts)


def complete(database: Database, claim: Claim) -> StageName | None:
    artifact = NewArtifact("plan.json", f"{claim.job_id}/{claim.stage}", "file:///plan.json", 3, "0" * 64)
    with transaction(database) as session:
        return stages.complete(session, claim, artifacts=[artifact], metrics={"loss": 1.5}, versions={"torch": "2"})


def stage_row(database: Database, job_id: str, stage: StageName) -> StageRow:
    with transaction(database) as session:
        return session.get_one(StageRow, (job_id, stage))


def event_types(database: Database, job_id: str) -> list[str]:
    with transaction(database) as session:
        rows, _ = events.page(session, job_id, after=0, limit=1000)
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    return [row.type for row in rows]


def test_a_stage_is_claimed_once(database: Database) -> None:
    job_id = create_job(database)
    claim = take(database, job_id)
    with transaction(database) as session:
        second = stages.claim(session, job_id, StageName.SCORING, worker="other", lease_seconds=60)
    assert claim.attempt == 1
    assert second is None


def test_a_stage_whose_predecessor_is_unfinished_cannot_be_claimed(database: Database) -> None:
    job_id = create_job(database)
    with transaction(database) as session:
        assert stages.claim(session, job_id, StageName.REMOVAL, worker="w", lease_seconds=60) is None


def test_stages_completed_in_order_end_in_a_succeeded_job_with_every_artifact(database: Database) -> None:
    job_id = create_job(database)
    for stage in StageName:
        complete(database, take(database, job_id, stage))
    with transaction(database) as session:
        job = jobs.get(session, job_id)
        recorded = [artifacts.of_stage(session, job_id, stage) for stage in StageName]
    assert job.status == JobStatus.SUCCEEDED
    assert job.versions == {"torch": "2"}
    assert job.finished_at is not None
    assert [len(rows) for rows in recorded] == [1] * len(StageName)
    assert event_types(database, job_id)[-2:] == ["stage.succeeded", "job.succeeded"]


def test_a_worker_whose_lease_was_taken_over_can_record_nothing(database: Database) -> None:
    job_id = create_job(database)
    zombie = take(database, job_id, lease_seconds=-1)
    retire(database, job_id)
    successor = take(database, job_id)
    for record in (
        lambda session: stages.renew(session, zombie, lease_seconds=60),
        lambda session: stages.record_progress(session, zombie, progress=0.5, message="", data={}),
        lambda session: stages.complete(session, zombie, artifacts=[], metrics={}, versions={}),
        lambda session: stages.fail(session, zombie, ErrorInfo(code="x", message="x")),
        lambda session: stages.stopped(session, zombie),
        lambda session: stages.release(session, zombie, "x", max_attempts=5, pause_seconds=10),
        lambda session: stages.hand_back(session, zombie),
    ):
        with pytest.raises(LeaseLost), transaction(database) as session:
            record(session)
    assert successor.attempt == 2
    assert complete(database, successor) == StageName.REMOVAL


def test_a_dead_workers_stage_is_queued_again_and_due_at_once(database: Database) -> None:
    job_id = create_job(database)
    take(database, job_id, lease_seconds=-1)
    with transaction(database) as session:
        assert stages.expired(session) == [(job_id, StageName.SCORING)]
        stages.retire(session, job_id, StageName.SCORING, max_attempts=5)
    with transaction(database) as session:
        assert stages.due(session, resend_seconds=30) == [(job_id, StageName.SCORING)]
    assert event_types(database, job_id)[-1] == "stage.requeued"


def test_a_live_lease_is_not_retired(database: Database) -> None:
    job_id = create_job(database)
    take(database, job_id)
    with transaction(database) as session:
        assert stages.expired(session) == []
        stages.retire(session, job_id, StageName.SCORING, max_attempts=5)
    assert stage_row(database, job_id, StageName.SCORING).status == StageStatus.RUNNING


def test_a_stage_that_keeps_killing_its_worker_fails_the_job(database: Database) -> None:
    job_id = create_job(database)
    for _ in range(3):
        take(database, job_id, lease_seconds=-1)
        retire(database, job_id, max_attempts=3)
    with transaction(database) as session:
        rows, _ = events.page(session, job_id, after=0, limit=100)
        job = jobs.get(session, job_id)
    assert job.status == JobStatus.FAILED
    assert job.error is not None
    assert job.error["code"] == "attempts_exhausted"
    told = [row.message for row in rows if row.type in ("stage.requeued", "stage.failed")]
    assert len(told) == 3
    assert all("Worker w fell silent" in message for message in told)


def test_a_released_stage_is_queued_again_with_its_reason(database: Database) -> None:
    job_id = create_job(database)
    claim = take(database, job_id)
    with transaction(database) as session:
        stages.release(session, claim, "the store refused", max_attempts=5, pause_seconds=10)
        rows, _ = events.page(session, job_id, after=0, limit=100)
    assert stage_row(database, job_id, StageName.SCORING).status == StageStatus.QUEUED
    assert rows[-1].message.startswith("the store refused")


def test_a_stage_whose_lease_ran_out_is_not_taken_before_its_loss_is_on_record(database: Database) -> None:
    job_id = create_job(database)
    take(database, job_id, lease_seconds=-1)
    with transaction(database) as session:
        assert stages.claim(session, job_id, StageName.SCORING, worker="other", lease_seconds=60) is None
    retire(database, job_id)
    assert take(database, job_id).attempt == 2


def test_a_job_that_a_stopped_process_holds_locked_keeps_no_other_waiting(postgres_database_url: str) -> None:
    database = connect(postgres_database_url)
    frozen, other = create_job(database), create_job(database)
    for job_id in (frozen, other):
        take(database, job_id, lease_seconds=-1)
    with transaction(database) as stopped:
        jobs.lock(stopped, frozen)
        for job_id in (frozen, other):
            retire(database, job_id)
        assert stage_row(database, frozen, StageName.SCORING).status == StageStatus.RUNNING
        assert stage_row(database, other, StageName.SCORING).status == StageStatus.QUEUED
    retire(database, frozen)
    assert stage_row(database, frozen, StageName.SCORING).status == StageStatus.QUEUED
    database.dispose()


def test_a_stage_handed_back_after_a_fault_is_sent_after_pauses_that_double(database: Database) -> None:
    job_id = create_job(database)

    def due_after(seconds: float) -> bool:
        with transaction(database) as session:
            return bool(stages.due(session, resend_seconds=10, at=now() + timedelta(seconds=seconds)))

    for early, late in ((9, 11), (19, 21), (39, 41)):
        claim = take(database, job_id)
        with transaction(database) as session:
            stages.release(session, claim, "the store is away", max_attempts=5, pause_seconds=10)
        assert [due_after(early), due_after(late)] == [False, True]


def test_what_the_broker_did_not_take_is_due_at_once(database: Database) -> None:
    job_id = create_job(database)
    later = now() + timedelta(seconds=11)
    for _ in range(2):
        with transaction(database) as session:
            assert stages.due(session, resend_seconds=10, at=later) == [(job_id, StageName.SCORING)]
        with transaction(database) as session:
            stages.not_sent(session, [job_id])
    row = stage_row(database, job_id, StageName.SCORING)
    assert (row.sends, row.sent_at) == (1, None)


@pytest.mark.parametrize(("own", "of_service", "seconds"), [(None, None, None), (60.0, None, 60), (600.0, 60.0, 60)])
def test_a_stage_has_until_the_strictest_of_its_deadlines(
    own: float | None, of_service: float | None, seconds: int | None, database: Database
) -> None:
    job_id = create_job(database, deadline_seconds=own)
    claim = take(database, job_id, deadline_seconds=of_service)
    started_at = stage_row(database, job_id, StageName.SCORING).started_at
    assert started_at is not None
    assert claim.deadline == (None if seconds is None else started_at + timedelta(seconds=seconds))
    begun_long_ago(database, job_id, seconds=100)
    with transaction(database) as session:
        found = stages.overdue(session, deadline_seconds=of_service, grace_seconds=10)
        spared = stages.overdue(session, deadline_seconds=of_service, grace_seconds=50)
    assert found == ([] if seconds is None else [(job_id, StageName.SCORING)])
    assert spared == []


def test_a_worker_that_hangs_past_the_deadline_loses_its_stage_and_a_resume_gives_as_much_time_again(
    database: Database,
) -> None:
    job_id = create_job(database, deadline_seconds=60.0)
    claim = take(database, job_id, lease_seconds=600)
    begun_long_ago(database, job_id, seconds=100)
    with transaction(database) as session:
        stages.time_out(session, job_id, StageName.SCORING, deadline_seconds=None, grace_seconds=60)
        assert jobs.get(session, job_id).error is None
        stages.time_out(session, job_id, StageName.SCORING, deadline_seconds=None, grace_seconds=10)
        error = jobs.get(session, job_id).error
    assert error is not None
    assert error["code"] == "deadline_exceeded"
    with pytest.raises(LeaseLost), transaction(database) as session:
        stages.renew(session, claim, lease_seconds=60)

    with transaction(database) as session:
        jobs.resume(session, job_id)
    deadline = take(database, job_id).deadline
    assert deadline is not None
    assert timedelta(seconds=50) < deadline - now() <= timedelta(seconds=60)


def test_the_cancellation_of_a_job_whose_worker_hangs_is_finished_at_the_deadline(database: Database) -> None:
    job_id = create_job(database, deadline_seconds=60.0)
    take(database, job_id, lease_seconds=600)
    begun_long_ago(database, job_id, seconds=100)
    with transaction(database) as session:
        jobs.request_cancel(session, job_id)
        stages.time_out(session, job_id, StageName.SCORING, deadline_seconds=None, grace_seconds=10)
    assert event_types(database, job_id)[-1] == "job.cancelled"


def test_queued_stages_are_sent_again_after_doubling_pauses(database: Database) -> None:
    job_id = create_job(database)
    start = now()

    def due_after(seconds: float) -> list[tuple[str, StageName]]:
        with transaction(database) as session:
            return stages.due(session, resend_seconds=10, at=start + timedelta(seconds=seconds))

    sent = [(job_id, StageName.SCORING)]
    assert [due_after(s) for s in (5, 11, 20, 33, 50, 75)] == [[], sent, [], sent, [], sent]


def test_cancelling_a_queued_job_is_immediate(database: Database) -> None:
    job_id = create_job(database)
    with transaction(database) as session:
        job = jobs.request_cancel(session, job_id)
    assert job.status == JobStatus.CANCELLED
    assert {stage_row(database, job_id, stage).status for stage in StageName} == {StageStatus.CANCELLED}


def test_cancelling_a_running_job_waits_for_its_worker(database: Database) -> None:
    job_id = create_job(database)
    claim = take(database, job_id)
    with transaction(database) as session:
        assert jobs.request_cancel(session, job_id).status == JobStatus.CANCELLING
        assert jobs.request_cancel(session, job_id).status == JobStatus.CANCELLING
    with transaction(database) as session:
        assert stages.renew(session, claim, lease_seconds=60)
        stages.stopped(session, claim)
    assert event_types(database, job_id)[-2:] == ["job.cancelling", "job.cancelled"]


def test_a_stage_that_finishes_while_its_job_is_cancelled_keeps_its_result(database: Database) -> None:
    job_id = create_job(database)
    claim = take(database, job_id)
    with transaction(database) as session:
        jobs.request_cancel(session, job_id)
    assert complete(database, claim) is None
    assert stage_row(database, job_id, StageName.SCORING).status == StageStatus.SUCCEEDED
    assert stage_row(database, job_id, StageName.REMOVAL).status == StageStatus.CANCELLED
    with transaction(database) as session:
        assert jobs.get(session, job_id).status == JobStatus.CANCELLED


def test_the_cancellation_of_a_dead_workers_job_is_finished_for_it(database: Database) -> None:
    job_id = create_job(database)
    take(database, job_id, lease_seconds=-1)
    with transaction(database) as session:
        jobs.request_cancel(session, job_id)
        stages.retire(session, job_id, StageName.SCORING, max_attempts=5)
        assert jobs.get(session, job_id).status == JobStatus.CANCELLED


def test_a_failed_stage_fails_its_job_and_cancels_the_rest(database: Database) -> None:
    job_id = create_job(database)
    claim = take(database, job_id)
    with transaction(database) as session:
        stages.fail(session, claim, ErrorInfo(code="model_unsupported", message="GPT-J is not known", param="model"))
        job = jobs.get(session, job_id)
    assert job.status == JobStatus.FAILED
    assert job.error == {"code": "model_unsupported", "message": "GPT-J is not known", "param": "model"}
    assert stage_row(database, job_id, StageName.EVALUATION).status == StageStatus.CANCELLED


def test_pausing_a_running_job_waits_for_its_worker_and_resuming_goes_on_with_its_stage(database: Database) -> None:
    job_id = create_job(database)
    complete(database, take(database, job_id))
    claim = take(database, job_id, StageName.REMOVAL)
    with transaction(database) as session:
        assert jobs.request_pause(session, job_id).status == JobStatus.PAUSING
        assert jobs.request_pause(session, job_id).status == JobStatus.PAUSING
        assert stages.renew(session, claim, lease_seconds=60)
        stages.stopped(session, claim)
        assert stages.claim(session, job_id, StageName.REMOVAL, worker="w", lease_seconds=60) is None
        assert stages.due(session, resend_seconds=0, at=now() + timedelta(days=1)) == []
    assert stage_row(database, job_id, StageName.REMOVAL).status == StageStatus.PAUSED
    assert stage_row(database, job_id, StageName.DISTILLATION).status == StageStatus.PENDING

    with transaction(database) as session:
        job, stage = jobs.resume(session, job_id)
    assert (job.status, stage) == (JobStatus.QUEUED, StageName.REMOVAL)
    assert event_types(database, job_id)[-3:] == ["job.pausing", "job.paused", "job.resumed"]
    assert take(database, job_id, StageName.REMOVAL).attempt == 2


def test_a_stage_that_finishes_while_its_job_is_paused_keeps_its_result(database: Database) -> None:
    job_id = create_job(database)
    claim = take(database, job_id)
    with transaction(database) as session:
        jobs.request_pause(session, job_id)
    assert complete(database, claim) is None
    assert stage_row(database, job_id, StageName.SCORING).status == StageStatus.SUCCEEDED
    assert stage_row(database, job_id, StageName.REMOVAL).status == StageStatus.PAUSED
    with transaction(database) as session:
        assert jobs.resume(session, job_id)[1] == StageName.REMOVAL


@pytest.mark.parametrize("ask", [jobs.request_pause, jobs.request_cancel])
def test_a_job_whose_last_stage_finishes_while_it_is_to_stop_has_succeeded(
    ask: Callable[[Session, str], JobRow], database: Database
) -> None:
    job_id = create_job(database)
    for stage in list(StageName)[:-1]:
        complete(database, take(database, job_id, stage))
    claim = take(database, job_id, StageName.EVALUATION)
    with transaction(database) as session:
        ask(session, job_id)
    complete(database, claim)
    with transaction(database) as session:
        assert jobs.get(session, job_id).status == JobStatus.SUCCEEDED


def test_the_pause_of_a_dead_workers_job_is_finished_for_it(database: Database) -> None:
    job_id = create_job(database)
    take(database, job_id, lease_seconds=-1)
    with transaction(database) as session:
        jobs.request_pause(session, job_id)
        stages.retire(session, job_id, StageName.SCORING, max_attempts=1)
        assert jobs.get(session, job_id).status == JobStatus.PAUSED


def test_a_job_that_is_pausing_or_paused_can_be_cancelled(database: Database) -> None:
    pausing, paused = create_job(database), create_job(database)
    claim = take(database, pausing)
    with transaction(database) as session:
        for job_id in (pausing, paused):
            jobs.request_pause(session, job_id)
        assert jobs.request_cancel(session, pausing).status == JobStatus.CANCELLING
        assert jobs.request_cancel(session, paused).status == JobStatus.CANCELLED
        with pytest.raises(JobNotPausable, match="cancelling"):
            jobs.request_pause(session, pausing)
        stages.stopped(session, claim)
    assert event_types(database, pausing)[-1] == event_types(database, paused)[-1] == "job.cancelled"


def test_a_resumed_stage_may_be_tried_as_often_as_a_new_one(database: Database) -> None:
    job_id = create_job(database)

    def lose_workers(count: int) -> JobStatus:
        for _ in range(count):
            take(database, job_id, lease_seconds=-1)
            with transaction(database) as session:
                stages.retire(session, job_id, StageName.SCORING, max_attempts=2)
        with transaction(database) as session:
            return jobs.get(session, job_id).status

    assert lose_workers(2) == JobStatus.FAILED
    with transaction(database) as session:
        job, _ = jobs.resume(session, job_id)
        assert (job.error, job.finished_at) == (None, None)
    assert lose_workers(1) == JobStatus.RUNNING
    assert lose_workers(1) == JobStatus.FAILED
    assert stage_row(database, job_id, StageName.SCORING).attempt == 4


def test_a_cancelled_job_is_resumed_with_its_first_unfinished_stage(database: Database) -> None:
    job_id = create_job(database)
    complete(database, take(database, job_id))
    with transaction(database) as session:
        jobs.request_cancel(session, job_id)
        jobs.resume(session, job_id)
    assert [stage_row(database, job_id, stage).status for stage in StageName] == [
        StageStatus.SUCCEEDED,
        StageStatus.QUEUED,
        *[StageStatus.PENDING] * 3,
    ]


def test_time_that_a_stage_lay_paused_is_none_that_it_ran(database: Database) -> None:
    job_id = create_job(database)
    claim = take(database, job_id)
    with transaction(database) as session:
        jobs.request_pause(session, job_id)
        stages.stopped(session, claim)
        row = session.get_one(StageRow, (job_id, StageName.SCORING))
        row.started_at, row.paused_at = now() - timedelta(hours=3), now() - timedelta(hours=2)
    with transaction(database) as session:
        jobs.resume(session, job_id)
    started_at = stage_row(database, job_id, StageName.SCORING).started_at
    assert started_at is not None
    assert timedelta(minutes=59) < now() - started_at < timedelta(minutes=61)


def test_a_stage_whose_worker_was_asked_to_end_is_queued_again_at_no_cost(database: Database) -> None:
    job_id = create_job(database)
    for _ in range(3):
        claim = take(database, job_id)
        with transaction(database) as session:
            stages.hand_back(session, claim)
    row = stage_row(database, job_id, StageName.SCORING)
    assert (row.status, row.attempt, row.attempts_forgiven) == (StageStatus.QUEUED, 3, 3)
    take(database, job_id, lease_seconds=-1)
    retire(database, job_id, max_attempts=2)
    assert stage_row(database, job_id, StageName.SCORING).status == StageStatus.QUEUED


@pytest.mark.parametrize(("ask", "ended"), [(jobs.request_pause, "job.paused"), (jobs.request_cancel, "job.cancelled")])
def test_a_job_that_was_to_stop_stops_when_its_worker_is_asked_to_end(
    ask: Callable[[Session, str], JobRow], ended: str, database: Database
) -> None:
    job_id = create_job(database)
    claim = take(database, job_id)
    with transaction(database) as session:
        ask(session, job_id)
        stages.hand_back(session, claim)
    assert event_types(database, job_id)[-1] == ended


def test_what_is_due_is_sent_in_portions_oldest_job_first(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "DUE_AT_ONCE", 2)
    with transaction(database) as session:
        job_ids = [store_job(session, SPEC).id for _ in range(3)]
    portions = []
    for _ in range(3):
        with transaction(database) as session:
            portions.append(
                [job_id for job_id, _ in stages.due(session, resend_seconds=10, at=now() + timedelta(minutes=1))]
            )
    assert portions == [job_ids[:2], job_ids[2:], []]
