"""Units: what of a model can be given up, one at a time, and what a set of them comes to.

A unit is a block, its MLP, its attention, or, in prefill, all of it but its keys and values. A search compares sets of
units. Hidden states pass what is given up unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workers.pruning.model import plan
from workers.pruning.model.plan import Blocks, Part

Kind = Literal["block"] | Part


@dataclass(frozen=True, order=True)
class Unit:
    """A block, or the part of it that `kind` names, given up. Units sort by block."""

    block: int
    kind: Kind = "block"


Units = frozenset[Unit]
NOTHING: Units = frozenset()
Step = Literal["run", "skip"] | Part
"""What happens in the place of one block: it runs, nothing does, or all of it does but the named part."""
Way = tuple[Step, ...]
"""The step at each block, from the first on."""


def deleting(blocks: Iterable[int]) -> Units:
    """The units that delete `blocks`."""
    return frozenset(map(Unit, blocks))


def kept_for_cache(blocks: Iterable[int]) -> Units:
    """The units by which prefill runs nothing of `blocks` but what makes their keys and values."""
    return frozenset(Unit(block, "kv_only") for block in blocks)


def blocks_of(units: Iterable[Unit]) -> Blocks:
    """The blocks that the units give up whole."""
    return frozenset(unit.block for unit in units if unit.kind == "block")


def parts_of(units: Iterable[Unit]) -> dict[int, Part]:
    """Block that stays → the part of it that the units give up, ascending.

    Raises: ValueError naming a block of which two units give up something.
    """
    parts: dict[int, Part] = {}
    touched: set[int] = set()
    for unit in sorted(units):
        if unit.block in touched:
            raise ValueError(f"two units give up something of block {unit.block}")
        touched.add(unit.block)
        if unit.kind != "block":
            parts[unit.block] = unit.kind
    return parts


def way_through(units: Units, num_blocks: int) -> Way:
    """What happens at each of `num_blocks` blocks. Sets with the same way have the same losses."""
    gone, parts = blocks_of(units), parts_of(units)
    return tuple("skip" if block in gone else parts.get(block, "run") for block in range(num_blocks))


def without_cache(units: Iterable[Unit]) -> Blocks:
    """The blocks that leave no keys and values behind."""
    return frozenset(unit.block for unit in units if unit.kind in ("block", "attention"))


def check_nested(prefill: Units, decode: Units) -> None:
    """Where prefill leaves no keys and values, decode has to do without them.

    Raises: ValueError naming a block.
    """
    plan.check_nested(without_cache(prefill), without_cache(decode))


def removed_json(units: Units) -> dict[str, Any]:
    """What goes, as records of a search have it: the blocks, and the parts of others where there are any."""
    parts = parts_of(units)
    return {"removed": sorted(blocks_of(units)), **({"parts": parts} if parts else {})}


def units_json(units: Units) -> list[list[Any]]:
    """A set as JSON that depends on it alone."""
    return [[unit.block] if unit.kind == "block" else [unit.block, unit.kind] for unit in sorted(units)]


def units_from_json(content: Iterable[Sequence[Any]]) -> Units:
    """The inverse of `units_json`."""
    return frozenset(Unit(*entry) for entry in content)
