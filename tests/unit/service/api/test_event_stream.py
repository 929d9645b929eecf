"""Server-sent events, through a real server: only one shows what is sent when, and that a disconnect ends the work."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from httpx_sse import ServerSentEvent, connect_sse
from sqlalchemy import text
from sqlmodel import Session

from pdtrim.contract.jobs import StageName
from service.api import events, wakeups
from service.db import events as stored
from service.db.events import News
from service.db.session import transaction
from tests.gateway import Gateway, listening


@pytest.fixture
def address(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(wakeups, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(wakeups, "RETRY_SECONDS", 0.05)
    with listening(gateway.settings) as url:
        yield url


@contextmanager
def following(address: str, job_id: str, *, after: int = 0, **headers: str) -> Iterator[Iterator[ServerSentEvent]]:
    url = f"{address}/v1/jobs/{job_id}/events"
    with (
        httpx.Client(timeout=20) as client,
        connect_sse(client, "GET", url, params={"after": after}, headers=headers) as source,
    ):
        assert source.response.status_code == 200
        yield source.iter_sse()


def numbers(received: Iterator[ServerSentEvent]) -> list[int]:
    return [int(event.id) for event in received]


def test_a_stream_carries_the_events_of_the_page(gateway: Gateway, address: str) -> None:
    job_id = gateway.create()
    gateway.run(job_id)
    page = gateway.client.get(f"/v1/jobs/{job_id}/events", params={"limit": 100}).json()["data"]

    with following(address, job_id) as stream:
        received = list(stream)

    assert [event.json() for event in received] == page
    assert [event.event for event in received] == [event["type"] for event in page]
    assert [int(event.id) for event in received] == [event["number"] for event in page]


def test_a_stream_follows_the_job_and_ends_with_its_final_event(gateway: Gateway, address: str) -> None:
    job_id = gateway.create()

    with following(address, job_id) as stream:
        types = [next(stream).event]
        claim = gateway.claim(job_id, StageName.SCORING)
        types.append(next(stream).event)
        gateway.report(claim, 0.5)
        types.append(next(stream).event)
        gateway.client.post(f"/v1/jobs/{job_id}/cancel")
        gateway.complete(claim)
        types += [event.event for event in stream]

    assert types == [
        "job.created",
        "stage.started",
        "stage.progress",
        "job.cancelling",
        "stage.succeeded",
        "job.cancelled",
    ]


def test_a_stream_waits_for_a_database_that_is_away(gateway: Gateway, address: str) -> None:
    job_id = gateway.create()

    with following(address, job_id) as stream:
        types = [next(stream).event]
        with gateway.database.begin() as connection:
            connection.execute(text("ALTER TABLE events RENAME TO hidden"))
        time.sleep(0.3)
        with gateway.database.begin() as connection:
            connection.execute(text("ALTER TABLE hidden RENAME TO events"))
        gateway.client.post(f"/v1/jobs/{job_id}/cancel")
        types += [event.event for event in stream]

    assert types == ["job.created", "job.cancelled"]


def test_the_stream_of_a_job_that_is_deleted_ends(gateway: Gateway, address: str) -> None:
    job_id = gateway.create()
    gateway.client.post(f"/v1/jobs/{job_id}/pause")

    with following(address, job_id) as stream:
        types = [next(stream).event for _ in range(2)]
        gateway.client.delete(f"/v1/jobs/{job_id}")
        types += [event.event for event in stream]

    assert types == ["job.created", "job.paused"]


def test_a_stream_resumes_after_the_last_event_id_or_the_given_number(gateway: Gateway, address: str) -> None:
    job_id = gateway.create()
    gateway.run(job_id)

    with following(address, job_id) as stream:
        everything = numbers(stream)
    with following(address, job_id, after=3) as stream:
        after_three = numbers(stream)
    with following(address, job_id, after=1, **{"Last-Event-ID": "5"}) as stream:
        resumed = numbers(stream)

    assert after_three == everything[3:]
    assert resumed == everything[5:]


def test_a_long_history_is_streamed_without_gaps(
    gateway: Gateway, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "BATCH", 3)
    job_id = gateway.create()
    gateway.run(job_id)

    with following(address, job_id) as stream:
        assert numbers(stream) == list(range(1, 13))


def test_nothing_left_to_stream_is_204_so_that_browsers_stop_asking(gateway: Gateway) -> None:
    job_id = gateway.create()
    gateway.client.post(f"/v1/jobs/{job_id}/cancel")

    response = gateway.client.get(
        f"/v1/jobs/{job_id}/events", headers={"accept": "text/event-stream", "last-event-id": "2"}
    )

    assert (response.status_code, response.content) == (204, b"")


def test_a_quiet_stream_is_kept_alive_by_comments(
    gateway: Gateway, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_SECONDS", 0.1)
    job_id = gateway.create()
    url = f"{address}/v1/jobs/{job_id}/events"

    with httpx.stream("GET", url, params={"after": 1}, headers={"accept": "text/event-stream"}) as response:
        lines = response.iter_lines()
        first = [next(lines) for _ in range(4)]

    assert first == [": ping", "", ": ping", ""]
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]


def test_a_client_that_leaves_ends_the_reading(gateway: Gateway, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeups, "SWEEP_SECONDS", 0.05)
    reads: list[object] = []
    news = stored.news

    def counted(session: Session, known: Mapping[str, int | None], **limit: int) -> dict[str, News]:
        reads.append(known)
        return news(session, known, **limit)

    monkeypatch.setattr(stored, "news", counted)
    with following(address, gateway.create()) as stream:
        next(stream)
        time.sleep(0.3)
        assert reads

    time.sleep(0.3)
    seen = len(reads)
    time.sleep(0.3)
    assert len(reads) == seen


def test_a_stream_that_falls_behind_reads_what_is_no_longer_at_hand(
    gateway: Gateway, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeups, "KEPT", 1)
    job_id = gateway.create()

    with following(address, job_id) as stream:
        received = [int(next(stream).id)]
        with transaction(gateway.database) as session:
            for _ in range(8):
                stored.append(session, job_id, "stage.progress", "")
        gateway.client.post(f"/v1/jobs/{job_id}/cancel")
        received += numbers(stream)

    assert received == list(range(1, 11))


def test_more_streams_than_threads_and_connections_leave_the_gateway_free(gateway: Gateway, address: str) -> None:
    job_id = gateway.create()
    url = f"{address}/v1/jobs/{job_id}/events"

    with httpx.Client(timeout=20) as client, ExitStack() as opened:
        streams = [opened.enter_context(connect_sse(client, "GET", url)).iter_sse() for _ in range(60)]
        assert [next(stream).event for stream in streams] == ["job.created"] * 60
        assert httpx.get(f"{address}/v1/jobs/{job_id}", timeout=5).status_code == 200
        gateway.client.post(f"/v1/jobs/{job_id}/cancel")
        assert [[event.event for event in stream] for stream in streams] == [["job.cancelled"]] * 60
