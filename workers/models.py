"""Models and tokenizers, loaded onto this worker's device."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype() -> torch.dtype:
    """bfloat16 on an accelerator; float32 on the CPU, where bfloat16 is slow and plans must be bit-equal."""
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def load_model(folder: Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model in evaluation mode on this worker's device; safetensors only, no remote code."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype or compute_dtype(),
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    torch.nn.Module.to(model, device())
    model.eval().requires_grad_(False)
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer; no remote code."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return tokenizer
