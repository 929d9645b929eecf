from __future__ import annotations

from pdtrim.contract.jobs import StageName
from service.queue import message_name


def test_every_stage_has_its_task() -> None:
    from workers import tasks

    assert {message_name(stage) for stage in StageName} <= set(tasks.app.tasks)


def test_tasks_are_acknowledged_late_and_taken_one_at_a_time() -> None:
    from workers import tasks

    assert tasks.app.conf.task_acks_late
    assert tasks.app.conf.task_reject_on_worker_lost
    assert tasks.app.conf.worker_prefetch_multiplier == 1
