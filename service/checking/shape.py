"""What a model is made of, in numbers: counted on the headers of its weight files, or by its configuration."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from pdtrim.contract.architectures import EXPERT_KEYS, architecture
from pdtrim.contract.kv_cache import kv_numbers
from service.checking.preflight import num_blocks
from service.sources import ModelDescription
from service.sources.safetensors_header import DTYPE_BITS, TensorInfo

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
"""What configurations call the types that safetensors names."""
NUMBERED = re.compile(r"^(?P<prefix>(?:.*?\.)?)(?P<number>\d{1,9})\.(?P<rest>.+)$")
NO_PARAMETERS = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias)$|^mtp\.|\.mtp\.")
"""Tensors in files that are no weights of the model: what is computed anew, and layers for speculation alone."""
SIGHT = re.compile(r"visual|vision|projector|connector|image")
"""Names of what a vision-language model has beside its text decoder."""
MLP = re.compile(r"mlp|feed_forward|block_sparse_moe|ffn|experts|(?:^|\.)fc[12]\.")
EXPERT = re.compile(r"experts\.\d+\.")
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclass(frozen=True)
class ModelShape:
    """A dense model. Numbers are counted, not their bytes."""

    blocks: int
    item_bytes: int
    """Of a number as it is stored."""
    numbers: int
    """All weights; tied ones once."""
    block: int
    """Of a block; the mean, where they differ."""
    largest_block: int
    hidden: int
    vocabulary: int
    attention_width: int
    """Of all heads of queries."""
    kv_width: int
    """Keys and values of one token in one block; the mean, where blocks differ."""
    kv_numbers: int | None
    """Keys and values of one token in all blocks; None where the configuration does not tell."""
    at_work: int
    """Numbers of a block that a token is multiplied with: of experts, those that it is sent to."""
    mlp_at_work: int
    keys_and_values: int
    """Of a block, that make keys and values."""
    block_width: int
    """What the matrices of a block take and give, a token: what is left for their gradients."""
    channels: int | None
    """Of the gated MLP that every block has, if it can be narrowed."""
    file_bytes: int
    largest_file: int

    @property
    def outside(self) -> int:
        """Numbers in no block: embeddings, head and last norm."""
        return self.numbers - self.blocks * self.block

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    def narrowed_by(self, channels: int) -> int:
        """What a block loses when its MLP keeps so many channels."""
        return 0 if self.channels is None else 3 * self.hidden * (self.channels - channels)


def shape_of(model: ModelDescription) -> ModelShape | None:
    """None where the configuration does not say what has to be known."""
    config, blocks = model.config, num_blocks(model.config)
    hidden, heads = _size(config, "hidden_size", "n_embd"), _size(config, "num_attention_heads", "n_head")
    vocabulary = _size(config, "vocab_size")
    item_bytes = _item_bytes(model)
    if hidden is None or heads is None or vocabulary is None or item_bytes is None:
        return None
    head = _size(config, "head_dim") or max(1, hidden // heads)
    kv_heads = _size(config, "num_key_value_heads") or heads
    wide = _size(config, "intermediate_size", "n_inner") or 4 * hidden
    gated = architecture(config["model_type"]).gated_mlp and not any(config.get(key) for key in EXPERT_KEYS)
    kept = kv_numbers(config)
    parts = (
        _by_configuration(model, blocks, item_bytes, hidden, vocabulary, heads * head, kv_heads * head, wide)
        if model.tensors is None
        else _by_headers(model.tensors, config, blocks)
    )
    if parts is None:
        return None
    return ModelShape(
        blocks=blocks,
        item_bytes=item_bytes,
        numbers=parts.total,
        block=parts.blocks // blocks,
        largest_block=parts.largest_block,
        hidden=hidden,
        vocabulary=vocabulary,
        attention_width=heads * head,
        kv_width=2 * kv_heads * head if kept is None else max(1, sum(kept) // blocks),
        kv_numbers=None if kept is None else sum(kept),
        at_work=parts.at_work // blocks,
        mlp_at_work=parts.mlp_at_work // blocks,
        keys_and_values=2 * hidden * kv_heads * head,
        block_width=parts.width // blocks,
        channels=wide if gated and "intermediate_size" in config else None,
        file_bytes=model.weight_bytes,
        largest_file=max(model.weights.values()),
    )


def _size(config: Mapping[str, Any], *names: str) -> int | None:
    found = next((config[name] for name in names if name in config), None)
    return found if type(found) is int and found > 0 else None


def _item_bytes(model: ModelDescription) -> int | None:
    """Of a stored number: as most bytes of the tensors have it, or else as the configuration says."""
    if model.tensors:
        by_type: dict[str, int] = defaultdict(int)
        for tensor in model.tensors.values():
            by_type[tensor.dtype] += tensor.end - tensor.begin
        return max(1, DTYPE_BITS[max(by_type, key=lambda name: by_type[name])] // 8)
    named = DTYPES.get(str(model.config.get("dtype") or model.config.get("torch_dtype")).removeprefix("torch."))
    return None if named is None else DTYPE_BITS[named] // 8


@dataclass
class _Parts:
    """Sums over the whole model; all but the first over its blocks."""

    total: int = 0
    blocks: int = 0
    largest_block: int = 0
    at_work: int = 0
    mlp_at_work: int = 0
    width: int = 0


def _by_headers(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], blocks: int) -> _Parts | None:
    weights = {
        name: tensor.shape
        for name, tensor in tensors.items()
        # GPT-2 and GPT-NeoX store masks beside their weights.
        if len(tensor.shape) < 4 and tensor.dtype not in ("BOOL", "U8") and not NO_PARAMETERS.search(name)
    }
    prefix = _decoder(weights, blocks)
    experts = next((size for key in EXPERT_KEYS[:3] if (size := _size(config, key))), None)
    chosen = _size(config, "num_experts_per_tok")
    busy = chosen / experts if chosen and experts else 1.0
    found, by_block = _Parts(), defaultdict[int, int](int)
    for name, shape in weights.items():
        match = NUMBERED.match(name)
        if match is None or match["prefix"] != prefix:
            if not SIGHT.search(name) and not _is_tied(name, config):
                found.total += prod(shape)
            continue
        if (number := int(match["number"])) >= blocks:
            continue  # Layers behind the last are for speculation.
        numbers, share = prod(shape), busy if EXPERT.search(match["rest"]) else 1.0
        found.total += numbers
        by_block[number] += numbers
        found.at_work += round(share * numbers)
        found.mlp_at_work += round(share * numbers) if MLP.search(match["rest"]) else 0
        found.width += round(share * sum(shape)) if len(shape) > 1 else 0
    if len(by_block) != blocks:
        return None
    found.blocks, found.largest_block = sum(by_block.values()), max(by_block.values())
    return found


def _decoder(weights: Mapping[str, tuple[int, ...]], blocks: int) -> str | None:
    """What the names of the decoder's blocks begin with: of what is numbered so far, what has the most numbers."""
    sizes: dict[str, int] = defaultdict(int)
    numbers: dict[str, set[int]] = defaultdict(set)
    for name, shape in weights.items():
        match = NUMBERED.match(name)
        if match is not None and not SIGHT.search(match["prefix"]):
            sizes[match["prefix"]] += prod(shape)
            numbers[match["prefix"]].add(int(match["number"]))
    fitting = [prefix for prefix in sizes if len(numbers[prefix]) >= blocks]
    return max(fitting, key=lambda prefix: sizes[prefix], default=None)


