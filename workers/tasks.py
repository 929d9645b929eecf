"""The Celery tasks, one a stage and one that helps. `celery -A workers.tasks worker` is a worker."""

from __future__ import annotations

import os
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
from service.queue import HELP, broker_queue, celery_app, task_name
from service.settings import Settings
from service.storage import open_store
from workers.running.attempt import Worker, run_stage
from workers.running.helper import help_search

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


@signals.worker_process_init.connect
def _begin(**given: Any) -> None:
    tracing.configure("pdtrim-worker")
    if settings.worker_metrics_port is not None:
        _worker(os.getpid()).metrics.serve(settings.worker_metrics_port)


@signals.worker_shutting_down.connect
def _stop(**given: Any) -> None:
    """Celery waits for the stage at hand however long it takes; after its time the stage is asked to go back."""
    timer = Timer(settings.shutdown_seconds, lambda: setattr(stopping, "value", True))
    timer.daemon = True
    timer.start()


@signals.worker_process_shutdown.connect
def _end(**given: Any) -> None:
    tracing.flush()


def _run(job_id: str, stage: StageName) -> None:
    with tracing.receiving(task_name(stage), current_task.request.headers or {}):
        run_stage(_worker(os.getpid()), job_id, stage)


@app.task(name=task_name(StageName.SCORING), shared=False)
def scoring(job_id: str) -> None:
    """Score the blocks of the dense model."""
    _run(job_id, StageName.SCORING)


@app.task(name=task_name(StageName.REMOVAL), shared=False)
def removal(job_id: str) -> None:
    """Choose the blocks that prefill and decode give up."""
    _run(job_id, StageName.REMOVAL)


@app.task(name=task_name(StageName.DISTILLATION), shared=False)
def distillation(job_id: str) -> None:
    """Merge distilled pairs and heal the pruned models."""
    _run(job_id, StageName.DISTILLATION)


@app.task(name=task_name(StageName.EXPORT), shared=False)
def export(job_id: str) -> None:
    """Write the pruned checkpoints."""
    _run(job_id, StageName.EXPORT)


@app.task(name=task_name(StageName.EVALUATION), shared=False)
def evaluation(job_id: str) -> None:
    """Measure the exported checkpoints."""
    _run(job_id, StageName.EVALUATION)


@app.task(name=HELP, shared=False)
def helper(job_id: str, attempt: int, numerics: str) -> None:
    """Evaluate sets for the search of another worker."""
    with tracing.receiving(HELP, current_task.request.headers or {}):
        # What Celery was told to consume.
        queues = [name for name in settings.queues if broker_queue(name) in app.amqp.queues.consume_from]
        help_search(_worker(os.getpid()), job_id, attempt, numerics, queues=queues)
