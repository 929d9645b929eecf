"""Hidden states on the way through a set of removed blocks, at which walks of sets near that one may begin.

A search that moves by swaps asks for sets that differ from its current one at some block first; what enters that block
is the same for both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from workers.pruning.model.units import Way


@dataclass
class Trail:
    """What enters some blocks on a `way` through them, for one chunk of windows."""

    way: Way
    states: dict[int, Tensor]
    """Block → hidden states (batch, time, hidden); block 0 is always there."""
    every: int
    """States that a walk passes are kept before each block that is a multiple of this."""

    @classmethod
    def starting(cls, h: Tensor) -> Trail:
        """One that has h_0 (batch, time, hidden) alone, and keeps nothing."""
        return cls((), {0: h}, 0)

    def begin(self, candidate: Way) -> int:
        """The last block whose entering state is here and the same on the candidate's way."""
        last = _first_difference(self.way, candidate)
        return max(block for block in self.states if last is None or block <= last)

    def keep(self, block: int, h: Tensor) -> None:
        """Take up what enters a block, if that is one of those to be kept."""
        if self.every and block % self.every == 0:
            self.states[block] = h


@dataclass
class Anchor:
    """The way that those of coming candidates are near, and what is held of its trail for every chunk of windows.

    States are held before every k-th block, with the smallest k for which those of all windows fit the budget.
    """

    num_blocks: int
    budget_bytes: int
    state_bytes: int
    """What the states before one block take, all windows together."""
    way: Way | None = None
    _held: dict[range, dict[int, Tensor]] = field(default_factory=dict, init=False)

    def move(self, way: Way) -> None:
        """Be on another way: what enters the blocks up to the first difference stays."""
        last = None if self.way is None else _first_difference(self.way, way)
        if last is not None:
            for states in self._held.values():
                for block in [block for block in states if block > last]:
                    del states[block]
        self.way = way

    def trail(self, chunk: range, h: Tensor) -> Trail:
        """What is held for a chunk of windows, of which h_0 (batch, time, hidden) is given."""
        if self.way is None or self._every == self.num_blocks:
            return Trail.starting(h)
        return Trail(self.way, {0: h, **self._held.get(chunk, {})}, self._every)

    def hold(self, chunk: range, trail: Trail) -> None:
        """Take up what a walk left; a window's states are held once, whatever chunks it comes in."""
        for other in [other for other in self._held if other.start < chunk.stop and chunk.start < other.stop]:
            del self._held[other]
        self._held[chunk] = {block: h for block, h in trail.states.items() if block}

    def give_up(self) -> bool:
        """Let go of everything and hold nothing from now on. Whether anything was, or was about to be, held."""
        holding = self.way is not None and self._every < self.num_blocks
        self._held.clear()
        self.budget_bytes = 0
        return holding

    @property
    def _every(self) -> int:
        return -(-self.num_blocks // (self.budget_bytes // self.state_bytes + 1))


def _first_difference(one: Way, other: Way) -> int | None:
    return next((block for block, (here, there) in enumerate(zip(one, other, strict=False)) if here != there), None)
