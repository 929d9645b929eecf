"""Greedy: the unit that costs least beside those chosen so far, count by count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from workers.pruning.model.units import Units
from workers.pruning.search.ascent import Acceptable, Ascent

RACES_SHARE = 0.9
"""Of greedy's progress, that its races take; the rest are exact losses."""


class Greedy:
    """Greedy's sets, each containing the one before. Every step is a race between the sets with one unit more."""

    def __init__(self, ascent: Ascent) -> None:
        self._ascent = ascent
        self._path = [ascent.base]
        self.gaps: dict[int, float] = {}
        """By count, the typical gap between a good set and the best in the race for it."""

    @property
    def extended(self) -> set[Units]:
        """The sets whose extensions raced."""
        return set(self._path[:-1])

    def ascend(self, acceptable: Acceptable | None) -> int:
        """Go up the counts, as far as there are acceptable sets. Returns the last count."""
        if acceptable is not None:
            return self._ascent.through(self._counts(), acceptable)
        self._at_once()
        return self._ascent.remove

    def _at_once(self) -> None:
        """All counts. Their exact losses come last and together: the sets share most of their way through the model."""
        start, end = self._ascent.progress
        races = replace(self._ascent, progress=(start, start + RACES_SHARE * (end - start)))
        for count in self._ascent.counts:
            self._step(count, partial(races.measuring, count, 0.0, 1.0, None))
            races.tell(count, 1.0, None)
        for count in self._ascent.counts[-1:]:
            last = len(self._ascent.counts) * (RACES_SHARE - 1) + 1
            self._ascent.measuring(count, last, 1.0, None)
            self._ascent.memo(self._path)
            self._ascent.tell_progress(count, 1.0)

    def _counts(self) -> Iterator[int]:
        """Each count once the exact loss of its set is known."""
        for count in self._ascent.counts:
            below = self._ascent.memo.best(count - 1)
            self._step(count, partial(self._ascent.measuring, count, 0.0, RACES_SHARE, below))
            self._ascent.measuring(count, RACES_SHARE, 1.0, below)
            self._ascent.memo(self._path[-1:])
            yield count

    def _step(self, count: int, tell: Callable[[], None]) -> None:
        tell()
        self._ascent.memo.anchor(self._path[-1])
        race = self._ascent.memo.race(self._ascent.extensions(self._path[-1]))
        self._path.append(race.winner)
        self.gaps[count] = race.typical_gap
