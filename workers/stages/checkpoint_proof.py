"""That a written checkpoint loads and computes what the pruned model computes, in float32.

Both are held in memory where they fit together, the checkpoint loaded as any server loads it. Else both are read block
by block from disk: the dense model with the trained tensors in their places is walked along what is kept, and the
checkpoint runs as the model that its own configuration describes, with a cache and without.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from workers.inputs.models import (
    compute_dtype,
    device,
    fits_whole,
    load_model,
    load_streamed_model,
    load_vision_language,
)
from workers.pruning.model.blocks import block_stack, capture_calls
from workers.pruning.model.checkpoint import SourceTensors, check_complete
from workers.pruning.model.comparison import Course
from workers.pruning.model.parts import pruned
from workers.pruning.model.plan import BlockPlan
from workers.pruning.model.streaming import BlockRoom, Cut, parameter_bytes
from workers.pruning.model.width import Channels
from workers.pruning.repair.distill import load_tensors
from workers.stages.context import StageContext
from workers.stages.width import narrowed

GENERATED_TOKENS = 8
TOLERANCE = 1e-4
CACHE_TOLERANCE = 1e-4
"""Of logits with a KV cache and without, as a share of the largest of them: other shapes of the same products."""


class ExportMismatch(Exception):
    """An exported checkpoint does not compute what the pruned model in memory computes."""


@dataclass(frozen=True)
class Healed:
    """What a checkpoint is made of: the dense model without what a plan gives up, narrowed, with trained tensors."""

    plan: BlockPlan
    channels: Channels | None
    trained: Path

    @property
    def cut(self) -> Cut:
        return Cut(self.plan, self.channels, SourceTensors.in_file(self.trained))


def two_fit(context: StageContext, dtype: torch.dtype) -> bool:
    """Whether two models as large as the dense one can be held, or have to be because they cannot be streamed."""
    both = 2 * parameter_bytes(context.model_dir, dtype, context.check)
    return fits_whole(both, context.memory_bytes) or not check_complete(context.model_dir, context.check).one_to_one


def healed_model(context: StageContext, healed: Healed) -> PreTrainedModel:
    """The model that a checkpoint will hold: in memory where two fit, else read block by block."""
    if two_fit(context, compute_dtype()):
        return _healed(context, healed, compute_dtype())
    return load_streamed_model(context.model_dir, context.check, cut=healed.cut)[0]


def _healed(context: StageContext, healed: Healed, dtype: torch.dtype) -> PreTrainedModel:
    weights = narrowed(load_model(context.model_dir, context.check, dtype=dtype), healed.channels)
    load_tensors(weights, load_file(healed.trained))
    return pruned(weights, healed.plan)


def prove_resident(context: StageContext, role: str, healed: Healed, target: Path, ids: Tensor) -> float:
    """Largest difference of a checkpoint's logits for `ids` (1, time) from those expected. Raises: ExportMismatch."""
    expected = _healed(context, healed, torch.float32)
    load = load_model if context.composite is None else load_vision_language
    loaded = load(target, context.check, dtype=torch.float32)
    with torch.no_grad():
        difference = _difference(role, loaded(input_ids=ids).logits, expected(input_ids=ids).logits)
    prove_cache(role, loaded, ids)
    return difference


@torch.no_grad()
def prove_streamed(context: StageContext, role: str, healed: Healed, target: Path, ids: Tensor) -> float:
    """The same, holding no more than one block. Of a checkpoint that sees, the text decoder is proved.

    Raises: ExportMismatch.
    """
    room = BlockRoom(torch.float32, device())
    load = partial(load_streamed_model, check=context.check, dtype=torch.float32, room=room)
    whole = Cut(channels=healed.channels, overrides=SourceTensors.in_file(healed.trained))
    dense, _ = load(context.model_dir, cut=whole)
    course, stack = Course.of_dense(dense, healed.plan), block_stack(dense)
    calls, h = capture_calls(stack, ids), stack.embed(ids)
    for block in healed.plan.kept:
        h = course.run(calls, block, h)
    expected = stack.head(stack.norm(h))

    loaded, _ = load(context.decoder_of(target), beside=dense)
    found = loaded(input_ids=ids).logits
    difference = _difference(role, found, expected)
    cache = DynamicCache(config=loaded.config)
    loaded(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    cached = loaded(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
    if not _agree(cached[:, -1], found[:, -1]):
        raise ExportMismatch(f"{role}: the last token's logits with the KV cache differ from those without")
    return difference


def _difference(role: str, found: Tensor, expected: Tensor) -> float:
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE:
        raise ExportMismatch(f"{role}: logits differ from the pruned model's by {difference}")
    return difference


def _agree(cached: Tensor, plain: Tensor) -> bool:
    return bool((cached - plain).abs().max() <= CACHE_TOLERANCE * plain.abs().max().clamp(min=1))


def prove_cache(name: str, model: PreTrainedModel, ids: Tensor) -> None:
    """Greedy generation after `ids` (1, time) takes the same steps with a KV cache as without.

    Up to a tie: where two tokens are as likely but for rounding, answers may part, and each is right.
    Raises: ExportMismatch.
    """
    generate: Any = model.generate
    greedy = partial(
        generate,
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=GENERATED_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for cached, plain in zip(greedy(use_cache=True).logits, greedy(use_cache=False).logits, strict=False):
        if not _agree(cached, plain):
            raise ExportMismatch(f"{name}: greedy generation with the KV cache differs from the one without")
        if not torch.equal(cached.argmax(dim=-1), plain.argmax(dim=-1)):
            return
