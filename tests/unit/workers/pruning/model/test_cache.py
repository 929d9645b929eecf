from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.architectures import held_bytes
from benchmarks.tiny_architectures import tiny_config
from benchmarks.tiny_architectures import tiny_model as any_model
from tests.unit.workers.pruning.models import random_ids, tiny_model
from workers.pruning.model.cache import cache_bytes


@pytest.mark.parametrize("family", ["qwen3", "mistral-sliding", "gemma3"])
def test_bytes_are_those_of_the_tensors(family: str) -> None:
    model, ids = tiny_model(family), random_ids(1, 13)
    held = held_bytes(model, ids)
    assert cache_bytes(model, 13, torch.float32) == held
    assert cache_bytes(model, 13, torch.bfloat16) == held // 2


def hybrid() -> PreTrainedModel:
    """Gated delta nets, which keep a state in float32, and attention."""
    with torch.no_grad():
        return any_model(tiny_config("qwen3_next"))


def test_a_state_that_stays_in_float32_counts_as_it_is_held() -> None:
    model = hybrid()
    served: Any = hybrid()
    served.to(torch.bfloat16)
    held = held_bytes(served, random_ids(1, 13))
    assert held > held_bytes(model, random_ids(1, 13)) // 2
    assert cache_bytes(model, 13, torch.bfloat16) == held
    assert cache_bytes(served, 13, torch.bfloat16) == held


def test_weights_are_left_as_they_were() -> None:
    model = hybrid()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cache_bytes(model, 5, torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
