from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.peer_methods import (
    PEERS,
    Peer,
    angular_span,
    llm_streamline,
    shortened_llama_perplexity,
    shortened_llama_taylor,
    shortgpt,
    sleb,
)
from benchmarks.spans import fit_runs
from tests.unit.workers.pruning.models import random_ids, reference_model, reference_windows, tiny_model
from workers.pruning.model.blocks import BlockStack, block_stack, drop_blocks
from workers.pruning.model.measure import perplexity
from workers.pruning.model.plan import Blocks
from workers.pruning.model.units import NOTHING, deleting
from workers.pruning.repair.distill import load_tensors
from workers.pruning.repair.training import Journal, TrainingSettings
from workers.pruning.search.engine import WholeEngine
from workers.pruning.search.memo import Memo
from workers.pruning.search.scores import block_scores
from workers.pruning.search.search import search

NUM_BLOCKS = 9
IDS = random_ids(4, 12)


def model_with_uneven_blocks(family: str = "llama") -> PreTrainedModel:
    """Nine random blocks that write to the residual stream by very different amounts."""
    model = tiny_model(family, num_blocks=NUM_BLOCKS)
    with torch.no_grad():
        for block, size in zip(model.model.layers, (1.0, 0.5, 0.9, 0.1, 0.6, 0.05, 0.3, 0.7, 0.4), strict=True):
            block.self_attn.o_proj.weight.mul_(size)
            block.mlp.down_proj.weight.mul_(size)
    return model


