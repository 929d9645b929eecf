"""The smallest job that passes every stage: a random Llama with the reference tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

import workers

REFERENCE = Path(workers.__file__).parent / "reference_model"


def write_tiny_model(folder: Path, family: Callable[..., PretrainedConfig] = LlamaConfig, *, blocks: int = 5) -> Path:
    """A float32 model of hidden size 32, a Llama of 5 blocks unless told."""
    torch.manual_seed(0)
    config = family(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / name, folder / name)
    return folder


def tiny_spec(model: Path, /, **changes: Any) -> dict[str, Any]:
    """A job of a few seconds; the threshold has every removed block distilled."""
    return {
        "model": model.as_uri(),
        "prefill": {"remove_blocks": 1},
        "decode": {"remove_blocks": 2},
        "data": {"text": "".join(f"value_{i} = {i} * {i + 1}\n" for i in range(600))},
        "calibration": {"windows": 4, "window_tokens": 32},
        "search": {"evaluations": 12},
        "distillation": {"heal_tokens": 512, "batch_windows": 4, "threshold": 1.0},
        "evaluation": {"windows": 4, "speed_tokens": 2, "speed_repeats": 1},
        **changes,
    }
