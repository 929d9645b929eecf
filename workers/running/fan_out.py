"""The search's side of sharing its evaluations with other workers.

What helpers do not begin, or do not bring to an end, the search does itself. It needs none of them, nor the database,
to go on, and waits only for what a living helper has begun.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence

from sqlalchemy import Engine as Database

from service import queue
from service.db import evaluations
from service.db.evaluations import Answer, Helpers, Losses
from service.db.session import DATABASE_FAULTS, transaction
from service.db.stages import Claim
from service.settings import Settings
from workers.inputs.models import numerics
from workers.pruning.model.units import Units
from workers.pruning.search.batches import Evaluation, Piece, Recipe, joined, split
from workers.pruning.search.engine import Objective, WindowsEngine, mean

PATIENCE = 3.0
"""A helper may take as many times as long for a piece as this worker's slowest took, before it is done here too."""
LEAST_PATIENCE_S = 1.0
LEAST_SHARE_S = 0.1
"""A worker's part of a batch has to take so long: asking others for less takes longer than doing it."""
MAX_INVITATION_PAUSE_S = 3600.0
log = logging.getLogger(__name__)


def pause_s(waited_s: float) -> float:
    """How long to wait until looking again: at most a tenth more than one has waited anyway."""
    return min(max(0.01, waited_s / 10), 0.5)


