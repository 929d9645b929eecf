"""A worker that helps with the search of another one.

It joins one attempt at a removal stage, loads the model once and evaluates what the search offers, until the search is
over, a stage waits for a worker, or nothing is offered for a while. Nothing depends on it: whatever goes wrong here,
the search does itself what was claimed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlmodel import Session
from structlog.contextvars import bound_contextvars

from pdtrim.contract.jobs import StageName
from service.db import evaluations, stages
from service.db.evaluations import Losses
from service.db.session import DATABASE_FAULTS
from service.db.stages import Claim, LeaseLost
from workers.inputs.faults import may_pass
from workers.inputs.models import anchor_bytes, numerics
from workers.pruning.search.batches import Evaluation, Recipe
from workers.pruning.search.engine import WindowsEngine
from workers.running.attempt import Worker, stage_context
from workers.running.fan_out import pause_s
from workers.running.lease import Lease, StopRequested, WorkerStopping
from workers.running.scratch import attempt_folder
from workers.stages import removal
from workers.stages.context import StageContext

IDLE_S = 60.0
"""Who was offered nothing for so long leaves."""
STAGE_WAITS_S = 2.0
"""A stage that waits for so long finds no worker: who helps makes room."""
Answer = tuple[int, Losses]
"""An evaluation's number, and what was found."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """What a helper does next: an evaluation, its number before it, or nothing yet; or make room."""

    work: tuple[int, dict[str, Any]] | None = None
    make_room: bool = False


def help_search(worker: Worker, job_id: str, attempt: int, computes: str, *, queues: Sequence[str]) -> None:
    """Help with an attempt at a job's search, if help is wanted and this worker computes as the search's does.

    `queues` are those from which this worker takes stages.
    """
    held = Claim(job_id, StageName.REMOVAL, attempt)
    with bound_contextvars(job_id=job_id, stage=held.stage.value, attempt=attempt, worker=worker.name):
        if computes != numerics():
            log.info("no help: the search computes with %s, this worker with %s", computes, numerics())
            return
        helper = worker.transact(partial(_join, held, worker, queues))
        if helper is None:
            log.info("no help is wanted")
            return
        log.info("helping")
        try:
            _help(worker, held, helper, queues)
            log.info("helping ended")
        except (LeaseLost, StopRequested, WorkerStopping) as error:
            log.info("helping ended: %s", str(error) or "the job, or this worker, is being stopped")
        except Exception as error:
            # The border of the process: the search does without this worker, and meets its own faults itself.
            if may_pass(error):
                log.warning("helping ended by a fault that may pass: %s", error)
            else:
                log.exception("helping failed")
        _leave(worker, helper)


def _join(held: Claim, worker: Worker, queues: Sequence[str], session: Session) -> str | None:
    if stages.waiting(session, queues, seconds=STAGE_WAITS_S):
        return None
    return evaluations.join(session, held, worker=worker.name, lease_seconds=worker.settings.lease_seconds)


def _leave(worker: Worker, helper: str) -> None:
    try:
        worker.transact(lambda session: evaluations.leave(session, helper))
    except DATABASE_FAULTS as error:
        log.warning("leaving is not recorded, the lease will run out: %s", error)


def _help(worker: Worker, held: Claim, helper: str, queues: Sequence[str]) -> None:
    scratch, seconds = worker.settings.scratch_dir, worker.settings.lease_seconds
    assert scratch is not None
    with (
        Lease(
            worker.database,
            held,
            seconds=seconds,
            abandon=worker.abandon,
            stopping=worker.stopping,
            renew=partial(evaluations.renew, helper=helper),
        ) as lease,
        attempt_folder(scratch, held, helper) as workdir,
    ):
        context = stage_context(worker, held, workdir, lease.check, lambda progress, message, figures: None)
        take_turn = partial(_turn, held, helper, queues)
        _evaluate(lambda answer: worker.transact(partial(take_turn, answer)), _evaluator(context))


def _evaluator(context: StageContext) -> Callable[[Evaluation], Losses]:
    """Computes evaluations, with the engine of the one before where that is the same. It raises what engines raise."""
    stack, windows = removal.load(context)
    latest: tuple[Recipe, WindowsEngine] | None = None

    def evaluate(evaluation: Evaluation) -> Losses:
        nonlocal latest
        context.check()
        if latest is None or latest[0] != evaluation.recipe:
            latest = None  # Engines hold hidden states: never two of them.
            engine = evaluation.recipe.build(stack, windows["calibration"], anchor_bytes=anchor_bytes(stack.model))
            latest = evaluation.recipe, engine
        return evaluation.losses(latest[1])

    return evaluate


def _evaluate(take_turn: Callable[[Answer | None], Turn], evaluate: Callable[[Evaluation], Losses]) -> None:
    """Evaluate what is offered, until a stage waits or nothing comes. Raises: what `evaluate` raises; LeaseLost."""
    answer: Answer | None = None
    idle_since = time.monotonic()
    while (idle_s := time.monotonic() - idle_since) < IDLE_S:
        turn = take_turn(answer)
        answer = None
        if turn.make_room:
            log.info("a stage waits for a worker")
            return
        if turn.work is None:
            time.sleep(pause_s(idle_s))
            continue
        number, payload = turn.work
        answer = number, evaluate(Evaluation.from_json(payload))
        idle_since = time.monotonic()


def _turn(held: Claim, helper: str, queues: Sequence[str], answer: Answer | None, session: Session) -> Turn:
    """Record an answer, and see what is next. Raises: LeaseLost."""
    if answer is not None:
        evaluations.answer(session, held, *answer, helper=helper)
    if stages.waiting(session, queues, seconds=STAGE_WAITS_S):
        return Turn(make_room=True)
    return Turn(evaluations.claim(session, held, helper=helper))
