"""Which stage a worker takes, on SQLite and on PostgreSQL, with workers played by hand."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine
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
    engine: Engine, *, project: str = "ours", priority: Priority = NORMAL, queue: str = "default",
    running: int | None = None,
) -> str:  # fmt: skip
    spec = SPEC.model_copy(update={"priority": priority, "queue": queue})
    with transaction(engine) as session:
        return store_job(session, spec, project=project, limits=Quotas(max_running_jobs=running)).id


def take(engine: Engine, *queues: str, running: int | None = None) -> Claim | None:
    """What a worker does that is woken."""
    with transaction(engine) as session:
        found = urgency.most_urgent(session, queues or ("default",), max_running_jobs=running)
        return found and stages.claim(session, *found, worker="w", lease_seconds=60, max_running_jobs=running)


def taken(engine: Engine, *queues: str, running: int | None = None) -> Claim:
    claim = take(engine, *queues, running=running)
    assert claim is not None
    return claim


def complete(engine: Engine, claim: Claim) -> None:
    with transaction(engine) as session:
        stages.complete(session, claim, artifacts=[], metrics={}, versions={})


def run_all(engine: Engine) -> list[tuple[str, StageName]]:
    """One worker, until nothing is due; what it ran."""
    ran = []
    while (claim := take(engine)) is not None:
        complete(engine, claim)
        ran.append((claim.job_id, claim.stage))
    return ran


def stage_row(engine: Engine, job_id: str) -> StageRow:
    with transaction(engine) as session:
        return session.get_one(StageRow, (job_id, StageName.SCORING))


def test_one_worker_brings_a_job_to_its_end_before_it_begins_another(engine: Engine) -> None:
    six = [create(engine) for _ in range(6)]
    assert run_all(engine) == [(job_id, stage) for job_id in six for stage in StageName]


def test_a_job_of_higher_priority_goes_before_all_others_at_the_next_stage(engine: Engine) -> None:
    low, normal = create(engine, priority=LOW), create(engine)
    claim = taken(engine)
    assert claim.job_id == normal
    high = create(engine, priority=HIGH)
    complete(engine, claim)
    order = [job_id for job_id, _ in run_all(engine)]
    assert order == [high] * 5 + [normal] * 4 + [low] * 5


def test_a_worker_for_each_of_two_projects_though_one_was_first_with_everything(engine: Engine) -> None:
    ours = [create(engine) for _ in range(4)]
    claims = [taken(engine) for _ in range(3)]
    assert [claim.job_id for claim in claims] == ours[:3]
    theirs = [create(engine, project="theirs") for _ in range(4)]
    for claim in claims:
        complete(engine, claim)
    # Of four workers each project gets two; ours goes on with what began first.
    assert [taken(engine).job_id for _ in range(4)] == [ours[0], theirs[0], ours[1], theirs[1]]


def test_on_one_worker_projects_take_turns_job_by_job(engine: Engine) -> None:
    ours = [create(engine) for _ in range(3)]
    first = taken(engine)
    theirs = [create(engine, project="theirs") for _ in range(2)]
    complete(engine, first)
    begun = [job_id for job_id, stage in run_all(engine) if stage == StageName.EVALUATION]
    assert begun == [ours[0], theirs[0], ours[1], theirs[1], ours[2]]


def test_priority_goes_before_fairness(engine: Engine) -> None:
    create(engine, project="theirs")
    urgent = [create(engine, priority=HIGH) for _ in range(2)]
    assert [taken(engine).job_id for _ in range(2)] == urgent


def test_a_resumed_job_keeps_its_place_as_one_that_began(engine: Engine) -> None:
    resumed, waiting = create(engine), create(engine)
    complete(engine, taken(engine))
    with transaction(engine) as session:
        jobs.request_pause(session, resumed)
    assert taken(engine).job_id == waiting
    other = create(engine)
    with transaction(engine) as session:
        jobs.resume(session, resumed)
    assert [taken(engine).job_id for _ in range(2)] == [resumed, other]


def test_a_worker_takes_stages_of_its_queues_alone(engine: Engine) -> None:
    large = create(engine, queue="gpu-80g", priority=HIGH)
    small = create(engine)
    assert taken(engine).job_id == small
    assert take(engine) is None
    assert taken(engine, "default", "gpu-80g").job_id == large


def test_paused_cancelled_and_running_jobs_are_not_there_to_be_taken(engine: Engine) -> None:
    running, paused, cancelled = (create(engine) for _ in range(3))
    assert taken(engine).job_id == running
    with transaction(engine) as session:
        jobs.request_pause(session, paused)
        jobs.request_cancel(session, cancelled)
    assert take(engine) is None


def test_a_stage_that_met_a_fault_rests_while_others_go_on(engine: Engine) -> None:
    faulty, other = create(engine), create(engine)
    claim = taken(engine)
    with transaction(engine) as session:
        stages.release(session, claim, "the store is away", max_attempts=5, pause_seconds=60)
    assert taken(engine).job_id == other
    assert take(engine) is None
    with transaction(engine) as session:
        assert stages.due(session, resend_seconds=1) == []
        session.get_one(StageRow, (faulty, StageName.SCORING)).not_before = now() - timedelta(seconds=1)
    with transaction(engine) as session:
        assert stages.due(session, resend_seconds=1) == [(faulty, StageName.SCORING)]
    assert taken(engine).attempt == 2
    assert stage_row(engine, faulty).not_before is None


def test_a_project_that_runs_as_many_jobs_as_it_may_is_passed_over(engine: Engine) -> None:
    ours = [create(engine, running=1) for _ in range(2)]
    theirs = create(engine, project="theirs", running=1)
    assert [taken(engine, running=1).job_id for _ in range(2)] == [ours[0], theirs]
    assert take(engine, running=1) is None
    # What has begun goes on.
    with transaction(engine) as session:
        row = session.get_one(StageRow, (ours[0], StageName.SCORING))
        stages.complete(session, Claim(ours[0], StageName.SCORING, row.attempt), artifacts=[], metrics={}, versions={})
    assert taken(engine, running=1).job_id == ours[0]


def test_a_slot_goes_to_the_most_urgent_job_and_what_it_overtook_is_sent_when_there_is_one(engine: Engine) -> None:
    sent, urgent = create(engine, running=1), create(engine, running=1, priority=HIGH)
    claim = taken(engine, running=1)
    assert (claim.job_id, claim.sent) == (urgent, False)
    assert take(engine, running=1) is None
    held_back = stage_row(engine, sent)
    assert (held_back.sent_at, held_back.message) == (None, quotas.HELD_BACK)
    with transaction(engine) as session:
        assert stages.due(session, resend_seconds=1, max_running_jobs=1) == []
        jobs.request_cancel(session, urgent)
        stages.stopped(session, claim)
    with transaction(engine) as session:
        assert stages.due(session, resend_seconds=1, max_running_jobs=1) == [(sent, StageName.SCORING)]
    assert taken(engine, running=1).job_id == sent


def test_of_jobs_that_are_held_back_the_most_urgent_is_sent_first(engine: Engine) -> None:
    running, *_ = [create(engine, running=1) for _ in range(2)]
    urgent = create(engine, running=1, priority=HIGH)
    with transaction(engine) as session:
        jobs.request_cancel(session, running)
    with transaction(engine) as session:
        assert stages.due(session, resend_seconds=1, max_running_jobs=1) == [(urgent, StageName.SCORING)]


@pytest.mark.parametrize("running", [None, 5])
def test_workers_that_are_woken_together_each_take_another_stage(engine: Engine, running: int | None) -> None:
    waiting = {create(engine, running=running) for _ in range(12)}

    def wake(_: int) -> str | None:
        # As a worker does: a slot may have been another's in between.
        for _ in range(100):
            claim = take(engine, running=running)
            if claim is not None:
                return claim.job_id
            with transaction(engine) as session:
                if urgency.most_urgent(session, ["default"], max_running_jobs=running) is None:
                    return None
        raise AssertionError("no end")

    with ThreadPoolExecutor(8) as workers:
        got = [job_id for job_id in workers.map(wake, range(16)) if job_id is not None]

    assert len(got) == len(set(got)) == (running or 12)
    assert set(got) <= waiting


def test_a_job_that_a_stopped_process_holds_locked_is_passed_over(postgres_database_url: str) -> None:
    engine = connect(postgres_database_url)
    frozen, other = create(engine), create(engine)
    with transaction(engine) as stopped:
        jobs.lock(stopped, frozen)
        assert taken(engine).job_id == other
        assert take(engine) is None
    assert taken(engine).job_id == frozen
    with transaction(engine) as session:
        assert session.get_one(JobRow, frozen).status == JobStatus.RUNNING
    engine.dispose()


@pytest.mark.parametrize("seed", range(4))
def test_for_every_stage_that_was_sent_a_message_is_under_way_whatever_workers_take(seed: int, tmp_path: Path) -> None:
    engine, rng = connect(f"sqlite:///{tmp_path}/jobs.db"), random.Random(seed)
    migrate(engine)
    messages: list[str] = []
    claims: list[Claim] = []

    def submit() -> None:
        queue = rng.choice(["default", "gpu-80g"])
        job_id = create(engine, priority=rng.choice(list(Priority)), queue=queue, running=3)
        if stage_row(engine, job_id).sent_at is not None:
            messages.append(queue)

    def wake() -> None:
        came_by = messages.pop(rng.randrange(len(messages)))
        claim = take(engine, *rng.choice([[came_by], ["default", "gpu-80g"]]), running=3)
        if claim is not None:
            claims.append(claim)
            messages.extend([] if claim.answers(came_by) else [came_by])

    def work() -> None:
        claim, what = claims.pop(rng.randrange(len(claims))), rng.choice(["complete", "hand back", "release"])
        with transaction(engine) as session:
            if what == "complete":
                following = stages.complete(session, claim, artifacts=[], metrics={}, versions={})
                messages.extend([] if following is None else [claim.queue])
            elif what == "hand back":
                stages.hand_back(session, claim)
                messages.append(claim.queue)
            else:
                stages.release(session, claim, "a fault", max_attempts=99, pause_seconds=rng.choice([0, 99]))

    def reconcile() -> None:
        with transaction(engine) as session:
            due = [job_id for job_id, _ in stages.due(session, resend_seconds=9999, max_running_jobs=3)]
            messages.extend(jobs.queues(session, due).values())

    for _ in range(150):
        possible = [submit, *[wake] * 2 * bool(messages), *[work] * 2 * bool(claims), reconcile]
        rng.choice(possible)()
        with transaction(engine) as session:
            sent = session.exec(
                select(JobRow.queue)
                .join(StageRow)
                .where(StageRow.status == StageStatus.QUEUED, col(StageRow.sent_at).is_not(None))
            ).all()
        assert Counter(sent) <= Counter(messages)
    engine.dispose()
