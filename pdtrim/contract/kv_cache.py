"""What a model's KV cache keeps of a token, by its `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdtrim.contract.architectures import LAYER_KIND_KEYS, STATEFUL, block_count

HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model")
HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
KV_HEAD_KEYS = ("num_key_value_heads", "num_kv_heads")
HEAD_SIZE_KEYS = ("head_dim", "kv_channels")
"""What configurations call these, the usual name first."""
_ATTENTION = """
* attention chunked_attention deepseek_sparse_attention full_attention hybrid hybrid_sliding indexed_attention
sliding_attention
"""
ATTENTION_KINDS = frozenset(_ATTENTION.split())
"""Kinds of layers that keep keys and values."""
INDEXED = frozenset({"axk2", "deepseek_v32", "glm_moe_dsa"})
"""Types whose attention keeps keys of an index beside."""
ALL_ATTENTION = INDEXED | {"falcon_h1"}
"""Types that keep a state, and keys and values in every layer too."""
ONE_HEAD = frozenset({"falcon", "gpt_bigcode"})
"""Types that have one head of keys and values for all where `multi_query` says so, which it does unless told."""
TWICE_IN_WINDOWS = frozenset({"mimo_v2_flash"})
"""Types that have twice as many such heads where there is a window."""
GLOBAL_HEAD_SIZE: Mapping[str, int] = {"gemma4_text": 512, "gemma4_unified_text": 512}
"""Types whose layers of full attention have heads of another size, and it, where their configuration does not say."""


def kv_numbers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """How many numbers each layer keeps of one token, while no window has let go of it.

    States that do not grow by the token are none of them. None where the configuration does not tell.
    """
    blocks = block_count(config)
    if type(blocks) is not int:
        return None
    kinds = _kinds(config, blocks)
    if kinds is None:
        return None
    found = [_layer(config, number, kind) for number, kind in enumerate(kinds)]
    known = tuple(numbers for numbers in found if numbers is not None)
    return known if len(known) == blocks else None


def _kinds(config: Mapping[str, Any], blocks: int) -> list[str] | None:
    """Each layer's kind; None where they are unlike, and not listed."""
    for key in (*LAYER_KIND_KEYS, "hybrid_override_pattern"):
        kinds = config.get(key)
        if isinstance(kinds, list | str) and len(kinds) == blocks:
            return [str(kind) for kind in kinds]
    kind = config.get("model_type")
    return None if kind in STATEFUL - ALL_ATTENTION else ["full_attention"] * blocks


def _layer(config: Mapping[str, Any], number: int, kind: str) -> int | None:
    if kind not in ATTENTION_KINDS:
        return 0
    own = config.get("per_layer_config")
    entry = own.get(str(number)) if isinstance(own, Mapping) else None
    config = {**config, **(entry if isinstance(entry, Mapping) else {})}
    if config.get("kv_lora_rank") is not None:
        latent, rotary = _size(config, "kv_lora_rank"), _size(config, "qk_rope_head_dim")
        index = _size(config, "index_head_dim") if config.get("model_type") in INDEXED else 0
        return None if latent is None or rotary is None or index is None else latent + rotary + index
    heads, size = _heads(config, kind), _head_size(config, kind, overruled=own is not None)
    values = _size(config, "swa_v_head_dim" if _windowed(config, kind) else "v_head_dim") or size
    return None if heads is None or size is None or values is None else heads * (size + values)


def _heads(config: Mapping[str, Any], kind: str) -> int | None:
    """Of keys and values."""
    every = _size(config, *HEAD_KEYS)
    if config.get("model_type") in ONE_HEAD:
        if config.get("new_decoder_architecture"):
            return _size(config, "num_kv_heads") or every
        return 1 if config.get("multi_query", True) else every
    if _windowed(config, kind):
        return _size(config, "swa_num_key_value_heads")
    few = _size(config, "num_global_key_value_heads")
    if few is not None and kind == "full_attention" and config.get("attention_k_eq_v", True):
        return few
    inner = config.get("attn_config")
    within = inner.get("kv_n_heads") if isinstance(inner, Mapping) else None
    told = [value for value in (*map(config.get, KV_HEAD_KEYS), within) if value is not None]
    heads = _positive(told[0]) if told else every
    doubled = "sliding" in kind and config.get("model_type") in TWICE_IN_WINDOWS
    return 2 * heads if heads and doubled else heads


def _head_size(config: Mapping[str, Any], kind: str, *, overruled: bool) -> int | None:
    model_type = config.get("model_type")
    if kind == "full_attention" and not overruled and isinstance(model_type, str):
        wide = _size(config, "global_head_dim") or GLOBAL_HEAD_SIZE.get(model_type)
        if wide is not None:
            return wide
    if _windowed(config, kind) and (own := _size(config, "swa_head_dim")) is not None:
        return own
    if (size := _size(config, *HEAD_SIZE_KEYS)) is not None:
        return size
    hidden, heads = _size(config, *HIDDEN_KEYS), _size(config, *HEAD_KEYS)
    return None if hidden is None or heads is None else hidden // heads


def _windowed(config: Mapping[str, Any], kind: str) -> bool:
    """Whether the layer has a window, and heads of its own."""
    return "sliding" in kind and _size(config, "swa_num_key_value_heads") is not None


def _size(config: Mapping[str, Any], *names: str) -> int | None:
    return _positive(next((config[name] for name in names if config.get(name) is not None), None))


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