def _is_tied(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a stored head is the embedding again."""
    return bool(config.get("tie_word_embeddings")) and name.endswith(HEADS)


def _by_configuration(
    model: ModelDescription,
    blocks: int,
    item_bytes: int,
    hidden: int,
    vocabulary: int,
    queries: int,
    keys: int,
    wide: int,
) -> _Parts:
    """Of blocks that are alike: all tensors less embeddings, head and the last norm, shared out evenly."""
    config = model.config
    total = (model.weight_bytes if model.tensor_bytes is None else model.tensor_bytes) // item_bytes
    tables = 1 if config.get("tie_word_embeddings", True) else 2
    block = max(0, total - tables * vocabulary * hidden - hidden) // blocks
    experts = next((size for key in EXPERT_KEYS[:3] if (size := _size(config, key))), None)
    chosen = _size(config, "num_experts_per_tok")
    attention = 2 * hidden * (queries + keys)
    mlp = max(0, block - attention)
    busy = round(mlp * (chosen / experts if chosen and experts else 1.0))
    in_mlp = 3 * (hidden + wide) * (chosen or 1)
    return _Parts(
        total=total,
        blocks=blocks * block,
        largest_block=block,
        at_work=blocks * (min(block, attention) + busy),
        mlp_at_work=blocks * busy,
        width=blocks * (4 * hidden + 2 * queries + 2 * keys + in_mlp),
    )
