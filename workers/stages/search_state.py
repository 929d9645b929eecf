"""What a removal stage has measured so far, kept in the store, so that a later attempt need not repeat it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pdtrim.contract.results import Half
from workers.pruning.model.plan import Part
from workers.pruning.model.units import Units, units_from_json, units_json
from workers.pruning.search.engine import LossEngine, Objective
from workers.pruning.search.memo import Memo
from workers.stages.context import StageContext

STATE = "search-state.json"
VERSION = 6
"""Of the state's form. What another version left is not read: the search measures again."""
SAVE_INTERVAL_S = 10.0
SearchName = Literal["prefill", "decode"] | tuple[Half, Part]
"""The searches of a stage: for the blocks of each half, and for the parts of a half."""


@dataclass(frozen=True)
class Phase:
    """Which losses are meant: by which objective, and of sets in which place.

    All losses are of continuations. Without `prefill` and `decode` both halves give up a set. With `prefill`, a set is
    what decode gives up beside a prefill half that gives up `prefill`; with `decode`, what prefill does beside a decode
    half that gives up `decode`. `part` tells the searches of parts of blocks from one another. With `folded`, sets are
    as they are with their gaps folded.
    """

    objective: Objective
    prefill: Units | None = None
    decode: Units | None = None
    part: Part | None = None
    folded: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON that depends on the phase alone."""
        prefill, decode = (None if units is None else units_json(units) for units in (self.prefill, self.decode))
        return {
            "objective": self.objective,
            "prefill": prefill,
            "decode": decode,
            "part": self.part,
            "folded": self.folded,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Phase:
        """The inverse of `to_json`."""
        prefill, decode = (
            None if content[half] is None else units_from_json(content[half]) for half in ("prefill", "decode")
        )
        return cls(content["objective"], prefill, decode, content["part"], content["folded"])


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

        def losses(candidates: Sequence[Units], windows: range) -> dict[Units, list[float]]:
            return engine.window_losses(candidates, windows, phase.objective, walked=memo.walked)

        known = self._losses.setdefault(phase, {})
        memo = Memo(losses, engine.windows, known, after_batch, racing, anchor=engine.anchor)
        return memo

    def out_of_time(self, search: SearchName, limit_s: float | None) -> Callable[[], bool]:
        """Whether a search has run for `limit_s` seconds, all attempts together."""
        name = search if isinstance(search, str) else " ".join(search)
        started, before = time.monotonic(), self._seconds.get(name, 0.0)

        def spent() -> bool:
            self._seconds[name] = before + time.monotonic() - started
            return limit_s is not None and self._seconds[name] >= limit_s

        return spent

    def _save(self) -> None:
        phases = [
            {"phase": phase.to_json(), "losses": [[units_json(units), found] for units, found in known.items()]}
            for phase, known in self._losses.items()
        ]
        content = {"version": VERSION, "phases": phases, "seconds": self._seconds}
        self._context.save_state(STATE, json.dumps(content).encode())
