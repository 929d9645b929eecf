"""Which stage a worker takes, on SQLite and on PostgreSQL, with workers played by hand."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine as Database
from sqlmodel import col, select

from pdtrim.contract.access import Quotas
from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from pdtrim.contract.queues import Priority
from pdtrim.contract.spec import JobSpec
from service.db import jobs, quotas, stages, urgency
from service.db.session import connect, migrate, transaction
from service.db.stages import Claim
from service.db.tables import JobRow, StageRow, now
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})
HIGH, NORMAL, LOW = Priority


def create(
    database: Database, *, project: str = "ours", priority: Priority = NORMAL, queue: str = "default",
    running: int | None = None,
) -> str:  # fmt: skip
    spec = SPEC.model_copy(update={"priority": priority, "queue": queue})
    with transaction(database) as session:
        return store_job(session, spec, project=project, limits=Quotas(max_running_jobs=running)).id


def take(database: Database, *queues: str, running: int | None = None) -> Claim | None:
    """What a worker does that is woken."""
    with transaction(database) as session:
        found = urgency.most_urgent(session, queues or ("default",), max_running_jobs=running)
        return found and stages.claim(session, *found, worker="w", lease_seconds=60, max_running_jobs=running)


def taken(database: Database, *queues: str, running: int | None = None) -> Claim:
    claim = take(database, *queues, running=running)
    assert claim is not None
    return claim


def complete(database: Database, claim: Claim) -> None:
    with transaction(database) as session:
        stages.complete(session, claim, artifacts=[], metrics={}, versions={})


def run_all(database: Database) -> list[tuple[str, StageName]]:
    """One worker, until nothing is due; what it ran."""
    ran = []
    while (claim := take(database)) is not None:
        complete(database, claim)
        ran.append((claim.job_id, claim.stage))
    return ran


def stage_row(database: Database, job_id: str) -> StageRow:
    with transaction(database) as session:
        return session.get_one(StageRow, (job_id, StageName.SCORING))


def test_one_worker_brings_a_job_to_its_end_before_it_begins_another(database: Database) -> None:
    six = [create(database) for _ in range(6)]
    assert run_all(database) == [(job_id, stage) for job_id in six for stage in StageName]


def test_a_job_of_higher_priority_goes_before_all_others_at_the_next_stage(database: Database) -> None:
    low, normal = create(database, priority=LOW), create(database)
    claim = taken(database)
    assert claim.job_id == normal
    high = create(database, priority=HIGH)
    complete(database, claim)
    order = [job_id for job_id, _ in run_all(database)]
    assert order == [high] * 5 + [normal] * 4 + [low] * 5


def test_a_worker_for_each_of_two_projects_though_one_was_first_with_everything(database: Database) -> None:
    ours = [create(database) for _ in range(4)]
    claims = [taken(database) for _ in range(3)]
    assert [claim.job_id for claim in claims] == ours[:3]
    theirs = [create(database, project="theirs") for _ in range(4)]
    for claim in claims:
        complete(database, claim)
    # Of four workers each project gets two; ours goes on with what began first.
    assert [taken(database).job_id for _ in range(4)] == [ours[0], theirs[0], ours[1], theirs[1]]


def test_on_one_worker_projects_take_turns_job_by_job(database: Database) -> None:
    ours = [create(database) for _ in range(3)]
    first = taken(database)
    theirs = [create(database, project="theirs") for _ in range(2)]
    complete(database, first)
    begun = [job_id for job_id, stage in run_all(database) if stage == StageName.EVALUATION]
    assert begun == [ours[0], theirs[0], ours[1], theirs[1], ours[2]]


def test_priority_goes_before_fairness(database: Database) -> None:
    create(database, project="theirs")
    urgent = [create(database, priority=HIGH) for _ in range(2)]
    assert [taken(database).job_id for _ in range(2)] == urgent


def test_a_resumed_job_keeps_its_place_as_one_that_began(database: Database) -> None:
    resumed, waiting = create(database), create(database)
    complete(database, taken(database))
    with transaction(database) as session:
        jobs.request_pause(session, resumed)
    assert taken(database).job_id == waiting
    other = create(database)
    with transaction(database) as session:
        jobs.resume(session, resumed)
    assert [taken(database).job_id for _ in range(2)] == [resumed, other]


def test_a_worker_takes_stages_of_its_queues_alone(database: Database) -> None:
    large = create(database, queue="gpu-80g", priority=HIGH)
    small = create(database)
    assert taken(database).job_id == small
    assert take(database) is None
    assert taken(database, "default", "gpu-80g").job_id == large


def test_paused_cancelled_and_running_jobs_are_not_there_to_be_taken(database: Database) -> None:
    running, paused, cancelled = (create(database) for _ in range(3))
    assert taken(database).job_id == running
    with transaction(database) as session:
        jobs.request_pause(session, paused)
        jobs.request_cancel(session, cancelled)
    assert take(database) is None


def test_a_stage_that_met_a_fault_rests_while_others_go_on(database: Database) -> None:
    faulty, other = create(database), create(database)
    claim = taken(database)
    with transaction(database) as session:
        stages.release(session, claim, "the store is away", max_attempts=5, pause_seconds=60)
    assert taken(database).job_id == other
    assert take(database) is None
    with transaction(database) as session:
        assert stages.due(session, resend_seconds=1) == []
        session.get_one(StageRow, (faulty, StageName.SCORING)).not_before = now() - timedelta(seconds=1)
    with transaction(database) as session:
        assert stages.due(session, resend_seconds=1) == [(faulty, StageName.SCORING)]
    assert taken(database).attempt == 2
    assert stage_row(database, faulty).not_before is None


def test_a_project_that_runs_as_many_jobs_as_it_may_is_passed_over(database: Database) -> None:
    ours = [create(database, running=1) for _ in range(2)]
    theirs = create(database, project="theirs", running=1)
    assert [taken(database, running=1).job_id for _ in range(2)] == [ours[0], theirs]
    assert take(database, running=1) is None
    # What has begun goes on.
    with transaction(database) as session:
        row = session.get_one(StageRow, (ours[0], StageName.SCORING))
        stages.complete(session, Claim(ours[0], StageName.SCORING, row.attempt), artifacts=[], metrics={}, versions={})
    assert taken(database, running=1).job_id == ours[0]


def test_a_slot_goes_to_the_most_urgent_job_and_what_it_overtook_is_sent_when_there_is_one(database: Database) -> None:
    sent, urgent = create(database, running=1), create(database, running=1, priority=HIGH)
    claim = taken(database, running=1)
    assert (claim.job_id, claim.sent) == (urgent, False)
    assert take(database, running=1) is None
    held_back = stage_row(database, sent)
    assert (held_back.sent_at, held_back.message) == (None, quotas.HELD_BACK)
    with transaction(database) as session:
        assert stages.due(session, resend_seconds=1, max_running_jobs=1) == []
        jobs.request_cancel(session, urgent)
        stages.stopped(session, claim)
    with transaction(database) as session:
        assert stages.due(session, resend_seconds=1, max_running_jobs=1) == [(sent, StageName.SCORING)]
    assert taken(database, running=1).job_id == sent


def test_of_jobs_that_are_held_back_the_most_urgent_is_sent_first(database: Database) -> None:
    running, *_ = [create(database, running=1) for _ in range(2)]
    urgent = create(database, running=1, priority=HIGH)
    with transaction(database) as session:
        jobs.request_cancel(session, running)
    with transaction(database) as session:
        assert stages.due(session, resend_seconds=1, max_running_jobs=1) == [(urgent, StageName.SCORING)]


@pytest.mark.parametrize("running", [None, 5])
def test_workers_that_are_woken_together_each_take_another_stage(database: Database, running: int | None) -> None:
    waiting = {create(database, running=running) for _ in range(12)}

    def wake(_: int) -> str | None:
        # As a worker does: a slot may have been another's in between.
        for _ in range(100):
            claim = take(database, running=running)
            if claim is not None:
                return claim.job_id
            with transaction(database) as session:
                if urgency.most_urgent(session, ["default"], max_running_jobs=running) is None:
                    return None
        raise AssertionError("no end")

    with ThreadPoolExecutor(8) as workers:
        got = [job_id for job_id in workers.map(wake, range(16)) if job_id is not None]

    assert len(got) == len(set(got)) == (running or 12)
    assert set(got) <= waiting


def test_a_job_that_a_stopped_process_holds_locked_is_passed_over(postgres_database_url: str) -> None:
    database = connect(postgres_database_url)
    frozen, other = create(database), create(database)
    with transaction(database) as stopped:
        jobs.lock(stopped, frozen)
        assert taken(database).job_id == other
        assert take(database) is None
    assert taken(database).job_id == frozen
    with transaction(database) as session:
        assert session.get_one(JobRow, frozen).status == JobStatus.RUNNING
    database.dispose()


@pytest.mark.parametrize("seed", range(4))
def test_for_every_stage_that_was_sent_a_message_is_under_way_whatever_workers_take(seed: int, tmp_path: Path) -> None:
    database, rng = connect(f"sqlite:///{tmp_path}/jobs.db"), random.Random(seed)
    migrate(database)
    messages: list[str] = []
    claims: list[Claim] = []

    def submit() -> None:
        queue = rng.choice(["default", "gpu-80g"])
        job_id = create(database, priority=rng.choice(list(Priority)), queue=queue, running=3)
        if stage_row(database, job_id).sent_at is not None:
            messages.append(queue)

    def wake() -> None:
        came_by = messages.pop(rng.randrange(len(messages)))
        claim = take(database, *rng.choice([[came_by], ["default", "gpu-80g"]]), running=3)
        if claim is not None:
            claims.append(claim)
            messages.extend([] if claim.answers(came_by) else [came_by])

    def work() -> None:
        claim, what = claims.pop(rng.randrange(len(claims))), rng.choice(["complete", "hand back", "release"])
        with transaction(database) as session:
            if what == "complete":
                following = stages.complete(session, claim, artifacts=[], metrics={}, versions={})
                messages.extend([] if following is None else [claim.queue])
            elif what == "hand back":
                stages.hand_back(session, claim)
                messages.append(claim.queue)
            else:
                stages.release(session, claim, "a fault", max_attempts=99, pause_seconds=rng.choice([0, 99]))

    def reconcile() -> None:
        with transaction(database) as session:
            due = [job_id for job_id, _ in stages.due(session, resend_seconds=9999, max_running_jobs=3)]
            messages.extend(jobs.queues(session, due).values())

    for _ in range(150):
        possible = [submit, *[wake] * 2 * bool(messages), *[work] * 2 * bool(claims), reconcile]
        rng.choice(possible)()
        with transaction(database) as session:
            sent = session.exec(
                select(JobRow.queue)
                .join(StageRow)
                .where(StageRow.status == StageStatus.QUEUED, col(StageRow.sent_at).is_not(None))
            ).all()
        assert Counter(sent) <= Counter(messages)
    database.dispose()


def test_how_many_stages_are_ahead_of_a_job_is_how_many_are_taken_before_it(database: Database) -> None:
    made = [create(database, priority=priority) for priority in (LOW, NORMAL, HIGH, NORMAL)]
    create(database, queue="other", priority=HIGH)

    def ahead(job_id: str) -> int | None:
        with transaction(database) as session:
            return urgency.ahead(session, job_id, "default")

    assert [ahead(job_id) for job_id in made] == [3, 1, 0, 2]
    claim = taken(database)
    assert claim.job_id == made[2]
    assert [ahead(job_id) for job_id in made] == [2, 0, None, 1]
    order = [made[1], made[3], made[0]]
    assert [taken(database).job_id for _ in order] == order
