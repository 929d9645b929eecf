"""How many sets the searches of a job compare, and how many forwards of blocks that takes.

The counts are those of `workers/pruning/search`. Greedy's and those of exhaustive search do not depend on what is
found. Annealing spends its budget, unless it has asked for every swap around its best set before: `least` is what it
asks for then, `most` what it asks for at the most. Where a bound on perplexity ends a search early, or a budget of
costs is met sooner, there is no more to be said than `most`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pdtrim.contract.blocks import limits
from pdtrim.contract.spec import BUDGET_PARTS, HalfTarget, JobSpec, Part
from service.checking.shape import ModelShape

LARGEST = 2**53
"""The largest integer that every JSON reader keeps exactly."""
RACED = 0.6
"""Of the windows, what a set of greedy's is measured on, with racing; the mean of the benchmarks."""


@dataclass(frozen=True)
class Sets:
    """Sets that a search compares: from `least` up to `most`, which are the same where that is known."""

    least: int
    most: int
    greedy: int = 0
    """Of these, those that race."""

    def __add__(self, other: Sets) -> Sets:
        return Sets(self.least + other.least, self.most + other.most, self.greedy + other.greedy)


NONE = Sets(0, 0)


@dataclass(frozen=True)
class Searches:
    """Of a job."""

    prefill: Sets
    decode: Sets
    parts: Sets
    """For parts of kept blocks and for budgets, both halves together."""


def searches(spec: JobSpec, blocks: int, shape: ModelShape | None) -> Searches:
    """Those of a job on a model of so many blocks."""
    prefill, decode = limits(spec, blocks)
    forced, algorithm = len(spec.search.force), spec.search.algorithm
    bounds = [half.max_perplexity_increase is not None for half in (spec.prefill, spec.decode)]
    return Searches(
        prefill=_bounded(_search(spec, blocks, forced, prefill, algorithm), bounds[0]),
        decode=_bounded(_search(spec, blocks, prefill, decode, algorithm), any(bounds)),
        parts=_parts(spec, blocks, prefill, spec.prefill)
        + _parts(spec, blocks, decode, spec.decode)
        + _for_budget(spec, blocks, prefill, decode, spec.prefill, shape)
        + _for_budget(spec, blocks, prefill, decode, spec.decode, shape),
    )


def _bounded(found: Sets, bounded: bool) -> Sets:
    return Sets(1, found.most, found.greedy) if bounded else found


def _search(spec: JobSpec, blocks: int, base: int, remove: int, algorithm: str) -> Sets:
    """A search from `base` up to `remove` units, each of another block."""
    free, counts = blocks - len(spec.search.protect) - base, range(1, remove - base + 1)
    every = 1 + sum(math.comb(free, count) for count in counts)
    if algorithm == "exhaustive":
        return Sets(min(LARGEST, every), min(LARGEST, every))
    by_greedy = {count: free - count + 1 for count in counts}
    greedy = 1 + sum(by_greedy.values())
    if algorithm == "greedy":
        return Sets(greedy, greedy, greedy)
    around = {count: 1 + count * (free - count) - by_greedy[count] for count in counts}
    of_count = {count: math.comb(free, count) - by_greedy[count] for count in counts}
    budget = spec.search.annealing_budget(blocks)
    least, most = (greedy + _spent(new, budget) for new in (around, of_count))
    if spec.search.seconds is not None:
        least = greedy
    return Sets(min(least, LARGEST), min(most, LARGEST), greedy)


def _spent(new: Mapping[int, int], budget: int) -> int:
    """What annealing spends where every count has so many new sets: an even share of what those before it left."""
    left = budget
    for number, sets in enumerate(new.values()):
        left -= min(left // (len(new) - number), sets)
    return budget - left


def _parts(spec: JobSpec, blocks: int, removed: int, target: HalfTarget) -> Sets:
    """The searches of the parts of a half's kept blocks."""
    found, given_up = NONE, removed
    for count in target.parts.values():
        found += _search(spec, blocks, given_up, given_up + count, spec.search.algorithm)
        given_up += count
    return found if target.max_perplexity_increase is None else Sets(0, found.most, found.greedy)


def _for_budget(
    spec: JobSpec, blocks: int, prefill: int, decode: int, target: HalfTarget, shape: ModelShape | None
) -> Sets:
    """The search for a budget: a walk with all kinds of units, and one with each kind where there are several.

    A walk with one kind takes off the same at every step; a mixed one takes steps of either kind.
    """
    if target.budget is None:
        return NONE
    cost, share = target.budget
    of_prefill = cost == "flops"
    free = blocks - len(spec.search.protect) - (prefill if of_prefill else decode)
    # Prefill may give up whole blocks only where decode does.
    whole = decode - prefill if of_prefill else free
    offered: dict[Part | None, int] = {None: whole} | dict.fromkeys(BUDGET_PARTS[cost], free)
    offered = {kind: count for kind, count in offered.items() if count > 0}
    saves = {kind: _saved(cost, kind, shape, spec, blocks) for kind in offered}
    gone = (1 - share) - (
        0 if shape is None else (prefill if of_prefill else decode) * _saved(cost, None, shape, spec, blocks)
    )
    if gone <= 0:
        return Sets(1, 1)
    steps = {kind: min(count, math.ceil(gone / max(saves[kind], 1e-9))) for kind, count in offered.items()}
    alone = {kind: sum(offered[kind] - step for step in range(steps[kind])) for kind in offered}
    units = sum(offered.values())
    first, shortest = units, min(steps.values())
    mixed = 1 + sum(max(0, units - len(offered) * step) for step in range(max(1, shortest)))
    longest = max(steps.values())
    most = 1 + sum(max(1, units - step) for step in range(longest))
    if len(offered) > 1:
        # The first steps of the walks with one kind are known of the mixed one.
        most += sum(alone.values()) - first
        least = mixed + max(alone[kind] - offered[kind] for kind in offered)
        return Sets(max(1, least), max(least, most))
    return Sets(1 + first if shortest == 1 else most, most)


def _saved(cost: str, kind: Part | None, shape: ModelShape | None, spec: JobSpec, blocks: int) -> float:
    """The share of the dense model's cost that a unit of that kind takes off."""
    if shape is None:
        return 0.5 / blocks
    if cost == "kv_bytes":
        return 1 / blocks
    if cost == "weight_bytes":
        of = {None: shape.block, "mlp": shape.mlp_at_work, "attention": shape.block - shape.mlp_at_work}
        return of[kind if kind != "kv_only" else None] / shape.numbers
    prompt = spec.calibration.window_tokens // 2
    block = 2 * shape.at_work + 4 * prompt * shape.attention_width
    saved = {None: block, "mlp": 2 * shape.mlp_at_work, "kv_only": block - 2 * shape.hidden * shape.kv_width}
    return saved[kind if kind != "attention" else None] / (blocks * block)
