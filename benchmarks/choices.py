"""What published methods choose to give up, of whole blocks and of parts, as rows beside this package's own search.

Each sees the calibration windows (windows, tokens) of a job; `CHOICES` lists them. Losses are the engine's, which equal
those of whole forwards: a method chooses here, its time is not measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from benchmarks.peer_methods import PEERS
from workers.pruning.model.blocks import BlockStack
from workers.pruning.model.costs import costs_of
from workers.pruning.model.units import NOTHING, Kind, Unit, Units, deleting, kept_for_cache
from workers.pruning.search.engine import WholeEngine

CHUNK_WINDOWS = 16
Given = tuple[Units, Units]
"""What prefill gives up, and what decode does."""
Choice = Callable[[BlockStack, Tensor, float], Given]
"""Of the last argument: how many blocks, or the share of the dense model's weight bytes that may be left."""


def by_peer(name: str) -> Choice:
    """The blocks that one of `peer_methods` removes from both halves."""

    def choose(stack: BlockStack, windows: Tensor, remove: float) -> Given:
        removed = PEERS[name](stack, windows, int(remove), chunk_windows=CHUNK_WINDOWS).removed
        return deleting(removed), deleting(removed)

    return choose


def late_blocks(stack: BlockStack, windows: Tensor, remove: float) -> Given:
    """Prefill makes nothing but keys and values in its last blocks, from what enters the first of these.

    Source: Qiao et al. 2024, "SwiftKV" (arXiv 2410.03960), SingleInputKV, which trains those projections afterwards;
    and "POP" (arXiv 2602.03295), which keeps the late blocks for decode, and trains nothing.
    """
    blocks = len(stack.blocks)
    return kept_for_cache(range(blocks - int(remove), blocks)), NOTHING


def evopress(stack: BlockStack, windows: Tensor, remove: float) -> Given:
    """Evolution of one set of blocks by swaps, on KL divergence; 32 offspring a generation, of which the best two on
    half of the windows meet their parent on all of them. k · (n − k) / 1.5 generations for k of n blocks.

    Source: Sieberling et al. 2024, "EvoPress" (arXiv 2410.14649), depth pruning, of whole blocks, with the settings of
    its published program for 2,048 and 32,768 tokens, of which there are fewer here.
    """
    blocks, count, rng = len(stack.blocks), int(remove), random.Random(0)
    engine = WholeEngine(stack, windows, "kl", chunk_windows=CHUNK_WINDOWS)

    def fittest(sets: Sequence[Units], survivors: int, used: int) -> list[Units]:
        first = rng.randrange(engine.windows - used + 1)
        losses = engine.window_losses(sets, range(first, first + used))
        return sorted(sets, key=lambda units: (sum(losses[units]), sorted(units)))[:survivors]

    few = max(engine.windows // 2, 1)
    started = {deleting(rng.sample(range(blocks), count)) for _ in range(64)}
    parent = fittest(sorted(started, key=sorted), 1, few)[0]
    for _ in range(int(count * (blocks - count) / 1.5)):
        offspring: set[Units] = set()
        for _ in range(32):
            child = set(parent)
            for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
                child.remove(rng.choice(sorted(child)))
                child.add(rng.choice([Unit(block) for block in range(blocks) if Unit(block) not in child]))
            offspring.add(frozenset(child))
        best = fittest(sorted(offspring - {parent}, key=sorted), 2, few)
        parent = fittest([parent, *best], 1, engine.windows)[0]
    return parent, parent


def blockpruner(stack: BlockStack, windows: Tensor, share: float) -> Given:
    """Decode without attentions and MLPs, one after another, each the one without which perplexity is lowest.

    Source: Zhong et al. 2024, "BlockPruner" (arXiv 2406.10594). As there, the whole model is judged; the weights of
    decode are bounded, so that it stops once `share` of their bytes is left.
    """
    engine = WholeEngine(stack, windows, "cross_entropy", chunk_windows=CHUNK_WINDOWS)
    costs = costs_of(stack, "weight_bytes", windows[:1])
    gone: Units = NOTHING
    while costs.share(gone) > share:
        nexts = [with_part(gone, block, half) for block in range(len(stack.blocks)) for half in ("attention", "mlp")]
        losses = engine.losses([units for units in dict.fromkeys(nexts) if units != gone])
        gone = min(losses, key=lambda units: (losses[units], sorted(units)))
    return NOTHING, gone


def with_part(units: Units, block: int, half: Kind) -> Units:
    """Without one half of a block more; the block itself, when the other half has gone before."""
    gone = {unit.block: unit for unit in units}.get(block)
    if gone is None:
        return units | {Unit(block, half)}
    return units if gone.kind in (half, "block") else units - {gone} | {Unit(block)}


CHOICES: Mapping[str, Choice] = MappingProxyType(
    {name: by_peer(name) for name in ("ShortGPT", "angular span", "SLEB", "LLM-Streamline")}
    | {"EvoPress": evopress, "late blocks (SwiftKV, POP)": late_blocks, "BlockPruner": blockpruner}
)
"""The methods by the names their papers give them."""
