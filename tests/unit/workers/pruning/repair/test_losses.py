from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.unit.workers.pruning.models import random_ids, tiny_model
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.model.pair import FirstToken
from workers.pruning.repair.distill import continuation_loss, mean_loss, sequence_loss, trainable
from workers.pruning.repair.losses import (
    LossWeights,
    Outputs,
    cross_entropy,
    healing_loss,
    hidden_distance,
    kl_divergence,
    outputs,
)

PARTS = [LossWeights(1, 0, 0), LossWeights(0, 1, 0), LossWeights(0, 0, 1)]
MIXED = LossWeights(kl=0.5, label=2.0, hidden=3.0)


def logits_of(*distributions: list[float]) -> Tensor:
    return torch.tensor([distributions]).log()  # (1, tokens, vocabulary)


def test_divergence_is_computed_in_parts_to_the_same_value(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, given = torch.randn(2, 2, 5, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(10)
    whole, labelled = kl_divergence(wanted, given), cross_entropy(given.flatten(0, 1), targets)
    monkeypatch.setattr("workers.pruning.repair.losses.HEAD_ELEMENTS", 22)
    assert kl_divergence(wanted, given) == pytest.approx(float(whole), rel=1e-6)
    assert kl_divergence(wanted, wanted) == pytest.approx(0.0, abs=1e-6)
    assert cross_entropy(given.flatten(0, 1), targets) == pytest.approx(float(labelled), rel=1e-6)


def test_each_part_has_the_value_found_by_hand_and_they_add_by_weight() -> None:
    middle, last = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    wanted = Outputs([middle, last], lambda h: logits_of([0.5, 0.5], [0.25, 0.75])[0], 2)
    given = Outputs(
        [middle, torch.tensor([[[3.0, 3.0], [1.0, 2.0]]])], lambda h: logits_of([0.25, 0.75], [0.25, 0.75])[0], 2
    )
    targets = torch.tensor([[1]])  # only the first output has a label
    kl, label, hidden = (float(healing_loss(given, wanted, targets, weights)) for weights in PARTS)
    # 0.5·ln(0.5/0.25) + 0.5·ln(0.5/0.75) for the first token, nothing for the second
    assert kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert label == pytest.approx(-math.log(0.75))
    # nothing in the middle; at last 1² of 3² + 4² for the first token, 1² of 2² for the second
    assert hidden == pytest.approx((1 / 25 + 1 / 4) / 2 / 2)
    mixed = float(healing_loss(given, wanted, targets, MIXED))
    assert mixed == pytest.approx(0.5 * kl + 2 * label + 3 * hidden)


@pytest.mark.parametrize("rows", [1, 4, 5, 33])
def test_logits_are_held_some_at_a_time_to_the_same_loss_and_gradients(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student, ids = tiny_model("llama"), drop_blocks(tiny_model("llama"), {2}), random_ids(3, 12)
    parameters = trainable(student, [0, 1, 2, 3], frozen=set())
    loss, held = sequence_loss(student, teacher, [0, 1, 3, 4], MIXED), []
    student.get_output_embeddings().register_forward_hook(lambda head, given, logits: held.append(logits.numel()))

    def found() -> tuple[float, list[Tensor]]:
        value = loss(ids)
        return value.item(), list(torch.autograd.grad(value, list(parameters.values())))

    expected, gradients = found()
    assert max(held) == 36 * 97
    held.clear()
    monkeypatch.setattr("workers.pruning.repair.losses.LOSS_LOGITS", rows * 97)
    value, in_parts = found()
    assert max(held) == rows * 97
    assert sum(held) == 2 * 36 * 97  # once more for the gradients
    assert value == pytest.approx(expected, rel=1e-6)
    for one, other in zip(in_parts, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))
    held.clear()
    assert mean_loss(loss, ids, 3) == pytest.approx(expected, rel=1e-6)
    assert sum(held) == 36 * 97


@pytest.mark.parametrize("family", ["llama", "qwen2-mixed"])
def test_outputs_are_the_models_own(family: str) -> None:
    model, ids = tiny_model(family), random_ids(2, 12)
    expected = model(input_ids=ids, output_hidden_states=True)
    found = outputs(model, ids, [1, 4])
    assert torch.equal(found.head(found.hidden[-1]), expected.logits)
    assert found.vocabulary == expected.logits.shape[-1]
    for state, layer in zip(found.hidden, (1, 4, -1), strict=True):
        assert torch.equal(state, expected.hidden_states[layer])
    outputs(model, ids, [])
    assert len(found.hidden) == 3  # nobody listens any more


def test_a_part_of_whole_windows_is_what_the_models_own_outputs_give() -> None:
    teacher, student, ids = tiny_model("llama"), drop_blocks(tiny_model("llama"), {2}), random_ids(3, 12)
    dense, pruned = (model(input_ids=ids, output_hidden_states=True) for model in (teacher, student))
    kl, label, hidden = (float(sequence_loss(student, teacher, [0, 1, 3, 4], weights)(ids)) for weights in PARTS)
    assert kl == pytest.approx(float(kl_divergence(dense.logits, pruned.logits)))
    assert label == pytest.approx(float(student(input_ids=ids, labels=ids).loss))
    # What the student's second, third and fourth block see, beside what the teacher's 1, 3 and 4 do, and the last.
    states = zip((1, 3, 4, -1), (1, 2, 3, -1), strict=True)
    distances = [float(hidden_distance(dense.hidden_states[t], pruned.hidden_states[s])) for t, s in states]
    assert hidden == pytest.approx(sum(distances) / 4)


@pytest.mark.parametrize(("first_token", "read"), [("decode", 4), ("prefill", 5)])
def test_on_continuations_only_the_tokens_that_decode_predicts_count(first_token: FirstToken, read: int) -> None:
    teacher, weights, ids = tiny_model("llama"), tiny_model("llama"), random_ids(3, 12)
    prefill, decode = drop_blocks(weights, {1}), drop_blocks(weights, {1, 3})
    prompt = prefill(input_ids=ids[:, :read], use_cache=True).past_key_values
    prompt.layers = [prompt.layers[layer] for layer in (0, 1, 3)]
    pruned = decode(input_ids=ids[:, read:11], past_key_values=prompt, output_hidden_states=True)
    dense = teacher(input_ids=ids[:, :11], output_hidden_states=True)
    losses = [
        continuation_loss(
            prefill, decode, [0, 1, 3], teacher, [0, 2, 4], part, prompt_tokens=5, first_token=first_token
        )
        for part in PARTS
    ]
    kl, label, hidden = (float(loss(ids)) for loss in losses)
    assert kl == pytest.approx(float(kl_divergence(dense.logits[:, read:], pruned.logits)))
    assert label == pytest.approx(float(cross_entropy(pruned.logits.flatten(0, 1), ids[:, read + 1 :].flatten())))
    states = zip((2, 4, -1), (1, 2, -1), strict=True)
    distances = [float(hidden_distance(dense.hidden_states[t][:, read:], pruned.hidden_states[s])) for t, s in states]
    assert hidden == pytest.approx(sum(distances) / 3)


def test_the_mean_over_windows_does_not_depend_on_how_many_are_computed_at_a_time() -> None:
    teacher, student, ids = tiny_model("llama"), drop_blocks(tiny_model("llama"), {2}), random_ids(5, 12)
    loss = sequence_loss(student, teacher, [0, 1, 3, 4], MIXED)
    assert mean_loss(loss, ids, 2) == pytest.approx(mean_loss(loss, ids, 5), rel=1e-6)
