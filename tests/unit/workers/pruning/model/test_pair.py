from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedModel

from tests.unit.workers.pruning.models import (
    EXPERTS,
    FAMILIES,
    OTHERS,
    REFERENCE,
    TOLERANCE,
    continued,
    continued_by_pair,
    random_ids,
    reference_model,
    reference_windows,
    tiny_model,
)
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.model.checkpoint import SourceTensors, write_checkpoint
from workers.pruning.model.pair import (
    FirstToken,
    first_token_losses,
    handover,
    pair_logits,
    pd_loss,
)
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.repair.distill import load_tensors

ALL = [0, 1, 2, 3, 4]
HALVES: tuple[FirstToken, ...] = ("decode", "prefill")


@pytest.mark.parametrize("first_token", HALVES)
@pytest.mark.parametrize("family", FAMILIES + OTHERS + EXPERTS)
def test_the_dense_model_as_both_halves_is_the_dense_model(family: str, first_token: FirstToken) -> None:
    model, ids = tiny_model(family), random_ids(3, 20)
    first, others = pair_logits(model, model, ALL, ids, 11, first_token)
    assert first.shape[1] == (first_token == "prefill")
    expected = model(input_ids=ids).logits[:, 10:-1]
    assert (torch.cat([first, others], dim=1) - expected).abs().max() <= TOLERANCE
    nll = F.cross_entropy(expected.flatten(0, 1), ids[:, 11:].flatten())
    found = pd_loss(model, model, ALL, ids, prompt_tokens=11, first_token=first_token, batch=2)
    assert found == pytest.approx(float(nll), abs=TOLERANCE)


def plain_nll(
    prefill: PreTrainedModel, decode: PreTrainedModel, layer_map: list[int], ids: torch.Tensor, first_token: FirstToken
) -> torch.Tensor:
    """−log p (batch, 9) of each token after prompts of 11, token by token with caches of transformers alone."""
    cache, read = DynamicCache(config=prefill.config), 10 if first_token == "decode" else 11

    def steps(model: PreTrainedModel, cache: DynamicCache, tokens: range) -> list[torch.Tensor]:
        return [model(input_ids=ids[:, at, None], past_key_values=cache, use_cache=True).logits for at in tokens]

    by_prefill = steps(prefill, cache, range(read))
    received = DynamicCache(config=decode.config)
    received.layers = [cache.layers[source] for source in layer_map]
    by_decode = steps(decode, received, range(read, 19))
    logits = torch.cat([*by_prefill, *by_decode], dim=1)[:, 10:]
    return F.cross_entropy(logits.mT, ids[:, 11:], reduction="none")


@pytest.mark.parametrize("family", FAMILIES + OTHERS + EXPERTS)
def test_a_pair_loses_what_plain_transformers_caches_lose_token_by_token(family: str) -> None:
    model, ids = tiny_model(family), random_ids(3, 20)
    pair = drop_blocks(model, {1}), drop_blocks(model, {1, 3}), [0, 1, 3]
    expected = {half: plain_nll(*pair, ids, half) for half in HALVES}
    found = {half: pd_loss(*pair, ids, prompt_tokens=11, first_token=half, batch=2) for half in HALVES}
    assert found == pytest.approx({half: float(nll.mean()) for half, nll in expected.items()}, abs=TOLERANCE)
    first = first_token_losses(*pair, ids, prompt_tokens=11, batch=2)
    assert first == pytest.approx({half: float(nll[:, 0].mean()) for half, nll in expected.items()}, abs=TOLERANCE)
    assert first["decode"] != pytest.approx(first["prefill"], abs=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "phi3"])
def test_decode_says_the_first_token_as_where_the_whole_prompt_is_handed_over_and_it_writes_its_own_last_entry(
    family: str,
) -> None:
    model, ids = tiny_model(family), random_ids(2, 20)
    prefill, decode = drop_blocks(model, {1}), drop_blocks(model, {1, 3})
    prompt = prefill(input_ids=ids[:, :11], use_cache=True).past_key_values
    received = handover(prompt, [0, 1, 3], decode.config)
    received.crop(-1)  # What vLLM does: the last token's place is kept, and written again.
    expected = decode(input_ids=ids[:, 10:-1], past_key_values=received, use_cache=True).logits
    _, found = pair_logits(prefill, decode, [0, 1, 3], ids, 11, "decode")
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("first_token", HALVES)
@pytest.mark.parametrize("family", FAMILIES + OTHERS + EXPERTS)
def test_the_dense_pair_generates_what_the_dense_model_generates(family: str, first_token: FirstToken) -> None:
    model, ids = tiny_model(family), random_ids(2, 12)
    model.generation_config.eos_token_id = None
    expected = continued(model, ids, 9)
    found = continued_by_pair(model, model, ALL, ids, new_tokens=9, first_token=first_token)
    assert torch.equal(found, expected[:, 12:])


