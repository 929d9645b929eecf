"""Search of the set of blocks whose removal costs least: annealing, greedy, exhaustive.

Sets are of units (`workers/pruning/model/units.py`), one for each block that goes. Every algorithm walks the removed
counts upwards. Simulated annealing lets greedy walk them all first, so that it soon has a set for every count and never
ends above greedy; then it moves by swapping removed blocks with kept ones, or one way to give up a block with another,
and accepts by Metropolis under geometric cooling. All are functions of the losses, the constraints and the seed alone:
repeated with the losses it already knows, a search arrives at the same place. Only a limit of time breaks that. Where
the memo races, greedy's steps are races; the frontier's losses are exact even so.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from workers.pruning.model.plan import Blocks
from workers.pruning.model.units import Unit, Units, blocks_of, removed_json, with_unit
from workers.pruning.search.memo import Found, Memo

Algorithm = Literal["annealing", "greedy", "exhaustive"]
PROPOSALS = 4
"""Sets evaluated together in one step of annealing; they share a pass over the weights."""
COOLING = 0.02
"""Last temperature as a fraction of the first."""
EXHAUSTIVE_BATCH = 64
LOOKAHEAD = 2
"""Counts in a row without an acceptable set after which a search that may stop does: losses need not be monotone."""
GREEDY_SHARE = 0.3
"""Share of the progress that greedy takes where it goes ahead of another algorithm."""


OnProgress = Callable[[float, Found], None]
Acceptable = Callable[[Found], bool]


@dataclass(frozen=True)
class SearchResult:
    """The best set for every count on the way (the frontier), and every set in the order it was first evaluated."""

    frontier: Mapping[int, Found]
    trajectory: Sequence[Found]

    def frontier_json(self) -> list[dict[str, Any]]:
        """The frontier by count, as JSON whose bytes depend on it alone."""
        return [
            {"remove_blocks": count, **removed_json(found.units), "loss": found.loss}
            for count, found in sorted(self.frontier.items())
        ]

    def trajectory_json(self) -> list[dict[str, Any]]:
        """Every set that was evaluated, in order, as such JSON."""
        return [{**removed_json(found.units), "loss": found.loss} for found in self.trajectory]


@dataclass(frozen=True)
class _Walk:
    """What every algorithm is given: where it starts, how far it goes, and whom it tells."""

    memo: Memo
    merges: Sequence[Unit]  # offered besides every block's deletion
    base: Units
    free: Sequence[int]  # the blocks that may be removed besides the base, ascending
    remove: int
    on_progress: OnProgress
    out_of_time: Callable[[], bool]
    span: tuple[float, float] = (0.0, 1.0)  # its part of the progress

    @property
    def counts(self) -> range:
        return range(len(self.base) + 1, self.remove + 1)

    @property
    def offered(self) -> list[Unit]:
        """The units that give up a free block, deletions first."""
        return [*map(Unit, self.free), *(unit for unit in self.merges if unit.block in self.free)]

    def add(self, units: Units, unit: Unit) -> Units | None:
        """The set with one unit more, where that can be."""
        return with_unit(units, unit, base=self.base)

    def extensions(self, units: Units) -> list[Units]:
        """The sets with one block more."""
        return list(filter(None, (self.add(units, unit) for unit in self.offered)))

    def swaps(self, units: Units) -> list[Units]:
        """The sets that swap a unit beyond the base with another."""
        offered = self.offered
        return [
            swapped
            for out in sorted(units - self.base)
            for into in offered
            if into != out and (swapped := self.add(units - {out}, into)) is not None
        ]

    def other_actions(self, units: Units) -> list[Units]:
        """Of these, the ones that remove the same blocks."""
        blocks = blocks_of(units)
        return [swapped for swapped in self.swaps(units) if blocks_of(swapped) == blocks]

    def affords(self, candidates: Sequence[Units]) -> bool:
        """Whether there is time for these sets. What is known takes none, so a resumed search gets where it was."""
        return not self.out_of_time() or all(map(self.memo.knows, candidates))

    def report(self, count: int, share: float) -> None:
        """Tell that `share` (0…1) of the work on `count` blocks is done."""
        self.tell(count, share, self.memo.best(count))

    def tell(self, count: int, share: float, best: Found) -> None:
        """The same with another set than the best of `count`."""
        done = (count - len(self.base) - 1 + share) / len(self.counts)
        start, end = self.span
        self.on_progress(start + (end - start) * done, best)

    def through(self, counts: Iterator[int], acceptable: Acceptable | None) -> int:
        """Walk `counts` as far as there are acceptable sets. Returns the last count walked."""
        last, missed = len(self.base), 0
        for count in counts:
            self.report(count, 1.0)
            last = count
            if acceptable is not None:
                missed = 0 if acceptable(self.memo.best(count)) else missed + 1
                if missed == LOOKAHEAD:
                    break
        return last


def search(
    memo: Memo,
    *,
    algorithm: Algorithm,
    num_blocks: int,
    remove: int,
    base: Units,
    scores: Sequence[float],
    evaluations: int,
    seed: int,
    on_progress: OnProgress,
    protect: Blocks = frozenset(),
    merges: Sequence[Unit] = (),
    out_of_time: Callable[[], bool] = lambda: False,
    acceptable: Acceptable | None = None,
) -> SearchResult:
    """The best sets that contain `base` and nothing of `protect`, for every count up to `remove` blocks.

    `merges` are the units that merge which are offered besides every block's deletion. Exhaustive search tries every
    set of deletions, and then, on the best of each count, one other action after the other.

    `scores` are the blocks' cosine scores, highest most redundant; annealing tries the most redundant set of each
    count. `evaluations` bounds the sets that annealing measures, if only in part; greedy's, which go ahead, it always
    takes. So does `out_of_time`, which it asks before every step. `on_progress` receives the fraction done and the best
    set of the current count after every batch of sets (the base while greedy goes ahead), and may raise to stop.

    With `acceptable`, the walk ends before `remove` once the best sets of two counts in a row are not. Annealing and
    exhaustive search walk as far as greedy, which goes ahead of them.

    Raises: ValueError when `remove`, or the base beside the protected blocks, is impossible.
    """
    given_up = blocks_of(base)
    if both := given_up & protect:
        raise ValueError(f"block {min(both)} is both protected and removed from the start")
    if not len(base) <= remove < num_blocks:
        raise ValueError(f"cannot remove {remove} of {num_blocks} blocks starting from {len(base)} removed ones")
    if remove > num_blocks - len(protect):
        raise ValueError(f"cannot remove {remove} of {num_blocks} blocks, of which {len(protect)} are protected")
    free = [block for block in range(num_blocks) if block not in given_up | protect]
    walk = _Walk(memo, merges, base, free, remove, on_progress, out_of_time)
    memo([base])
    if algorithm == "annealing" or (algorithm == "exhaustive" and acceptable is not None):
        ahead = replace(walk, span=(0.0, GREEDY_SHARE))
        if acceptable is None and ahead.counts:
            _greedy_ahead(ahead)
        walk = replace(
            walk,
            remove=remove if acceptable is None else ahead.through(_greedy(ahead), acceptable),
            span=(GREEDY_SHARE, 1.0),
        )
    last = walk.through(_walked(walk, algorithm, scores, evaluations, seed), acceptable)
    frontier = {count: memo.best(count) for count in range(len(base), last + 1)}
    return SearchResult(frontier, [Found(units, loss) for units, loss in memo.visited.items()])


def _walked(walk: _Walk, algorithm: Algorithm, scores: Sequence[float], evaluations: int, seed: int) -> Iterator[int]:
    """Each count once its sets were searched."""
    match algorithm:
        case "exhaustive":
            return _exhaustive(walk)
        case "greedy":
            return _greedy(walk)
        case "annealing":
            return _annealing(walk, scores, evaluations, seed)


def _exhaustive(walk: _Walk) -> Iterator[int]:
    for count in walk.counts:
        more = count - len(walk.base)
        total = math.comb(len(walk.free), more)
        sets = (walk.base.union(map(Unit, chosen)) for chosen in itertools.combinations(walk.free, more))
        done = 0
        while batch := list(itertools.islice(sets, EXHAUSTIVE_BATCH)):
            walk.memo(batch)
            done += len(batch)
            walk.report(count, done / total)
        _weigh_actions(walk, count)
        yield count


def _weigh_actions(walk: _Walk, count: int) -> None:
    """Change how a block of the best set of `count` goes, one at a time, while that lowers the loss."""
    before = None
    while walk.merges and before != (best := walk.memo.best(count)):
        before = best
        walk.memo(walk.other_actions(best.units))


def _greedy(walk: _Walk) -> Iterator[int]:
    removed = walk.base
    for count in walk.counts:
        walk.memo.anchor(removed)
        removed = walk.memo.first(walk.extensions(removed))
        walk.memo([removed])
        walk.report(count, 0.0)
        yield count


def _greedy_ahead(walk: _Walk) -> None:
    """Greedy's sets of all counts; their exact losses come last and together, since each contains the one before."""
    path = [walk.base]
    for count in walk.counts:
        walk.memo.anchor(path[-1])
        path.append(walk.memo.first(walk.extensions(path[-1])))
        walk.tell(count, 0.0, walk.memo.best(len(walk.base)))
    walk.memo(path)
    walk.report(walk.counts[-1], 1.0)


