from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.unit.workers.pruning.models import random_ids, tiny_model
from workers.pruning.model import measure
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.model.measure import parameters, perplexity, quality, speeds


def test_perplexity_is_the_exponential_of_the_models_own_loss() -> None:
    model, ids = tiny_model("llama"), random_ids(5, 16)
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in ids]
    mean = sum(losses) / 5
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 4)
    found = perplexity(model, ids, batch=2)
    assert found.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.standard_error == pytest.approx(math.exp(mean) * deviation / math.sqrt(5), rel=1e-4)


def test_one_window_has_no_standard_error() -> None:
    found = perplexity(tiny_model("llama"), random_ids(1, 8), batch=1)
    assert found.standard_error is None
    assert str(found) == f"{found.value:.2f}"


@pytest.mark.parametrize("logits_bytes", [1, 4 * 97 * 7, measure.LOGITS_BYTES])
def test_quality_compares_whole_distributions_however_little_memory_holds(
    logits_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LOGITS_BYTES", logits_bytes)
    dense, ids = tiny_model("llama"), random_ids(5, 16)
    model = drop_blocks(dense, {1, 2})
    found = quality(model, dense, ids, batch=2)
    logits, dense_logits = (each(input_ids=ids[:, :-1]).logits for each in (model, dense))
    kl = F.softmax(dense_logits, -1) * (F.log_softmax(dense_logits, -1) - F.log_softmax(logits, -1))
    assert found.kl_to_dense == pytest.approx(float(kl.sum(-1).mean()), rel=1e-4)
    assert found.kl_to_dense > 1e-4
    assert found.top1_agreement == int((logits.argmax(-1) == dense_logits.argmax(-1)).sum()) / (5 * 15)
    assert found.perplexity.value == pytest.approx(perplexity(model, ids, batch=5).value, rel=1e-6)


def test_the_dense_model_is_like_itself() -> None:
    dense, ids = tiny_model("qwen3"), random_ids(3, 16)
    found = quality(dense, dense, ids, batch=2)
    assert (found.kl_to_dense, found.top1_agreement) == (0.0, 1.0)


def test_tied_weights_count_once() -> None:
    tied, untied = tiny_model("llama-tied"), tiny_model("llama")
    assert parameters(untied) - parameters(tied) == 97 * 32


def test_speeds_are_measured_for_every_model() -> None:
    model = tiny_model("llama")
    found = speeds(
        {"dense": model, "pruned": drop_blocks(model, {1, 2, 3})}, random_ids(1, 32), new_tokens=4, repeats=2
    )
    assert found.keys() == {"dense", "pruned"}
    for speed in found.values():
        assert speed.time_to_first_token_ms * speed.prefill_tokens_per_second == pytest.approx(32 * 1000)
        assert speed.inter_token_latency_ms * speed.decode_tokens_per_second == pytest.approx(1000)
        assert speed.peak_memory_bytes is None
        assert speed.speed_repeats == 2
        for median, spread in (
            (speed.time_to_first_token_ms, speed.time_to_first_token_spread_ms),
            (speed.inter_token_latency_ms, speed.inter_token_latency_spread_ms),
        ):
            assert spread.low <= median <= spread.high
            assert median == pytest.approx((spread.low + spread.high) / 2)
    assert torch.is_grad_enabled()
