"""Exhaustive search: every set of every count."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from workers.pruning.search.ascent import Ascent

BATCH = 64
"""Sets that are evaluated together; they share a pass over the weights."""


def exhaustive(ascent: Ascent) -> Iterator[int]:
    """Each count once all its sets are known."""
    for count in ascent.counts:
        more = count - len(ascent.base)
        total = math.comb(len(ascent.offered), more)
        sets = (ascent.base.union(chosen) for chosen in itertools.combinations(ascent.offered, more))
        done = 0
        while batch := list(itertools.islice(sets, BATCH)):
            ascent.measuring(count, done / total, (done + len(batch)) / total, None)
            ascent.memo(batch)
            done += len(batch)
            ascent.tell_progress(count, done / total)
        yield count
