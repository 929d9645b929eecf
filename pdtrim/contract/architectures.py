"""The architectures that were tested, and what can be done with each: one table, read by the gateway and the workers.

Any other decoder-only architecture is tried too: the worker proves it on the model itself before it begins.
It needs nothing but the standard library, so that the method can be used without the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

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
_KNOWN = """
afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba bart beam bert bert-generation big_bird
bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom blt camembert codegen cohere cohere2 cohere2_moe
cohere_compass_text cpmant ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
diffllama doge dots1 dots3_note dots3_note_text electra emu3 ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe
falcon falcon_h1 falcon_mamba flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4
gemma4_assistant gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text git glm glm4 glm4_moe
glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj
granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe
kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4 llama4_text longcat_flash mamba mamba2 marian mbart
megatron-bert mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral
mixtral mllama modernbert-decoder moshi moss_transcribe_diarize mpt musicgen musicgen_melody mvp nanochat
nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3 phi4_multimodal
phimoe plbart prophetnet qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe
qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma reformer rembert roberta roberta-prelayernorm roc_bert
roformer rwkv seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma whisper xglm xlm xlm-roberta
xlm-roberta-xl xlnet xlstm xmod youtu zamba zamba2 zaya
"""
KNOWN = frozenset(_KNOWN.split())
"""Every `model_type` that transformers has a causal language model of: code beside their weights is not needed."""
_ENCODERS = """
bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod
"""
ENCODERS = frozenset(_ENCODERS.split())
"""Those of them that are encoders, although they can be given a head and a causal mask."""
_OWN_NUMBERS = "which change when one of them goes"
_PASSED_ON = "so that a block cannot be left out by passing on what it was given"
_STREAMS = "whose blocks pass on several hidden states side by side"
_NO_KEYS = "whose blocks keep no keys and values"
UNPRUNABLE: Mapping[str, str] = MappingProxyType(
    {
        "beam": f"whose blocks weigh what they are given by their own numbers, {_OWN_NUMBERS}",
        "blt": "which reads bytes in patches, with three stacks of blocks",
        "cpmant": "which puts tokens of its own before those that it reads",
        "deepseek_v4": f"{_STREAMS} (hyper-connections), {_PASSED_ON}",
        "diffllama": f"whose attentions have constants by their blocks' numbers, {_OWN_NUMBERS}",
        "falcon_mamba": _NO_KEYS,
        "gemma3n": f"{_STREAMS} (AltUp), {_PASSED_ON}, and whose last blocks read the keys and values of others",
        "gemma3n_text": f"{_STREAMS} (AltUp), {_PASSED_ON}, and whose last blocks read the keys and values of others",
        "hrm_text": "which runs its blocks several times, in two stacks",
        "hy_v4": f"{_STREAMS} (hyper-connections), {_PASSED_ON}",
        "inkling2_text": f"whose blocks read what all blocks before them gave, {_PASSED_ON}",
        "jamba": f"whose blocks are of one kind or another by their numbers, {_OWN_NUMBERS}",
        "mamba": _NO_KEYS,
        "mamba2": _NO_KEYS,
        "minimax": "whose blocks need a cache of its own kind",
        "modernbert-decoder": "whose head is more than one matrix",
        "openai-gpt": _NO_KEYS,
        "rwkv": _NO_KEYS,
        "trocr": "which reads what an encoder makes of an image",
        "xlm": "whose blocks are no parts of their own",
        "xlnet": _NO_KEYS,
        "xlstm": _NO_KEYS,
        "zamba": f"whose blocks read the embeddings beside the hidden state, {_PASSED_ON}",
        "zamba2": f"whose blocks read the embeddings beside the hidden state, {_PASSED_ON}",
        "zaya": f"whose blocks pass on what their routers saw, beside the hidden state, {_PASSED_ON}",
    }
)
"""Types that no block can be left out of, or not by what is common to all others, each with its reason."""
PER_LAYER_EMBEDDINGS: Mapping[str, int] = MappingProxyType({"gemma4_text": 256})
"""Types that have `hidden_size_per_layer_input`, and what it is where a configuration does not say."""
LAST_STAYS = frozenset({"gemma4_text", "gemma4_unified_text", "gpt_neox_japanese"})
"""Types whose last block is unlike the others, whatever their configuration says."""
_STATE_KINDS = """
conv deepseek_sparse_attention hybrid hybrid_sliding indexed_attention linear_attention mamba mamba2
qwen_sparse_attention recurrent
"""
STATE_KINDS = frozenset(_STATE_KINDS.split())
"""Kinds of layers that keep a state that is not keys and values."""
LAYER_KIND_KEYS = ("layer_types", "layers_block_type", "block_types")
"""What configurations call the list of their layers' kinds."""
_STATEFUL = """
axk2 bailing_hybrid bamba deepseek_v32 falcon_h1 glm_moe_dsa granitemoehybrid inkling2_text inkling_text jamba
kimi_linear lfm2 lfm2_moe lfm3 minimax nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next
qwen4_exp_text recurrent_gemma zamba zamba2 zaya
"""
STATEFUL = frozenset(_STATEFUL.split())
"""Types with such layers where their configuration does not say otherwise."""
OWN_DISTANCES = frozenset({"bloom"})
"""Types whose attention has a bias by distance that is worked out for the tokens at hand, and not for a cache's."""
TEXT_MODELS: Mapping[str, str] = MappingProxyType(
    {
        "qwen2_5_vl": "qwen2",
        "qwen2_5_vl_text": "qwen2",
        "qwen3_vl_text": "qwen3",
    }
)
"""Types of text decoders that are another type where there is no image, by which they are pruned."""
VISION_LANGUAGE = frozenset(
    {"gemma3", "internvl", "llama4", "llava", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl", "smolvlm"}
)
"""Types of vision-language models, whose text decoder is pruned in its place; tested, each with an image."""
UNTESTED = Architecture()
"""What is assumed of any other; the worker finds out before it begins."""


def architecture(model_type: object) -> Architecture:
    """What can be done with a model of that type."""
    return ARCHITECTURES.get(model_type, UNTESTED) if isinstance(model_type, str) else UNTESTED


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The configuration of the text decoder of a vision-language model, as of a model of its own; None of any other."""
    if not isinstance(whole := config.get("model_type"), str) or whole not in VISION_LANGUAGE:
        return None
    part = config.get("text_config")
    # Qwen2.5-VL is published with the decoder's entries beside those of the whole.
    flat = {key: value for key, value in config.items() if key != "vision_config"}
    text: Mapping[str, Any] = part if isinstance(part, dict) else flat
    kind = text.get("model_type")
    ours = {key: config[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in config}
    return {**text, **ours, "model_type": TEXT_MODELS.get(kind, kind) if isinstance(kind, str) else kind}


def protected_for_vision(config: Mapping[str, Any]) -> int:
    """How many of the first blocks have to stay: Qwen3-VL adds what it sees to what these give, by their numbers."""
    sight = config.get("vision_config")
    found = sight.get("deepstack_visual_indexes") if isinstance(sight, dict) else None
    return len(found) if isinstance(found, list) else 0


def unprunable(config: Mapping[str, Any]) -> str | None:
    """Why no block can be left out of a text model, as what follows its architecture's name; None if one may be."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    if kind in UNPRUNABLE:
        return UNPRUNABLE[kind]
    if config.get("num_kv_shared_layers"):
        return "whose last blocks (`num_kv_shared_layers`) read the keys and values of others"
    if config.get("hidden_size_per_layer_input", PER_LAYER_EMBEDDINGS.get(kind)):
        return "each of whose blocks has a part of one table of embeddings (`hidden_size_per_layer_input`)"
    indexers = [one for key in ("indexer_types", "index_topk_pattern") for one in _entries(config.get(key))]
    if "shared" in indexers or "S" in indexers:
        return f"whose blocks pass on which tokens to attend to, beside the hidden state, {_PASSED_ON}"
    if config.get("scale_attn_by_inverse_layer_idx"):
        return f"whose blocks are scaled by their numbers (`scale_attn_by_inverse_layer_idx`), {_OWN_NUMBERS}"
    return None


def _entries(value: object) -> list[object]:
    """Of a list, or the letters of a text."""
    return list(value) if isinstance(value, list | str) else []


def block_count(config: Mapping[str, Any]) -> object:
    """What a configuration says of its number of blocks: a number, or a list or text with one entry for each."""
    for key in BLOCK_COUNT_KEYS:
        if config.get(key) is not None:
            return config[key]
    for key in (*LAYER_KIND_KEYS, "hybrid_override_pattern"):
        if isinstance(kinds := config.get(key), list | str):
            return len(kinds)
    return None


def keeps_states(config: Mapping[str, Any]) -> bool:
    """Whether some layers keep a state that is not keys and values, which a prefill half cannot hand over."""
    for key in LAYER_KIND_KEYS:
        if isinstance(kinds := config.get(key), list) and kinds:
            return not STATE_KINDS.isdisjoint(kind for kind in kinds if isinstance(kind, str))
    return config.get("model_type") in STATEFUL


def is_tested(model_type: object) -> bool:
    """Whether a model of that type needs no proof before work begins."""
    return isinstance(model_type, str) and model_type in ARCHITECTURES
