"""Units: what of a model can be given up, one at a time, and what a set of them comes to.

A unit gives up one block. It deletes the block, or merges it into a neighbour, its absorber: then a block that was
fitted to stand for both runs in the absorber's place. A search compares sets of units; a set never gives up a block
twice, so that it has as many units as blocks go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workers.pruning.model import plan
from workers.pruning.model.plan import BlockPlan, Blocks


@dataclass(frozen=True)
class Unit:
    """A block given up: deleted without an `absorber`, else merged into that adjacent block.

    Units sort by block; of one block, its deletion comes first.
    """

    block: int
    absorber: int | None = None

    def __lt__(self, other: Unit) -> bool:
        return self.to_json() < other.to_json()

    def to_json(self) -> list[int]:
        """`[block]`, or `[block, absorber]`."""
        return [self.block] if self.absorber is None else [self.block, self.absorber]


Units = frozenset[Unit]
NOTHING: Units = frozenset()
Step = Unit | Literal["run", "skip"]
"""What happens in the place of one block: the block runs, nothing does, or the block fitted for a unit that merges."""
Way = tuple[Step, ...]
"""The step at each block, from the first on."""


def deleting(blocks: Iterable[int]) -> Units:
    """The units that delete `blocks`."""
    return frozenset(map(Unit, blocks))


def blocks_of(units: Iterable[Unit]) -> Blocks:
    """The blocks that the units give up."""
    return frozenset(unit.block for unit in units)


def by_absorber(units: Units) -> dict[int, Unit]:
    """Kept block → the unit that merges another block into it. A unit whose absorber goes, too, only deletes."""
    gone = blocks_of(units)
    return {unit.absorber: unit for unit in units if unit.absorber is not None and unit.absorber not in gone}


def way_through(units: Units, num_blocks: int) -> Way:
    """What happens at each of `num_blocks` blocks. Sets with the same way have the same losses."""
    gone, merged = blocks_of(units), by_absorber(units)
    return tuple("skip" if block in gone else merged.get(block, "run") for block in range(num_blocks))


def with_unit(units: Units, unit: Unit, *, base: Units = NOTHING) -> Units | None:
    """`units` and one more; None where the two cannot be in one set.

    Where the block that goes is the absorber of another unit, that unit becomes the deletion of its block. Units of
    `base` stay as they are, since every set of a search contains its base, and only delete from then on.
    """
    gone = blocks_of(units)
    if unit.block in gone or unit.absorber in gone or unit.absorber in by_absorber(units):
        return None
    without_absorber = {other for other in units - base if other.absorber == unit.block}
    return (units - without_absorber) | deleting(blocks_of(without_absorber)) | {unit}


def plan_of(units: Units, num_blocks: int) -> BlockPlan:
    """What the units come to in a model of `num_blocks`. Raises: as `BlockPlan`."""
    distilled = {unit.block: absorber for absorber, unit in by_absorber(units).items()}
    return BlockPlan(num_blocks, blocks_of(units).difference(distilled), distilled)


def check_nested(prefill: Units, decode: Units) -> None:
    """Decode has to give up what prefill does, and as prefill does: it reads the keys and values that prefill left.

    Raises: ValueError naming a block.
    """
    plan.check_nested(blocks_of(prefill), blocks_of(decode))
    if otherwise := prefill - decode:
        unit = min(otherwise)
        does = "deletes it" if unit.absorber is None else f"merges it into block {unit.absorber}"
        raise ValueError(f"decode gives up block {unit.block} otherwise than prefill, which {does}; both must agree")


def removed_json(units: Units) -> dict[str, Any]:
    """The blocks that go, and into which others some of them are merged, if any."""
    merged = {unit.block: absorber for absorber, unit in by_absorber(units).items()}
    distilled = {"distilled": {str(block): merged[block] for block in sorted(merged)}} if merged else {}
    return {"removed": sorted(blocks_of(units)), **distilled}


def units_json(units: Units) -> list[list[int]]:
    """A set as JSON that depends on it alone."""
    return [unit.to_json() for unit in sorted(units)]


def units_from_json(content: Iterable[Sequence[int]]) -> Units:
    """The inverse of `units_json`."""
    return frozenset(Unit(*numbers) for numbers in content)
