"""A batch of evaluations in pieces that several processes may compute, and the losses put together again.

A set's loss depends on the windows that walk through the blocks together with it, not on the sets beside it. So pieces
are whole chunks of windows and, where there are fewer of those than workers, parts of the sets: on the CPU every loss
is bit for bit what one process would find.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from workers.pruning.model.blocks import BlockStack
from workers.pruning.model.units import Units, blocks_of, units_from_json, units_json
from workers.pruning.search.engine import Engine, Objective, PairEngine, WindowsEngine

PIECES_A_WORKER = 4
"""At most, of a batch: the fewer, the longer the last one may be waited for."""


@dataclass(frozen=True)
class Recipe:
    """What an engine is made of besides the model and its windows. Without `prefill`, it is one on whole windows."""

    objective: Objective
    chunk_windows: int
    prompt_tokens: int
    prefill: Units | None = None
    project_skipped: bool = False

    def build(self, stack: BlockStack, windows: Tensor, *, anchor_bytes: int) -> WindowsEngine:
        """The engine for windows (windows, tokens)"""
        if self.prefill is None:
            return Engine(
                stack,
                windows,
                self.objective,
                chunk_windows=self.chunk_windows,
                anchor_bytes=anchor_bytes,
            )
        return PairEngine(
            stack,
            windows,
            self.objective,
            prefill=self.prefill,
            prompt_tokens=self.prompt_tokens,
            chunk_windows=self.chunk_windows,
            project_skipped=self.project_skipped,
            anchor_bytes=anchor_bytes,
        )


@dataclass(frozen=True)
class Piece:
    """Sets to be measured on a range of windows."""

    candidates: tuple[Units, ...]
    windows: range


@dataclass(frozen=True)
class Evaluation:
    """A piece with all that a process needs to compute it which has model and windows."""

    recipe: Recipe
    objective: Objective
    piece: Piece
    anchor: Units | None = None
    """The set that the candidates are near, if the search has one."""

    def losses(self, engine: WindowsEngine) -> list[list[float]]:
        """Of every set in its order, on every window. Raises: as the engine's `window_losses`."""
        if self.anchor is not None:
            engine.anchor(self.anchor)
        found = engine.window_losses(self.piece.candidates, self.piece.windows, self.objective)
        return [found[candidate] for candidate in self.piece.candidates]

    def to_json(self) -> dict[str, Any]:
        """As JSON, of a few bytes a block."""
        return {
            "recipe": asdict(self.recipe) | {"prefill": _optional_json(self.recipe.prefill)},
            "objective": self.objective,
            "candidates": [units_json(candidate) for candidate in self.piece.candidates],
            "windows": [self.piece.windows.start, self.piece.windows.stop],
            "anchor": _optional_json(self.anchor),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Evaluation:
        """What `to_json` wrote."""
        recipe = Recipe(**content["recipe"] | {"prefill": _optional_units(content["recipe"]["prefill"])})
        piece = Piece(tuple(map(units_from_json, content["candidates"])), range(*content["windows"]))
        return cls(recipe, content["objective"], piece, _optional_units(content["anchor"]))


def _optional_json(units: Units | None) -> list[list[int]] | None:
    return None if units is None else units_json(units)


def _optional_units(content: Sequence[Sequence[int]] | None) -> Units | None:
    return None if content is None else units_from_json(content)


def split(
    candidates: Sequence[Units], windows: range, *, chunk_windows: int, num_blocks: int, workers: int
) -> list[Piece]:
    """Pieces of much the same work, one for each of `workers` at least where there is enough of it."""
    starts = range(windows.start, windows.stop, chunk_windows)
    step = chunk_windows * -(-len(starts) // (PIECES_A_WORKER * workers))
    spans = [range(start, min(start + step, windows.stop)) for start in range(windows.start, windows.stop, step)]
    return [
        Piece(tuple(group), span)
        for span in spans
        for group in _groups(candidates, math.ceil(workers * len(span) / len(windows)), num_blocks)
    ]


def _groups(candidates: Sequence[Units], count: int, num_blocks: int) -> list[list[Units]]:
    """At most `count` groups of neighbours in the walk's trie, of much the same number of block-forwards."""
    ordered = sorted(candidates, key=lambda units: [*sorted(blocks_of(units)), math.inf])
    costs = [num_blocks]
    for before, units in pairwise(ordered):
        # A set runs apart from the one before it from the first block on which they differ.
        costs.append(max(1, num_blocks - min(blocks_of(before ^ units), default=0)))
    total, so_far = sum(costs), 0
    groups: list[list[Units]] = [[] for _ in range(count)]
    for units, cost in zip(ordered, costs, strict=True):
        groups[so_far * count // total].append(units)
        so_far += cost
    return [group for group in groups if group]


def joined(candidates: Sequence[Units], parts: Mapping[Piece, Sequence[Sequence[float]]]) -> dict[Units, list[float]]:
    """The losses of every candidate on all windows, from those of the pieces that `split` made."""
    losses: dict[Units, list[float]] = {candidate: [] for candidate in candidates}
    for piece in sorted(parts, key=lambda piece: piece.windows.start):
        for candidate, by_window in zip(piece.candidates, parts[piece], strict=True):
            losses[candidate] += by_window
    return losses
