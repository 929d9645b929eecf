from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.unit.workers.pruning.models import random_ids, reference_model, reference_windows, tiny_model
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.measure import perplexity
from workers.pruning.model.parts import Half, block_part, pruned
from workers.pruning.model.plan import BlockPlan
from workers.pruning.repair.distill import load_tensors
from workers.pruning.repair.fold import (
    Fold,
    Foldable,
    Gap,
    Moments,
    by_size,
    crossed_change,
    fold,
    foldable,
    gaps_of,
    ridge_change,
    wanted_states,
)

SPAN = BlockPlan(5, frozenset({2, 3}))


def folded_model(model: PreTrainedModel, plan: BlockPlan, made: Fold) -> PreTrainedModel:
    weights = copy.deepcopy(model)
    load_tensors(weights, made.tensors)
    return pruned(weights, plan)


def folding(model: PreTrainedModel, plan: BlockPlan, windows: Tensor) -> Fold:
    stack = block_stack(model)
    wanted = wanted_states(stack, plan, windows, chunk_windows=3)
    return fold(stack, plan, wanted, change_of=lambda *halves: exact(halves))


def exact(halves: tuple[Moments, Moments]) -> Tensor:
    return ridge_change(halves[0] + halves[1], 1e-9)


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def with_linear_span(family: str) -> PreTrainedModel:
    """A model whose blocks 2 and 3 add linear maps of what the MLP of block 1 added, and nothing else.

    That alone writes the upper half of the hidden state, and they read no more.
    """
    model = tiny_model(family)
    stack = block_stack(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "wte" in name or "wpe" in name:
                parameter[:, 16:] = 0
        halves: list[tuple[int, Half]] = [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]
        for number, half in halves:
            for name in block_part(stack.blocks[number], half).last:
                parameter = stack.blocks[number].get_parameter(name)
                written: Tensor = parameter.T if family == "gpt2" else parameter
                written[slice(0, 16) if (number, half) == (1, "mlp") else slice(16, 32)] = 0
        for number in (2, 3):
            block = stack.blocks[number]
            for name in block_part(block, "attention").last:
                block.get_parameter(name).zero_()
            linear = nn.Linear(32, 32, bias=False)
            linear.weight.copy_(torch.randn((32, 32), generator=torch.Generator().manual_seed(number)) / 6)
            linear.weight[:, :16] = 0
            block.mlp = linear
            setattr(block, "ln_2" if family == "gpt2" else "post_attention_layernorm", nn.Identity())
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "gpt2"])
def test_a_span_that_is_a_linear_map_of_the_mlp_before_it_is_undone(family: str) -> None:
    model, ids = with_linear_span(family), random_ids(9, 16)
    made = folding(model, SPAN, ids)
    unseen = random_ids(4, 12)
    dense = logits(model, unseen)
    far = float((logits(pruned(model, SPAN), unseen) - dense).abs().max())
    near = float((logits(folded_model(model, SPAN, made), unseen) - dense).abs().max())
    assert far > 0.1
    assert near < 1e-4 * float(dense.abs().max())
    assert made.errors[0].after < 1e-8 < made.errors[0].before


def test_gaps_are_whole_runs_of_removed_blocks() -> None:
    plan = BlockPlan(10, frozenset({0, 3, 4}), {7: 8}, {5: "kv_only", 6: "attention"})
    assert gaps_of(plan) == [Gap(0, 0), Gap(3, 4), Gap(7, 7)]


def test_several_gaps_bring_a_trained_model_back_towards_the_dense_one() -> None:
    model, plan = reference_model(), BlockPlan(12, frozenset({2, 4, 5, 9}))
    windows, unseen = reference_windows("calibration", 24, 128), reference_windows("validation", 8, 128)
    stack = block_stack(model)
    made = fold(stack, plan, wanted_states(stack, plan, windows, chunk_windows=8))
    assert [error.gap for error in made.errors] == [Gap(2, 2), Gap(4, 5), Gap(9, 9)]
    assert all(error.after < error.before for error in made.errors)
    before = perplexity(pruned(model, plan), unseen, batch=8).value
    after = perplexity(folded_model(model, plan, made), unseen, batch=8).value
    assert after < 0.97 * before


@pytest.mark.parametrize(
    ("family", "plan", "reason"),
    [
        ("gemma2", SPAN, "does not add its MLP's output as it is"),
        ("gemma3", SPAN, "does not add its MLP's output as it is"),
        ("olmo2", SPAN, "does not add its MLP's output as it is"),
        ("mixtral", SPAN, "is not a plain linear layer"),
        ("llama", BlockPlan(5, frozenset({0, 1})), "no block stands before it"),
        ("llama", BlockPlan(5, frozenset({2}), parts={1: "mlp"}), "gives up its MLP"),
    ],
)
def test_a_gap_that_nothing_can_take_says_why(family: str, plan: BlockPlan, reason: str) -> None:
    stack = block_stack(tiny_model(family))
    (gap,) = gaps_of(plan)
    assert reason in str(foldable(stack, plan, gap))
    made = fold(stack, plan, wanted_states(stack, plan, random_ids(4, 8), chunk_windows=2))
    assert not made.tensors
    assert [one.gap for one in made.left_out] == [gap]


def test_what_an_mlp_adds_is_known_by_its_factor() -> None:
    for family, factor in (("granite", 0.5), ("gpt2", 1.0), ("opt", 1.0), ("gpt-neox", 1.0), ("phi3", 1.0)):
        found = foldable(block_stack(tiny_model(family)), SPAN, Gap(2, 3))
        assert isinstance(found, Foldable), (family, found)
        assert found.factor == pytest.approx(factor, rel=1e-4)


def test_blocks_kept_for_their_keys_and_values_are_no_gap_and_take_no_fold() -> None:
    model, ids = tiny_model("llama"), random_ids(9, 16)
    assert not folding(model, BlockPlan(5, parts={2: "kv_only", 3: "kv_only"}), ids).tensors
    behind = folding(model, BlockPlan(5, frozenset({3}), parts={2: "kv_only"}), ids)
    assert not behind.tensors
    assert "block 2 before it gives up its MLP" in behind.left_out[0].reason


def test_a_map_that_does_not_hold_on_other_windows_is_none() -> None:
    seeded = torch.Generator().manual_seed(0)
    halves = Moments.none(8, torch.device("cpu")), Moments.none(8, torch.device("cpu"))
    for half in halves:
        m, r = torch.randn((2, 12, 8), generator=seeded)
        half.add(m, r, r)
    assert not crossed_change(*halves).any()
    for half in halves:
        m = torch.randn((400, 8), generator=seeded)
        half.add(m, 2 * m, m)
    assert crossed_change(*halves).diagonal().mean() > 1


def test_errors_by_size_weigh_a_token_by_its_own_state() -> None:
    wanted = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    assert by_size(wanted).tolist() == pytest.approx([1 / 25, 1 / 2500])
