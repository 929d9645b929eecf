"""Sets of blocks as a search may compare them: each with its gaps folded, as a half that gives up the set would be.

The best set before repair need not be the best after it. A fold is a linear map of what one block's MLP adds (`fold`),
so a set need not be built to be measured: where a way through the blocks leaves a gap, D m is added to the hidden
state. Sets that begin alike share their way and its maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from workers.pruning.model.blocks import BlockCalls, BlockStack, capture_calls
from workers.pruning.model.plan import BlockPlan
from workers.pruning.model.units import Step, Units, Way, blocks_of, way_through
from workers.pruning.repair.fold import (
    ChangeOf,
    Foldable,
    Gap,
    by_size,
    crossed_change,
    foldable,
    gaps_of,
    hooked,
    moments_of,
)
from workers.pruning.search.engine import take_step


@dataclass(frozen=True)
class _Here:
    """Where a way through the blocks has come to."""

    h: Tensor
    """(batch, time, hidden)."""
    added: Tensor | None = None
    """What the MLP of the last block that ran added, m, same shape; None where that takes no fold."""


PastGap = Callable[[Way, Tensor, Tensor], Tensor]
"""A way up to the end of a gap, h and m there (batch, time, hidden) → the hidden state with the gap's fold."""


class FoldedSets:
    """Walks of sets with their folds, whose maps are fitted to windows (windows, tokens) when a set first comes.

    Only whole blocks are folded; a gap that nothing takes the fold of is left as it is. The dense model's hidden states
    behind every block are held: blocks · windows · tokens · hidden numbers. While maps are fitted, two more of all
    windows for each set, of as many sets at a time as fit `held_bytes`; and about as many bytes of maps are kept, of
    hidden² numbers each.
    """

    def __init__(
        self, stack: BlockStack, windows: Tensor, *, held_bytes: int, change_of: ChangeOf = crossed_change
    ) -> None:
        self._stack = stack
        self._windows = windows
        self._change_of = change_of
        self._calls = capture_calls(stack, windows)
        self._takers = [_taker(stack, block) for block in range(len(stack.blocks))]
        self._dense = list(self._states())
        self._held_bytes = held_bytes
        self._at_once = max(1, held_bytes // (2 * self._dense[0].nbytes))
        self._maps: dict[Way, Tensor] = {}
        self._fitted: set[Way] = set()

    def walk(
        self,
        calls: BlockCalls,
        h: Tensor,
        candidates: Sequence[Units],
        caches: Mapping[int, Any],
        on_block: Callable[[int], None] = lambda block: None,
    ) -> tuple[dict[Units, Tensor], int]:
        """As `engine.walk`, from h_0 (batch, time, hidden). Block-forwards that fitting takes are not counted.

        The last hidden states h_L (batch, time, hidden) of every candidate, and how many block-forwards it took.
        """
        ways = {candidate: way_through(candidate, len(self._stack.blocks)) for candidate in candidates}

        def past_gap(way: Way, h: Tensor, added: Tensor) -> Tensor:
            return h + added @ self._maps[way].T

        found: dict[Way, Tensor] = {}
        forwards = 0
        for some in self._grouped(ways.values()):
            self._fit(some)
            last, taken = self._walk(calls, h, some, caches, past_gap, on_block)
            found |= last
            forwards += taken
        return {candidate: found[way] for candidate, way in ways.items()}, forwards

    @contextmanager
    def applied(self, units: Units) -> Iterator[None]:
        """While this lasts, the blocks before the gaps of a set do what the folded ones would."""
        blocks = len(self._stack.blocks)
        way = way_through(units, blocks)
        self._fit({way})
        with ExitStack() as hooks:
            for gap in gaps_of(BlockPlan(blocks, blocks_of(units))):
                taker, map_ = self._takers[gap.first - 1] if gap.first else None, self._maps.get(way[: gap.last + 1])
                if taker is not None and map_ is not None:
                    hooks.enter_context(hooked(taker.projection, partial(_mapped, map_)))
            yield

    def forget(self) -> None:
        """Let go of all maps; those that are asked for again are fitted again."""
        self._maps.clear()
        self._fitted.clear()

    @torch.no_grad()
    def _states(self) -> Iterator[Tensor]:
        """What the dense model gives behind every block."""
        h = self._stack.embed(self._windows)
        for block in range(len(self._stack.blocks)):
            h = self._calls.run(self._stack, block, h)
            yield h

    def _grouped(self, ways: Iterable[Way]) -> Iterator[set[Way]]:
        """So many of the ways at a time as may be fitted together; before each, no more maps are kept than may be."""
        every = sorted(set(ways))
        for first in range(0, len(every), self._at_once):
            if sum(map_.nbytes for map_ in self._maps.values()) > self._held_bytes:
                self.forget()
            yield set(every[first : first + self._at_once])

    @torch.no_grad()
    def _fit(self, ways: set[Way]) -> None:
        """Have the maps of all gaps of these ways."""

        def past_gap(way: Way, h: Tensor, added: Tensor) -> Tensor:
            if way not in self._maps:
                halves = moments_of([h], [added], [self._dense[len(way) - 1]], self._stack.device, by_size)
                self._maps[way] = self._change_of(*halves).to(h)
            return h + added @ self._maps[way].T

        if new := ways - self._fitted:
            self._walk(self._calls, self._stack.embed(self._windows), new, {}, past_gap, lambda block: None)
            self._fitted |= new

    def _walk(
        self,
        calls: BlockCalls,
        start: Tensor,
        ways: set[Way],
        caches: Mapping[int, Any],
        past_gap: PastGap,
        on_block: Callable[[int], None],
    ) -> tuple[dict[Way, Tensor], int]:
        here: dict[Way, _Here] = {(): _Here(start)}
        forwards = 0
        for block in range(len(self._stack.blocks)):
            following: dict[Way, _Here] = {}
            for way in sorted({way[: block + 1] for way in ways}):
                before, step = way[:block], way[block]
                at = here[before]
                if step == "skip":
                    following[way] = at
                    continue
                following[way] = self._step(calls, block, step, _past(before, at, past_gap), caches.get(block))
                forwards += 1
            here = following
            on_block(block)
        return {way: _past(way, at, past_gap) for way, at in here.items()}, forwards

    def _step(self, calls: BlockCalls, block: int, step: Step, h: Tensor, cache: Any) -> _Here:
        """One block, and what its MLP adds."""
        taker = self._takers[block]
        if taker is None:
            return _Here(take_step(self._stack, calls, block, step, h, cache))
        given: list[Tensor] = []

        def keep(output: Tensor) -> Tensor:
            given.append(output)
            return output

        with hooked(taker.projection, keep):
            after = take_step(self._stack, calls, block, step, h, cache)
        return _Here(after, taker.factor * given[0].view_as(h).to(after.device) if given else None)


def _past(way: Way, at: _Here, past_gap: PastGap) -> Tensor:
    """The hidden state behind a way, with the fold of the gap that it ends with."""
    if not way or way[-1] != "skip" or at.added is None:
        return at.h
    return past_gap(way, at.h, at.added)


def _mapped(change: Tensor, output: Tensor) -> Tensor:
    """What a projection gives, (1 + D) times."""
    return output + output @ change.T


def _taker(stack: BlockStack, block: int) -> Foldable | None:
    """What takes the fold of a gap behind a block, if anything does."""
    if block + 1 == len(stack.blocks):
        return None
    found = foldable(stack, BlockPlan(len(stack.blocks), frozenset({block + 1})), Gap(block + 1, block + 1))
    return None if isinstance(found, str) else found
