"""Keys and values without attention: what is left of the attention of a block that is kept for its KV cache alone."""

# Not `from __future__ import annotations`: PyTorch reads the annotations of an operator as types.
from typing import Any

import torch
from torch import nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import CompilationConfig
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, direct_register_custom_op

OPERATOR = "pdtrim_keep_keys_values"
ATTENTION = "vllm::unified_attention_with_output"
"""At this operator and its like vLLM cuts its compiled graphs."""
QUERIES = ("q_norm", "o_proj")
"""Modules of an attention that keys and values do not need."""


@eager_break_during_capture
@maybe_transfer_kv_layer
def pdtrim_keep_keys_values(
    key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, layer_name: LayerNameType
) -> None:
    """Write a layer's KV cache. It is said to change `hidden`, lest a compiler leave out what nobody uses."""
    unified_kv_cache_update(key, value, layer_name)


direct_register_custom_op(op_name=OPERATOR, op_func=pdtrim_keep_keys_values, mutates_args=["hidden"])


def cut_graphs(config: CompilationConfig) -> None:
    """Have vLLM cut its graphs at this operator where it does so at attention, which reads the same metadata."""
    if config.splitting_ops and ATTENTION in config.splitting_ops:
        config.splitting_ops.append(f"vllm::{OPERATOR}")


class KeyValueLinear(QKVParallelLinear):
    """The rows of a projection of queries, keys and values that make keys and values."""

    def __init__(self, stock: QKVParallelLinear) -> None:
        super().__init__(
            stock.hidden_size,
            stock.head_size,
            0,
            stock.total_num_kv_heads,
            bias=stock.bias is not None,
            prefix=stock.prefix,
            disable_tp=stock.disable_tp,
            v_head_size=stock.v_head_size,
        )

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: str | None = None
    ) -> None:
        if loaded_shard_id != "q":
            super().weight_loader(param, self._without_queries(loaded_weight, loaded_shard_id), loaded_shard_id)

    def weight_loader_v2(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: str | None = None
    ) -> None:
        if loaded_shard_id != "q":
            super().weight_loader_v2(param, self._without_queries(loaded_weight, loaded_shard_id), loaded_shard_id)

    def _without_queries(self, loaded: torch.Tensor, shard: str | None) -> torch.Tensor:
        """Of checkpoints that have one projection for all three, whose first rows make queries."""
        rows = self.total_num_kv_heads * (self.head_size + self.v_head_size)
        return loaded if shard else loaded[-rows:]


class KeysAndValues(nn.Module):
    """Keys and values of a block, for its KV cache, by the modules of its attention, under their own names."""

    k_norm: nn.Module
    rotary_emb: nn.Module

    def __init__(self, attention: Any) -> None:
        super().__init__()
        for name, child in attention.named_children():
            # vLLM's loaders leave out the weights of what is missing.
            self.add_module(name, PPMissingLayer() if name in QUERIES else child)
        self.qkv_proj = KeyValueLinear(attention.qkv_proj)
        self.heads: int = attention.num_kv_heads
        self.size: int = attention.kv_size
        self.layer_name = _encode_layer_name(attention.attn.layer_name)
        self.operator = pdtrim_keep_keys_values if attention.attn.use_direct_call else getattr(torch.ops.vllm, OPERATOR)

    def forward(self, positions: torch.Tensor, normed: torch.Tensor, hidden: torch.Tensor) -> None:
        """Write the cache for `normed` (tokens, width), which came of `hidden`."""
        projected, _ = self.qkv_proj(normed)
        _, key, value = projected.split([projected.shape[-1] - 2 * self.size, self.size, self.size], dim=-1)
        if hasattr(self, "k_norm"):
            key = self.k_norm(key.unflatten(-1, (self.heads, -1))).flatten(-2)
        # Some rotary embeddings want queries too; what becomes of these is not used.
        _, key = self.rotary_emb(positions, key.clone(), key)
        self.operator(
            key.view(-1, self.heads, self.size // self.heads),
            value.view(-1, self.heads, self.size // self.heads),
            hidden,
            self.layer_name,
        )
