"""Gradient checkpointing of transformer blocks that also holds where a block reads a KV cache.

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


@contextmanager
def recomputed_blocks(model: PreTrainedModel) -> Iterator[None]:
    """While this lasts, each block keeps its input alone and computes the rest again in the backward pass.

    A block reads the KV cache it is given but leaves it as it was, so that the second forward equals the first:
    the model cannot generate token by token meanwhile.
    """
    blocks = list(block_stack(model).blocks)
    for block in blocks:
        block.forward = _recomputed(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward_again(h: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        def run(h: Tensor) -> Any:
            return forward(h, *args, past_key_values=_copy(past_key_values), **kwargs)

        return checkpoint(run, h, use_reentrant=False) if torch.is_grad_enabled() else run(h)

    return forward_again


def _copy(cache: Any) -> Any:
    """The same keys and values in layer objects of their own; an update of one does not reach the other."""
    if cache is None:
        return None
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own
