from __future__ import annotations

import math

import pytest
import torch

from tests.unit.workers.pruning.models import random_ids, tiny_model
from workers.pruning.blocks import drop_blocks
from workers.pruning.measure import parameters, perplexity, speeds


def test_perplexity_is_the_exponential_of_the_models_own_loss() -> None:
    model, ids = tiny_model("llama"), random_ids(5, 16)
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in ids]
    mean = sum(losses) / 5
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 4)
    found = perplexity(model, ids, batch=2)
    assert found.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.standard_error == pytest.approx(math.exp(mean) * deviation / math.sqrt(5), rel=1e-4)


def test_one_window_has_no_standard_error() -> None:
    assert perplexity(tiny_model("llama"), random_ids(1, 8), batch=1).standard_error == 0.0


def test_tied_weights_count_once() -> None:
    tied, untied = tiny_model("llama-tied"), tiny_model("llama")
    assert parameters(untied) - parameters(tied) == 97 * 32


def test_speeds_are_measured_for_every_model() -> None:
    model = tiny_model("llama")
    found = speeds(
        {"dense": model, "pruned": drop_blocks(model, {1, 2, 3})}, random_ids(1, 32), new_tokens=4, repeats=2
    )
    assert found.keys() == {"dense", "pruned"}
    assert all(speed.prefill_tokens_per_second > 0 and speed.decode_tokens_per_second > 0 for speed in found.values())
    assert torch.is_grad_enabled()
