"""What the export proves of a checkpoint's cache, where rounding decides between two tokens and where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.unit.workers.pruning.models import random_ids, tiny_model
from workers.stages.checkpoint_proof import ExportMismatch, prove_cache

TIED = (5, 9)
IDS = random_ids(1, 12)


def with_cache_off_by(amount: float) -> PreTrainedModel:
    """A model that finds two tokens most likely, one as much as the other; with a cache one gains `amount`."""
    model = tiny_model("llama")

    def change(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        output.logits[..., TIED] = 50.0
        if kwargs["use_cache"]:
            output.logits[..., TIED[1]] += amount
        return output

    model.register_forward_hook(change, with_kwargs=True)
    return model


def answer(model: PreTrainedModel, *, use_cache: bool) -> int:
    generate: Any = model.generate
    return int(generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=1, use_cache=use_cache)[0, -1])


def test_a_tie_that_rounding_decides_is_no_mismatch() -> None:
    model = with_cache_off_by(1e-5)
    assert [answer(model, use_cache=use_cache) for use_cache in (True, False)] == [TIED[1], TIED[0]]
    prove_cache("decode", model, IDS)


def test_a_cache_that_changes_logits_is_a_mismatch() -> None:
    with pytest.raises(ExportMismatch, match="decode: greedy generation with the KV cache differs"):
        prove_cache("decode", with_cache_off_by(0.1), IDS)
