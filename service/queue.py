"""The Celery app, its task names and its routes: all that gateway and workers share about queueing.

The database says what is to be done, and what first; a message only wakes a worker. So delivery may fail in either
way: what was lost the reconciler sends again, and who is woken for nothing finds nothing due.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from celery import Celery
from kombu import Queue
from kombu.exceptions import ChannelError, OperationalError

from pdtrim.contract.jobs import StageName
from pdtrim.contract.queues import DEFAULT_QUEUE
from service import brokers
from service.observing import tracing
from service.settings import Settings

QUEUE = "pdtrim"
"""What the broker calls the queue `default`; the others are called so with their own name behind it."""
BROKER_ERRORS = (OperationalError, ChannelError, OSError)
"""What a transport raises when the broker is out of reach."""
SEND_AGAIN = {"max_retries": 1, "interval_start": 0}
"""At once: the connection at hand may be one that a restart of the broker left behind."""
log = logging.getLogger(__name__)


class BrokerUnavailable(Exception):
    """The broker is out of reach, or did not take a message."""


@dataclass(frozen=True)
class WakeUp:
    """A message to the workers of a queue: a stage is due in it. Who is woken takes the most urgent, whichever that is.

    It tells of the stage because workers of earlier versions take that very one.
    """

    job_id: str
    stage: StageName
    queue: str = DEFAULT_QUEUE


def message_name(stage: StageName) -> str:
    """Name of the Celery task by which workers are woken for `stage`."""
    return f"pdtrim.{stage.value}"


def broker_queue(queue: str) -> str:
    """What the broker calls a queue."""
    return QUEUE if queue == DEFAULT_QUEUE else f"{QUEUE}.{queue}"


def queue_of(broker_queue: str) -> str:
    """The queue that the broker calls so."""
    return DEFAULT_QUEUE if broker_queue == QUEUE else broker_queue.removeprefix(f"{QUEUE}.")


def _transport(broker_url: str) -> dict[str, Any]:
    """Celery's settings for a broker URL; `filesystem:///folder` keeps messages as files, without a server."""
    parts = urlsplit(broker_url)
    if parts.scheme != "filesystem":
        # A stage may run for days. Redelivery only wakes a worker that then finds the lease held.
        options = {
            "visibility_timeout": 3600,
            "socket_connect_timeout": 2,
            # A broker that is there and says nothing must not hold up whoever sends.
            "socket_timeout": 10,
            "socket_keepalive": True,
        }
        return {"broker_url": broker_url, "broker_transport_options": options}
    folders = {name: Path(unquote(parts.path)) / name for name in ("messages", "processed", "control")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    return {
        "broker_url": "filesystem://localhost",
        "broker_transport_options": {
            "data_folder_in": str(folders["messages"]),
            "data_folder_out": str(folders["messages"]),
            "processed_folder": str(folders["processed"]),
            "control_folder": str(folders["control"]),
            "polling_interval": 0.1,
        },
    }


@cache
def celery_app(broker_url: str) -> Celery:
    """The Celery app on `broker_url`, one for each process."""
    brokers.use()
    app = Celery("pdtrim")
    app.conf.update(
        **_transport(broker_url),
        task_default_queue=QUEUE,
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        # However long the broker is away, a worker waits for it; by default it would end after the hundredth try.
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        # No result is waited for: a worker whose child died takes the next stage soon, by default after 10 s.
        worker_lost_wait=0.5,
        broker_connection_timeout=2,
        worker_hijack_root_logger=False,
    )
    return app


def send(settings: Settings, wake_up: WakeUp) -> None:
    """Wake a worker. Raises: BrokerUnavailable."""
    task = message_name(wake_up.stage)
    try:
        with tracing.sending(task):
            celery_app(settings.broker_url).send_task(
                task,
                args=[wake_up.job_id],
                queue=broker_queue(wake_up.queue),
                retry=True,
                retry_policy=SEND_AGAIN,
                argsrepr=wake_up.job_id,
                ignore_result=True,
            )
    except BROKER_ERRORS as error:
        raise BrokerUnavailable(f"{task} was not sent: {error}") from error


def try_to_send(settings: Settings, wake_up: WakeUp) -> bool:
    """Wake a worker. False when the broker is out of reach: the reconciler sends again later."""
    try:
        send(settings, wake_up)
    except BrokerUnavailable as error:
        log.warning("broker out of reach, %s of %s will be sent again: %s", wake_up.stage, wake_up.job_id, error)
        return False
    return True


def sweep(settings: Settings) -> int:
    """Delete what nobody will read of a broker's files; returns how much. Raises: BrokerUnavailable."""
    parts = urlsplit(settings.broker_url)
    if parts.scheme != "filesystem":
        return 0
    try:
        with celery_app(settings.broker_url).connection_for_write() as connection, connection.channel() as channel:
            forget = partial(brokers.forget, channel)
            return brokers.sweep(Path(unquote(parts.path)), forget)
    except BROKER_ERRORS as error:
        raise BrokerUnavailable(f"the broker's files were not swept: {error}") from error


def check(settings: Settings) -> None:
    """Declare the queues. Raises: what the transport raises when the broker is out of reach or refuses."""
    with celery_app(settings.broker_url).connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, timeout=2)
        with connection.channel() as channel:
            for queue in settings.queues:
                Queue(broker_queue(queue), channel=channel).declare()