def test_the_prefill_cache_is_not_changed_by_decoding() -> None:
    model, ids = tiny_model("llama"), random_ids(1, 12)
    cache = model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True).past_key_values
    before = copy.deepcopy(cache.layers)
    decode = drop_blocks(model, {2})
    decode(input_ids=ids, past_key_values=handover(cache, [0, 1, 3, 4], decode.config), use_cache=True)
    for held, was in zip(cache.layers, before, strict=True):
        assert torch.equal(held.keys, was.keys)


@pytest.mark.parametrize("learns", ["prefill", "decode"])
def test_gradients_reach_the_half_that_learns_through_the_cache_where_that_is_prefill(learns: str) -> None:
    halves = {half: tiny_model("llama").requires_grad_(half == learns) for half in ("prefill", "decode")}
    _, logits = pair_logits(halves["prefill"], halves["decode"], ALL, random_ids(1, 8), 4, "decode")
    logits.sum().backward()
    for half, model in halves.items():
        assert (model.model.layers[0].self_attn.k_proj.weight.grad is not None) == (half == learns)
    # Behind its last keys and values nothing of prefill is read.
    assert halves["prefill"].model.layers[-1].mlp.up_proj.weight.grad is None


# What follows in the script is all that a serving stack needs: transformers and pdtrim.json.
PLAIN_PAIR = """
import json, sys, torch
from transformers import AutoModelForCausalLM, DynamicCache

for folder in sys.argv[1:]:
    prefill = AutoModelForCausalLM.from_pretrained(f"{folder}/prefill", dtype=torch.float32)
    decode = AutoModelForCausalLM.from_pretrained(f"{folder}/decode", dtype=torch.float32)
    layer_map = json.load(open(f"{folder}/decode/pdtrim.json"))["kv_layer_map"]
    ids = torch.tensor(json.load(open(f"{folder}/ids.json")))
    prompt_tokens = ids.shape[1] // 2
    with torch.no_grad():
        prompt = prefill(input_ids=ids[:, : prompt_tokens - 1], use_cache=True)
        cache = DynamicCache(config=decode.config)
        cache.layers = [prompt.past_key_values.layers[source] for source in layer_map]
        logits = decode(input_ids=ids[:, prompt_tokens - 1 : -1], past_key_values=cache, use_cache=True).logits
    print(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt_tokens:].flatten())))
"""


def exported_pair(source: Path, folder: Path, dense: list[PreTrainedModel], ids: torch.Tensor) -> float:
    """Export a pair with a trained tensor in each half; returns the PD loss of the same models in memory."""
    num_blocks = dense[0].config.num_hidden_layers
    plans = {
        "prefill": BlockPlan(num_blocks, frozenset({1})),
        "decode": BlockPlan(num_blocks, frozenset({1}), {3: 2}),
    }
    layer_map = kv_layer_map(plans["prefill"], plans["decode"])
    halves: list[PreTrainedModel] = []
    for (role, plan), model in zip(plans.items(), dense, strict=True):
        name = f"model.layers.{max(plan.kept)}.mlp.up_proj.weight"
        # What bfloat16 can hold, so that storing it loses nothing.
        trained = {name: (1.25 * dict(model.named_parameters())[name]).bfloat16().float()}
        save_file(trained, folder / f"{role}.safetensors")
        write_checkpoint(
            source,
            folder / role,
            kept=plan.kept,
            overrides=SourceTensors.in_file(folder / f"{role}.safetensors"),
            pdtrim={"kv_layer_map": layer_map},
            model_card="",
        )
        load_tensors(model, trained)
        halves.append(drop_blocks(model, plan.removed))
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    prefill, decode = halves
    return pd_loss(prefill, decode, layer_map, ids, prompt_tokens=ids.shape[1] // 2, first_token="decode", batch=4)


@pytest.mark.training
def test_the_exported_files_alone_give_the_reported_loss(tmp_path: Path) -> None:
    reported = {}
    for family in FAMILIES:
        folder = tmp_path / family
        tiny_model(family).save_pretrained(folder / "source")
        models = [tiny_model(family), tiny_model(family)]
        reported[str(folder)] = exported_pair(folder / "source", folder, models, random_ids(4, 24))
    (folder := tmp_path / "reference").mkdir()
    windows = reference_windows("validation", 4, 64)
    reported[str(folder)] = exported_pair(REFERENCE, folder, [reference_model(), reference_model()], windows)
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN_PAIR, *reported],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(zip(reported, map(float, plain.stdout.split()), strict=True))
    assert found == pytest.approx(reported, abs=1e-4)


@pytest.mark.parametrize("layer_map", [[0, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, -1]])
def test_a_layer_map_that_does_not_fit_the_pair_is_refused(layer_map: list[int]) -> None:
    model, ids = tiny_model("llama"), random_ids(1, 6)
    prefill, decode = drop_blocks(model, {1}), drop_blocks(model, {1, 3})
    cache = prefill(input_ids=ids, past_key_values=DynamicCache(config=prefill.config)).past_key_values
    with pytest.raises(ValueError, match="does not fit a decode model of 3 layers and a prefill cache of 4"):
        handover(cache, layer_map, decode.config)
