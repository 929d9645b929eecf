"""What a removal stage has measured so far, kept in the store, so that a later attempt need not repeat it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from workers.pruning.model.units import Units, units_from_json, units_json
from workers.pruning.search.engine import LossEngine, Objective
from workers.pruning.search.memo import Memo
from workers.stages.context import StageContext

STATE = "search-state.json"
VERSION = 2
"""Of the state's form. What another version left is not read: the search measures again."""
SAVE_INTERVAL_S = 10.0
SearchName = Literal["prefill", "decode", "control"]
"""The searches of a stage: for each half, and for the control without nesting."""


@dataclass(frozen=True)
class Phase:
    """Which losses are meant: by which objective, and of sets in which place.

    Without `prefill` a set is given up on whole windows. With it, a set is what decode gives up beside a prefill half
    that gives up `prefill`, on continuations; not `nested`, that prefill half projects keys and values for all blocks.
    """

    objective: Objective
    prefill: Units | None = None
    nested: bool = True

    def to_json(self) -> dict[str, Any]:
        """As JSON that depends on the phase alone."""
        prefill = None if self.prefill is None else units_json(self.prefill)
        return {"objective": self.objective, "prefill": prefill, "nested": self.nested}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Phase:
        """The inverse of `to_json`."""
        prefill = None if content["prefill"] is None else units_from_json(content["prefill"])
        return cls(content["objective"], prefill, content["nested"])


class SearchState:
    """The losses found so far, by phase and set, and the time that each search took, in all attempts of a stage."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self._saved_at = time.monotonic()
        self._losses: dict[Phase, dict[Units, list[float]]] = {}
        self._seconds: dict[str, float] = {}
        kept = json.loads(context.load_state(STATE) or b"{}")
        if kept.get("version") == VERSION:
            self._seconds = kept["seconds"]
            for entry in kept["phases"]:
                losses = {units_from_json(units): by_window for units, by_window in entry["losses"]}
                self._losses[Phase.from_json(entry["phase"])] = losses

    def memo(self, phase: Phase, engine: LossEngine, *, racing: bool) -> Memo:
        """The losses of a phase by `engine`, with those that are known already; saved as they grow.

        Evaluating raises StopRequested, LeaseLost.
        """

        def after_batch() -> None:
            if time.monotonic() - self._saved_at >= SAVE_INTERVAL_S:
                self._saved_at = time.monotonic()
                self._save()
            self._context.check()

        losses = partial(engine.window_losses, objective=phase.objective)
        known = self._losses.setdefault(phase, {})
        return Memo(losses, engine.windows, known, after_batch, racing, engine.anchor)

    def out_of_time(self, search: SearchName, limit_s: float | None) -> Callable[[], bool]:
        """Whether a search has run for `limit_s` seconds, all attempts together."""
        started, before = time.monotonic(), self._seconds.get(search, 0.0)

        def spent() -> bool:
            self._seconds[search] = before + time.monotonic() - started
            return limit_s is not None and self._seconds[search] >= limit_s

        return spent

    def _save(self) -> None:
        phases = [
            {"phase": phase.to_json(), "losses": [[units_json(units), found] for units, found in known.items()]}
            for phase, known in self._losses.items()
        ]
        content = {"version": VERSION, "phases": phases, "seconds": self._seconds}
        self._context.save_state(STATE, json.dumps(content).encode())
