"""What a model's cache holds of a request: read off one that the model fills, never worked out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from workers.pruning.model.blocks import BlockStack, block_stack, run_block

KEYS_AND_VALUES = frozenset({"keys", "values"})


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that the cache of one request holds after `tokens` tokens, served in `dtype`.

    Layers with a window hold no more than it, those of linear attention a state that does not grow, which many keep in
    float32 whatever the model is served in.
    """
    served = Served(block_stack(model), dtype)
    return sum(served.layer_bytes(number, layer) for number, layer in enumerate(filled_cache(model, tokens).layers))


class Served:
    """A model that is served in some type, by which the bytes of its caches are counted, layer by layer."""

    def __init__(self, stack: BlockStack, dtype: torch.dtype) -> None:
        self._stack, self._dtype = stack, dtype
        self._types: dict[str, torch.dtype] = dict.fromkeys(KEYS_AND_VALUES, dtype)

    def layer_bytes(self, number: int, layer: Any) -> int:
        """Of one layer of a cache, whose block has its weights."""
        held = named_tensors(layer)
        if self._stack.model.dtype == self._dtype:
            self._types |= {name: tensor.dtype for name, tensor in held.items()}
        elif held.keys() - self._types.keys():
            self._types = _types(self._stack, number, self._dtype) | self._types
        return sum(tensor.numel() * self._types[name].itemsize for name, tensor in held.items())


def filled_cache(model: PreTrainedModel, tokens: int) -> DynamicCache:
    """The cache of one request after so many tokens."""
    stack, cache = block_stack(model), DynamicCache(config=model.config)
    stack.body(
        input_ids=torch.zeros((1, tokens), dtype=torch.long, device=stack.device), past_key_values=cache, use_cache=True
    )
    return cache


def named_tensors(layer: Any) -> dict[str, Tensor]:
    """All that a cache keeps of a layer, by name: keys and values, or states."""
    found: dict[str, Tensor] = {}
    for name, value in vars(layer).items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        found |= {
            f"{name}.{key}".rstrip("."): part
            for key, part in parts
            if isinstance(part, Tensor) and part.is_floating_point()
        }
    return found


def held_tensors(layer: Any) -> list[Tensor]:
    """All that a cache keeps of a layer."""
    return list(named_tensors(layer).values())


def _types(stack: BlockStack, number: int, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """In which types a block keeps its states where it is served in `dtype`: by a copy of that block alone."""
    ids = torch.zeros((1, 2), dtype=torch.long, device=stack.device)
    h, calls = stack.enter(ids)
    block: nn.Module = copy.deepcopy(stack.blocks[number])
    vars(block).pop("forward", None)  # Of a block that is read when it is called: the copy has its weights.
    block.to(dtype)
    cache = DynamicCache(config=stack.model.config)
    run_block(block, h.to(dtype), _converted(calls.kwargs[number], dtype), cache)
    return {name: tensor.dtype for name, tensor in named_tensors(cache.layers[number]).items()}


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """What a block is called with, in another type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _converted(part, dtype) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_converted(part, dtype) for part in value)
    return value
