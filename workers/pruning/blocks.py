"""Where a model's transformer blocks are, how to run one of them, and how to take some away.

Walking the blocks one by one gives the model's own logits bit for bit, because each block is called with the
arguments (mask, positions, rotary embeddings) that one real forward of the model passed to it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BLOCK_PREFIX = "model.layers."


class UnsupportedArchitecture(ValueError):
    """The model is of a family whose blocks this package does not know."""


@dataclass(frozen=True)
class BlockStack:
    """A causal language model seen as embedding, blocks, final norm and head."""

    model: PreTrainedModel
    blocks: nn.ModuleList
    embed: nn.Module
    norm: nn.Module
    head: nn.Module

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device  # type: ignore[return-value]


def block_stack(model: PreTrainedModel) -> BlockStack:
    """The parts of a Llama, Mistral, Qwen2 or Qwen3 model. Raises: UnsupportedArchitecture."""
    family = model.config.model_type
    if family not in FAMILIES:
        raise UnsupportedArchitecture(f"model_type {family!r} is not supported; known are {', '.join(FAMILIES)}")
    body = model.model
    return BlockStack(model, body.layers, body.embed_tokens, body.norm, model.lm_head)


@dataclass(frozen=True)
class BlockCalls:
    """Each block's keyword arguments besides hidden state and cache, from a forward of batch 1; they broadcast."""

    kwargs: Sequence[Mapping[str, Any]]

    def run(self, stack: BlockStack, block: int, h: Tensor, cache: Any = None) -> Tensor:
        """h_i (batch, time, hidden) → h_{i+1}, same shape; `cache` takes and gives the block's keys and values."""
        out = stack.blocks[block](h, past_key_values=cache, **self.kwargs[block])
        after: Tensor = out[0] if isinstance(out, tuple) else out
        return after


@torch.no_grad()
def capture_calls(stack: BlockStack, ids: Tensor, cache: Cache | None = None) -> BlockCalls:
    """What the model passes to each block for windows like `ids` (batch, time), read from the first of them.

    With `cache`, which must hold one sequence, `ids` continue it.
    """
    captured: list[Mapping[str, Any]] = [{} for _ in stack.blocks]

    def hook(index: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured[index] = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}

        return record

    handles = [
        block.register_forward_pre_hook(hook(index), with_kwargs=True) for index, block in enumerate(stack.blocks)
    ]
    try:
        stack.model(input_ids=ids[:1], past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return BlockCalls(captured)


@torch.no_grad()
def capture_continuation_calls(stack: BlockStack, ids: Tensor, prompt_tokens: int) -> BlockCalls:
    """What the model passes to each block for tokens after a cached prompt: `ids` (batch, time) cut at the prompt."""
    cache = DynamicCache(config=stack.model.config)
    stack.model(input_ids=ids[:1, :prompt_tokens], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return capture_calls(stack, ids[:, prompt_tokens:], cache)


def pruned_config(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A model's configuration with only the blocks `kept`: their count, and every list with one entry a layer."""
    num_blocks = config["num_hidden_layers"]
    result = dict(config)
    for key, value in config.items():
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == num_blocks:
            result[key] = [value[block] for block in kept]
    result["num_hidden_layers"] = len(kept)
    return result


def drop_blocks(model: PreTrainedModel, removed: Iterable[int]) -> PreTrainedModel:
    """The model without the blocks `removed`, sharing every parameter and buffer; the original stays as it is."""
    gone = frozenset(removed)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    pruned: PreTrainedModel = copy.deepcopy(model, shared)
    stack = block_stack(pruned)
    kept = [index for index in range(len(stack.blocks)) if index not in gone]
    for layer, index in enumerate(kept):
        for module in stack.blocks[index].modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", layer)  # noqa: B010  (torch types attributes as modules)
    pruned.model.layers = nn.ModuleList(stack.blocks[index] for index in kept)
    for key, value in pruned_config(model.config.to_dict(), kept).items():
        if key == "num_hidden_layers" or ("layer" in key and isinstance(value, list)):
            setattr(pruned.config, key, value)
    return pruned
