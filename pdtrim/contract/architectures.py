"""The architectures that were tested, and what can be done with each: one table, read by the gateway and the workers.

Any other decoder-only architecture is tried too: the worker proves it on the model itself before it begins.
It needs nothing but the standard library, so that the method can be used without the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

BLOCK_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configurations call their number of blocks."""
CONTEXT_KEYS = ("max_position_embeddings", "n_positions")
"""What they call the longest context, in tokens."""
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
"""Keys that only the configuration of a mixture of experts has."""


@dataclass(frozen=True)
class Architecture:
    """What can be done with the models of one `model_type`."""

    gated_mlp: bool = False
    """Every block has one gated MLP (gate, up and down projection), which can be narrowed."""
    attention_measurable: bool = True
    """The attention to a prompt can be computed from a block's queries and keys."""
    linear_layers: bool = True
    """Its blocks have linear layers that low-rank adapters fit."""


_GATED = Architecture(gated_mlp=True)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "gemma2": Architecture(gated_mlp=True, attention_measurable=False),
        "gemma3_text": _GATED,
        "gpt2": Architecture(attention_measurable=False, linear_layers=False),
        "gpt_neox": Architecture(attention_measurable=False),
        "granite": _GATED,
        "llama": _GATED,
        "mistral": _GATED,
        "mixtral": Architecture(),
        "olmo2": _GATED,
        "opt": Architecture(attention_measurable=False),
        "phi3": Architecture(attention_measurable=False),
        "qwen2": _GATED,
        "qwen3": _GATED,
        "qwen3_moe": Architecture(),
    }
)
"""Tested architectures by their `model_type`."""
UNTESTED = Architecture()
"""What is assumed of any other; the worker finds out before it begins."""


def architecture(model_type: object) -> Architecture:
    """What can be done with a model of that type."""
    return ARCHITECTURES.get(model_type, UNTESTED) if isinstance(model_type, str) else UNTESTED


def is_tested(model_type: object) -> bool:
    """Whether a model of that type needs no proof before work begins."""
    return isinstance(model_type, str) and model_type in ARCHITECTURES
