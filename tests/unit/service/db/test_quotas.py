"""Quotas of projects and keys, on SQLite and on PostgreSQL, through the whole life of jobs and side by side."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine as Database
from sqlmodel import Session, select

from pdtrim.contract.access import Quotas, Scope
from pdtrim.contract.errors import ArtifactQuotaExceeded, QueueQuotaExceeded
from pdtrim.contract.jobs import ErrorInfo, JobStatus, StageName
from pdtrim.contract.spec import JobSpec
from service.db import deletion, jobs, keys, quotas, stages
from service.db.session import transaction
from service.db.stages import Claim, NewArtifact
from service.db.tables import JobRow, StageRow, now
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})
RESEND = 30.0
LATER = timedelta(hours=1)


def new_key(database: Database, project: str = "ours", **most: int) -> str:
    with transaction(database) as session:
        scopes = {Scope.SUBMIT}
        row, _ = keys.create(session, project=project, name="ci", scopes=scopes, quotas=Quotas(**most))
        return row.prefix


def create(
    database: Database, *, queued: int | None = None, running: int | None = None, kept: int | None = None,
    project: str = "ours", api_key: str | None = None,
) -> str:  # fmt: skip
    limits = Quotas(max_queued_jobs=queued, max_running_jobs=running, max_artifact_bytes=kept)
    with transaction(database) as session:
        return store_job(session, SPEC, project=project, api_key=api_key, limits=limits).id


def take(
    database: Database, job_id: str, stage: StageName = StageName.SCORING, *, running: int | None = None
) -> Claim | None:
    with transaction(database) as session:
        return stages.claim(session, job_id, stage, worker="w", lease_seconds=60, max_running_jobs=running)


def complete(database: Database, claim: Claim, *, size: int = 3) -> None:
    artifact = NewArtifact("plan.json", f"{claim.job_id}/{claim.stage}", "file:///plan.json", size, "0" * 64)
    with transaction(database) as session:
        stages.complete(session, claim, artifacts=[artifact], metrics={}, versions={})


def run_to_the_end(database: Database, job_id: str, *, size: int = 3) -> None:
    for stage in StageName:
        claim = take(database, job_id, stage)
        assert claim is not None
        complete(database, claim, size=size)


def due(database: Database, *, running: int | None, at: datetime | None = None) -> list[str]:
    with transaction(database) as session:
        found = stages.due(session, resend_seconds=RESEND, max_running_jobs=running, at=at)
    return [job_id for job_id, _ in found]


def change(database: Database, action: Callable[[Session, str], object], job_id: str) -> None:
    with transaction(database) as session:
        action(session, job_id)


def is_sent(database: Database, job_id: str) -> bool:
    with transaction(database) as session:
        return jobs.is_sent(jobs.stages(session, [job_id])[job_id])


def test_a_project_queues_as_many_jobs_as_it_may(database: Database) -> None:
    for _ in range(2):
        create(database, queued=2)

    with pytest.raises(QueueQuotaExceeded, match="Project ours has 2 queued jobs"):
        create(database, queued=2)

    create(database, queued=2, project="theirs")


@pytest.mark.parametrize("ending", ["begun", "paused", "cancelled", "deleted"])
def test_a_job_that_leaves_the_queue_makes_room(database: Database, ending: str) -> None:
    job_id = create(database, queued=1)
    if ending == "begun":
        assert take(database, job_id) is not None
    else:
        change(database, jobs.request_cancel if ending == "cancelled" else jobs.request_pause, job_id)
    if ending == "deleted":
        change(database, deletion.mark, job_id)

    create(database, queued=1)
    with pytest.raises(QueueQuotaExceeded):
        create(database, queued=1)


def test_a_resume_counts_as_a_submission_and_one_that_is_refused_changes_nothing(database: Database) -> None:
    paused = create(database)
    change(database, jobs.request_pause, paused)
    waiting = create(database)

    with pytest.raises(QueueQuotaExceeded), transaction(database) as session:
        jobs.resume(session, paused, limits=Quotas(max_queued_jobs=1))
    with transaction(database) as session:
        assert jobs.get(session, paused).status == JobStatus.PAUSED
    change(database, jobs.request_cancel, waiting)
    with transaction(database) as session:
        assert jobs.resume(session, paused, limits=Quotas(max_queued_jobs=1))[0].status == JobStatus.QUEUED


def test_a_key_has_its_own_quotas_within_its_projects(database: Database) -> None:
    small, large = new_key(database, max_queued_jobs=1), new_key(database, max_queued_jobs=5)
    create(database, queued=3, api_key=small)

    with pytest.raises(QueueQuotaExceeded, match=f"The key {small} has 1 queued"):
        create(database, queued=3, api_key=small)
    for _ in range(2):
        create(database, queued=3, api_key=large)
    with pytest.raises(QueueQuotaExceeded, match="Project ours has 3 queued"):
        create(database, queued=3, api_key=large)


def test_bytes_count_until_their_job_is_deleted(database: Database) -> None:
    job_id = create(database, kept=50)
    run_to_the_end(database, job_id, size=10)

    with pytest.raises(ArtifactQuotaExceeded, match="keeps 50 bytes of artifacts and may keep 50"):
        create(database, kept=50)
    create(database, kept=51)
    create(database, kept=1, project="theirs")
    change(database, deletion.mark, job_id)
    create(database, kept=1)


def test_a_key_keeps_as_many_bytes_as_it_may(database: Database) -> None:
    mine, other = new_key(database, max_artifact_bytes=15), new_key(database, max_artifact_bytes=15)
    run_to_the_end(database, create(database, api_key=mine), size=3)

    with pytest.raises(ArtifactQuotaExceeded, match=f"The key {mine}"):
        create(database, api_key=mine)
    create(database, api_key=other)


def test_submissions_at_the_same_time_do_not_exceed_the_quota(database: Database) -> None:
    def submit(_: int) -> bool:
        try:
            create(database, queued=3)
        except QueueQuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as gateways:
        accepted = list(gateways.map(submit, range(16)))

    assert accepted.count(True) == 3


def test_workers_that_claim_at_the_same_time_do_not_exceed_the_quota(database: Database) -> None:
    mine = new_key(database, max_running_jobs=1)
    waiting = [create(database, api_key=mine if number < 4 else None) for number in range(12)]

    with ThreadPoolExecutor(8) as workers:
        claims = list(workers.map(lambda job_id: take(database, job_id, running=3), waiting))

    assert len([one for one in claims if one is not None]) == 3
    assert len([one for one in claims[:4] if one is not None]) <= 1


def test_a_job_keeps_its_place_between_its_stages(database: Database) -> None:
    first, second = create(database), create(database)
    claim = take(database, first, running=1)
    assert claim is not None
    complete(database, claim)

    assert take(database, second, running=1) is None
    assert take(database, first, StageName.REMOVAL, running=1) is not None


@pytest.mark.parametrize("ending", ["succeeded", "failed", "paused", "cancelled", "given up"])
def test_a_job_that_was_held_back_goes_when_another_ends(database: Database, ending: str) -> None:
    running, held_back = create(database, running=1), create(database, running=1)
    claim = take(database, running, running=1)
    assert claim is not None
    assert take(database, held_back, running=1) is None
    assert not is_sent(database, held_back)
    assert due(database, running=1, at=now() + LATER) == []

    if ending == "succeeded":
        complete(database, claim)
        for stage in list(StageName)[1:]:
            again = take(database, running, stage, running=1)
            assert again is not None
            complete(database, again)
    elif ending == "failed":
        with transaction(database) as session:
            stages.fail(session, claim, ErrorInfo(code="x", message="x"))
    elif ending == "given up":
        with transaction(database) as session:
            stages.release(session, claim, "x", max_attempts=1, pause_seconds=10)
    else:
        change(database, jobs.request_pause if ending == "paused" else jobs.request_cancel, running)
        assert due(database, running=1) == []  # Its worker has not stopped yet.
        with transaction(database) as session:
            stages.stopped(session, claim)

    assert due(database, running=1) == [held_back]
    assert take(database, held_back, running=1) is not None


def test_the_first_in_line_go_first_and_no_message_is_sent_for_nothing(database: Database) -> None:
    waiting = [create(database, running=2) for _ in range(6)]

    assert [is_sent(database, job_id) for job_id in waiting] == [True, True, False, False, False, False]
    assert due(database, running=2) == []
    for job_id in waiting[:2]:
        run_to_the_end(database, job_id)
    assert due(database, running=2) == waiting[2:4]
    assert due(database, running=2) == []
    # A message that was lost is sent again; those behind do not overtake it.
    assert due(database, running=2, at=now() + timedelta(seconds=RESEND + 1)) == waiting[2:4]
    assert due(database, running=2, at=now() + timedelta(seconds=RESEND + 2)) == []
    assert create(database, running=2) not in due(database, running=2)


def test_a_project_that_runs_its_share_keeps_no_other_waiting(database: Database) -> None:
    limited = new_key(database, max_running_jobs=1)
    busy = create(database, running=5, api_key=limited)
    assert take(database, busy, running=5) is not None
    held_back = [create(database, running=5, api_key=limited) for _ in range(3)]
    others = [create(database, running=5), create(database, running=5, project="theirs")]

    assert [is_sent(database, job_id) for job_id in (*held_back, *others)] == [False] * 3 + [True] * 2
    assert due(database, running=5) == []
    assert due(database, running=5, at=now() + LATER) == others
    assert all(take(database, job_id, running=5) is not None for job_id in others)


def test_a_running_job_whose_worker_died_is_sent_again_whatever_waits(database: Database) -> None:
    running, waiting = create(database, running=1), create(database, running=1)
    claim = take(database, running, running=1)
    assert claim is not None
    with transaction(database) as session:
        session.get_one(StageRow, (running, StageName.SCORING)).lease_expires_at = now() - LATER
    with transaction(database) as session:
        assert stages.retire(session, running, StageName.SCORING, max_attempts=5)

    assert due(database, running=1) == [running]
    assert take(database, waiting, running=1) is None
    assert take(database, running, running=1) is not None


def test_a_job_that_is_held_back_says_so_until_it_goes(database: Database) -> None:
    create(database, running=1)
    held_back = create(database, running=1)

    def message() -> str:
        with transaction(database) as session:
            return session.get_one(StageRow, (held_back, StageName.SCORING)).message

    assert message() == quotas.HELD_BACK
    assert due(database, running=2) == [held_back]
    assert message() == ""


def test_a_job_remembers_its_key(database: Database) -> None:
    mine = new_key(database)
    job_id = create(database, api_key=mine)

    with transaction(database) as session:
        assert session.exec(select(JobRow.api_key).where(JobRow.id == job_id)).one() == mine
