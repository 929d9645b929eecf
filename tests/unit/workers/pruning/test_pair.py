from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.unit.workers.pruning.models import FAMILIES, TOLERANCE, random_ids, tiny_model
from workers.pruning.blocks import drop_blocks
from workers.pruning.checkpoint import SourceTensors, write_checkpoint
from workers.pruning.pair import generate_pair, kv_cache_bytes, pair_logits, pd_loss
from workers.pruning.plan import BlockPlan, kv_layer_map

ALL = [0, 1, 2, 3, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_as_both_halves_is_the_dense_model(family: str) -> None:
    model, ids = tiny_model(family), random_ids(3, 20)
    first, others = pair_logits(model, model, ALL, ids, 11)
    expected = model(input_ids=ids).logits[:, 10:-1]
    assert (torch.cat([first, others], dim=1) - expected).abs().max() <= TOLERANCE
    nll = F.cross_entropy(expected.flatten(0, 1), ids[:, 11:].flatten())
    assert pd_loss(model, model, ALL, ids, prompt_tokens=11, batch=2) == pytest.approx(float(nll), abs=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_pair_generates_what_the_dense_model_generates(family: str) -> None:
    model, ids = tiny_model(family), random_ids(2, 12)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(generate_pair(model, model, ALL, ids, new_tokens=9), expected[:, 12:])


def test_the_prefill_cache_is_not_changed_by_decoding() -> None:
    model, ids = tiny_model("llama"), random_ids(1, 12)
    one = generate_pair(model, drop_blocks(model, {2}), [0, 1, 3, 4], ids, new_tokens=6)
    again = generate_pair(model, drop_blocks(model, {2}), [0, 1, 3, 4], ids, new_tokens=6)
    assert torch.equal(one, again)


def test_gradients_reach_the_decode_model_only() -> None:
    prefill, decode = tiny_model("llama").requires_grad_(True), tiny_model("llama").requires_grad_(True)
    _, logits = pair_logits(prefill, decode, ALL, random_ids(1, 8), 4)
    logits.sum().backward()
    assert all(parameter.grad is None for parameter in prefill.parameters())
    assert decode.model.layers[0].mlp.up_proj.weight.grad is not None


def test_kv_cache_bytes_are_those_of_the_tensors() -> None:
    model, ids = tiny_model("qwen3"), random_ids(1, 13)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(model.config, 13, torch.float32) == held


# What follows in the script is all that a serving stack needs: transformers and pdtrim.json.
PLAIN_PAIR = """
import json, sys, torch
from transformers import AutoModelForCausalLM, DynamicCache

folder, prompt_tokens = sys.argv[1], int(sys.argv[2])
prefill = AutoModelForCausalLM.from_pretrained(f"{folder}/prefill", dtype=torch.float32)
decode = AutoModelForCausalLM.from_pretrained(f"{folder}/decode", dtype=torch.float32)
layer_map = json.load(open(f"{folder}/decode/pdtrim.json"))["kv_layer_map"]
ids = torch.tensor(json.load(open(f"{folder}/ids.json")))
with torch.no_grad():
    prompt = prefill(input_ids=ids[:, :prompt_tokens], use_cache=True)
    cache = DynamicCache(config=decode.config)
    for layer, source in enumerate(layer_map):
        held = prompt.past_key_values.layers[source]
        cache.update(held.keys, held.values, layer)
    rest = decode(input_ids=ids[:, prompt_tokens:-1], past_key_values=cache, use_cache=True)
logits = torch.cat([prompt.logits[:, -1:], rest.logits], dim=1)
print(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt_tokens:].flatten())))
"""


def test_the_exported_files_alone_give_the_reported_loss(tmp_path: Path) -> None:
    model, ids = tiny_model("llama"), random_ids(4, 24)
    model.save_pretrained(tmp_path / "source")
    plans = {"prefill": BlockPlan(5, frozenset({1})), "decode": BlockPlan(5, frozenset({1, 3}))}
    layer_map = kv_layer_map(plans["prefill"], plans["decode"])
    for role, plan in plans.items():
        write_checkpoint(
            tmp_path / "source",
            tmp_path / role,
            kept=plan.kept,
            overrides=SourceTensors({}),
            pdtrim={"kv_layer_map": layer_map},
            model_card="",
        )
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    halves = (drop_blocks(model, plan.removed) for plan in plans.values())
    reported = pd_loss(*halves, layer_map, ids, prompt_tokens=10, batch=4)
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN_PAIR, str(tmp_path), "10"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(plain.stdout) == pytest.approx(reported, abs=1e-4)
