"""Configurations: read as transformers reads them, and those of pruned models.

What a configuration's class derives from a layer's number, or from their count, is made explicit for the blocks that
stay, so that each is built as it was. Whether that succeeded is shown by `proof`, not here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from pdtrim.contract.architectures import BLOCK_COUNT_KEYS
from workers.pruning.model.building import ImpossibleModel

PER_LAYER = frozenset({"activation_sparsity_pattern", "indexer_types", "intermediate_size", "moe_topk", "num_experts"})
"""Keys without the word layer that may have a list with one entry a layer."""
NUMBERS = frozenset({"moe_layers", "mlp_only_layers", "full_attn_idxs", "hybrid_layer_ids", "attn_layer_indices"})
"""Keys whose lists name layers."""
LEADING = ("first_k_dense_replace", "num_dense_layers")
"""Keys that count layers at the beginning which are unlike those after them."""
PATTERNS = ("hybrid_override_pattern", "index_topk_pattern")
"""Keys whose text may have one letter a layer."""
EXTRA_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Keys that count layers behind the last block, which predict further tokens and are no part of a causal model."""
CODE_KEYS = ("auto_map",)
"""Keys that name code beside the weights, which is never run."""


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a checkpoint folder, as transformers reads it, whatever code lies beside it.

    Raises: what its class raises.
    """
    return config_of(json.loads((folder / "config.json").read_text()))


def config_of(given: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that a `config.json` describes. Raises: ImpossibleModel; what its class raises."""
    if not isinstance(given, Mapping):
        raise ImpossibleModel("config.json holds no object")
    content = {key: value for key, value in given.items() if key not in CODE_KEYS}
    return AutoConfig.for_model(**PretrainedConfig._decode_special_floats(content))


def count_key(config: Mapping[str, Any]) -> str:
    """What a configuration calls its number of blocks. Raises: ImpossibleModel."""
    for key in BLOCK_COUNT_KEYS:
        if key in config:
            return key
    raise ImpossibleModel(f"config.json has none of {', '.join(BLOCK_COUNT_KEYS)}")


def pruned_json(given: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The `config.json` of a model with only the blocks `kept`: what was given, and what these blocks need.

    Raises: as `config_of`.
    """
    config = config_of(given)
    aliases: Mapping[str, str] = config.attribute_map
    changed = pruned_values(config, kept)
    # The class would take an alias for the value as it was.
    result = {
        key: value for key, value in given.items() if key not in CODE_KEYS and aliases.get(key, key) not in changed
    }
    result |= changed
    if count := next((key for key in BLOCK_COUNT_KEYS if key in given), None):
        result.setdefault(count, len(kept))
    encoded: dict[str, Any] = PretrainedConfig._encode_special_floats(result)
    return encoded


def pruned_values(config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """What differs in the configuration of a model with only the blocks `kept`, by key."""
    values = config.to_dict()
    num_blocks: int = config.num_hidden_layers
    layer = {block: number for number, block in enumerate(kept)}
    changed: dict[str, Any] = {}
    if len(kept) < num_blocks:
        for key in BLOCK_COUNT_KEYS:
            if values.get(key) == num_blocks:
                changed[key] = len(kept)
                break
        for key, value in values.items():
            changed |= _entries(key, value, num_blocks, layer)
        changed |= _sparse_steps(config, num_blocks, layer) | _ernie_experts(config, num_blocks, layer)
        if kinds := values.get("block_types"):  # Recurrent Gemma repeats a shorter list.
            changed["block_types"] = [kinds[block % len(kinds)] for block in kept]
        if (depth := values.get("scale_depth")) is not None:  # MiniCPM 3 scales by 1/√blocks.
            changed["scale_depth"] = depth * math.sqrt(len(kept) / num_blocks)
    for key in EXTRA_LAYERS:
        if values.get(key):
            changed[key] = 0
    return changed


def _entries(key: str, value: Any, num_blocks: int, layer: Mapping[int, int]) -> dict[str, Any]:
    """What becomes of one entry of a configuration."""
    if key in LEADING and isinstance(value, int):
        return {key: sum(block < value for block in layer)}
    if key in PATTERNS and isinstance(value, str) and len(value) == num_blocks:
        return {key: "".join(value[block] for block in layer)}
    if key == "per_layer_config" and isinstance(value, Mapping):
        return {key: {str(layer[int(block)]): entry for block, entry in value.items() if int(block) in layer}}
    if key == "attention_layers" and isinstance(value, list | tuple):  # GPT Neo has them a second time, as runs.
        kinds = [value[block] for block in layer]
        return {key: kinds, "attention_types": [[[kind], 1] for kind in kinds]}
    if not isinstance(value, list | tuple):
        return {}
    if key in NUMBERS:
        return {key: [layer[block] for block in value if block in layer]}
    if ("layer" in key or key in PER_LAYER) and len(value) == num_blocks:
        return {key: [value[block] for block in layer]}
    return {}


def _sparse_steps(config: PretrainedConfig, num_blocks: int, layer: Mapping[int, int]) -> dict[str, Any]:
    """Qwen's mixtures: which blocks have experts follows from their numbers."""
    step = getattr(config, "decoder_sparse_step", None)
    if not step:
        return {}
    dense = {*(getattr(config, "mlp_only_layers", None) or ()), *(b for b in range(num_blocks) if (b + 1) % step)}
    return {"decoder_sparse_step": 1, "mlp_only_layers": [number for block, number in layer.items() if block in dense]}


def _ernie_experts(config: PretrainedConfig, num_blocks: int, layer: Mapping[int, int]) -> dict[str, Any]:
    """ERNIE's mixtures: the blocks with experts are every so many between a first and a last one."""
    if (first := getattr(config, "moe_layer_start_index", None)) is None:
        return {}
    last, interval = config.moe_layer_end_index, config.moe_layer_interval
    last = num_blocks - 1 if last == -1 else last
    sparse = [n for block, n in layer.items() if first <= block <= last and (block + 1) % interval == 0]
    if not sparse:
        return {"moe_layer_start_index": len(layer), "moe_layer_end_index": len(layer), "moe_layer_interval": 1}
    steps = {after - before for before, after in pairwise(sparse)}
    interval = next(iter(steps)) if len(steps) == 1 else 1
    return {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1], "moe_layer_interval": interval}
