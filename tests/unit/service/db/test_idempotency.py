"""Idempotency keys, on SQLite and on PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import Engine, text
from sqlmodel import select

from pdtrim.contract.access import DEFAULT_PROJECT
from pdtrim.contract.errors import IdempotencyKeyReused, JobNotFound, RequestInFlight
from pdtrim.contract.spec import JobSpec
from service.db import idempotency, jobs
from service.db.idempotency import Answered, KeyClaim
from service.db.session import transaction
from service.db.tables import IdempotencyRow, now
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})


def take(engine: Engine, *, project: str = "default", fingerprint: str = "a") -> KeyClaim | Answered:
    with transaction(engine) as session:
        return idempotency.claim(session, project, "key", fingerprint)


def taken(engine: Engine, **changes: str) -> KeyClaim:
    claim = take(engine, **changes)
    assert isinstance(claim, KeyClaim)
    return claim


def create(engine: Engine, claim: KeyClaim) -> str:
    with transaction(engine) as session:
        job_id = store_job(session, SPEC).id
        idempotency.settle(session, claim, job_id, {"id": job_id})
    return job_id


def age(engine: Engine, by: timedelta) -> None:
    with transaction(engine) as session:
        for row in session.exec(select(IdempotencyRow)):
            row.reserved_at = now() - by


def test_a_settled_key_gives_the_answer_to_the_same_body_alone(engine: Engine) -> None:
    job_id = create(engine, taken(engine))

    assert take(engine) == Answered(job_id, {"id": job_id})
    with pytest.raises(IdempotencyKeyReused):
        take(engine, fingerprint="b")


def test_every_project_has_keys_of_its_own(engine: Engine) -> None:
    create(engine, taken(engine))

    assert taken(engine, project="other")


def test_a_released_key_is_free_and_a_settled_one_is_not_released(engine: Engine) -> None:
    first = taken(engine)
    with transaction(engine) as session:
        idempotency.release(session, first)
    second = taken(engine, fingerprint="b")
    job_id = create(engine, second)
    with transaction(engine) as session:
        idempotency.release(session, second)

    assert take(engine, fingerprint="b") == Answered(job_id, {"id": job_id})


def test_a_request_whose_claim_was_taken_over_creates_nothing(engine: Engine) -> None:
    slow = taken(engine)
    with pytest.raises(RequestInFlight):
        take(engine)
    age(engine, timedelta(minutes=1))
    fast = taken(engine)

    with pytest.raises(RequestInFlight):
        create(engine, slow)
    job_id = create(engine, fast)

    with transaction(engine) as session:
        assert [row.id for row in jobs.page(session, DEFAULT_PROJECT, limit=10)[0]] == [job_id]


def test_of_many_requests_at_once_one_gets_the_key(engine: Engine) -> None:
    def attempt(_: int) -> KeyClaim | Answered | None:
        try:
            return take(engine)
        except RequestInFlight:
            return None

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(attempt, range(16)))

    assert sum(outcome is not None for outcome in outcomes) == 1


def test_keys_are_forgotten_after_a_day_and_their_jobs_are_not(engine: Engine) -> None:
    job_id = create(engine, taken(engine))
    age(engine, timedelta(hours=23))
    with transaction(engine) as session:
        idempotency.forget(session)
    assert isinstance(take(engine), Answered)

    age(engine, timedelta(hours=25))
    with transaction(engine) as session:
        idempotency.forget(session)

    assert taken(engine)
    with transaction(engine) as session:
        assert jobs.get(session, job_id).id == job_id


def test_a_deleted_job_takes_its_key_along(engine: Engine) -> None:
    job_id = create(engine, taken(engine))
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM jobs"))

    assert taken(engine)
    with pytest.raises(JobNotFound), transaction(engine) as session:
        jobs.get(session, job_id)
