"""Gradient checkpointing of transformer blocks that also holds where a block reads or writes a KV cache.

transformers' own drops the cache of a checkpointed layer, which would silently change the decode path.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from workers.pruning.model.blocks import block_stack

KEYS_VALUES = ("keys", "values")
"""What a layer of a cache calls what it holds."""


@contextmanager
def recomputed_blocks(*models: PreTrainedModel) -> Iterator[None]:
    """While this lasts, each block keeps its input alone and computes the rest again in the backward pass.

    A block reads the KV cache that it was given, the second time as the first, and leaves its own keys and values in
    it, through which gradients go.
    """
    blocks = [block for model in models for block in block_stack(model).blocks]
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = _recomputed(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:  # Of a block that is read when it is called.
                block.forward = forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward_again(h: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(h, *args, past_key_values=past_key_values, **kwargs)
        before = _copy(past_key_values)

        def run(h: Tensor) -> tuple[Any, list[tuple[int, dict[str, Any]]]]:
            own = _copy(before)
            made = forward(h, *args, past_key_values=own, **kwargs)
            return made, _written(before, own)

        made, written = checkpoint(run, h, use_reentrant=False)
        for layer, state in written:
            vars(past_key_values.layers[layer]).update(state)
        return made

    return forward_again


def _written(before: Any, after: Any) -> list[tuple[int, dict[str, Any]]]:
    """The layers of a cache that a block wrote, and all that they are now."""
    if before is None:
        return []
    layers = enumerate(zip(before.layers, after.layers, strict=True))
    return [(number, dict(vars(new))) for number, (old, new) in layers if _held(old) != _held(new)]


def _held(layer: Any) -> list[int]:
    return [id(getattr(layer, name, None)) for name in KEYS_VALUES]


def _copy(cache: Any) -> Any:
    """The same keys and values in layer objects of their own; an update of one does not reach the other."""
    if cache is None:
        return None
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own
