from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.workers.pruning.models import FAMILIES, OTHERS, random_ids, tiny_model
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.streaming import load_streamed
from workers.pruning.model.units import deleting
from workers.pruning.search.engine import PairEngine, WholeEngine
from workers.pruning.search.scores import block_scores

CPU = torch.device("cpu")
SINGLES = [deleting({block}) for block in range(5)]


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_streamed_weights_give_what_resident_ones_give_bit_for_bit(family: str, tmp_path: Path) -> None:
    model, ids = tiny_model(family), random_ids(4, 12)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    streamed, _ = load_streamed(tmp_path, dtype=torch.float32, device=CPU)
    assert torch.equal(streamed(input_ids=ids).logits, model(input_ids=ids).logits)
    stacks = [block_stack(model), block_stack(streamed)]
    scores = [block_scores(stack, ids, chunk_windows=4) for stack in stacks]
    assert scores[0] == scores[1]
    losses = [WholeEngine(stack, ids, "kl", chunk_windows=4).losses(SINGLES) for stack in stacks]
    assert losses[0] == losses[1]
    pairs = [
        PairEngine(
            stack, ids, "cross_entropy", prefill=deleting({1}), prompt_tokens=6, first_token="decode", chunk_windows=4
        )
        for stack in stacks
    ]
    candidates = [deleting({1, other}) for other in (0, 2, 3)]
    assert pairs[0].losses(candidates) == pairs[1].losses(candidates)


def test_a_round_reads_every_block_once_and_holds_one(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model, reader = load_streamed(tmp_path, dtype=torch.float32, device=CPU)
    engine = WholeEngine(block_stack(model), random_ids(4, 12), "kl", chunk_windows=4)
    before = reader.blocks_read
    engine.losses(SINGLES)
    assert reader.blocks_read - before == 5
    held = [index for index, block in enumerate(block_stack(model).blocks) if not next(block.parameters()).is_meta]
    assert held == [4]


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tiny_model("llama-tied").save_pretrained(tmp_path)
    model, _ = load_streamed(tmp_path, dtype=torch.float32, device=CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
