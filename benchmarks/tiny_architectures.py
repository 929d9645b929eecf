"""A tiny random model of any causal language model type of transformers, made from its configuration class alone.

Sizes are set by what configurations call them, so that most new types need nothing here.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pdtrim.contract.architectures import VISION_LANGUAGE

BLOCKS = 8
WINDOW = 6
VOCABULARY = 97
SPREAD = 0.15
"""Standard deviation of the weights: large enough that every block matters, so that a mistake shows."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), BLOCKS),
    **dict.fromkeys(("num_layers_per_stack", "max_window_layers"), BLOCKS // 2),
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "embedding_size"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "word_embed_proj_dim", "dff", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "dim_ff", "feed_forward_size", "d_inner"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "expert_ffn_hidden_size"), 40),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_heads", "linear_num_value_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_head", "dim_head", "kv_channels", "attention_head_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_d_head", "mamba_headdim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("linear_num_key_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups", "n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
    "v_head_dim": 12,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "index_n_heads"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "zero_expert_num"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), WINDOW),
    **dict.fromkeys(("attention_chunk_size", "keep_window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 128),
    **dict.fromkeys(("rotary_dim", "hidden_size_per_layer_input", "laurel_rank", "d_rel", "rel_extent"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "index_block_size"), 8),
    "index_topk": 64,  # Real ones are as long as windows, too.
    "original_max_position_embeddings": 64,
    "vocab_size_per_layer_input": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "query_pre_attn_scalar": 8,
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 2),
    "mamba_d_ssm": 64,
    "dim_model_base": 16,
    **dict.fromkeys(("gated_norm_rank", "adapter_rank", "router_hidden_size", "hc_lowrank"), 8),
    **dict.fromkeys(("layerdrop", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
}
"""What a configuration gets for each of these that its class knows."""

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 4},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "bamba": {"attn_layer_indices": list(range(1, BLOCKS, 2))},
    "bloom": {"hidden_size": 32, "n_head": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": BLOCKS - 1},
    "falcon": {"num_kv_heads": 4, "new_decoder_architecture": False, "multi_query": True},
    "gemma3n_text": {"num_kv_shared_layers": 2, "intermediate_size": 48, "activation_sparsity_pattern": [0.0] * BLOCKS},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_text": {"global_head_dim": 16, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], BLOCKS // 2]]},
    "gpt_oss": {"num_local_experts": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "full_attention"] * (BLOCKS // 2)},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "inkling_text": {"sliding_window_size": WINDOW},
    "kimi_linear": {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (BLOCKS // 4)},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (BLOCKS // 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (BLOCKS // 2)},
    "mamba": {"intermediate_size": 64},
    "falcon_mamba": {"intermediate_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * (BLOCKS // 2)},
    "mimo_v2_flash": {"head_dim": 8, "v_head_dim": 8},
    "mpt": {"d_model": 32, "max_seq_len": 128},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"] * (BLOCKS // 4),
        "moe_latent_size": None,
    },
    "persimmon": {"num_attention_heads": 4},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * (BLOCKS // 2)},
    "recurrent_gemma": {"num_key_value_heads": 1, "block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"] * (BLOCKS // 2),
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [8, 24],
        "num_buckets": 4,
    },
    "xlm": {"causal": True, "use_lang_emb": False},
    "zamba": {"attention_head_dim": 16, "mamba_dt_rank": 4},
    "zamba2": {
        "attention_head_dim": 16,
        "layer_types": ["linear_attention", "linear_attention", "hybrid", "linear_attention"] * (BLOCKS // 4),
        "hybrid_layer_ids": [2, 6],
        "mamba_headdim": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What single types need beside."""


def causal_types() -> list[str]:
    """Every `model_type` that transformers builds a causal language model of, and those that see and are pruned."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() | VISION_LANGUAGE)


def tiny_config(model_type: str) -> PretrainedConfig:
    """The configuration of a tiny model; what it raises, transformers raises."""
    known = CONFIG_MAPPING[model_type]().to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in known}
    if "kv_lora_rank" in known:  # Of multi-head latent attention the configuration works it out.
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**sizes | SPECIAL.get(model_type, {}))
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    return config


def tiny_model(config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A float32 model in evaluation mode with random weights."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.float().eval().requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        parameter.copy_(SPREAD * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    embedding: Any = model.get_input_embeddings()
    embedding.weight[0] = 0  # The padding's, which some models put back to zero.
    return model
