from __future__ import annotations

import pytest
import redis
from kombu import Queue

from pdtrim.contract.jobs import StageName
from service import queue
from service.settings import Settings
from tests.servers import free_ports, restartable_valkey

WAKE_UP = queue.WakeUp("job_1", StageName.SCORING)


def test_a_restart_of_the_broker_loses_no_message_that_is_sent_after_it() -> None:
    with restartable_valkey() as valkey:
        settings = Settings(broker_url=f"{valkey.connection_url}/0")
        for _ in range(2):
            queue.send(settings, WAKE_UP)
            with redis.Redis.from_url(settings.broker_url) as broker:
                assert broker.llen(queue.QUEUE) == 1
            valkey.terminate()
            valkey.start()


def test_a_broker_that_is_away_is_an_error_of_its_own_and_costs_no_job() -> None:
    (closed,) = free_ports(1)
    settings = Settings(broker_url=f"redis://127.0.0.1:{closed}/0")
    with pytest.raises(queue.BrokerUnavailable, match="was not sent"):
        queue.send(settings, WAKE_UP)
    assert not queue.try_to_send(settings, WAKE_UP)


def test_messages_wait_in_the_queue_of_their_job(empty_redis_url: str) -> None:
    settings = Settings(broker_url=empty_redis_url, queues=["default", "gpu-80g"])
    for number in range(3):
        queue.send(settings, queue.WakeUp(f"job_{number}", StageName.SCORING, "gpu-80g"))
    queue.send(settings, queue.WakeUp("job_other", StageName.SCORING))

    taken: dict[str, list[str]] = {"default": [], "gpu-80g": []}
    with queue.celery_app(settings.broker_url).connection_for_read() as connection:
        for name, found in taken.items():
            channel = connection.channel()
            waiting = Queue(queue.broker_queue(name), channel=channel)
            while message := waiting.get(no_ack=True):
                found.append(message.payload[0][0])

    assert taken == {"default": ["job_other"], "gpu-80g": ["job_0", "job_1", "job_2"]}


def test_a_worker_waits_for_its_broker_however_long_that_is_away() -> None:
    assert queue.celery_app("redis://127.0.0.1:6379/0").conf.broker_connection_max_retries is None


@pytest.mark.parametrize("name", ["default", "gpu-80g", "pdtrim"])
def test_the_broker_s_name_of_a_queue_leads_back_to_it(name: str) -> None:
    assert queue.queue_of(queue.broker_queue(name)) == name
