from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.workers.pruning.models import random_ids, tiny_model
from workers.pruning.model.blocks import BlockStack, block_stack
from workers.pruning.model.streaming import load_streamed
from workers.pruning.model.units import NOTHING, Unit, Units, deleting, way_through
from workers.pruning.search.anchor import Anchor, Trail
from workers.pruning.search.engine import ChunkedEngine, PairEngine, WholeEngine
from workers.pruning.search.memo import Memo
from workers.pruning.search.search import SearchResult, search

BLOCKS, WINDOWS, TOKENS = 8, 5, 12
AMPLE = 2**20
CURRENT = deleting({1, 3, 6})
SWAPS = [CURRENT - {Unit(out)} | {Unit(into)} for out in (3, 6) for into in (4, 5, 7)]
PREFILL = deleting({1})


def tiny_stack() -> BlockStack:
    return block_stack(tiny_model("llama", num_blocks=BLOCKS))


def whole(stack: BlockStack, anchor_bytes: int) -> ChunkedEngine:
    return WholeEngine(stack, random_ids(WINDOWS, TOKENS), "kl", chunk_windows=2, anchor_bytes=anchor_bytes)


def pair(stack: BlockStack, anchor_bytes: int) -> ChunkedEngine:
    return PairEngine(
        stack,
        random_ids(WINDOWS, TOKENS),
        "cross_entropy",
        prefill=PREFILL,
        prompt_tokens=5,
        first_token="decode",
        chunk_windows=2,
        anchor_bytes=anchor_bytes,
    )


def forwards(engine: ChunkedEngine, candidates: Sequence[Units]) -> int:
    """Block-forwards that the losses of these take, over all chunks."""
    before = engine.block_forwards
    engine.losses(candidates)
    return engine.block_forwards - before


def held_bytes(engine: ChunkedEngine) -> int:
    return sum(h.nbytes for states in engine._anchor._held.values() for h in states.values())


@pytest.mark.parametrize("make", [whole, pair])
def test_swaps_near_an_anchor_cost_fewer_block_forwards_and_the_same_losses(
    make: Callable[[BlockStack, int], ChunkedEngine],
) -> None:
    stack = tiny_stack()
    plain, anchored = make(stack, 0), make(stack, AMPLE)
    for engine in (plain, anchored):
        engine.losses([CURRENT])
        engine.anchor(CURRENT)
    assert anchored.losses(SWAPS[:3]) == plain.losses(SWAPS[:3])  # the first walk passes what it then holds
    # On the way without 1 and 3 lie blocks 0, 2, 4, 5; without 1 alone the swaps of 3 go their own ways from there.
    chunks = 3
    assert forwards(plain, SWAPS[3:]) - forwards(anchored, SWAPS[3:]) == chunks * len({0, 2})
    assert anchored.losses(SWAPS[3:]) == plain.losses(SWAPS[3:])
    assert forwards(plain, SWAPS[5:]) - forwards(anchored, SWAPS[5:]) == chunks * len({0, 2, 4, 5})
    assert anchored.losses(SWAPS) == plain.losses(SWAPS)


@pytest.mark.parametrize("anchor_bytes", [AMPLE, 3 * WINDOWS * (TOKENS - 1) * 32 * 4, 1])
def test_losses_stay_bit_equal_wherever_the_anchor_moves_and_however_little_is_held(anchor_bytes: int) -> None:
    stack = tiny_stack()
    plain, anchored = whole(stack, 0), whole(stack, anchor_bytes)
    for near, other in pairwise([CURRENT, *SWAPS, NOTHING, CURRENT]):
        anchored.anchor(near)
        candidates = [near, other, near | deleting({0}), other - deleting({6}) | deleting({2})]
        assert anchored.losses(candidates) == plain.losses(candidates)
        assert held_bytes(anchored) <= anchor_bytes
    assert anchored.block_forwards <= plain.block_forwards
    assert (anchored.block_forwards < plain.block_forwards) == (anchor_bytes > 1)


