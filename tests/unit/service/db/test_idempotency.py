"""Idempotency keys, on SQLite and on PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import Engine as Database
from sqlalchemy import text
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


def take(database: Database, *, project: str = "default", fingerprint: str = "a") -> KeyClaim | Answered:
    with transaction(database) as session:
        return idempotency.claim(session, project, "key", fingerprint)


def taken(database: Database, **changes: str) -> KeyClaim:
    claim = take(database, **changes)
    assert isinstance(claim, KeyClaim)
    return claim


def create(database: Database, claim: KeyClaim) -> str:
    with transaction(database) as session:
        job_id = store_job(session, SPEC).id
        idempotency.settle(session, claim, job_id, {"id": job_id})
    return job_id


def age(database: Database, by: timedelta) -> None:
    with transaction(database) as session:
        for row in session.exec(select(IdempotencyRow)):
            row.reserved_at = now() - by


def test_a_settled_key_gives_the_answer_to_the_same_body_alone(database: Database) -> None:
    job_id = create(database, taken(database))

    assert take(database) == Answered(job_id, {"id": job_id})
    with pytest.raises(IdempotencyKeyReused):
        take(database, fingerprint="b")


def test_every_project_has_keys_of_its_own(database: Database) -> None:
    create(database, taken(database))

    assert taken(database, project="other")


def test_a_released_key_is_free_and_a_settled_one_is_not_released(database: Database) -> None:
    first = taken(database)
    with transaction(database) as session:
        idempotency.release(session, first)
    second = taken(database, fingerprint="b")
    job_id = create(database, second)
    with transaction(database) as session:
        idempotency.release(session, second)

    assert take(database, fingerprint="b") == Answered(job_id, {"id": job_id})


def test_a_request_whose_claim_was_taken_over_creates_nothing(database: Database) -> None:
    slow = taken(database)
    with pytest.raises(RequestInFlight):
        take(database)
    age(database, timedelta(minutes=1))
    fast = taken(database)

    with pytest.raises(RequestInFlight):
        create(database, slow)
    job_id = create(database, fast)

    with transaction(database) as session:
        assert [row.id for row in jobs.page(session, DEFAULT_PROJECT, limit=10)[0]] == [job_id]


def test_of_many_requests_at_once_one_gets_the_key(database: Database) -> None:
    def attempt(_: int) -> KeyClaim | Answered | None:
        try:
            return take(database)
        except RequestInFlight:
            return None

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(attempt, range(16)))

    assert sum(outcome is not None for outcome in outcomes) == 1


def test_keys_are_forgotten_after_a_day_and_their_jobs_are_not(database: Database) -> None:
    job_id = create(database, taken(database))
    age(database, timedelta(hours=23))
    with transaction(database) as session:
        idempotency.forget(session)
    assert isinstance(take(database), Answered)

    age(database, timedelta(hours=25))
    with transaction(database) as session:
        idempotency.forget(session)

    assert taken(database)
    with transaction(database) as session:
        assert jobs.get(session, job_id).id == job_id


def test_a_deleted_job_takes_its_key_along(database: Database) -> None:
    job_id = create(database, taken(database))
    with database.begin() as connection:
        connection.execute(text("DELETE FROM jobs"))

    assert taken(database)
    with pytest.raises(JobNotFound), transaction(database) as session:
        jobs.get(session, job_id)
