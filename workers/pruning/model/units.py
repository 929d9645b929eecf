"""Ways to give up a block, numbered: what a search chooses among.

In a model of L blocks the unit b < L deletes block b. The units from L on distil: one block goes, and the block that is
fitted to stand for it and a neighbour (the absorber) runs in the neighbour's place. A set of units (`Blocks`) gives up
one block with each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from workers.pruning.model.plan import BlockPlan, Blocks

SKIPPED = -1
Way = tuple[int, ...]
"""What runs in the place of each block: its own number for the block itself, the unit of a pair for that pair's fitted
block, or `SKIPPED`."""


@dataclass(frozen=True)
class Units:
    """The units of a model of `num_blocks`, of which `pairs` are offered to a search besides every block's deletion."""

    num_blocks: int
    pairs: Sequence[int] = ()

    def pair(self, removed: int, absorber: int) -> int:
        """The unit that distils a block into an adjacent one."""
        return self.num_blocks + 2 * removed + (absorber > removed)

    def block(self, unit: int) -> int:
        """The block that goes."""
        return unit if unit < self.num_blocks else (unit - self.num_blocks) // 2

    def absorber(self, unit: int) -> int | None:
        """The block whose place the fitted block takes; None where the unit deletes."""
        if unit < self.num_blocks:
            return None
        return self.block(unit) + (1 if (unit - self.num_blocks) % 2 else -1)

    def blocks(self, chosen: Iterable[int]) -> Blocks:
        """The blocks that go."""
        return frozenset(map(self.block, chosen))

    def absorbing(self, chosen: Blocks) -> dict[int, int]:
        """Kept block → the unit whose fitted block takes its place. A pair whose absorber goes too only deletes."""
        gone = self.blocks(chosen)
        places = {unit: self.absorber(unit) for unit in chosen}
        return {absorber: unit for unit, absorber in places.items() if absorber is not None and absorber not in gone}

    def way(self, chosen: Blocks) -> Way:
        """The way through the blocks; sets with the same way have the same losses."""
        gone, absorbing = self.blocks(chosen), self.absorbing(chosen)
        return tuple(SKIPPED if b in gone else absorbing.get(b, b) for b in range(self.num_blocks))

    def add(self, chosen: Blocks, unit: int, *, base: Blocks = frozenset()) -> Blocks | None:
        """`chosen` with one more block gone, by `unit`; None where that cannot be.

        A pair that loses its absorber becomes a deletion. Pairs of `base` stay named, as every set of a search has all
        of its base, and delete from then on.
        """
        gone, block, absorber = self.blocks(chosen), self.block(unit), self.absorber(unit)
        if block in gone or absorber in gone or absorber in self.absorbing(chosen):
            return None
        widowed = {other for other in chosen - base if self.absorber(other) == block}
        return (chosen - widowed) | self.blocks(widowed) | {unit}

    def plan(self, chosen: Blocks) -> BlockPlan:
        """What the set comes to."""
        distilled = {self.block(unit): absorber for absorber, unit in self.absorbing(chosen).items()}
        return BlockPlan(self.num_blocks, self.blocks(chosen).difference(distilled), distilled)

    def to_json(self, chosen: Blocks) -> dict[str, Any]:
        """The blocks that go, and which of them are distilled, if any."""
        plan = self.plan(chosen)
        distilled = {"distilled": plan.to_json()["distilled"]} if plan.distilled else {}
        return {"removed": sorted(plan.removed), **distilled}