class FanOut:
    """Shares the evaluations of a held removal stage between up to `workers`, this one among them."""

    def __init__(
        self, database: Database, settings: Settings, held: Claim, *, workers: int, check: Callable[[], None]
    ) -> None:
        self._database = database
        self._settings = settings
        self._held = held
        self._workers = workers
        self._check = check
        self._numerics = numerics()
        self._next_number = 1
        self._slowest_s = 0.0
        self._loss_s = math.inf
        """What the loss of one set on one window took here, the last time."""
        self._seen: set[str] = set()
        """Workers that helped."""
        self._measured = self._measured_by_helpers = 0
        """Losses of sets on windows."""
        self._invited_at, self._pause_s, self._joined = -math.inf, settings.resend_seconds, 0

    def over(self, engine: WindowsEngine, recipe: Recipe) -> FannedOut:
        """An engine whose evaluations are shared."""
        return FannedOut(self, engine, recipe)

    @property
    def workers(self) -> int:
        """How many workers took part."""
        return 1 + len(self._seen)

    @property
    def helpers_share(self) -> float:
        """The share of the losses that came from others."""
        return round(self._measured_by_helpers / max(self._measured, 1), 4)

    def window_losses(
        self,
        engine: WindowsEngine,
        recipe: Recipe,
        objective: Objective,
        candidates: Sequence[Units],
        windows: range,
        anchor: Units | None,
    ) -> dict[Units, list[float]]:
        """As of the engine, bit for bit on the CPU. Raises: what the engine, and `check`, raise; LeaseLost."""
        self._measured += len(candidates) * len(windows)
        enough_for = len(candidates) * len(windows) * self._loss_s / LEAST_SHARE_S
        workers = int(min(enough_for, self._present() + 1)) if enough_for >= 2 else 1
        pieces = [Piece(tuple(candidates), windows)]
        if workers > 1:
            pieces = split(
                candidates, windows, chunk_windows=recipe.chunk_windows, num_blocks=engine.num_blocks, workers=workers
            )
        left = {
            number: Evaluation(recipe, objective, piece, anchor)
            for number, piece in enumerate(pieces, start=self._next_number)
        }
        self._next_number += len(pieces)
        if len(pieces) > 1 and self._offer(left):
            return joined(candidates, self._gather(engine, left))
        return joined(candidates, {e.piece: self._evaluate(engine, e) for e in left.values()})

    def _gather(self, engine: WindowsEngine, left: dict[int, Evaluation]) -> dict[Piece, Losses]:
        """The losses of what was offered: answered by helpers, or found here."""
        found: dict[Piece, Losses] = {}
        idle_since = time.monotonic()
        while left:
            answers, mine = self._exchange(left)
            for answer in answers:
                found[left.pop(answer.number).piece] = answer.losses
                self._seen.add(answer.worker)
                self._measured_by_helpers += sum(map(len, answer.losses))
            waited_s = time.monotonic() - idle_since
            if mine is None and left and waited_s > max(LEAST_PATIENCE_S, PATIENCE * self._slowest_s):
                mine = min(left)
            if mine is not None:
                evaluation = left.pop(mine)
                found[evaluation.piece] = self._evaluate(engine, evaluation)
                idle_since = time.monotonic()
            elif left:
                self._check()
                time.sleep(pause_s(waited_s))
        return found

    def _evaluate(self, engine: WindowsEngine, evaluation: Evaluation) -> Losses:
        started = time.monotonic()
        losses = evaluation.losses(engine)
        took_s = time.monotonic() - started
        self._slowest_s = max(self._slowest_s, took_s)
        self._loss_s = took_s / (len(losses) * len(evaluation.piece.windows))
        return losses

    def _present(self) -> int:
        """How many help at the moment; others are invited now and then."""
        try:
            with transaction(self._database) as session:
                helpers = evaluations.helpers(session, self._held)
        except DATABASE_FAULTS as error:
            log.warning("nobody helps, for the database is out of reach: %s", error)
            return 0
        missing = self._workers - 1 - helpers.present
        if missing > 0 and time.monotonic() - self._invited_at > self._pause_s:
            self._invite(missing, helpers)
        return helpers.present

    def _invite(self, missing: int, helpers: Helpers) -> None:
        # Where nobody comes, invitations that nobody reads must not pile up.
        again = self._invited_at > 0 and helpers.joined == self._joined
        self._pause_s = min(2 * self._pause_s, MAX_INVITATION_PAUSE_S) if again else self._settings.resend_seconds
        self._invited_at, self._joined = time.monotonic(), helpers.joined
        held = self._held
        queue.try_to_invite(
            self._settings, held.job_id, held.attempt, held.queue, numerics=self._numerics, helpers=missing
        )

    def _offer(self, offered: dict[int, Evaluation]) -> bool:
        try:
            with transaction(self._database) as session:
                payloads = {number: evaluation.to_json() for number, evaluation in offered.items()}
                evaluations.offer(session, self._held, payloads)
        except DATABASE_FAULTS as error:
            log.warning("evaluating alone, for the database is out of reach: %s", error)
            return False
        return True

    def _exchange(self, numbers: Collection[int]) -> tuple[list[Answer], int | None]:
        """Answers to some evaluations, and one of the others to be done here, if it is not in a helper's hands."""
        try:
            with transaction(self._database) as session:
                answers = evaluations.answers(session, self._held, numbers)
                others = set(numbers) - {answer.number for answer in answers}
                return answers, evaluations.take_back(session, self._held, others) if others else None
        except DATABASE_FAULTS as error:
            log.warning("evaluating alone, for the database is out of reach: %s", error)
            return [], min(numbers)


class FannedOut:
    """An engine whose evaluations are shared with other workers."""

    def __init__(self, fan_out: FanOut, engine: WindowsEngine, recipe: Recipe) -> None:
        self.windows = engine.windows
        self._fan_out = fan_out
        self._engine = engine
        self._recipe = recipe
        self._anchor: Units | None = None

    def anchor(self, units: Units) -> None:
        """As of the engine; helpers are told with what they are offered."""
        self._engine.anchor(units)
        self._anchor = units

    def window_losses(
        self, candidates: Sequence[Units], windows: range, objective: Objective | None = None
    ) -> dict[Units, list[float]]:
        """As of the engine. Raises: what the engine raises; StopRequested, LeaseLost."""
        objective = objective or self._recipe.objective
        return self._fan_out.window_losses(self._engine, self._recipe, objective, candidates, windows, self._anchor)

    def losses(self, candidates: Sequence[Units], objective: Objective | None = None) -> dict[Units, float]:
        """As of the engine. Raises: as `window_losses`."""
        return mean(self.window_losses(candidates, range(self.windows), objective))
