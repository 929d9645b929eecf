"""What is known of sets of units, window by window, and races between sets on ever more of the windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, stdev

from workers.pruning.model.plan import Blocks
from workers.pruning.model.units import Units, blocks_of
from workers.pruning.search.engine import Walked, WindowLosses, mean, unheard

HEAT_WINDOWS = 4
"""Windows of a race's first heat; every later one adds as many, or half of those before if that is more."""
DROPPED_AT = 3.0
"""Standard errors behind the leader at which a set leaves a race."""


@dataclass(frozen=True)
class MeasuredSet:
    """A set of units and its calibration loss."""

    units: Units
    loss: float

    @property
    def blocks(self) -> Blocks:
        """The blocks that go."""
        return blocks_of(self.units)


@dataclass(frozen=True)
class Race:
    """The set that a race ended on, and how far behind the leader every set was when it left, the winner at 0."""

    winner: Units
    behind: Mapping[Units, float]

    @property
    def typical_gap(self) -> float:
        """How far a good set is behind the best: the lower quartile."""
        return sorted(self.behind.values())[len(self.behind) // 4]


@dataclass(frozen=True)
class Effort:
    """How many sets were compared, and how many evaluations on all windows would have taken as many windows."""

    sets: int
    whole: float

    def __sub__(self, before: Effort) -> Effort:
        return Effort(self.sets - before.sets, self.whole - before.whole)


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

    A search sees losses through its memo alone. What it asked for is kept apart from what is known: `known` may hold
    what an earlier attempt measured, and a search that is repeated must not be led by that. `on_new` is called when
    `known` has grown. With `racing`, a race measures a set on no more windows than it takes to see that it cannot win.
    """

    losses: WindowLosses
    windows: int
    known: dict[Units, list[float]] = field(default_factory=dict)
    """Losses on the first windows, for some sets on all."""
    on_new: Callable[[], None] = lambda: None
    racing: bool = False
    measuring: Walked = unheard
    """Told, while candidates are measured, for which share of all windows that is done."""
    anchor: Callable[[Units], None] = lambda units: None
    """Told which set the coming candidates are near, so that what gives the losses may hold on to its way there."""
    asked: dict[Units, int] = field(default_factory=dict, init=False)
    """Every set that this search asked for, and on how many windows."""
    visited: dict[Units, float] = field(default_factory=dict, init=False)
    """Those it asked for on all windows, in the order in which it first did, and their mean losses."""
    _best: dict[int, MeasuredSet] = field(default_factory=dict, init=False)
    _asked_for: tuple[int, int] = field(default=(0, 0), init=False)

    def __call__(self, candidates: Sequence[Units]) -> dict[Units, float]:
        """Mean loss of every candidate on all windows."""
        for stop in self._heats:
            self._measure(candidates, stop)
        found = mean({candidate: self.known[candidate] for candidate in candidates})
        for units, loss in found.items():
            if units not in self.visited:
                self.visited[units] = loss
                best = self._best.get(len(units))
                if best is None or (loss, sorted(units)) < (best.loss, sorted(best.units)):
                    self._best[len(units)] = MeasuredSet(units, loss)
        return found

    def race(self, candidates: Sequence[Units]) -> Race:
        """Find the candidate of least loss. With `racing`, none is measured on more windows than the race takes."""
        behind: dict[Units, float] = {}
        left = list(candidates)
        for stop in self._heats:
            self._measure(left, stop)
            if stop == self.windows:
                self(left)
            left = self._judged(left, stop, behind)
            if len(left) == 1:
                break
        winner = min(left, key=sorted)
        return Race(winner, behind | {winner: 0.0})

    def knows(self, candidates: Sequence[Units]) -> bool:
        """Whether the candidates' losses on all windows take no more measuring."""
        return all(len(self.known.get(candidate, ())) == self.windows for candidate in candidates)

    def knows_race(self, candidates: Sequence[Units]) -> bool:
        """Whether a race between the candidates takes no more measuring."""
        left = list(candidates)
        for stop in self._heats:
            if any(len(self.known.get(candidate, ())) < stop for candidate in left):
                return False
            left = self._judged(left, stop, {})
            if len(left) == 1:
                break
        return True

    def best(self, count: int) -> MeasuredSet:
        """The best set of `count` units visited so far; ties go to the lowest blocks."""
        return self._best[count]

    def effort(self) -> Effort:
        """What this search asked for so far."""
        return Effort(len(self.asked), sum(self.asked.values()) / self.windows)

    @cached_property
    def _heats(self) -> list[int]:
        return heats(self.windows) if self.racing else [self.windows]

    def _judged(self, left: Sequence[Units], stop: int, behind: dict[Units, float]) -> list[Units]:
        """The candidates that stay in a race after `stop` windows; `behind` takes up by how much the others are."""
        losses = {candidate: self.known[candidate][:stop] for candidate in left}
        stay = survivors(losses, self.windows)
        means = mean(losses)
        leading = min(means.values())
        behind |= {candidate: means[candidate] - leading for candidate in left}
        return stay

    def walked(self, share: float) -> None:
        """For `losses` to tell which share of what it was last asked for is done."""
        start, stop = self._asked_for
        self.measuring((start + (stop - start) * share) / self.windows)

    def _measure(self, candidates: Sequence[Units], stop: int) -> None:
        """Know every candidate on the windows before `stop`."""
        seen = {}
        for candidate in candidates:
            self.asked[candidate] = max(stop, self.asked.get(candidate, 0))
            seen[candidate] = len(self.known.get(candidate, ()))
        for start in sorted({count for count in seen.values() if count < stop}):
            new = [candidate for candidate, count in seen.items() if count == start]
            self._asked_for = start, stop
            for candidate, by_window in self.losses(new, range(start, stop)).items():
                self.known[candidate] = [*self.known.get(candidate, ()), *by_window]
            self.on_new()
            self.walked(1.0)
