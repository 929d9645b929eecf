"""Small vision-language models, of every family that is pruned whole, with an image and a text that asks about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    InternVLConfig,
    Llama4Config,
    LlavaConfig,
    Mistral3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    SmolVLMConfig,
)

FAMILIES = ("gemma3", "internvl", "llama4", "llava", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl", "smolvlm")
IMAGE = 4000
"""The token that stands for a part of the image, which no text has."""
BLOCKS = 5
SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_SIGHT = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
QWEN_SIGHT |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _text(kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": 4096,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **changes,
    }


def _mrope(kind: str) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    if kind.startswith("qwen3"):
        rope["mrope_interleaved"] = True
    return _text(kind, rope_parameters=rope)


def _configs() -> Mapping[str, Callable[[], PretrainedConfig]]:
    qwen: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": 4001}
    qwen |= {"vision_start_token_id": 4002, "vision_end_token_id": 4003}
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    return {
        "gemma3": lambda: Gemma3Config(
            text_config=_text("gemma3_text", sliding_window=6, layer_types=kinds, query_pre_attn_scalar=8),
            vision_config={**SIGHT, "image_size": 16, "patch_size": 4},
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
        ),
        "internvl": lambda: InternVLConfig(
            text_config=_text("qwen2"),
            vision_config={**SIGHT, "image_size": (16, 16), "patch_size": (4, 4)},
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        ),
        "llama4": lambda: Llama4Config(
            text_config=_text(
                "llama4_text",
                intermediate_size_mlp=40,
                num_local_experts=2,
                moe_layers=[1, 3],
                attention_chunk_size=8,
                no_rope_layers=[1, 1, 0, 1, 1],
            ),
            vision_config={**SIGHT, "image_size": 16, "patch_size": 4, "vision_output_dim": 24}
            | {"projector_input_dim": 24, "projector_output_dim": 24, "intermediate_size": 64},
            image_token_index=IMAGE,
        ),
        "llava": lambda: LlavaConfig(
            text_config=_text("llama"),
            vision_config={"model_type": "clip_vision_model", **SIGHT, "image_size": 8, "patch_size": 4},
            image_token_index=IMAGE,
            image_seq_length=4,
            tie_word_embeddings=False,
        ),
        "mistral3": lambda: Mistral3Config(
            text_config=_text("mistral", sliding_window=None),
            vision_config={"model_type": "pixtral", **SIGHT, "head_dim": 8, "image_size": 16, "patch_size": 4},
            image_token_index=IMAGE,
            tie_word_embeddings=False,
        ),
        "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
            text_config=_mrope("qwen2_5_vl_text"),
            vision_config={**QWEN_SIGHT, "window_size": 8, "fullatt_block_indexes": [1]},
            **qwen,
        ),
        "qwen3_5": lambda: Qwen3_5Config(
            text_config=_mrope("qwen3_5_text")
            | {"layer_types": ["linear_attention", "full_attention"] * 2 + ["full_attention"]}
            | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
            | {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            vision_config={**QWEN_SIGHT, "num_position_embeddings": 16},
            **qwen,
        ),
        "qwen3_vl": lambda: Qwen3VLConfig(
            text_config=_mrope("qwen3_vl_text"),
            vision_config={**QWEN_SIGHT, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **qwen,
        ),
        "smolvlm": lambda: SmolVLMConfig(
            text_config=_text("llama"),
            vision_config={**SIGHT, "image_size": 16, "patch_size": 4},
            image_token_id=IMAGE,
            scale_factor=2,
        ),
    }


def whole_model(family: str) -> PreTrainedModel:
    """A random float32 model with 5 blocks in its text decoder."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(_configs()[family]())
    model.float().eval().requires_grad_(False)
    if family == "gemma3":  # Made without sight: zeros stand between the image and the text.
        model.get_parameter("model.multi_modal_projector.mm_input_projection_weight").normal_(std=0.2)
    return model


def question(family: str) -> dict[str, Tensor]:
    """An image of four tokens in a text of 16, as the model takes them."""
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 80, (1, 16), generator=drawn)
    ids[0, 3:7] = IMAGE
    seen: dict[str, Tensor] = {}
    if family.startswith("qwen"):
        seen["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=drawn)
        seen["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        seen["mm_token_type_ids"] = (ids == IMAGE).long()
    elif family == "smolvlm":
        seen["pixel_values"] = torch.randn(1, 1, 3, 16, 16, generator=drawn)
    elif family == "llava":
        seen["pixel_values"] = torch.randn(1, 3, 8, 8, generator=drawn)
    else:
        seen["pixel_values"] = torch.randn(1, 3, 16, 16, generator=drawn)
    if family == "gemma3":
        seen["token_type_ids"] = (ids == IMAGE).long()
    if family == "mistral3":
        seen["image_sizes"] = torch.tensor([[16, 16]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen}


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The one list of so many blocks is the decoder's."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == BLOCKS]
    (blocks,) = lists
    return blocks


@contextmanager
def passing(blocks: nn.ModuleList, removed: Sequence[int]) -> Iterator[None]:
    """These blocks give what enters them: the truth, which knows nothing of pruned models."""

    def skip(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    handles = [blocks[number].register_forward_hook(skip, with_kwargs=True) for number in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reloaded_whole(folder: Path) -> PreTrainedModel:
    """As any server would load it, with nothing missing or left over."""
    found: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = found
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs, use_cache=False).logits
    return found
