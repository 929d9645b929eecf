from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests.unit.workers.pruning.models import (
    EXPERTS,
    FAMILIES,
    OTHERS,
    TOLERANCE,
    random_ids,
    reference_model,
    reference_windows,
    tiny_model,
)
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.pair import FirstToken, pd_loss
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.model.units import NOTHING, Units, blocks_of, deleting, kept_for_cache
from workers.pruning.search.engine import NonFiniteLoss, Objective, PairEngine, WholeEngine, windows_in

HALVES: tuple[FirstToken, ...] = ("decode", "prefill")
SETS = [deleting(s) for s in ((), (0,), (2,), (1, 3), (1, 4), (0, 1, 2), (4,))]


def plain_loss(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor, objective: Objective) -> float:
    """The objective from two ordinary forwards."""
    logits, reference = (m(input_ids=ids).logits[:, :-1].float() for m in (model, dense))
    if objective == "cross_entropy":
        return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    if objective == "kl":
        log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    h, wanted = (m.base_model(input_ids=ids).last_hidden_state[:, :-1] for m in (model, dense))
    return float(((h - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)).mean())


@pytest.mark.parametrize("objective", ["kl", "cross_entropy", "hidden"])
@pytest.mark.parametrize("family", FAMILIES + OTHERS + EXPERTS)
def test_losses_equal_those_of_the_pruned_models_run_on_their_own(family: str, objective: Objective) -> None:
    model, ids = tiny_model(family), random_ids(5, 18)
    engine = WholeEngine(block_stack(model), ids, objective, chunk_windows=2)
    found = engine.losses(SETS)
    expected = {s: plain_loss(drop_blocks(model, blocks_of(s)), model, ids, objective) for s in SETS}
    assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@pytest.mark.parametrize("family", FAMILIES + OTHERS + EXPERTS)
def test_pair_losses_equal_those_of_two_models_with_the_cache_handed_over(family: str, first_token: FirstToken) -> None:
    model, ids = tiny_model(family), random_ids(3, 20)
    prefill = deleting({1})
    engine = PairEngine(
        block_stack(model),
        ids,
        "cross_entropy",
        prefill=prefill,
        prompt_tokens=9,
        first_token=first_token,
        chunk_windows=2,
    )
    sets = [prefill, prefill | deleting({3}), prefill | deleting({0, 4})]
    expected = {
        s: pd_loss(
            drop_blocks(model, blocks_of(prefill)),
            drop_blocks(model, blocks_of(s)),
            kv_layer_map(BlockPlan(5, blocks_of(prefill)), BlockPlan(5, blocks_of(s))),
            ids,
            prompt_tokens=9,
            first_token=first_token,
            batch=3,
        )
        for s in sets
    }
    assert engine.losses(sets) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_that_projects_what_it_skips_lets_decode_keep_those_blocks(
    family: str, first_token: FirstToken
) -> None:
    model, ids = tiny_model(family), random_ids(3, 20)
    stack, prefill = block_stack(model), kept_for_cache({1, 3})
    engine, nested = (
        PairEngine(
            stack,
            ids,
            "cross_entropy",
            prefill=skipped,
            prompt_tokens=9,
            first_token=first_token,
            chunk_windows=2,
        )
        for skipped in (prefill, deleting({1, 3}))
    )
    read = 8 if first_token == "decode" else 9
    assert engine.losses([deleting({1, 3, 4})]) == nested.losses([deleting({1, 3, 4})])

    def loss(decode: Units) -> float:
        """By forwards of the whole model, in which hooks let the removed blocks' inputs pass."""
        cache = DynamicCache(config=model.config)
        outputs = []
        for gone, part in ((prefill, ids[:, :read]), (decode, ids[:, read:-1])):
            hooks = [
                stack.blocks[block].register_forward_hook(lambda module, args, out: args[0])
                for block in sorted(unit.block for unit in gone)
            ]
            outputs.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
            for hook in hooks:
                hook.remove()
        logits = torch.cat(outputs, dim=1)[:, 8:]
        return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 9:].flatten()))

    sets = [deleting(s) for s in ((), (1,), (0, 3), (2, 4))]
    assert engine.losses(sets) == pytest.approx({s: loss(s) for s in sets}, abs=TOLERANCE)


