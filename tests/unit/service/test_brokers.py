from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from kombu import Exchange, Queue

from pdtrim.contract.jobs import StageName
from service import brokers, queue
from service.settings import Settings
from tests.observing import lines, logged

ODD = [
    b"",
    b"{",
    b"\xff",
    b"[]",
    b"7",
    b"null",
    b"{}",
    b'{"properties": 1}',
    b'{"properties": {"body_encoding": "base64"}}',
]


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """An embedded broker; what this process knows of others would keep it from writing its tables."""
    brokers.FileTransport.global_state.clear()
    yield Settings(data_dir=tmp_path, log_format="json")
    brokers.FileTransport.global_state.clear()


def taken(settings: Settings, name: str = queue.QUEUE) -> list[Any]:
    """The jobs that messages are about, until there is none."""
    found = []
    with queue.celery_app(settings.broker_url).connection_for_read() as connection:
        waiting = Queue(name, channel=connection.channel())
        while message := waiting.get(no_ack=True):
            found.append(message.payload[0][0])
    return found


def test_messages_come_in_their_order(settings: Settings) -> None:
    for number in range(20):
        queue.send(settings, queue.WakeUp(f"job_{number}", StageName.SCORING))

    assert taken(settings) == [f"job_{number}" for number in range(20)]
    assert [path.name for path in (settings.data_dir / "broker" / "processed").iterdir()] == []


def test_files_that_are_no_messages_are_set_aside_and_keep_nobody_from_the_others(settings: Settings) -> None:
    queue.send(settings, queue.WakeUp("job_1", StageName.SCORING))
    messages = settings.data_dir / "broker" / "messages"
    for number, content in enumerate(ODD):
        (messages / f"0{number}.{queue.QUEUE}.msg").write_bytes(content)
    (messages / f"1.{queue.QUEUE}.msg").mkdir()

    with logged(settings) as stream:
        assert taken(settings) == ["job_1"]

    aside = settings.data_dir / "broker" / "processed" / brokers.UNREADABLE
    assert sorted(path.read_bytes() for path in aside.iterdir()) == sorted(ODD)
    assert sum("cannot be read, and is set aside" in line["event"] for line in lines(stream)) == len(ODD)


@pytest.mark.parametrize("content", [b"", b'[["pdtrim"', b"[7]", b"{}"])
def test_a_table_of_queues_that_cannot_be_read_is_made_again(settings: Settings, content: bytes) -> None:
    control = settings.data_dir / "broker" / "control"
    control.mkdir(parents=True)
    (control / f"{queue.QUEUE}.exchange").write_bytes(content)

    queue.send(settings, queue.WakeUp("job_1", StageName.SCORING))

    assert taken(settings) == ["job_1"]
    assert json.loads((control / f"{queue.QUEUE}.exchange").read_bytes()) == [["pdtrim", "", "pdtrim"]]


def test_who_reads_from_a_queue_is_heard_of_again_when_its_table_is_lost(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "BOUND_AGAIN_SECONDS", 0.0)
    table = settings.data_dir / "broker" / "control" / "celery.pidbox.exchange"
    with queue.celery_app(settings.broker_url).connection_for_read() as connection:
        channel = connection.channel()
        pings = Queue("worker.celery.pidbox", Exchange("celery.pidbox", "fanout"), channel=channel)
        pings.declare()
        before = json.loads(table.read_bytes())
        table.write_bytes(b'[["", "')

        assert pings.get() is None
        assert json.loads(table.read_bytes()) == before
        pings.delete()
        assert json.loads(table.read_bytes()) == []


def test_who_reads_while_others_write_gets_every_message_whole_and_once(settings: Settings) -> None:
    queue.check(settings)
    sent = [f"job_{number}" for number in range(300)]

    def send(job_id: str) -> None:
        queue.send(settings, queue.WakeUp(job_id, StageName.SCORING))

    found: list[Any] = []
    with ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(send, job_id) for job_id in sent]
        while not all(one.done() for one in sending):
            found += [job for jobs in pool.map(taken, [settings] * 2) for job in jobs]
    found += taken(settings)

    assert sorted(found) == sorted(sent)
    assert not list((settings.data_dir / "broker").rglob(brokers.UNREADABLE))


def test_answers_that_nobody_fetched_are_swept_and_their_queues_forgotten(settings: Settings) -> None:
    queue.send(settings, queue.WakeUp("job_1", StageName.SCORING))
    app = queue.celery_app(settings.broker_url)
    with app.connection_for_write() as connection:
        channel: Any = connection.channel()
        for name in ("pdtrim-1@here", "pdtrim-2@here"):
            channel.exchange_declare("celery.pidbox", "fanout")
            channel.queue_declare(f"{name}.celery.pidbox")
            channel.queue_bind(f"{name}.celery.pidbox", "celery.pidbox", "")
    assert app.control.ping(timeout=0.1) == []
    messages = settings.data_dir / "broker" / "messages"
    old = time.time() - brokers.STALE_SECONDS - 1
    for path in messages.iterdir():
        if "pdtrim-2" not in path.name:
            os.utime(path, (old, old))

    assert queue.sweep(settings) == 1

    left = {path.name.partition(".")[2] for path in messages.iterdir()}
    assert left == {"pdtrim.msg", "pdtrim-2@here.celery.pidbox.msg"}
    table = json.loads((settings.data_dir / "broker" / "control" / "celery.pidbox.exchange").read_bytes())
    assert [entry[2] for entry in table] == ["pdtrim-2@here.celery.pidbox"]


def test_an_empty_broker_is_told_from_one_that_is_away(settings: Settings) -> None:
    queue.check(settings)
    with queue.celery_app(settings.broker_url).connection_for_read() as connection:
        channel: Any = connection.channel()
        with pytest.raises(Empty):
            channel._get(queue.QUEUE)
