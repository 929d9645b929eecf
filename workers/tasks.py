"""The Celery tasks: one for each stage, which all do the same.

`celery -A workers.tasks worker` is a worker.
"""

from __future__ import annotations

import os
import signal
import socket
from ctypes import c_bool
from functools import cache, partial
from multiprocessing import RawValue
from threading import Timer
from typing import Any

from celery import current_task, signals

from pdtrim.contract.jobs import StageName
from service.db.session import connect
from service.observing import logs, tracing
from service.queue import WakeUp, celery_app, message_name, queue_of
from service.settings import Settings
from service.storage import open_store
from workers.running.announcing import announce
from workers.running.attempt import Worker, run_most_urgent

settings = Settings()
app = celery_app(settings.broker_url)
# Memory that the process of the pool shares with the one that hears the signals; without a lock, so that whoever is
# killed holds none.
stopping = RawValue(c_bool, False)


@cache
def _worker(pid: int) -> Worker:
    """This process's worker. Keyed by process id: a forked pool child must not share its parent's connections."""
    store = open_store(settings.artifacts_url, endpoint_url=settings.s3_endpoint_url, region=settings.s3_region)
    name = f"{socket.gethostname()}:{pid}"
    # The pool starts another child in place of one that ends.
    database, ended = connect(settings.database_url), partial(os._exit, 1)
    return Worker(settings, database, store, name, abandon=ended, stopping=lambda: stopping.value)


@signals.setup_logging.connect
def _set_up_logging(**given: Any) -> None:
    logs.configure(settings)


@signals.worker_ready.connect
def _hear(**given: Any) -> None:
    """A closed terminal stops a worker as SIGTERM does. Celery would start another, from no command line of ours."""
    signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))


@signals.worker_process_init.connect
def _begin(**given: Any) -> None:
    # The terminal tells all processes; this one is asked by the one that heard it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    tracing.configure("pdtrim-worker")
    worker = _worker(os.getpid())
    if settings.worker_metrics_port is not None:
        worker.metrics.serve(settings.worker_metrics_port)
    announce(worker, _consumed())


@signals.worker_shutting_down.connect
def _stop(**given: Any) -> None:
    """Celery waits for the stage at hand however long it takes; after its time the stage is asked to go back."""
    timer = Timer(settings.shutdown_seconds, lambda: setattr(stopping, "value", True))
    timer.daemon = True
    timer.start()


@signals.worker_process_shutdown.connect
def _end(**given: Any) -> None:
    tracing.flush()


def _consumed() -> list[str]:
    """The queues from which Celery was told to take messages."""
    return [queue_of(name) for name in app.amqp.queues.consume_from]


def _wake(job_id: str) -> None:
    """Run the most urgent stage, which need not be the one that the message tells of."""
    told_of = next(stage for stage in StageName if message_name(stage) == current_task.name)
    delivery = current_task.request.delivery_info
    assert delivery is not None, "it came from a broker"
    came_by = queue_of(str(delivery["routing_key"]))
    run_most_urgent(_worker(os.getpid()), _consumed(), WakeUp(job_id, told_of, came_by))


for stage in StageName:
    app.task(name=message_name(stage), shared=False)(_wake)
