"""Search of the sets of units whose removal costs least, for every count up to the one that is asked for.

An engine (`engine.py`) gives the losses of sets, a memo (`memo.py`) remembers them and lets sets race; `ascent.py` has
which sets lie next to one another. Three algorithms go up the counts of removed blocks: `greedy.py`, `annealing.py`,
`exhaustive.py`. This file lets them go one after the other.

All are functions of the losses, the constraints and the seed alone. A search that was interrupted is resumed by
repeating it with the losses that are known: it arrives at the same place. Only a limit of time breaks that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from workers.pruning.model.plan import Blocks
from workers.pruning.model.units import Kind, Unit, Units, removed_json
from workers.pruning.search.annealing import Annealing, EndedBy
from workers.pruning.search.ascent import Acceptable, Ascent, OnProgress
from workers.pruning.search.engine import unheard
from workers.pruning.search.exhaustive import exhaustive
from workers.pruning.search.greedy import Greedy
from workers.pruning.search.memo import Effort, MeasuredSet, Memo

Algorithm = Literal["annealing", "greedy", "exhaustive"]
BASE_SHARE = 0.03
"""Share of the progress that the base alone takes, which is measured before any set with more."""
GREEDY_SHARE = 0.3
"""Share of the progress that greedy takes where it goes ahead of another algorithm."""


@dataclass(frozen=True)
class SearchResult:
    """The best set for every count on the way (the frontier), and every set in the order it was first evaluated."""

    frontier: Mapping[int, MeasuredSet]
    trajectory: Sequence[MeasuredSet]
    efforts: Mapping[Algorithm, Effort]
    """What each algorithm that took part asked for."""
    ended_by: EndedBy | None
    """What ended annealing, if it took part."""

    def frontier_json(self) -> list[dict[str, Any]]:
        """The frontier by count, as JSON whose bytes depend on it alone."""
        return [
            {"remove_blocks": count, **removed_json(found.units), "loss": found.loss}
            for count, found in sorted(self.frontier.items())
        ]

    def trajectory_json(self) -> list[dict[str, Any]]:
        """Every set that was evaluated on all windows, in order, as such JSON."""
        return [{**removed_json(found.units), "loss": found.loss} for found in self.trajectory]


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
    kind: Kind = "block",
    protect: Blocks = frozenset(),
    out_of_time: Callable[[], bool] = lambda: False,
    acceptable: Acceptable | None = None,
) -> SearchResult:
    """The best sets that contain `base` and give up nothing of `protect`, for every count up to `remove` units.

    The units besides the base are of one `kind`, each of another block. `scores` are the blocks' cosine scores, highest
    most redundant. `evaluations` bounds the sets that annealing asks for besides greedy's, and `out_of_time` is asked
    before every step of it; greedy's steps are always taken.

    With `acceptable`, the search ends before `remove` once the best sets of two counts in a row are not acceptable.

    `on_progress` receives the fraction done and the best set of the current count, again and again while sets are
    measured, and may raise to stop. There is no best set while greedy goes up all counts, whose losses come last.

    Raises: ValueError when `remove`, or the base beside the protected blocks, is impossible.
    """
    # Which blocks may go.
    given_up = frozenset(unit.block for unit in base)
    if both := given_up & protect:
        raise ValueError(f"block {min(both)} is both protected and removed from the start")
    if not len(base) <= remove < num_blocks + (kind != "block"):
        raise ValueError(f"cannot remove {remove} of {num_blocks} blocks starting from {len(base)} removed ones")
    if remove > num_blocks - len(protect):
        raise ValueError(f"cannot remove {remove} of {num_blocks} blocks, of which {len(protect)} are protected")
    free = [block for block in range(num_blocks) if block not in given_up | protect]
    ascent = Ascent(
        memo, base, [Unit(block, kind) for block in free], remove, on_progress, out_of_time, (BASE_SHARE, 1.0)
    )

    # Greedy goes first, unless every set is tried anyway: it finds how far to go, and where annealing begins.
    efforts: dict[Algorithm, Effort] = {}
    last, before = remove, memo.effort()
    memo.measuring = lambda share: on_progress(BASE_SHARE * share, None)
    memo([base])
    alone = algorithm == "greedy"
    greedy = Greedy(replace(ascent, progress=(BASE_SHARE, 1.0 if alone else GREEDY_SHARE)))
    if algorithm != "exhaustive" or acceptable is not None:
        last = greedy.ascend(acceptable)
        efforts["greedy"] = memo.effort() - before
        ascent = replace(ascent, remove=last, progress=(GREEDY_SHARE, 1.0))

    # Then the algorithm that was asked for goes up the same counts.
    ended_by, before = None, before if not efforts else memo.effort()
    if algorithm == "annealing" and ascent.counts:
        annealing = Annealing(ascent, greedy, scores=scores, budget=evaluations, seed=seed)
        last = ascent.through(annealing.counts(), acceptable)
        ended_by = annealing.ended_by
    elif algorithm == "exhaustive":
        last = ascent.through(exhaustive(ascent), acceptable)
    if not alone:
        efforts[algorithm] = memo.effort() - before

    memo.measuring = unheard
    frontier = {count: memo.best(count) for count in range(len(base), last + 1)}
    trajectory = [MeasuredSet(units, loss) for units, loss in memo.visited.items()]
    return SearchResult(frontier, trajectory, efforts, ended_by)
