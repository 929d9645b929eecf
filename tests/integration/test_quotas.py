"""Two gateways, PostgreSQL and Valkey: together they let no more through than one would."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from pdtrim.contract.jobs import StageName
from service.queue import QUEUE
from service.settings import Settings
from service.upkeep.reconciler import sweep
from tests.gateway import Gateway, model, problem_of, serve

__all__ = ["model"]


@pytest.fixture
def gateways(
    tmp_path: Path, model: Path, postgres_database_url: str, empty_redis_url: str
) -> Iterator[tuple[Gateway, Gateway]]:
    settings = Settings(
        data_dir=tmp_path / "data",
        database_url=postgres_database_url,
        broker_url=empty_redis_url,
        allowed_sources=["builtin:", model.as_uri()],
        reconcile_in_gateway=False,
        max_queued_jobs=5,
        max_running_jobs=2,
    )
    with serve(settings, model) as first, serve(settings, model) as second:
        yield first, second


def test_submissions_to_two_gateways_do_not_exceed_the_quota(gateways: tuple[Gateway, Gateway]) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda number: gateways[number % 2].client.post("/v1/jobs", json=dict(gateways[0].spec)), range(24)
            )
        )

    accepted = [answer.json()["id"] for answer in answers if answer.status_code == 201]
    refused = [answer for answer in answers if answer.status_code != 201]
    assert len(accepted) == 5
    assert all(problem_of(answer, 429, "queue_quota_exceeded") for answer in refused)


def test_messages_go_out_for_as_many_jobs_as_may_run(gateways: tuple[Gateway, Gateway]) -> None:
    first, second = gateways
    waiting = [gateway.create() for _ in range(2) for gateway in gateways]
    with redis.Redis.from_url(first.settings.broker_url) as broker:
        sent = [broker.llen(QUEUE)]
        claim = first.claim(waiting[0], StageName.SCORING)
        second.claim(waiting[1], StageName.SCORING)
        sent.append(sweep(first.database, first.settings))
        first.complete(claim)
        for stage in list(StageName)[1:]:
            first.complete(first.claim(waiting[0], stage))
        sent.append(sweep(second.database, second.settings))
        (message, *_) = broker.lrange(QUEUE, 0, -1)

    assert sent == [2, 0, 1]
    assert waiting[2].encode() in message