def test_losses_can_be_asked_for_by_another_objective() -> None:
    stack, ids = block_stack(tiny_model("llama")), random_ids(3, 20)
    for make in (
        lambda objective: WholeEngine(stack, ids, objective, chunk_windows=2),
        lambda objective: PairEngine(
            stack, ids, objective, prefill=NOTHING, prompt_tokens=9, first_token="decode", chunk_windows=2
        ),
    ):
        assert make("kl").losses(SETS, "cross_entropy") == make("cross_entropy").losses(SETS)


def test_with_nothing_removed_every_loss_is_the_dense_models() -> None:
    model, ids = reference_model(), reference_windows("calibration", 4, 64)
    stack = block_stack(model)
    whole = WholeEngine(stack, ids, "cross_entropy", chunk_windows=2).losses([NOTHING])[NOTHING]
    by_decode, by_prefill = (
        PairEngine(
            stack, ids, "cross_entropy", prefill=NOTHING, prompt_tokens=32, first_token=half, chunk_windows=2
        ).losses([NOTHING])[NOTHING]
        for half in HALVES
    )
    log_p = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    nll = -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert whole == pytest.approx(float(nll.mean()), abs=TOLERANCE)
    assert (by_decode, by_prefill) == pytest.approx([float(nll[:, 31:].mean())] * 2, abs=TOLERANCE)
    for objective in ("kl", "hidden"):
        assert WholeEngine(stack, ids, objective, chunk_windows=4).losses([NOTHING])[NOTHING] == pytest.approx(
            0, abs=TOLERANCE
        )


@pytest.mark.parametrize("objective", ["kl", "cross_entropy"])
def test_what_both_halves_give_up_loses_on_continuations_what_the_pair_does(objective: Objective) -> None:
    stack, ids, gone = block_stack(tiny_model("llama")), random_ids(3, 20), deleting({1, 3})
    whole = WholeEngine(stack, ids, objective, chunk_windows=2, prompt_tokens=9)
    pair = PairEngine(stack, ids, objective, prefill=gone, prompt_tokens=9, first_token="decode", chunk_windows=2)
    assert whole.window_losses([gone], range(3))[gone] == pytest.approx(
        pair.window_losses([gone], range(3))[gone], abs=TOLERANCE
    )


def test_candidates_share_the_blocks_before_they_differ() -> None:
    engine = WholeEngine(block_stack(tiny_model("llama")), random_ids(2, 8), "kl", chunk_windows=2)
    engine.losses([deleting({block}) for block in range(5)])
    # The dense walk takes 5; a candidate that removes block i then runs the 4 − i blocks after it on its own.
    assert engine.block_forwards == 5 + (4 + 3 + 2 + 1 + 0)


def test_a_loss_that_is_not_finite_names_candidate_and_windows() -> None:
    model = tiny_model("llama")
    model.model.layers[3].mlp.down_proj.weight.fill_(torch.inf)
    engine = WholeEngine(block_stack(model), random_ids(3, 8), "cross_entropy", chunk_windows=2)
    with pytest.raises(NonFiniteLoss, match=r"removing blocks \[1\] gives the loss nan on window 0"):
        engine.losses([deleting({1})])


def test_a_decode_set_that_keeps_what_prefill_removed_is_refused() -> None:
    stack = block_stack(tiny_model("llama"))
    engine = PairEngine(
        stack, random_ids(1, 8), "kl", prefill=deleting({2}), prompt_tokens=4, first_token="decode", chunk_windows=1
    )
    with pytest.raises(ValueError, match="decode keeps block 2"):
        engine.losses([deleting({1})])


@pytest.mark.parametrize(("prompt_tokens", "first_token"), [(7, "decode"), (7, "prefill"), (1, "decode")])
def test_a_prompt_that_fills_the_window_or_leaves_nothing_to_hand_over_is_refused(
    prompt_tokens: int, first_token: FirstToken
) -> None:
    with pytest.raises(ValueError, match=f"a prompt of {prompt_tokens} tokens does not fit windows of 8"):
        PairEngine(
            block_stack(tiny_model("llama")),
            random_ids(1, 8),
            "kl",
            prefill=NOTHING,
            prompt_tokens=prompt_tokens,
            first_token=first_token,
            chunk_windows=1,
        )


