"""How many blocks may go before perplexity rises by more than a bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from workers.pruning.model.units import Units
from workers.pruning.search.memo import MeasuredSet, Memo

MAX_EXPONENT = 700.0
"""exp of more overflows; perplexities so high differ no longer."""


@dataclass(frozen=True)
class PerplexityBound:
    """Sets of removed blocks whose perplexity is at most `max_increase` (a fraction) above the dense model's."""

    cross_entropy: Memo
    """Cross-entropy of sets in nats a token."""
    dense: float
    """The dense model's, on the same tokens."""
    max_increase: float
    windows: Sequence[int]
    """Those that count: running text, of which perplexity is said."""

    def increase(self, units: Units) -> float:
        """Perplexity without the blocks over the dense model's, less one."""
        self.cross_entropy([units])
        by_window = self.cross_entropy.known[units]
        return math.expm1(min(fmean(by_window[window] for window in self.windows) - self.dense, MAX_EXPONENT))

    def holds(self, found: MeasuredSet) -> bool:
        """Whether a set is within the bound."""
        return self.increase(found.units) <= self.max_increase

    def largest(self, memo: Memo, smallest: MeasuredSet) -> MeasuredSet:
        """Of the sets that were held against the bound and kept it, the largest; of those, the one of least loss.

        `smallest` when there is none: it is what has to go in any case.
        """
        measured = (MeasuredSet(units, memo.visited[units]) for units in list(self.cross_entropy.visited))
        kept = [found for found in measured if self.holds(found)]
        return min(kept, key=lambda f: (-len(f.units), f.loss, sorted(f.units)), default=smallest)

    def to_json(self, chosen: MeasuredSet, frontier: Iterable[MeasuredSet]) -> dict[str, Any]:
        """The bound, whether and how the chosen set keeps it, and the increase at every count that was walked."""
        return {
            "max_perplexity_increase": self.max_increase,
            "perplexity_increase": self.increase(chosen.units),
            "met": self.holds(chosen),
            "dense_perplexity": math.exp(min(self.dense, MAX_EXPONENT)),
            "frontier": [
                {"remove_blocks": len(found.units), "perplexity_increase": self.increase(found.units)}
                for found in frontier
            ],
        }
