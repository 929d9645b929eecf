"""Simulated annealing: from greedy's set of each count on, swap a unit that goes with one that stays.

A swap that lowers the loss is always taken; one that raises it is taken now and then, and ever less often (Metropolis
acceptance under geometric cooling). So the search can leave a set that is better than its neighbours but not the best.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal

from workers.pruning.model.units import Units
from workers.pruning.search.ascent import Ascent
from workers.pruning.search.greedy import Greedy
from workers.pruning.search.memo import MeasuredSet

PROPOSALS = 4
"""Swaps that are evaluated together; they share a pass over the weights. The best of them is taken or left."""
COOLING = 0.02
"""Last temperature as a fraction of the first."""
LEAST_TEMPERATURE = 1e-9
EndedBy = Literal["budget", "neighbourhood", "time"]
"""Why annealing ended: time was up; else its share of the sets was spent at some count; else no swap was new at any."""


class Annealing:
    """Annealing at each count in turn, within a budget of sets that are new to the search.

    Each count may spend an even share of what is left of the budget; what it leaves goes to the counts above.
    """

    def __init__(self, ascent: Ascent, ahead: Greedy, *, scores: Sequence[float], budget: int, seed: int) -> None:
        """`ahead` has ascended the same counts; `scores` are the blocks' cosine scores, highest most redundant."""
        self._ascent = ascent
        self._memo = ascent.memo
        self._ranked = sorted(ascent.offered, key=lambda unit: -scores[unit.block])
        self._extended = ahead.extended
        self._gaps = dict(ahead.gaps)
        self._rng = random.Random(seed)
        self._budget_ends = len(self._memo.asked) + budget
        self._share_ends = self._budget_ends
        self._short_of_sets = self._short_of_time = False

    @property
    def ended_by(self) -> EndedBy:
        """What ended it."""
        if self._short_of_time:
            return "time"
        return "budget" if self._short_of_sets else "neighbourhood"

    def counts(self) -> Iterator[int]:
        """Each count once its sets were searched."""
        for count in self._ascent.counts:
            asked = len(self._memo.asked)
            self._share_ends = asked + (self._budget_ends - asked) // (self._ascent.remove - count + 1)
            self._try_most_redundant(count)
            self._extend_best_below(count)
            self._anneal(count)
            yield count

    def _try_most_redundant(self, count: int) -> None:
        """Know the set that the blocks' scores alone would choose: annealing begins there if greedy's is no better."""
        redundant = self._ascent.base.union(self._ranked[: count - len(self._ascent.base)])
        if redundant in self._memo.asked:
            return
        if self._affords_sets([redundant]) and self._affords_time(known=self._memo.knows([redundant])):
            self._ascent.measuring(count, 0.0, 0.0, self._memo.best(count))
            self._memo([redundant])
            self._ascent.tell_progress(count, 0.0)

    def _extend_best_below(self, count: int) -> None:
        """Take greedy's step from the best set of one block less, where that is not one from which greedy took it."""
        below = self._memo.best(count - 1).units
        if below in self._extended:
            return
        extensions = self._ascent.extensions(below)
        if self._affords_sets(extensions) and self._affords_time(known=self._memo.knows_race(extensions)):
            self._extended.add(below)
            self._memo.anchor(below)
            self._ascent.measuring(count, 0.0, 0.0, self._memo.best(count))
            race = self._memo.race(extensions)
            self._memo([race.winner])
            self._gaps[count] = race.typical_gap
            self._ascent.tell_progress(count, 0.0)

    def _anneal(self, count: int) -> None:
        """Swap units of the best set of `count` until the share of this count is spent or no swap is new."""
        current = self._memo.best(count)
        # Hot enough at first to cross the typical gap between a good set and the best, no hotter.
        first = max(self._gaps[count], LEAST_TEMPERATURE)
        share = self._share_ends - len(self._memo.asked)
        while True:
            # Propose swaps that the search never asked for: what a race dropped is not looked at again.
            new = [swap for swap in self._ascent.swaps(current.units) if swap not in self._memo.asked]
            if not new and current == self._memo.best(count):
                return
            if not new:
                current = self._memo.best(count)
                continue
            left = self._share_ends - len(self._memo.asked)
            if not self._affords_sets(new[:1]):
                return
            proposals = self._rng.sample(new, min(PROPOSALS, left, len(new)))
            if not self._affords_time(known=self._memo.knows(proposals)):
                return

            # Measure them, near the current set.
            self._memo.anchor(current.units)
            begin, end = (1 - more / share for more in (left, left - len(proposals)))
            self._ascent.measuring(count, begin, end, self._memo.best(count))
            losses = self._memo(proposals)
            self._ascent.tell_progress(count, end)

            # Take the best of them, or stay.
            best = min(proposals, key=lambda units: (losses[units], sorted(units)))
            change = losses[best] - current.loss
            temperature = first * COOLING ** (1 - left / share)
            if change <= 0 or self._rng.random() < math.exp(-change / temperature):
                current = MeasuredSet(best, losses[best])

    def _affords_sets(self, candidates: Sequence[Units]) -> bool:
        """Whether the share of this count suffices for the candidates."""
        new = sum(candidate not in self._memo.asked for candidate in candidates)
        enough = len(self._memo.asked) + new <= self._share_ends
        self._short_of_sets |= not enough
        return enough

    def _affords_time(self, *, known: bool) -> bool:
        """Whether there is time for something. What is `known` takes none, so a resumed search gets where it was."""
        enough = not self._ascent.out_of_time() or known
        self._short_of_time |= not enough
        return enough
