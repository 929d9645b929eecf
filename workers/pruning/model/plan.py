"""Which blocks a serving stage gives up, and how: the plan that search finds and every later step follows.

Blocks are named by their index in the dense model throughout. A removed block is either deleted, or distilled
into an adjacent kept block, which then stands for both and keeps its own index (PDTrim, Zhang et al., ACL 2026).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Blocks = frozenset[int]
Part = Literal["attention", "kv_only", "mlp"]
"""What a kept block may give up: its MLP; its attention with its keys and values; or both and leave the keys and values
(`kv_only`), which prefill then still makes for decode."""


@dataclass(frozen=True)
class BlockPlan:
    """The blocks one stage removes from a model of `num_blocks`.

    Raises: ValueError naming the block when the plan contradicts itself.
    """

    num_blocks: int
    """Blocks of the dense model."""
    deleted: Blocks = frozenset()
    """Blocks removed outright."""
    distilled: Mapping[int, int] = field(default_factory=dict)
    """Removed block → the adjacent kept block that absorbs it."""
    parts: Mapping[int, Part] = field(default_factory=dict)
    """Kept block → what of it is given up."""

    def __post_init__(self) -> None:
        for block in self.removed:
            if not 0 <= block < self.num_blocks:
                raise ValueError(f"block {block} does not exist in a model of {self.num_blocks} blocks")
        if len(self.removed) >= self.num_blocks:
            raise ValueError(f"all {self.num_blocks} blocks are removed; at least one must stay")
        if both := self.deleted & self.distilled.keys():
            raise ValueError(f"block {min(both)} is both deleted and distilled")
        absorbers = list(self.distilled.values())
        for block, absorber in self.distilled.items():
            if abs(block - absorber) != 1:
                raise ValueError(f"block {block} is distilled into block {absorber}, which is not adjacent")
            if not 0 <= absorber < self.num_blocks or absorber in self.removed:
                raise ValueError(f"block {block} is distilled into block {absorber}, which is not kept")
            if absorbers.count(absorber) > 1:
                raise ValueError(f"block {absorber} absorbs more than one block")
        for block, part in self.parts.items():
            if not 0 <= block < self.num_blocks or block in self.removed:
                raise ValueError(f"block {block} gives up its {part}, but is not kept")
            if block in absorbers:
                raise ValueError(f"block {block} gives up its {part}, but stands for another block")

    @property
    def removed(self) -> Blocks:
        return self.deleted.union(self.distilled)

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(block for block in range(self.num_blocks) if block not in self.removed)

    @property
    def without_cache(self) -> Blocks:
        """The blocks that leave no keys and values behind."""
        return self.removed | {block for block, part in self.parts.items() if part == "attention"}


def check_nested(prefill: Blocks, decode: Blocks) -> None:
    """Every block whose KV cache decode reads must have it computed by prefill; given are the blocks that have none.

    Raises: ValueError naming a block.
    """
    if missing := prefill - decode:
        raise ValueError(
            f"decode keeps block {min(missing)}, whose KV cache prefill no longer computes; decode must remove it too"
        )


def kv_layer_map(prefill: BlockPlan, decode: BlockPlan) -> list[int]:
    """For each layer of the decode checkpoint, the layer of the prefill checkpoint whose KV cache it reads.

    Raises: ValueError naming a block that decode keeps, though prefill leaves no keys and values of it.
    """
    check_nested(prefill.removed, decode.removed)
    check_nested(prefill.without_cache, decode.without_cache)
    position = {block: layer for layer, block in enumerate(prefill.kept)}
    return [position[block] for block in decode.kept]


def assign_actions(
    removed: Iterable[int],
    *,
    num_blocks: int,
    scores: Sequence[float],
    threshold: float,
    merge_errors: Mapping[tuple[int, int], float],
    parts: Mapping[int, Part] = MappingProxyType({}),
    fixed: BlockPlan | None = None,
) -> BlockPlan:
    """Decide for every removed block whether it is deleted or distilled, and into which neighbour, by score alone.

    A block whose cosine score reaches `threshold` is redundant enough to delete; below, it is distilled into the kept
    neighbour from which the pair starts with the lower error, `merge_errors[removed, neighbour]`. A kept block absorbs
    at most one, and gives up no part; when no neighbour is free the block is deleted and healing has to repair it.
    `fixed` is the prefill plan that a decode plan extends: what it distilled into blocks that are still kept whole
    stays, so the weights and with them the handed-over KV cache stay the same.
    """
    gone = frozenset(removed)
    distilled: dict[int, int] = {}
    settled: set[int] = set()
    if fixed is not None:
        check_nested(fixed.removed, gone)
        settled |= fixed.removed
        kept = (item for item in fixed.distilled.items() if item[1] not in gone and item[1] not in parts)
        distilled |= dict(kept)
    for block in sorted(gone - settled, key=lambda block: (scores[block], block)):
        if scores[block] >= threshold:
            continue
        free = [
            neighbour
            for neighbour in (block - 1, block + 1)
            if 0 <= neighbour < num_blocks
            and neighbour not in gone
            and neighbour not in parts
            and neighbour not in distilled.values()
        ]
        if free:
            distilled[block] = min(free, key=lambda neighbour: (merge_errors[block, neighbour], neighbour))
    return BlockPlan(num_blocks, gone.difference(distilled), distilled, parts)