def test_where_decode_says_the_first_token_prefill_may_give_up_what_decode_reads_nothing_behind() -> None:
    stack, ids, last = block_stack(tiny_model("llama")), random_ids(3, 12), deleting({4})

    def loss(prefill: Units, first_token: FirstToken) -> float:
        engine = PairEngine(
            stack, ids, "kl", prefill=prefill, prompt_tokens=6, first_token=first_token, chunk_windows=3
        )
        return engine.losses([last])[last]

    assert loss(NOTHING, "decode") == loss(last, "decode")
    assert loss(NOTHING, "prefill") != pytest.approx(loss(last, "prefill"), abs=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_prompts_beyond_what_may_be_kept_are_processed_again_to_the_same_losses(family: str) -> None:
    stack, ids, candidates = block_stack(tiny_model(family)), random_ids(6, 12), [deleting({1}), deleting({1, 3})]
    rounds, forwards = [], []
    for kept in (None, 10_000, 0):
        engine = PairEngine(
            stack,
            ids,
            "kl",
            prefill=deleting({1}),
            prompt_tokens=6,
            first_token="decode",
            chunk_windows=2,
            prompt_bytes=kept,
        )
        rounds.append([engine.losses(candidates) for _ in range(2)])
        forwards.append(engine.block_forwards)
    assert rounds[0] == rounds[1] == rounds[2]
    assert forwards[0] < forwards[1] < forwards[2]


def test_the_budget_bounds_how_many_windows_a_walk_carries() -> None:
    assert windows_in(10 * 2**20, streams=13, tokens=256, hidden=192, itemsize=4) == 4
    assert windows_in(1, streams=13, tokens=256, hidden=192, itemsize=4) == 1


def short_of_memory(model: PreTrainedModel, windows: int) -> None:
    """Blocks run out of memory when more than `windows` come at once."""

    def check(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[0] > windows:
            raise torch.OutOfMemoryError("the allocator has no more")

    for block in block_stack(model).blocks:
        block.register_forward_pre_hook(check)


def test_out_of_memory_halves_the_chunk_and_goes_on() -> None:
    ids, candidates = random_ids(8, 12), [deleting({1}), deleting({1, 3})]
    short = block_stack(tiny_model("llama"))
    short_of_memory(short.model, windows=2)
    plain = block_stack(tiny_model("llama"))
    whole = [WholeEngine(stack, ids, "kl", chunk_windows=8).losses(candidates) for stack in (short, plain)]
    assert whole[0] == pytest.approx(whole[1], abs=TOLERANCE)
    pair = [
        PairEngine(
            stack, ids, "kl", prefill=deleting({1}), prompt_tokens=6, first_token="decode", chunk_windows=8
        ).losses(candidates)
        for stack in (short, plain)
    ]
    assert pair[0] == pytest.approx(pair[1], abs=TOLERANCE)


def test_a_window_that_does_not_fit_alone_is_reported_with_its_numbers() -> None:
    model = tiny_model("llama")
    engine = WholeEngine(block_stack(model), random_ids(2, 12), "kl", chunk_windows=2)
    short_of_memory(model, windows=0)
    with pytest.raises(torch.OutOfMemoryError, match=r"one window in 2 streams .*: the allocator has no more"):
        engine.losses([deleting({1})])


def test_the_dense_model_is_walked_once_for_all_rounds() -> None:
    engine = WholeEngine(block_stack(tiny_model("llama")), random_ids(4, 8), "kl", chunk_windows=2)
    first, second = engine.losses([NOTHING, deleting({1})]), engine.losses([NOTHING, deleting({1})])
    assert first == second
    # Two chunks: the dense model's 5 blocks and the 3 after the gap; later the one before the gap and those 3.
    assert engine.block_forwards == 2 * (5 + 3) + 2 * (1 + 3)
