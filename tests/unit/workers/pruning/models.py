"""Small models of every supported family, and the reference model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import workers
from workers.pruning.model.calibration import Split, cut_windows, stdlib_documents, token_stream
from workers.pruning.model.pair import FirstToken, handover

FAMILIES = ("llama", "llama-tied", "mistral-sliding", "qwen2-mixed", "qwen3")
"""For what the same code does to every family."""
OTHERS = ("gemma2", "gemma3", "gpt2", "gpt-neox", "granite", "olmo2", "opt", "opt-projected", "phi3")
EXPERTS = ("mixtral", "qwen3-moe")
"""Families with blocks of experts, which the model stacks and checkpoints keep apart."""
"""For where the parts of a model are, and what their checkpoints look like."""
REFERENCE = Path(workers.__file__).parent / "reference_model"
TOLERANCE = 1e-5


def tiny_model(family: str, *, num_blocks: int = 5, seed: int = 0) -> PreTrainedModel:
    """A random float32 model with 5 blocks, hidden size 32, 4 heads, 2 KV heads, vocabulary 97."""
    shared: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        # Large weights make every block matter, so that a mistake shows.
        "initializer_range": 0.2,
        "attn_implementation": "sdpa",
    }
    layer_types = ["full_attention" if index % 2 else "sliding_attention" for index in range(num_blocks)]
    ungrouped = {key: value for key, value in shared.items() if key != "num_key_value_heads"}
    opt = {key: value for key, value in ungrouped.items() if key not in ("intermediate_size", "initializer_range")}
    opt |= {"ffn_dim": 48, "init_std": 0.2}
    configs: dict[str, Callable[[], PretrainedConfig]] = {
        "llama": lambda: LlamaConfig(**shared, tie_word_embeddings=False),
        "llama-tied": lambda: LlamaConfig(**shared, tie_word_embeddings=True),
        "mistral-sliding": lambda: MistralConfig(**shared, sliding_window=7),
        "qwen2-mixed": lambda: Qwen2Config(
            **shared, use_sliding_window=True, sliding_window=6, layer_types=layer_types, tie_word_embeddings=True
        ),
        "qwen3": lambda: Qwen3Config(**shared, head_dim=16, tie_word_embeddings=False),
        "gemma2": lambda: Gemma2Config(
            **shared | {"attn_implementation": "eager"},
            head_dim=16,
            sliding_window=6,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        ),
        "gemma3": lambda: Gemma3TextConfig(
            **shared, head_dim=16, sliding_window=6, layer_types=layer_types, final_logit_softcapping=3.0
        ),
        "gpt2": lambda: GPT2Config(
            vocab_size=97,
            n_embd=32,
            n_layer=num_blocks,
            n_head=4,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            initializer_range=0.2,
        ),
        "gpt-neox": lambda: GPTNeoXConfig(**ungrouped | {"rotary_pct": 0.5, "use_parallel_residual": True}),
        "granite": lambda: GraniteConfig(
            **shared,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            attention_multiplier=0.3,
            logits_scaling=4.0,
        ),
        "mixtral": lambda: MixtralConfig(**shared, num_local_experts=3, num_experts_per_tok=2),
        "olmo2": lambda: Olmo2Config(**shared),
        "opt": lambda: OPTConfig(**opt, word_embed_proj_dim=32),
        "opt-projected": lambda: OPTConfig(**opt, word_embed_proj_dim=16, do_layer_norm_before=False),
        "phi3": lambda: Phi3Config(**shared),
        "qwen3-moe": lambda: Qwen3MoeConfig(
            **shared | {"head_dim": 16},
            moe_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=2,
        ),
        "qwen3-tied": lambda: Qwen3Config(**shared, head_dim=16, tie_word_embeddings=True),
    }
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(configs[family]())
    model.float().eval().requires_grad_(False)
    return model


def continued(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, *, use_cache: bool = True) -> torch.Tensor:
    """Prompts `ids` (batch, time) with their greedy continuation, as the library generates it."""
    generate: Any = model.generate
    mask = torch.ones_like(ids)
    tokens: torch.Tensor = generate(
        ids, max_new_tokens=new_tokens, do_sample=False, attention_mask=mask, use_cache=use_cache
    )
    return tokens


def loaded_whole(folder: Path) -> PreTrainedModel:
    """A checkpoint as any server would load it, in float32, but with nothing missing or left over."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert isinstance(model, PreTrainedModel)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval()
    return model


def random_ids(batch: int, tokens: int, *, seed: int = 1) -> torch.Tensor:
    """Token ids (batch, tokens) below 97."""
    return torch.randint(1, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@cache
def reference_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(REFERENCE)


def framed_tokenizer(opening: Sequence[int] = (), closing: Sequence[int] = ()) -> PreTrainedTokenizerBase:
    """The reference model's, but with these tokens before every text and behind it."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(REFERENCE)
    names = {token: tokenizer.convert_ids_to_tokens(token) for token in (*opening, *closing)}
    template = [*(names[token] for token in opening), "$A", *(names[token] for token in closing)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(name, token) for token, name in names.items()]
    )
    return tokenizer


def reference_model() -> PreTrainedModel:
    """A fresh float32 copy of the trained reference model."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    model.eval().requires_grad_(False)
    return model


@cache
def reference_windows(split: Split, count: int, tokens: int) -> torch.Tensor:
    """Windows (count, tokens) of the standard library's source; do not change them."""
    stream = token_stream(stdlib_documents(split), reference_tokenizer(), at_least=2 * count * tokens)
    return cut_windows(stream, count=count, tokens=tokens, seed=0)


@torch.no_grad()
def continued_by_pair(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    layer_map: Sequence[int],
    ids: torch.Tensor,
    *,
    new_tokens: int,
    first_token: FirstToken,
) -> torch.Tensor:
    """Greedy continuation (batch, new_tokens) of prompts `ids` (batch, time) with caches of transformers alone."""
    read, newest = (ids[:, :-1], ids[:, -1:]) if first_token == "decode" else (ids, None)
    prompt = prefill(input_ids=read, past_key_values=DynamicCache(config=prefill.config), use_cache=True)
    cache = handover(prompt.past_key_values, layer_map, decode.config)
    tokens: list[torch.Tensor] = []
    if newest is None:
        newest = prompt.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(newest)
    while len(tokens) < new_tokens:
        newest = decode(input_ids=newest, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(newest)
    return torch.cat(tokens, dim=1)
