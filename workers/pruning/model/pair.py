"""A prefill checkpoint and a decode checkpoint as one model: the KV cache of the first is handed to the second.

Decode layer k continues the keys and values of prefill layer `layer_map[k]`: both stand for the same original block.
Where decode says the first token of the answer, it runs the prompt's last token itself, on the cache of those before.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from workers.pruning.model.blocks import UnsupportedArchitecture, block_stack, head
from workers.pruning.model.cache import filled_cache, held_tensors
from workers.pruning.model.measure import token_losses

FirstToken = Literal["decode", "prefill"]
"""The half that predicts the token after the prompt, as the pair is served."""


def handed_tokens(prompt_tokens: int, first_token: FirstToken) -> int:
    """How many of a prompt's tokens decode goes on from: all, or all but the last, which it runs itself.

    vLLM hands over the last one's keys and values too, and decode then writes its own in their place.
    """
    return prompt_tokens - 1 if first_token == "decode" else prompt_tokens


def check_prompt(prompt_tokens: int, first_token: FirstToken, window_tokens: int) -> int:
    """How many tokens of a window's prompt are handed over.

    Raises: ValueError when none are, or the window leaves no room for a continuation of at least two tokens.
    """
    handed = handed_tokens(prompt_tokens, first_token)
    if handed < 1 or prompt_tokens > window_tokens - 2:
        raise ValueError(f"a prompt of {prompt_tokens} tokens does not fit windows of {window_tokens}")
    return handed


def copied_layer(layer: Any) -> Any:
    """A layer of a cache that may be written into: keys and values are shared, states copied, which change in place."""
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            own = {key: part.clone() if isinstance(part, Tensor) else part for key, part in value.items()}
            setattr(copied, name, own)
    return copied


def handover(cache: Cache, layer_map: Sequence[int], decode_config: PretrainedConfig) -> DynamicCache:
    """A cache for the decode model that holds what the prefill model's `cache` holds in the mapped layers.

    Keys and values keep their shape (batch, kv heads, time, head dimension) and are shared, not copied.
    Raises: ValueError when the map does not name one prefill layer for each decode layer.
    """
    layers = decode_config.num_hidden_layers
    if len(layer_map) != layers or not set(layer_map) <= set(range(len(cache.layers))):
        raise ValueError(
            f"the KV layer map {list(layer_map)} does not fit a decode model of {layers} layers and a prefill cache "
            f"of {len(cache.layers)}; use the kv_layer_map of this pair's pdtrim.json"
        )
    received = DynamicCache(config=decode_config)
    # The layer objects also count the tokens that a sliding window has dropped.
    received.layers = [copied_layer(cache.layers[source]) for source in layer_map]
    return received


@dataclass(frozen=True)
class KvShape:
    """What a layer's keys and values are for one token."""

    heads: int
    key_size: int
    value_size: int
    """Unlike that of the keys where attention is latent."""


@torch.no_grad()
def kv_shapes(model: PreTrainedModel) -> tuple[KvShape, ...]:
    """Each layer's, read off a cache. Raises: UnsupportedArchitecture for a layer that holds anything else."""
    shapes = []
    for number, layer in enumerate(filled_cache(model, 1).layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or len(held_tensors(layer)) != 2:
            raise UnsupportedArchitecture(
                f"layer {number} of {model.config.model_type!r} keeps a state that is not keys and values, which is "
                "not handed over"
            )
        shapes.append(KvShape(keys.shape[1], keys.shape[3], values.shape[3]))
    return tuple(shapes)


def pair_hidden(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    layer_map: Sequence[int],
    ids: Tensor,
    prompt_tokens: int,
    first_token: FirstToken,
) -> tuple[Tensor, Tensor]:
    """Last hidden states, after the final norm, from which `pair_logits` predicts; the same shapes with `hidden` last.

    Gradients reach the parameters of either model that require them, prefill's through the cache that decode reads.
    """
    handed = handed_tokens(prompt_tokens, first_token)
    empty = DynamicCache(config=prefill.config)
    prompt = block_stack(prefill).body(input_ids=ids[:, :handed], past_key_values=empty, use_cache=True)
    received = handover(prompt.past_key_values, layer_map, decode.config)
    continued = block_stack(decode).body(input_ids=ids[:, handed:-1], past_key_values=received, use_cache=True)
    return prompt.last_hidden_state[:, prompt_tokens - 1 :], continued.last_hidden_state


def pair_logits(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    layer_map: Sequence[int],
    ids: Tensor,
    prompt_tokens: int,
    first_token: FirstToken,
) -> tuple[Tensor, Tensor]:
    """Logits for every token of `ids` (batch, time) after the prompt: those by prefill, those by decode.

    Shapes (batch, first, vocabulary) and (batch, time − prompt − first, vocabulary), where `first` is 1 when prefill
    says the first token and 0 when decode does. Gradients go where those of `pair_hidden` do.
    """
    first, others = pair_hidden(prefill, decode, layer_map, ids, prompt_tokens, first_token)
    return head(prefill, first), head(decode, others)


@torch.no_grad()
def pd_loss(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    layer_map: Sequence[int],
    windows: Tensor,
    *,
    prompt_tokens: int,
    first_token: FirstToken,
    batch: int,
) -> float:
    """Mean negative log-likelihood in nats of the tokens after the prompt, over windows (windows, time)."""
    total = 0.0
    for ids in windows.split(batch):
        first, others = pair_hidden(prefill, decode, layer_map, ids, prompt_tokens, first_token)
        by_prefill, by_decode = ids[:, prompt_tokens:].split([first.shape[1], others.shape[1]], dim=1)
        total += _summed_loss(prefill, first, by_prefill) + _summed_loss(decode, others, by_decode)
    return total / windows[:, prompt_tokens:].numel()


@torch.no_grad()
def first_token_losses(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    layer_map: Sequence[int],
    windows: Tensor,
    *,
    prompt_tokens: int,
    batch: int,
) -> dict[FirstToken, float]:
    """Mean negative log-likelihood in nats of the token after the prompt, whichever half says it."""
    total: dict[FirstToken, float] = {"decode": 0.0, "prefill": 0.0}
    for ids in windows.split(batch):
        last, target = ids[:, prompt_tokens - 1 : prompt_tokens], ids[:, prompt_tokens : prompt_tokens + 1]
        cache = DynamicCache(config=prefill.config)
        block_stack(prefill).body(input_ids=ids[:, : prompt_tokens - 1], past_key_values=cache, use_cache=True)
        received = handover(cache, layer_map, decode.config)
        by_decode = block_stack(decode).body(input_ids=last, past_key_values=received, use_cache=True)
        by_prefill = block_stack(prefill).body(input_ids=last, past_key_values=cache, use_cache=True)
        total["decode"] += _summed_loss(decode, by_decode.last_hidden_state, target)
        total["prefill"] += _summed_loss(prefill, by_prefill.last_hidden_state, target)
    return {half: loss / len(windows) for half, loss in total.items()}


def _summed_loss(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> float:
    """Of last hidden states (batch, time, hidden) after the final norm and the tokens (batch, time) that followed."""
    return float(token_losses(model, hidden.flatten(0, 1), targets.flatten()).sum()) if targets.numel() else 0.0
