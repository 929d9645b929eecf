"""Units: what of a model can be given up, one at a time, and what a set of them comes to.

A unit is a block that is deleted. A search compares sets of units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workers.pruning.model import plan
from workers.pruning.model.plan import Blocks


@dataclass(frozen=True, order=True)
class Unit:
    """A block given up. Units sort by block."""

    block: int


Units = frozenset[Unit]
NOTHING: Units = frozenset()
Step = Literal["run", "skip"]
"""What happens in the place of one block: the block runs, or nothing does."""
Way = tuple[Step, ...]
"""The step at each block, from the first on."""


def deleting(blocks: Iterable[int]) -> Units:
    """The units that delete `blocks`."""
    return frozenset(map(Unit, blocks))


def blocks_of(units: Iterable[Unit]) -> Blocks:
    """The blocks that the units give up."""
    return frozenset(unit.block for unit in units)


def way_through(units: Units, num_blocks: int) -> Way:
    """What happens at each of `num_blocks` blocks. Sets with the same way have the same losses."""
    gone = blocks_of(units)
    return tuple("skip" if block in gone else "run" for block in range(num_blocks))


def check_nested(prefill: Units, decode: Units) -> None:
    """Decode has to give up what prefill does: it reads the keys and values that prefill left.

    Raises: ValueError naming a block.
    """
    plan.check_nested(blocks_of(prefill), blocks_of(decode))


def removed_json(units: Units) -> dict[str, Any]:
    """The blocks that go, as records of a search have them."""
    return {"removed": sorted(blocks_of(units))}


def units_json(units: Units) -> list[list[int]]:
    """A set as JSON that depends on it alone."""
    return [[unit.block] for unit in sorted(units)]


def units_from_json(content: Iterable[Sequence[int]]) -> Units:
    """The inverse of `units_json`."""
    return frozenset(Unit(*numbers) for numbers in content)
