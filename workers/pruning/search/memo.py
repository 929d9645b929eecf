"""What is known of sets of units, window by window, and races between sets on ever more of the windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, stdev

from workers.pruning.model.plan import Blocks
from workers.pruning.model.units import Units, blocks_of
from workers.pruning.search.engine import WindowLosses, mean

HEAT_WINDOWS = 4
"""Windows of a race's first heat; every later one adds as many, or half of those before if that is more."""
DROPPED_AT = 3.0
"""Standard errors behind the leader at which a set leaves a race."""


@dataclass(frozen=True)
class Found:
    """A set of units and its calibration loss."""

    units: Units
    loss: float

    @property
    def blocks(self) -> Blocks:
        """The blocks that go."""
        return blocks_of(self.units)


def heats(windows: int) -> list[int]:
    """After how many windows a race is judged, ascending; the last time after all `windows`."""
    stops = [min(HEAT_WINDOWS, windows)]
    while stops[-1] < windows:
        more = max(HEAT_WINDOWS, stops[-1] // 2 // HEAT_WINDOWS * HEAT_WINDOWS)
        stops.append(min(stops[-1] + more, windows))
    return stops


def survivors(losses: Mapping[Units, Sequence[float]], windows: int) -> list[Units]:
    """The sets that may still be best on all `windows`, given their losses on the first few, the same for each.

    A paired test: a set leaves when it is behind the leader by `DROPPED_AT` standard errors of the mean difference. The
    windows are a finite population (Cochran, Sampling Techniques, §2.6): an error shrinks to nothing at the last, where
    only sets as good as the leader stay.
    """
    means = mean(losses)
    leader = min(losses, key=lambda units: (means[units], sorted(units)))
    seen = len(losses[leader])
    if seen == windows:
        return [units for units in losses if means[units] <= means[leader]]
    if seen < 2:
        return list(losses)

    def stays(units: Units) -> bool:
        behind = [loss - best for loss, best in zip(losses[units], losses[leader], strict=True)]
        return fmean(behind) <= DROPPED_AT * stdev(behind) * math.sqrt(1 / seen - 1 / windows)

    return [units for units in losses if stays(units)]


@dataclass
class Memo:
    """`losses` over a number of `windows`, measured no more than once for a set and a window.

    `known` may come from an earlier run; `on_new` is called when it has grown. With `racing` a set may be known on the
    first few windows alone; what has been visited is known on all.
    """

    losses: WindowLosses
    windows: int
    known: dict[Units, list[float]] = field(default_factory=dict)
    on_new: Callable[[], None] = lambda: None
    racing: bool = False
    anchor: Callable[[Units], None] = lambda units: None
    """Told which set the coming candidates are near, so that what gives the losses may hold on to its way there."""
    visited: dict[Units, float] = field(default_factory=dict, init=False)
    """Mean loss on all windows of the sets that were asked for it, in the order in which they first were."""
    asked: set[Units] = field(default_factory=set, init=False)
    """What was visited, and what took part in a race: never what only an earlier run measured."""
    _best: dict[int, Found] = field(default_factory=dict, init=False)

    def __call__(self, candidates: Sequence[Units]) -> dict[Units, float]:
        """Mean loss of every candidate on all windows."""
        self.asked.update(candidates)
        for stop in self._heats:
            self._measure(candidates, stop)
        found = mean({candidate: self.known[candidate] for candidate in candidates})
        for units, loss in found.items():
            if units not in self.visited:
                self.visited[units] = loss
                best = self._best.get(len(units))
                if best is None or (loss, sorted(units)) < (best.loss, sorted(best.units)):
                    self._best[len(units)] = Found(units, loss)
        return found

    def first(self, candidates: Sequence[Units]) -> Units:
        """The candidate of least loss. With `racing`, none is measured on more windows than the race takes."""
        self.asked.update(candidates)
        left = list(candidates)
        for stop in self._heats:
            self._measure(left, stop)
            if stop == self.windows:
                self(left)
            left = survivors({candidate: self.known[candidate][:stop] for candidate in left}, self.windows)
            if len(left) == 1:
                break
        return min(left, key=sorted)

    def knows(self, candidate: Units) -> bool:
        """Whether the candidate's loss takes no more measuring."""
        return len(self.known.get(candidate, ())) == self.windows

    def best(self, count: int) -> Found:
        """The best set of `count` blocks visited so far; ties go to the lowest indices."""
        return self._best[count]

    @cached_property
    def _heats(self) -> list[int]:
        return heats(self.windows) if self.racing else [self.windows]

    def _measure(self, candidates: Sequence[Units], stop: int) -> None:
        """Know every candidate on the windows before `stop`."""
        seen = {candidate: len(self.known.get(candidate, ())) for candidate in candidates}
        for start in sorted({count for count in seen.values() if count < stop}):
            new = [candidate for candidate, count in seen.items() if count == start]
            for candidate, by_window in self.losses(new, range(start, stop)).items():
                self.known[candidate] = [*self.known.get(candidate, ()), *by_window]
            self.on_new()
