"""The dense model's own answers to prompts, for healing on what it would say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from workers.pruning.model.blocks import block_stack

TEMPERATURE = 1.0
TOP_K = 64
"""Each word is drawn from so many most probable ones: of the long rest nobody would say any. A sum of shares (top-p)
would sort the whole vocabulary for every word, which costs a CPU more than a small model itself."""


@torch.no_grad()
def answers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, most_tokens: int, ends: Sequence[int], seed: int
) -> list[list[int]]:
    """Token ids of one answer for each of `prompts`, drawn at random by `seed`; one of `ends` is its last, if it ended.

    All are answered in one batch. An answer has at most `most_tokens`.
    """
    longest = max(map(len, prompts))
    padding = ends[0] if ends else 0
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    at = block_stack(model).device
    generate: Any = model.generate
    with torch.random.fork_rng(devices=[at] if at.type == "cuda" else []):
        torch.manual_seed(seed)
        made = generate(
            input_ids=ids.to(at),
            attention_mask=seen.to(at),
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=1.0,
            top_k=TOP_K,
            max_new_tokens=most_tokens,
            eos_token_id=list(ends) or None,
            pad_token_id=padding,
        )
    return [_until(answer, ends) for answer in made[:, longest:].tolist()]


def _until(answer: list[int], ends: Sequence[int]) -> list[int]:
    """What was said before the padding."""
    for place, token in enumerate(answer):
        if token in ends:
            return answer[: place + 1]
    return answer
