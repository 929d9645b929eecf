"""A part on the model of random weights: the time of a prompt alone, by what prefill gives up of some blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from benchmarks.device.bench import Bench
from benchmarks.device.findings import Findings, Spread
from benchmarks.device.llama import described, nested, ratios
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.parts import pruned
from workers.pruning.model.plan import BlockPlan, Blocks, Part

SAME_NUMBERS = 0.05
"""Largest share by which keys, values and last hidden states may differ in their norm from those of a model with zeros
in place of what is given up: kernels that sum in another order, in bfloat16, over 32 blocks."""


class KeysAndValuesAlone(nn.Module):
    """A block of Llama's of which nothing runs but the input norm, K and V projection and the rotary embedding."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: DynamicCache,
        **kwargs: Any,
    ) -> Tensor:
        """`hidden_states` (batch, time, hidden) as they came; keys and values go into the cache."""
        attention: Any = self.block.self_attn
        normed = self.block.get_submodule("input_layernorm")(hidden_states)
        shape = (*normed.shape[:-1], -1, attention.head_dim)
        keys, values = (make(normed).view(shape).transpose(1, 2) for make in (attention.k_proj, attention.v_proj))
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        one, other = keys.chunk(2, dim=-1)
        past_key_values.update(keys * cos + torch.cat((-other, one), dim=-1) * sin, values, attention.layer_idx)
        return hidden_states


class AttentionAlone(nn.Module):
    """A block of Llama's without its MLP."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`hidden_states` (batch, time, hidden) → the same shape."""
        normed = self.block.get_submodule("input_layernorm")(hidden_states)
        attended, _ = self.block.get_submodule("self_attn")(hidden_states=normed, **kwargs)
        summed: Tensor = hidden_states + attended
        return summed


SKIPPING: Mapping[Part, Callable[[nn.Module], nn.Module]] = {"kv_only": KeysAndValuesAlone, "mlp": AttentionAlone}
"""What runs in place of a block that gives up a part, where a runtime skips what is not needed."""


def without_parts(model: PreTrainedModel, blocks: Blocks, part: Part) -> PreTrainedModel:
    """A Llama that skips a part of some blocks; it shares all weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    skipping: PreTrainedModel = copy.deepcopy(model, shared)
    layers = block_stack(skipping).blocks
    for block in blocks:
        layers[block] = SKIPPING[part](layers[block])
    return skipping


@torch.no_grad()
def read(model: PreTrainedModel, prompt: Tensor) -> tuple[Tensor, DynamicCache]:
    """Last hidden states (1, time, hidden) of a prompt (1, time), and what is kept of it."""
    cache = DynamicCache(config=model.config)
    hidden: Tensor = model.base_model(input_ids=prompt, past_key_values=cache, use_cache=True).last_hidden_state
    return hidden, cache


def difference(one: tuple[Tensor, DynamicCache], other: tuple[Tensor, DynamicCache]) -> float:
    """Of two readings of a prompt: the largest share by which a tensor's norm is off."""

    def tensors(reading: tuple[Tensor, DynamicCache]) -> list[Tensor]:
        hidden, cache = reading
        layers: list[Any] = cache.layers
        return [hidden, *(tensor for layer in layers for tensor in (layer.keys, layer.values))]

    shares = [
        float((ours - theirs).float().norm() / theirs.float().norm())
        for ours, theirs in zip(tensors(one), tensors(other), strict=True)
    ]
    return max(shares)


def prompts(bench: Bench) -> Findings:
    """Time of a prompt: dense, without some blocks, with some kept for keys and values alone, some without MLP."""
    model, size = bench.shaped, bench.size
    blocks, gone = model.config.num_hidden_layers, size.shape_remove[1]
    _, chosen = nested(blocks, 1, gone)
    ways = {
        "dense": model,
        f"−{gone} blocks": drop_blocks(model, chosen),
        f"−{gone} blocks but keys and values": without_parts(model, chosen, "kv_only"),
        f"−{gone} MLPs": without_parts(model, chosen, "mlp"),
    }
    findings = Findings()
    tokens = torch.randint(
        size.shape.vocab_size, (1, max(size.long_prompts)), generator=torch.Generator().manual_seed(0)
    )
    short = tokens[:, : size.prompt_tokens].to(bench.device)
    for way, part in zip(list(ways)[2:], SKIPPING, strict=True):
        zeros = pruned(model, BlockPlan(blocks, parts=dict.fromkeys(chosen, part)))
        findings.judge(
            f"{way}, from zeros in place", difference(read(ways[way], short), read(zeros, short)), SAME_NUMBERS
        )

    table = findings.table(
        f"{described(model)}. Prefill of one prompt, median (lowest–highest) of {size.repeats} runs in turns:",
        {"tokens": "", "prefill": "", "ms": ".1f", "of dense": ".3f"},
    )
    for length in size.long_prompts:
        prompt = tokens[:, :length].to(bench.device)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(size.repeats + 1):
            for way, runs in ways.items():
                start = bench.now()
                read(runs, prompt)
                if repeat:  # The first one warms up.
                    times[way].append(1000 * (bench.now() - start))
        for way in ways:
            table.add(length, way, Spread.of(times[way]), Spread.of(ratios(times[way], times["dense"])))
    return findings
