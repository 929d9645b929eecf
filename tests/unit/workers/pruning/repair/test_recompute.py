from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.unit.workers.pruning.models import random_ids, tiny_model
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.pair import FirstToken
from workers.pruning.repair.distill import Loss, continuation_loss, sequence_loss, trainable
from workers.pruning.repair.losses import LossWeights
from workers.pruning.repair.recompute import recomputed_blocks

ALL_PARTS = LossWeights(1.0, 0.5, 0.5)


def gradients(loss: Loss, model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    parameters = trainable(model, [0, 2, 4], frozen=set())
    loss(ids).backward()
    found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    assert found.keys() == parameters.keys()
    return found


@pytest.mark.parametrize("path", ["whole", "continuation"])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "qwen2-mixed", "qwen3"])
def test_gradients_are_those_of_blocks_that_keep_everything(family: str, path: str) -> None:
    teacher, prefill, weights = (tiny_model(family) for _ in range(3))
    student, ids = drop_blocks(weights, {1, 3}), random_ids(2, 16)
    loss = {
        "whole": sequence_loss(student, teacher, [0, 2, 4], ALL_PARTS),
        "continuation": continuation_loss(
            drop_blocks(prefill, {1}),
            student,
            [0, 1, 3],
            teacher,
            [0, 2, 4],
            ALL_PARTS,
            prompt_tokens=8,
            first_token="decode",
        ),
    }[path]
    expected, value = gradients(loss, weights, ids), loss(ids)
    with recomputed_blocks(student):
        found, again = gradients(loss, weights, ids), loss(ids)
    assert torch.equal(again, value)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "qwen2-mixed", "qwen3"])
def test_gradients_go_through_keys_and_values_that_a_recomputed_block_left(
    family: str, first_token: FirstToken
) -> None:
    teacher, weights, decode = (tiny_model(family) for _ in range(3))
    prefill, ids = drop_blocks(weights, {1, 3}), random_ids(2, 16)
    decode = drop_blocks(decode, {1, 3})
    loss = continuation_loss(
        prefill, decode, [0, 1, 2], teacher, [0, 2, 4], ALL_PARTS, prompt_tokens=8, first_token=first_token
    )
    parameters = {name: p for name, p in trainable(weights, [0, 2], frozen=set()).items() if "_proj" in name}

    def found() -> list[Tensor]:
        return list(torch.autograd.grad(loss(ids), list(parameters.values()), allow_unused=False))

    expected = found()
    with recomputed_blocks(prefill, decode):
        again = found()
    assert any(gradient.abs().max() > 0 for gradient in expected)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


def test_a_block_runs_twice_a_step_meanwhile_and_once_afterwards() -> None:
    teacher, weights = tiny_model("llama"), tiny_model("llama")
    student, ids = drop_blocks(weights, {1}), random_ids(2, 16)
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    block_stack(student).blocks[1].mlp.register_forward_pre_hook(count)  # type: ignore[union-attr]
    loss = sequence_loss(student, teacher, [0, 2, 3, 4], ALL_PARTS)
    with recomputed_blocks(student):
        gradients(loss, weights, ids)
    assert runs == 2
    gradients(loss, weights, ids)
    assert runs == 3
