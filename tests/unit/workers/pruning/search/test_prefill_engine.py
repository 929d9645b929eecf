from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit.workers.pruning.models import EXPERTS, FAMILIES, OTHERS, TOLERANCE, random_ids, tiny_model
from workers.pruning.model.blocks import UnsupportedArchitecture, block_stack
from workers.pruning.model.pair import FirstToken, pd_loss
from workers.pruning.model.parts import prove_parts, pruned
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.model.units import Unit, Units, blocks_of, deleting, parts_of
from workers.pruning.search.engine import PairEngine, WholeEngine
from workers.pruning.search.prefill_engine import PrefillEngine

WITH_PARTS = [family for family in FAMILIES + OTHERS + EXPERTS if family != "opt-projected"]
DECODE: Units = deleting({1}) | {Unit(2, "attention"), Unit(4, "mlp")}
PREFILL: list[Units] = [
    deleting({1}),
    deleting({1}) | {Unit(3, "kv_only")},
    deleting({1}) | {Unit(0, "kv_only"), Unit(3, "kv_only")},
    frozenset({Unit(1, "kv_only"), Unit(2, "kv_only"), Unit(4, "kv_only")}),
    deleting({1}) | {Unit(2, "attention"), Unit(3, "mlp")},
    frozenset({Unit(0, "mlp"), Unit(4, "kv_only")}),
]


def plan(units: Units) -> BlockPlan:
    return BlockPlan(5, blocks_of(units), parts=parts_of(units))


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@pytest.mark.parametrize("family", WITH_PARTS)
def test_both_engines_give_the_loss_of_two_models_whose_last_projections_are_zero(
    family: str, first_token: FirstToken
) -> None:
    model, ids = tiny_model(family), random_ids(3, 20)
    stack = block_stack(model)
    engine = PrefillEngine(
        stack, ids, "cross_entropy", decode=DECODE, prompt_tokens=9, first_token=first_token, chunk_windows=2
    )
    decode = plan(DECODE)

    def loss(prefill: Units) -> float:
        halves = pruned(model, plan(prefill)), pruned(model, decode)
        layer_map = kv_layer_map(plan(prefill), decode)
        return pd_loss(*halves, layer_map, ids, prompt_tokens=9, first_token=first_token, batch=3)

    expected = {prefill: loss(prefill) for prefill in PREFILL}
    assert engine.losses(PREFILL) == pytest.approx(expected, abs=TOLERANCE)
    for prefill in PREFILL[2:4]:
        pair = PairEngine(
            stack,
            ids,
            "cross_entropy",
            prefill=prefill,
            prompt_tokens=9,
            first_token=first_token,
            chunk_windows=3,
        )
        assert pair.losses([DECODE])[DECODE] == pytest.approx(expected[prefill], abs=TOLERANCE)


@pytest.mark.parametrize("family", WITH_PARTS)
def test_losses_on_whole_windows_are_those_of_the_model_whose_last_projections_are_zero(family: str) -> None:
    model, ids = tiny_model(family), random_ids(3, 20)
    sets = [frozenset({Unit(0, "mlp")}), frozenset({Unit(1, "attention"), Unit(3)}), frozenset({Unit(4, "attention")})]

    def loss(units: Units) -> float:
        logits: Tensor = pruned(model, plan(units))(input_ids=ids).logits[:, :-1]
        return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    with torch.no_grad():
        expected = {units: loss(units) for units in sets}
    engine = WholeEngine(block_stack(model), ids, "cross_entropy", chunk_windows=2)
    assert engine.losses(sets) == pytest.approx(expected, abs=TOLERANCE)


def test_a_round_over_all_blocks_runs_about_half_of_their_forwards() -> None:
    blocks = 32
    model, ids = tiny_model("llama", num_blocks=blocks), random_ids(2, 12)
    stack = block_stack(model)
    engine = PrefillEngine(
        stack, ids, "cross_entropy", decode=frozenset(), prompt_tokens=6, first_token="decode", chunk_windows=2
    )
    found = engine.losses([frozenset({Unit(block, "kv_only")}) for block in range(blocks)])
    assert len(set(found.values())) == blocks
    assert engine.block_forwards <= 0.55 * blocks * blocks


def test_decode_cannot_read_an_attention_that_prefill_left_nothing_for() -> None:
    ids = random_ids(2, 12)
    engine = PrefillEngine(
        block_stack(tiny_model("llama")),
        ids,
        "cross_entropy",
        decode=deleting({1}),
        prompt_tokens=6,
        first_token="decode",
        chunk_windows=2,
    )
    with pytest.raises(ValueError, match="decode keeps block 2"):
        engine.losses([frozenset({Unit(2, "attention")})])


@pytest.mark.parametrize("family", WITH_PARTS)
def test_blocks_of_every_family_pass_the_hidden_state_without_both_parts(family: str) -> None:
    prove_parts(block_stack(tiny_model(family)), ["kv_only"])


def test_a_block_that_adds_something_of_its_own_is_refused() -> None:
    # It norms the sum of what it was given and what its parts give.
    with pytest.raises(UnsupportedArchitecture, match="changes the hidden state"):
        prove_parts(block_stack(tiny_model("opt-projected")), ["mlp"])


def test_the_parts_of_a_model_that_stay_are_shared_with_it() -> None:
    model = tiny_model("llama")
    silent = pruned(model, BlockPlan(5, frozenset({0}), parts={2: "kv_only"}))
    shared = {id(parameter) for parameter in model.parameters()}
    own = {name for name, parameter in silent.named_parameters() if id(parameter) not in shared}
    assert own == {"model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    assert all(not silent.get_parameter(name).any() and model.get_parameter(name).any() for name in own)
