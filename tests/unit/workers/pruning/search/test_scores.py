from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tests.unit.workers.pruning.models import FAMILIES, random_ids, tiny_model
from workers.pruning.model.blocks import block_stack, capture_calls
from workers.pruning.search.scores import Scores, block_scores


@pytest.mark.parametrize("family", FAMILIES)
def test_cosines_equal_those_of_the_models_hidden_states(family: str) -> None:
    model, ids = tiny_model(family), random_ids(5, 16)
    h = list(model(input_ids=ids, output_hidden_states=True).hidden_states)[:-1]
    found = block_scores(block_stack(model), ids, chunk_windows=2)
    # transformers norms the last hidden state, so it is left out here.
    expected = [float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairwise(h)]
    assert found.cosine[:-1] == pytest.approx(expected, abs=1e-5)


def test_merge_errors_are_relative_to_deleting_both_blocks() -> None:
    model, ids = tiny_model("llama"), random_ids(4, 16)
    stack = block_stack(model)
    h = model(input_ids=ids, output_hidden_states=True).hidden_states
    moved = (h[3] - h[1]).pow(2).sum()
    alone = capture_calls(stack, ids).run(stack, 2, h[1])
    errors = block_scores(stack, ids, chunk_windows=3).merge_errors
    assert errors[1, 2] == pytest.approx(float((alone - h[3]).pow(2).sum() / moved), rel=1e-4)
    assert errors[2, 1] == pytest.approx(float((h[2] - h[3]).pow(2).sum() / moved), rel=1e-4)


def test_json_keeps_the_scores() -> None:
    scores = block_scores(block_stack(tiny_model("llama")), random_ids(1, 8), chunk_windows=1)
    assert Scores.from_json(json.loads(json.dumps(scores.to_json()))) == scores


def test_a_block_that_is_not_finite_is_named() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="block 2 gives hidden states that are not finite"):
        block_scores(block_stack(model), random_ids(1, 8), chunk_windows=1)