def test_with_little_memory_states_are_held_before_every_few_blocks() -> None:
    anchor = Anchor(num_blocks=32, budget_bytes=1000, state_bytes=100)
    anchor.move(way_through(deleting({7}), 32))
    trail = anchor.trail(range(2), torch.zeros(1))
    for block in range(1, 32):
        trail.keep(block, torch.zeros(1))
    anchor.hold(range(2), trail)
    assert sorted(anchor.trail(range(2), torch.zeros(1)).states) == [0, *range(3, 32, 3)]


def test_a_move_of_the_anchor_keeps_what_enters_the_blocks_up_to_the_first_difference() -> None:
    anchor = Anchor(num_blocks=4, budget_bytes=AMPLE, state_bytes=4)
    anchor.move(way_through(deleting({1}), 4))
    anchor.hold(range(1), Trail(way_through(deleting({1}), 4), {block: torch.zeros(1) for block in range(4)}, 1))
    anchor.move(way_through(deleting({1, 2}), 4))
    assert sorted(anchor.trail(range(1), torch.zeros(1)).states) == [0, 1, 2]


def test_windows_that_come_in_other_chunks_are_not_held_twice() -> None:
    stack = tiny_stack()
    engine = whole(stack, AMPLE)
    engine.anchor(CURRENT)
    for windows in (range(5), range(1, 4), range(3), range(5)):
        engine.window_losses(SWAPS, windows)
        assert held_bytes(engine) <= WINDOWS * (TOKENS - 1) * 32 * 4 * (BLOCKS - 1)


def test_held_states_are_let_go_before_a_chunk_is_halved() -> None:
    stack = tiny_stack()
    engine, plain = whole(stack, AMPLE), whole(stack, 0)
    engine.anchor(CURRENT)
    engine.losses(SWAPS)

    def short_of_memory(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if held_bytes(engine):
            raise torch.OutOfMemoryError("the allocator has no more")

    for block in stack.blocks:
        block.register_forward_pre_hook(short_of_memory)
    assert engine.losses(SWAPS) == plain.losses(SWAPS)
    assert forwards(engine, SWAPS) == forwards(plain, SWAPS)  # in chunks of the same size


def test_blocks_before_the_first_change_are_not_read_from_disk(tmp_path: Path) -> None:
    tiny_model("llama", num_blocks=BLOCKS).save_pretrained(tmp_path)
    model, reader = load_streamed(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    ids = random_ids(4, TOKENS)
    read = []
    for anchor_bytes in (0, AMPLE):
        engine = WholeEngine(block_stack(model), ids, "cross_entropy", chunk_windows=4, anchor_bytes=anchor_bytes)
        engine.anchor(CURRENT)
        engine.losses([CURRENT])
        before = reader.blocks_read
        engine.losses(SWAPS[3:])  # 6 for 4, 5 or 7
        read.append(reader.blocks_read - before)
    assert read == [len({0, 2, 4, 5, 6, 7}), len({5, 6, 7})]


def test_annealing_near_its_current_set_finds_the_same_in_fewer_block_forwards() -> None:
    stack, ids = tiny_stack(), random_ids(2, TOKENS)

    def found(anchor_bytes: int) -> tuple[SearchResult, int]:
        engine = WholeEngine(stack, ids, "kl", chunk_windows=2, anchor_bytes=anchor_bytes)
        memo = Memo(engine.window_losses, engine.windows, anchor=engine.anchor)
        result = search(
            memo,
            algorithm="annealing",
            num_blocks=BLOCKS,
            remove=4,
            base=NOTHING,
            scores=[0.0] * BLOCKS,
            evaluations=80,
            seed=0,
            on_progress=lambda done, best: None,
        )
        return result, engine.block_forwards

    (plain, all_forwards), (anchored, fewer) = found(0), found(AMPLE)
    assert anchored == plain
    assert fewer < 0.95 * all_forwards
