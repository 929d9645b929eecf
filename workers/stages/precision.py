"""What search and healing compute in: decided once, in scoring, from the device, the model and its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import SCORES, BlockScores, ComputePrecision
from workers.inputs.models import compute_dtype, device, is_streamed, load_for_walks, multiplies_bfloat16
from workers.pruning.model.blocks import BlockStack
from workers.pruning.model.measure import parameters, perplexity
from workers.stages.context import StageContext

Used = Literal["float32", "bfloat16"]
DTYPES: Mapping[Used, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GAINING_PARAMETERS = 50_000_000
"""A smaller model is done in minutes; it keeps every digit."""
SAME_LOSS = 0.002
"""Nats by which a mean loss may differ and be the same: less than sets one block apart differ in."""
COMPARED_WINDOWS = 8
STREAMED_TOKENS = 2048
"""Tokens that go through a streamed model together."""


def scoring_dtype(context: StageContext) -> torch.dtype:
    """What the model is proved and scored in: the device's own, or float32 where that is asked for."""
    return torch.float32 if context.spec.precision == "float32" else compute_dtype()


def choose_precision(context: StageContext, stack: BlockStack, windows: Tensor) -> ComputePrecision:
    """What the later stages compute in, for the dense model as scoring has it and its calibration windows.

    On a CPU `auto` is float32, unless bfloat16 is fast there, the model large, and its loss the same.
    Raises: as `load_for_walks`.
    """
    asked = context.spec.precision
    if asked != "auto":
        return ComputePrecision(used=asked)
    if device().type == "cuda":
        return ComputePrecision(used="bfloat16")
    if not multiplies_bfloat16() or parameters(stack.model) < GAINING_PARAMETERS:
        return ComputePrecision(used="float32")
    return compared(context, stack, windows[:COMPARED_WINDOWS])


def compared(context: StageContext, stack: BlockStack, windows: Tensor) -> ComputePrecision:
    """bfloat16 where the loss on `windows` (windows, tokens) is the same as in float32, in which `stack` is."""
    context.say(0.95, "Comparing bfloat16 with float32.")
    rounded = load_for_walks(context.model_dir, context.check, dtype=torch.bfloat16, memory_bytes=context.memory_bytes)
    # For every batch a streamed model is read once more.
    batch = max(1, STREAMED_TOKENS // windows.shape[1]) if is_streamed(stack.model) else 1
    exact, other = (math.log(perplexity(one, windows, batch=batch).value) for one in (stack.model, rounded))
    used: Used = "bfloat16" if abs(exact - other) <= SAME_LOSS else "float32"
    return ComputePrecision(
        used=used, windows=len(windows), float32_loss=round(exact, 6), bfloat16_loss=round(other, 6)
    )


def read_precision(context: StageContext) -> torch.dtype:
    """What scoring chose; the device's own in the jobs of versions that had no choice."""
    chosen = context.read(StageName.SCORING, SCORES, BlockScores).precision
    return compute_dtype() if chosen is None else DTYPES[chosen.used]
