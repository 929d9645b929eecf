"""Work that a search offers, claims of it and answers to it, on SQLite and on PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier

import pytest
from sqlalchemy import Engine
from sqlmodel import Session, select

from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from pdtrim.contract.spec import JobSpec
from service.db import deletion, evaluations, jobs, stages
from service.db.evaluations import Answer
from service.db.session import transaction
from service.db.stages import Claim, LeaseLost
from service.db.tables import EvaluationRow, HelperRow, JobRow, StageRow, now
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate(
    {
        "model": "reference",
        "prefill": {"remove_blocks": 1},
        "decode": {"remove_blocks": 2},
        "search": {"parallelism": 3},
    }
)
LOSSES = [[0.1, 1 / 3], [2.5e-17, 1e300]]


@pytest.fixture
def held(engine: Engine) -> Claim:
    """The removal stage of a job, as its worker holds it."""
    with transaction(engine) as session:
        job = store_job(session, SPEC)
        for row in jobs.stages(session, [job.id])[job.id]:
            row.status = StageStatus.QUEUED if row.name == StageName.REMOVAL else StageStatus.SUCCEEDED
    return take(engine, job.id)


def take(engine: Engine, job_id: str) -> Claim:
    with transaction(engine) as session:
        held = stages.claim(session, job_id, StageName.REMOVAL, worker="w1", lease_seconds=60)
    assert held is not None
    return held


def take_over(engine: Engine, held: Claim) -> Claim:
    with transaction(engine) as session:
        stages.release(session, held, "a fault", max_attempts=5, pause_seconds=10)
    return take(engine, held.job_id)


def join(engine: Engine, held: Claim, worker: str = "w2", lease_seconds: float = 60) -> str | None:
    with transaction(engine) as session:
        return evaluations.join(session, held, worker=worker, lease_seconds=lease_seconds)


def joined(engine: Engine, held: Claim, worker: str = "w2", lease_seconds: float = 60) -> str:
    helper = join(engine, held, worker, lease_seconds)
    assert helper is not None
    return helper


def offer(engine: Engine, held: Claim, *numbers: int) -> None:
    with transaction(engine) as session:
        evaluations.offer(session, held, {number: {"windows": [0, number]} for number in numbers})


def claim(engine: Engine, held: Claim, helper: str) -> int | None:
    with transaction(engine) as session:
        found = evaluations.claim(session, held, helper=helper)
    return None if found is None else found[0]


def answer(engine: Engine, held: Claim, number: int, helper: str) -> None:
    with transaction(engine) as session:
        evaluations.answer(session, held, number, LOSSES, helper=helper)


def answers(engine: Engine, held: Claim, *numbers: int) -> list[Answer]:
    with transaction(engine) as session:
        return evaluations.answers(session, held, numbers)


def take_back(engine: Engine, held: Claim, *numbers: int) -> int | None:
    with transaction(engine) as session:
        return evaluations.take_back(session, held, numbers)


def rows(session: Session) -> list[object]:
    return [*session.exec(select(EvaluationRow.number)), *session.exec(select(HelperRow.id))]


def test_helpers_take_from_one_end_and_the_search_from_the_other(engine: Engine, held: Claim) -> None:
    helper = joined(engine, held)
    offer(engine, held, 1, 2, 3)
    assert claim(engine, held, helper) == 3
    assert take_back(engine, held, 1, 2, 3) == 1
    assert claim(engine, held, helper) == 2
    assert claim(engine, held, helper) is None
    assert take_back(engine, held, 2, 3) is None


def test_losses_come_back_bit_for_bit_with_the_worker_that_found_them(engine: Engine, held: Claim) -> None:
    helper = joined(engine, held)
    offer(engine, held, 1, 2)
    with transaction(engine) as session:
        assert evaluations.claim(session, held, helper=helper) == (2, {"windows": [0, 2]})
    assert answers(engine, held, 1, 2) == []
    answer(engine, held, 2, helper)
    assert answers(engine, held, 1, 2) == [Answer(2, LOSSES, "w2")]
    assert answers(engine, held, 1) == []


def test_a_search_that_was_interrupted_is_given_again_what_it_took(engine: Engine, held: Claim) -> None:
    offer(engine, held, 1, 2)
    assert take_back(engine, held, 1, 2) == take_back(engine, held, 1, 2) == 1
    assert take_back(engine, held, 2) == 2


@pytest.mark.parametrize("how", ["left", "silent"])
def test_what_a_helper_had_claimed_is_free_when_it_is_gone(how: str, engine: Engine, held: Claim) -> None:
    gone = joined(engine, held, lease_seconds=60 if how == "left" else 0)
    offer(engine, held, 1, 2, 3)
    assert [claim(engine, held, gone) for _ in range(2)] == [3, 2 if how == "left" else 3]
    if how == "left":
        with transaction(engine) as session:
            evaluations.leave(session, gone)
    other = joined(engine, held, "w3")
    assert claim(engine, held, other) == 3
    answer(engine, held, 3, gone)
    assert answers(engine, held, 3) == []  # It is the other's now.
    assert [take_back(engine, held, 2, 3), take_back(engine, held, 3)] == [2, None]


def test_a_job_has_no_more_helpers_than_it_asked_for_and_others_may_take_their_places(
    engine: Engine, held: Claim
) -> None:
    first = joined(engine, held)
    joined(engine, held, "w3", lease_seconds=0)
    joined(engine, held, "w4")
    assert join(engine, held, "w5") is None
    with transaction(engine) as session:
        evaluations.leave(session, first)
    joined(engine, held, "w5")
    with transaction(engine) as session:
        assert evaluations.helpers(session, held) == evaluations.Helpers(present=2, joined=4)


def test_of_many_that_join_at_once_only_as_many_do_as_there_are_places(engine: Engine, held: Claim) -> None:
    barrier = Barrier(5)

    def join_at_once(number: int) -> str | None:
        barrier.wait()
        return join(engine, held, f"w{number}")

    with ThreadPoolExecutor(5) as pool:
        assert sum(helper is not None for helper in pool.map(join_at_once, range(5))) == 2


def test_of_many_that_claim_at_once_each_gets_another_piece(engine: Engine, held: Claim) -> None:
    helpers = [joined(engine, held, f"w{number}") for number in range(2)]
    offer(engine, held, *range(40))
    barrier = Barrier(3)

    def claim_all(helper: str | None) -> list[int]:
        barrier.wait()
        left = set(range(40))
        mine: list[int] = []
        while True:
            number = take_back(engine, held, *left) if helper is None else claim(engine, held, helper)
            if number is None:
                return mine
            mine.append(number)
            left.discard(number)

    with ThreadPoolExecutor(3) as pool:
        claimed = [number for numbers in pool.map(claim_all, [None, *helpers]) for number in numbers]
    assert sorted(claimed) == list(range(40))


def test_helpers_of_an_attempt_that_is_over_get_and_give_nothing(engine: Engine, held: Claim) -> None:
    helper = joined(engine, held)
    offer(engine, held, 1, 2)
    assert claim(engine, held, helper) == 2
    following = take_over(engine, held)
    assert join(engine, held) is None
    for late in (
        lambda session: evaluations.claim(session, held, helper=helper),
        lambda session: evaluations.renew(session, held, helper=helper, lease_seconds=60),
        lambda session: evaluations.offer(session, held, {3: {}}),
    ):
        with pytest.raises(LeaseLost), transaction(engine) as session:
            late(session)
    answer(engine, held, 2, helper)
    offer(engine, following, 1, 2)
    assert answers(engine, following, 1, 2) == []
    assert claim(engine, following, joined(engine, following)) == 2


@pytest.mark.parametrize("asked", [jobs.request_cancel, jobs.request_pause])
def test_helpers_hear_that_a_job_is_to_stop_and_keep_their_places_until_then(
    asked: object, engine: Engine, held: Claim
) -> None:
    helper = joined(engine, held, lease_seconds=0)
    with transaction(engine) as session:
        assert not evaluations.renew(session, held, helper=helper, lease_seconds=60)
        assert evaluations.helpers(session, held).present == 1
        asked(session, held.job_id)  # type: ignore[operator]
    with transaction(engine) as session:
        assert evaluations.renew(session, held, helper=helper, lease_seconds=60)
    assert join(engine, held) is None


def test_a_batch_takes_the_place_of_the_one_before(engine: Engine, held: Claim) -> None:
    helper = joined(engine, held)
    offer(engine, held, 1, 2)
    assert claim(engine, held, helper) == 2
    offer(engine, held, 3, 4)
    answer(engine, held, 2, helper)
    assert answers(engine, held, 1, 2) == []
    assert claim(engine, held, helper) == 4


def test_nothing_is_left_of_a_search_that_is_over_or_whose_job_is_deleted(engine: Engine, held: Claim) -> None:
    joined(engine, held)
    offer(engine, held, 1)
    with transaction(engine) as session:
        evaluations.forget(session)
        assert len(rows(session)) == 2
    following = take_over(engine, held)
    joined(engine, following)
    with transaction(engine) as session:
        evaluations.forget(session)
        assert len(rows(session)) == 1
        stages.complete(session, following, artifacts=[], metrics={}, versions={})
        evaluations.forget(session)
        assert rows(session) == []

    with transaction(engine) as session:
        session.add(EvaluationRow(job_id=held.job_id, attempt=2, number=1, payload={}))
        session.add(HelperRow(id="h", job_id=held.job_id, attempt=2, worker="w", lease_expires_at=now()))
        session.flush()
        jobs.request_pause(session, held.job_id)
        deletion.mark(session, held.job_id)
        deletion.remove(session, held.job_id)
        assert session.get(JobRow, held.job_id) is None
        assert rows(session) == []


def test_only_a_stage_that_waits_for_longer_than_a_worker_takes_counts_as_waiting(engine: Engine) -> None:
    with transaction(engine) as session:
        job = store_job(session, SPEC)
        row = session.get_one(StageRow, (job.id, StageName.SCORING))

        def waits(*queues: str) -> bool:
            session.flush()
            return stages.waiting(session, queues, seconds=2)

        assert not waits("default")
        row.sent_at = now() - timedelta(seconds=3)
        assert waits("default")
        assert waits("other", "default")
        assert not waits("other")
        row.sent_at = None  # Held back, or about to be sent.
        assert not waits("default")
        row.sent_at = now() - timedelta(seconds=3)
        session.flush()
        assert stages.claim(session, job.id, StageName.SCORING, worker="w", lease_seconds=60) is not None
        assert not waits("default")
        assert job.status == JobStatus.RUNNING