def _annealing(walk: _Walk, scores: Sequence[float], evaluations: int, seed: int) -> Iterator[int]:
    rng = random.Random(seed)
    memo, base = walk.memo, walk.base
    ranked = sorted(walk.free, key=lambda block: -scores[block])
    for count in walk.counts:
        redundant = base.union(map(Unit, ranked[: count - len(base)]))
        starts = [redundant, *walk.extensions(memo.best(count - 1).units)]
        if walk.affords(starts):
            memo(starts)
            walk.report(count, 0.0)
            levels_left = walk.remove - count + 1
            spare = evaluations - len(memo.asked)
            # What is kept back for the higher counts is worth more there: they have more sets.
            _anneal(walk, count, spare // levels_left, rng)
        yield count


def _anneal(walk: _Walk, count: int, evaluations: int, rng: random.Random) -> None:
    """Swap blocks of the best set of `count` until `evaluations` more sets were measured or no neighbour is new."""
    memo = walk.memo
    current = memo.best(count)
    same_count = sorted(loss for units, loss in memo.visited.items() if len(units) == count)
    # The typical gap between a good set and the next: hot enough to leave a local minimum, no hotter.
    first = max(same_count[len(same_count) // 4] - same_count[0], 1e-9)
    last_asked = len(memo.asked) + evaluations
    while len(memo.asked) < last_asked:
        remaining = last_asked - len(memo.asked)
        temperature = first * COOLING ** (1 - remaining / evaluations)
        proposals = _swaps(walk, current, min(PROPOSALS, remaining), rng)
        if not proposals:
            best = memo.best(count)
            if best == current:
                return
            current = best
            continue
        if not walk.affords(proposals):
            return
        memo.anchor(current.units)
        losses = memo(proposals)
        walk.report(count, 1 - remaining / evaluations)
        best_proposal = min(proposals, key=lambda units: (losses[units], sorted(units)))
        change = losses[best_proposal] - current.loss
        if change <= 0 or rng.random() < math.exp(-change / temperature):
            current = Found(best_proposal, losses[best_proposal])


def _swaps(walk: _Walk, current: Found, limit: int, rng: random.Random) -> list[Units]:
    """Up to `limit` sets not yet visited that are one swap away from `current`."""
    unseen = [units for units in walk.swaps(current.units) if units not in walk.memo.visited]
    return rng.sample(unseen, min(limit, len(unseen)))
