"""Search of the set of blocks whose removal costs least: simulated annealing, greedy, exhaustive.

Annealing walks the removed counts upwards. At every count it first takes greedy's step, so it never ends above greedy,
then moves by swapping removed blocks with kept ones and accepts by Metropolis under geometric cooling. It is a function
of the losses and the seed alone: repeated with the losses it already knows, it arrives at the same place.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from workers.pruning.engine import Losses
from workers.pruning.plan import Blocks

Algorithm = Literal["annealing", "greedy", "exhaustive"]
PROPOSALS = 4
"""Swaps evaluated together in one annealing step; they share a pass over the weights."""
COOLING = 0.02
"""Last temperature as a fraction of the first."""
EXHAUSTIVE_BATCH = 64


@dataclass(frozen=True)
class Found:
    """A set of removed blocks and its calibration loss."""

    removed: Blocks
    loss: float


@dataclass(frozen=True)
class SearchResult:
    """The best set for every count on the way (the frontier), and every set in the order it was first evaluated."""

    frontier: Mapping[int, Found]
    trajectory: Sequence[Found]

    def frontier_json(self) -> list[dict[str, Any]]:
        """The frontier by count, as JSON whose bytes depend on it alone."""
        return [
            {"remove_blocks": count, "removed": sorted(found.removed), "loss": found.loss}
            for count, found in sorted(self.frontier.items())
        ]


@dataclass
class Memo:
    """`losses` that evaluates no set twice. `known` comes from an earlier run; `on_new` sees what is new."""

    losses: Losses
    known: dict[Blocks, float] = field(default_factory=dict)
    on_new: Callable[[Mapping[Blocks, float]], None] = lambda new: None
    visited: dict[Blocks, float] = field(default_factory=dict, init=False)

    def __call__(self, candidates: Sequence[Blocks]) -> dict[Blocks, float]:
        new = [candidate for candidate in dict.fromkeys(candidates) if candidate not in self.known]
        if new:
            evaluated = self.losses(new)
            self.known.update(evaluated)
            self.on_new(evaluated)
        found = {candidate: self.known[candidate] for candidate in candidates}
        self.visited.update({candidate: loss for candidate, loss in found.items() if candidate not in self.visited})
        return found

    def best(self, count: int) -> Found:
        """The best set of `count` blocks visited so far; ties go to the lowest indices."""
        of_count = [removed for removed in self.visited if len(removed) == count]
        removed = min(of_count, key=lambda removed: (self.visited[removed], sorted(removed)))
        return Found(removed, self.visited[removed])


def search(
    memo: Memo,
    *,
    algorithm: Algorithm,
    num_blocks: int,
    remove: int,
    base: Blocks,
    scores: Sequence[float],
    evaluations: int,
    seed: int,
    on_progress: Callable[[float, Found], None],
) -> SearchResult:
    """The best sets that contain `base`, for every count up to `remove` blocks.

    `scores` are the blocks' cosine scores, highest most redundant; annealing tries the most redundant set of each
    count. `evaluations` bounds the sets that annealing visits, beyond greedy's, which it always takes.
    `on_progress` receives the fraction done and the best set of the current count, and may raise to stop.

    Raises: ValueError when `remove` is impossible.
    """
    if not len(base) <= remove < num_blocks:
        raise ValueError(f"cannot remove {remove} of {num_blocks} blocks starting from {len(base)} removed ones")
    memo([base])
    if algorithm == "exhaustive":
        _exhaustive(memo, num_blocks, remove, base, on_progress)
    else:
        _upwards(memo, algorithm, num_blocks, remove, base, scores, evaluations, seed, on_progress)
    frontier = {count: memo.best(count) for count in range(len(base), remove + 1)}
    return SearchResult(frontier, [Found(removed, loss) for removed, loss in memo.visited.items()])


def _exhaustive(
    memo: Memo, num_blocks: int, remove: int, base: Blocks, on_progress: Callable[[float, Found], None]
) -> None:
    kept = [block for block in range(num_blocks) if block not in base]
    counts = range(1, remove - len(base) + 1)
    total = sum(math.comb(len(kept), count) for count in counts)
    done = 0
    for count in counts:
        sets = (base.union(chosen) for chosen in itertools.combinations(kept, count))
        while batch := list(itertools.islice(sets, EXHAUSTIVE_BATCH)):
            memo(batch)
            done += len(batch)
            on_progress(done / total, memo.best(len(base) + count))


def _upwards(
    memo: Memo,
    algorithm: Algorithm,
    num_blocks: int,
    remove: int,
    base: Blocks,
    scores: Sequence[float],
    evaluations: int,
    seed: int,
    on_progress: Callable[[float, Found], None],
) -> None:
    rng = random.Random(seed)
    levels = range(len(base) + 1, remove + 1)
    greedy = base
    for count in levels:
        extended = memo([greedy | {block} for block in range(num_blocks) if block not in greedy])
        greedy = min(extended, key=lambda removed: (extended[removed], sorted(removed)))
        if algorithm == "annealing":
            best = memo.best(count - 1).removed
            ranked = sorted((block for block in range(num_blocks) if block not in base), key=lambda b: -scores[b])
            redundant = base.union(ranked[: count - len(base)])
            memo([redundant, *(best | {block} for block in range(num_blocks) if block not in best)])
            rounds_left = sum(num_blocks - later for later in range(count, remove))
            levels_left = remove - count + 1
            spare = evaluations - len(memo.visited) - rounds_left
            # What is kept back for the higher counts is worth more there: they have more sets.
            _anneal(memo, num_blocks, count, base, spare // levels_left, rng)
        on_progress((count - len(base)) / len(levels), memo.best(count))


def _anneal(memo: Memo, num_blocks: int, count: int, base: Blocks, evaluations: int, rng: random.Random) -> None:
    """Swap blocks of the best set of `count` until `evaluations` more sets were visited or no neighbour is new."""
    current = memo.best(count)
    same_count = sorted(loss for removed, loss in memo.visited.items() if len(removed) == count)
    # The typical gap between a good set and the next: hot enough to leave a local minimum, no hotter.
    first = max(same_count[len(same_count) // 4] - same_count[0], 1e-9)
    last_visited = len(memo.visited) + evaluations
    while len(memo.visited) < last_visited:
        remaining = last_visited - len(memo.visited)
        temperature = first * COOLING ** (1 - remaining / evaluations)
        proposals = _swaps(memo, current, num_blocks, base, min(PROPOSALS, remaining), rng)
        if not proposals:
            best = memo.best(count)
            if best == current:
                return
            current = best
            continue
        losses = memo(proposals)
        best_proposal = min(proposals, key=lambda removed: (losses[removed], sorted(removed)))
        change = losses[best_proposal] - current.loss
        if change <= 0 or rng.random() < math.exp(-change / temperature):
            current = Found(best_proposal, losses[best_proposal])


def _swaps(memo: Memo, current: Found, num_blocks: int, base: Blocks, limit: int, rng: random.Random) -> list[Blocks]:
    """Up to `limit` sets not yet visited that swap one removed block of `current` with a kept one."""
    removable = sorted(current.removed - base)
    kept = [block for block in range(num_blocks) if block not in current.removed]
    neighbours = [current.removed - {out} | {into} for out in removable for into in kept]
    unseen = [removed for removed in neighbours if removed not in memo.visited]
    return rng.sample(unseen, min(limit, len(unseen)))