def hidden_states(stack: BlockStack, ids: Tensor) -> list[Tensor]:
    """h_0 … h_L by transformers' own hooks; its `hidden_states` would have the last one normed."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for block in stack.blocks]
    hooks.append(stack.final[0].register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    stack.model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


def chosen(method: Peer, model: PreTrainedModel, remove: int, *, chunk_windows: int = 3) -> Blocks:
    return method(block_stack(model), IDS, remove, chunk_windows=chunk_windows).removed


@pytest.mark.parametrize("remove", [1, 3])
@pytest.mark.parametrize("method", PEERS.values(), ids=PEERS.keys())
def test_every_method_removes_as_many_blocks_as_asked_and_leaves_the_model_alone(method: Peer, remove: int) -> None:
    model = model_with_uneven_blocks("qwen3")
    before = copy.deepcopy(model.state_dict())
    plan = method(block_stack(model), IDS, remove, chunk_windows=3)
    assert len(plan.removed) == remove
    assert plan.removed <= set(range(NUM_BLOCKS))
    assert plan.forwards >= 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", PEERS.values(), ids=PEERS.keys())
def test_how_windows_are_chunked_does_not_matter(method: Peer) -> None:
    model = model_with_uneven_blocks()
    assert chosen(method, model, 1, chunk_windows=1) == chosen(method, model, 1, chunk_windows=4)


@pytest.mark.parametrize("remove", [0, NUM_BLOCKS])
@pytest.mark.parametrize("method", PEERS.values(), ids=PEERS.keys())
def test_an_impossible_count_is_refused(method: Peer, remove: int) -> None:
    with pytest.raises(ValueError, match=f"cannot remove {remove} of 9 blocks"):
        chosen(method, tiny_model("llama", num_blocks=NUM_BLOCKS), remove)


def test_shortgpt_removes_what_changes_direction_least() -> None:
    model = model_with_uneven_blocks()
    cosine = block_scores(block_stack(model), IDS, chunk_windows=4).cosine
    ranked = sorted(range(NUM_BLOCKS), key=lambda block: -cosine[block])
    for remove in range(1, 5):
        assert chosen(shortgpt, model, remove) == frozenset(ranked[:remove])


@pytest.mark.parametrize("remove", [1, 2, 4, 8])
def test_the_angular_span_turns_the_last_token_least(remove: int) -> None:
    model = model_with_uneven_blocks()
    h = [state[:, -1] for state in hidden_states(block_stack(model), IDS)]
    distances = [
        float((torch.arccos(F.cosine_similarity(h[first], h[first + remove], dim=-1)) / math.pi).mean())
        for first in range(NUM_BLOCKS - remove + 1)
    ]
    first = distances.index(min(distances))
    assert chosen(angular_span, model, remove) == frozenset(range(first, first + remove))


def test_sleb_takes_greedys_steps_with_one_full_forward_a_candidate() -> None:
    model = model_with_uneven_blocks()
    stack = block_stack(model)
    greedy = search(
        Memo(WholeEngine(stack, IDS, "cross_entropy", chunk_windows=2).window_losses, len(IDS)),
        algorithm="greedy",
        num_blocks=NUM_BLOCKS,
        remove=3,
        base=NOTHING,
        scores=[0.0] * NUM_BLOCKS,
        evaluations=0,
        seed=0,
        on_progress=lambda done, best: None,
    )
    plan = sleb(stack, IDS, 3, chunk_windows=3)
    assert plan.removed == greedy.frontier[3].blocks
    assert plan.forwards == 9 + 8 + 7


def test_perplexity_ranks_each_block_alone() -> None:
    model = model_with_uneven_blocks()
    alone = [perplexity(drop_blocks(model, {block}), IDS, batch=4).value for block in range(NUM_BLOCKS)]
    plan = shortened_llama_perplexity(block_stack(model), IDS, 3, chunk_windows=3)
    assert plan.removed == frozenset(sorted(range(NUM_BLOCKS), key=alone.__getitem__)[:3])
    assert plan.forwards == NUM_BLOCKS


def test_taylor_sums_weight_times_gradient_over_each_inner_block() -> None:
    model = model_with_uneven_blocks()
    expected = copy.deepcopy(model).requires_grad_(True)
    expected(input_ids=IDS, labels=IDS).loss.backward()
    importance = {
        block: sum(float((p * p.grad).abs().sum().detach()) for p in expected.model.layers[block].parameters())
        for block in (4, 5, 6)
    }
    ranked = sorted(importance, key=importance.__getitem__)
    for remove in (1, 2):
        assert chosen(shortened_llama_taylor, model, remove) == frozenset(ranked[:remove])


def test_taylor_leaves_the_first_four_and_the_last_two_blocks() -> None:
    assert chosen(shortened_llama_taylor, model_with_uneven_blocks(), 3) == {4, 5, 6}
    with pytest.raises(ValueError, match="cannot remove 4 of 9 blocks: the method may choose among 3"):
        chosen(shortened_llama_taylor, model_with_uneven_blocks(), 4)


@pytest.mark.parametrize("remove", [1, 3, 8])
def test_llm_streamline_keeps_the_first_block_of_its_span_to_stand_for_all_of_it(remove: int) -> None:
    model = model_with_uneven_blocks()
    h = hidden_states(block_stack(model), IDS)
    cosines = [
        float(F.cosine_similarity(h[first], h[first + remove + 1], dim=-1).mean())
        for first in range(NUM_BLOCKS - remove)
    ]
    first = cosines.index(max(cosines))
    plan = llm_streamline(block_stack(model), IDS, remove, chunk_windows=3)
    assert plan.removed == frozenset(range(first + 1, first + remove + 1))
    assert plan.spans == {first: (first, first + remove)}


def test_the_block_that_stands_for_a_span_learns_to_map_its_start_to_its_end() -> None:
    model = model_with_uneven_blocks()
    stack = block_stack(model)
    plan = llm_streamline(stack, IDS, 2, chunk_windows=3)
    [(stand_in, (first, last))] = plan.spans.items()
    h = hidden_states(stack, IDS)
    settings = TrainingSettings(steps=20, batch_windows=4, learning_rate=5e-3, seed=0)
    tensors, losses = fit_runs(
        model, plan.spans, frozen=set(), windows=IDS, held_out=IDS, settings=settings, journal=Journal()
    )
    before, after = losses[stand_in]
    assert after < before
    load_tensors(model, tensors)
    out = hidden_states(block_stack(drop_blocks(model, plan.removed)), IDS)[first + 1]
    error = F.mse_loss(out, h[last + 1]) / (h[last + 1] - h[first]).pow(2).mean()
    assert after == pytest.approx(float(error), rel=1e-4)


def test_a_block_that_breaks_the_numbers_is_named() -> None:
    model = model_with_uneven_blocks()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="hidden states around block 3 are not finite"):
        chosen(shortgpt, model, 1)
    with pytest.raises(ValueError, match=r"removing blocks \[0\] gives the loss nan"):
        chosen(sleb, model, 1)


@pytest.mark.training
def test_on_the_reference_model_searching_by_the_loss_beats_what_never_sees_it() -> None:
    model = reference_model()
    stack, windows = block_stack(model), reference_windows("calibration", 4, 64)
    names = ("ShortGPT", "angular span", "SLEB", "Shortened LLaMA Taylor+", "LLM-Streamline")
    removed = {name: deleting(PEERS[name](stack, windows, 2, chunk_windows=4).removed) for name in names}
    losses = WholeEngine(stack, windows, "cross_entropy", chunk_windows=4).losses(list(removed.values()))
    loss = {name: losses[units] for name, units in removed.items()}
    assert loss["SLEB"] == min(loss.values())
    assert loss["SLEB"] < min(loss["angular span"], loss["Shortened LLaMA Taylor+"], loss["LLM-Streamline"])
