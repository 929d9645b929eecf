"""What every search algorithm is given: the sets it may try, their losses, whom to tell, and when to stop.

An algorithm ascends the counts of removed blocks, from one more than its base has to as many as are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from workers.pruning.model.units import Unit, Units
from workers.pruning.search.memo import MeasuredSet, Memo

LOOKAHEAD = 2
"""Counts in a row without an acceptable set after which a search that may stop does: losses need not be monotone."""

OnProgress = Callable[[float, MeasuredSet | None], None]
Acceptable = Callable[[MeasuredSet], bool]


@dataclass(frozen=True)
class Ascent:
    """One way up the counts."""

    memo: Memo
    base: Units
    """In every set."""
    offered: Sequence[Unit]
    """The units that may be given up besides, ascending."""
    remove: int
    """The last count."""
    on_progress: OnProgress
    out_of_time: Callable[[], bool]
    progress: tuple[float, float] = (0.0, 1.0)
    """The part of the search's progress that this ascent takes."""

    @property
    def counts(self) -> range:
        """From one block more than the base."""
        return range(len(self.base) + 1, self.remove + 1)

    def extensions(self, units: Units) -> list[Units]:
        """The sets with one unit more."""
        return [units | {unit} for unit in self.offered if unit not in units]

    def swaps(self, units: Units) -> list[Units]:
        """The sets with one unit beyond the base exchanged for another."""
        return [
            (units - {out}) | {into} for out in sorted(units - self.base) for into in self.offered if into not in units
        ]

    def measuring(self, count: int, begin: float, end: float, best: MeasuredSet | None) -> None:
        """Tell of what the memo measures from now on as that part of the work on `count` blocks."""
        self.memo.measuring = lambda share: self.tell(count, begin + (end - begin) * share, best)

    def tell_progress(self, count: int, share: float) -> None:
        """Tell that `share` (0…1) of the work on `count` blocks is done, and the best set of so many."""
        self.tell(count, share, self.memo.best(count))

    def tell(self, count: int, share: float, best: MeasuredSet | None) -> None:
        """The same with another set than the best of `count`, or none whose loss is known."""
        done = (count - len(self.base) - 1 + share) / len(self.counts)
        start, end = self.progress
        self.on_progress(start + (end - start) * done, best)

    def through(self, counts: Iterator[int], acceptable: Acceptable | None) -> int:
        """Let an algorithm ascend, as far as there are acceptable sets. Returns the last count it was done with."""
        last, missed = len(self.base), 0
        for count in counts:
            self.tell_progress(count, 1.0)
            last = count
            if acceptable is not None:
                missed = 0 if acceptable(self.memo.best(count)) else missed + 1
                if missed == LOOKAHEAD:
                    break
        return last
