"""Decoder layers of vLLM that leave out what their block gives up, made of the stock ones.

What stock vLLM adds for such a part is zeros, so nothing is lost with it. A layer takes and gives the hidden state as
vLLM's do, in two summands, the later of which the next norm adds to the earlier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.utils import PPMissingLayer

from pdtrim_vllm.keys_values import KeysAndValues

State = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Norms:
    """What a family calls the norms of its blocks beside `input_layernorm`."""

    before_mlp: str
    after_attention: str = ""
    after_mlp: str = ""


PRE = Norms(before_mlp="post_attention_layernorm")
SANDWICH = Norms(
    before_mlp="pre_feedforward_layernorm",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)
KNOWN: Mapping[str, Norms] = {
    "vllm.model_executor.models.llama.LlamaDecoderLayer": PRE,
    "vllm.model_executor.models.mistral.MistralDecoderLayer": PRE,
    "vllm.model_executor.models.qwen2.Qwen2DecoderLayer": PRE,
    "vllm.model_executor.models.qwen3.Qwen3DecoderLayer": PRE,
    "vllm.model_executor.models.gemma3.Gemma3DecoderLayer": SANDWICH,
}
"""Class of the stock layer → its norms. Of a subclass it is not known what it does besides."""


def class_name(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def normed(norm: nn.Module, hidden: torch.Tensor, residual: torch.Tensor | None) -> State:
    """(the sum of both, normed; the sum)."""
    if residual is None:
        return norm(hidden), hidden
    after: State = norm(hidden, residual)
    return after


class SkippingLayer(nn.Module):
    """The parts of a stock layer that are at work, under their own names."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    mlp: nn.Module

    def __init__(self, stock: nn.Module, alive: tuple[str, ...]) -> None:
        super().__init__()
        for name, child in stock.named_children():
            # vLLM's loaders leave out the weights of what is missing.
            self.add_module(name, child if name in alive else PPMissingLayer())


class WithoutMlp(SkippingLayer):
    def __init__(self, stock: nn.Module, norms: Norms) -> None:
        super().__init__(stock, ("input_layernorm", "self_attn", norms.after_attention))
        self.norms = norms

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **unused: Any
    ) -> State:
        hidden, residual = normed(self.input_layernorm, hidden_states, residual)
        hidden = self.self_attn(positions=positions, hidden_states=hidden)
        if self.norms.after_attention:
            hidden = self.get_submodule(self.norms.after_attention)(hidden)
        return hidden, residual


class WithoutAttention(SkippingLayer):
    def __init__(self, stock: nn.Module, norms: Norms) -> None:
        super().__init__(stock, (norms.before_mlp, "mlp", norms.after_mlp))
        self.norms = norms

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **unused: Any
    ) -> State:
        hidden, residual = normed(self.get_submodule(self.norms.before_mlp), hidden_states, residual)
        hidden = self.mlp(hidden)
        if self.norms.after_mlp:
            hidden = self.get_submodule(self.norms.after_mlp)(hidden)
        return hidden, residual


class KeysAndValuesOnly(SkippingLayer):
    def __init__(self, stock: Any, norms: Norms) -> None:
        super().__init__(stock, ("input_layernorm",))
        self.self_attn = KeysAndValues(stock.self_attn)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **unused: Any
    ) -> State:
        hidden, residual = normed(self.input_layernorm, hidden_states, residual)
        self.self_attn(positions, hidden, residual)
        return torch.zeros_like(residual), residual


WITHOUT: Mapping[str, type[WithoutMlp | WithoutAttention | KeysAndValuesOnly]] = {
    "mlp": WithoutMlp,
    "attention": WithoutAttention,
    "kv_only": KeysAndValuesOnly,
}
"""What a block gives up → the layer that leaves it out."""


def skipping(stock: nn.Module, part: str) -> nn.Module:
    """A layer without `part`, which takes what it needs of a stock layer of a class in `KNOWN`."""
    return WITHOUT[part](stock, KNOWN[class_name(stock)])
