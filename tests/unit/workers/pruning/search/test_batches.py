from __future__ import annotations

import json
from collections import Counter
from itertools import combinations

import pytest

from tests.unit.workers.pruning.models import random_ids, tiny_model
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.units import Units, blocks_of, deleting
from workers.pruning.search.batches import Evaluation, Piece, Recipe, joined, split

NUM_BLOCKS = 5
SETS = [deleting({1, *more}) for count in range(3) for more in combinations((0, 2, 3, 4), count)]
WHOLE = Recipe("kl", chunk_windows=2, prompt_tokens=9)
PAIR = Recipe("cross_entropy", chunk_windows=2, prompt_tokens=9, prefill=deleting({1}))
ANCHOR_BYTES = 2**20
PROJECTING = Recipe("hidden", chunk_windows=3, prompt_tokens=9, prefill=deleting({1, 2}), project_skipped=True)


def forwards(candidates: tuple[Units, ...], num_blocks: int) -> int:
    """Blocks that a walk runs for some sets."""
    return sum(
        len({frozenset(r for r in blocks_of(c) if r < block) for c in candidates if block not in blocks_of(c)})
        for block in range(num_blocks)
    )


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("recipe", [WHOLE, PAIR, PROJECTING])
@pytest.mark.parametrize("windows", [range(11), range(4, 8), range(3, 4)])
def test_losses_of_pieces_are_bit_for_bit_those_of_the_whole(workers: int, recipe: Recipe, windows: range) -> None:
    stack, ids = block_stack(tiny_model("llama")), random_ids(11, 20)
    whole = recipe.build(stack, ids, anchor_bytes=ANCHOR_BYTES).window_losses(SETS, windows)
    pieces = split(SETS, windows, chunk_windows=recipe.chunk_windows, num_blocks=NUM_BLOCKS, workers=workers)
    anchor = deleting({1, 2})
    parts = {}
    for piece in reversed(pieces):  # in another process each, and in any order
        content = json.loads(json.dumps(Evaluation(recipe, recipe.objective, piece, anchor).to_json()))
        evaluation = Evaluation.from_json(content)
        parts[piece] = json.loads(
            json.dumps(evaluation.losses(evaluation.recipe.build(stack, ids, anchor_bytes=ANCHOR_BYTES)))
        )
    assert joined(SETS, parts) == whole


@pytest.mark.parametrize("workers", [1, 2, 3, 64])
@pytest.mark.parametrize("windows", [1, 4, 64, 4096])
def test_every_set_is_measured_once_on_every_window_and_chunks_stay_whole(workers: int, windows: int) -> None:
    pieces = split(SETS, range(windows), chunk_windows=6, num_blocks=NUM_BLOCKS, workers=workers)
    measured = Counter((candidate, window) for p in pieces for candidate in p.candidates for window in p.windows)
    assert measured == Counter((candidate, window) for candidate in SETS for window in range(windows))
    assert all(p.windows.start % 6 == 0 and (p.windows.stop % 6 == 0 or p.windows.stop == windows) for p in pieces)
    assert min(workers, len(SETS)) <= len(pieces) <= 8 * workers * len(SETS)
    assert len(pieces) <= 8 * workers or windows < 6 * workers


@pytest.mark.parametrize(("workers", "most"), [(2, 0.6), (4, 0.4)])
def test_parts_of_the_sets_take_much_the_same_work(workers: int, most: float) -> None:
    """A greedy step of 32 blocks on one chunk: what blocks before the sets' parting cost comes on top."""
    sets = [deleting({7, block}) for block in range(32) if block != 7]
    pieces = split(sets, range(4), chunk_windows=6, num_blocks=32, workers=workers)
    assert len(pieces) == workers
    largest = max(forwards(piece.candidates, 32) for piece in pieces)
    assert largest <= most * forwards(tuple(sets), 32)


def test_one_set_on_one_chunk_is_one_piece() -> None:
    pieces = split(SETS[:1], range(4), chunk_windows=6, num_blocks=NUM_BLOCKS, workers=5)
    assert pieces == [Piece((SETS[0],), range(4))]
