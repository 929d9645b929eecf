"""What healing a half of a job takes, counted on the model's shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pdtrim.contract.healing_memory import HealingSize, HealingWay, needed_bytes
from pdtrim.contract.results.distillation import HowHealed
from workers.inputs.models import device
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.checkpoint import empty_model, stored_dtype
from workers.pruning.model.measure import parameters
from workers.pruning.model.parts import idle_tensors, zeroed_tensors
from workers.pruning.model.plan import BlockPlan
from workers.pruning.model.width import Channels
from workers.pruning.repair.distill import trainable
from workers.pruning.repair.lora import linear_weights
from workers.stages.context import StageContext
from workers.stages.width import narrowed


@dataclass(frozen=True)
class HealingSizes:
    """Of a half, beside the dense model, and without it."""

    beside: HealingSize
    ahead: HealingSize


def healing_sizes(
    context: StageContext,
    plan: BlockPlan,
    channels: Channels | None,
    blocks: list[int],
    windows: Tensor,
    *,
    number_bytes: int,
    beside: HealingSizes | None,
) -> HealingSizes:
    """Of the half that gives up `plan` and all but `channels`, trained in `blocks` on `windows` (windows, tokens).

    `number_bytes` is what a number of the dense model takes; `beside` are the sizes of the half whose cache is read.
    No weights are read.
    """
    spec = context.spec.distillation
    dense = empty_model(context.model_dir, context.check)
    weights = narrowed(dense, channels)
    stack = block_stack(weights)
    named = dict(weights.named_parameters())
    idle = idle_tensors(stack, plan.parts)
    own = sum(named[name].numel() for name in zeroed_tensors(stack, plan.parts))
    adapters = spec.trainable == "lora"
    if adapters:
        adapted = linear_weights(weights, blocks, frozen=idle).values()
        sizes = [spec.lora.rank * sum(weight.shape) for weight in adapted]
        own += sum(weight.numel() for weight in adapted)
    else:
        sizes = [parameter.numel() for parameter in trainable(weights, blocks, frozen=idle).values()]
    embedding: Any = weights.get_input_embeddings()
    output: Any = weights.get_output_embeddings()
    experts = getattr(weights.config, "num_experts_per_tok", None)
    every = parameters(weights)
    gone = sum(weight.numel() for block in plan.removed for weight in stack.blocks[block].parameters())
    size = HealingSize(
        beside=(0 if beside is None else beside.beside.healed_bytes) + parameters(dense) * number_bytes,
        trained=sum(sizes),
        adapters=adapters,
        own=own,
        frozen=max(0, every - gone - own - (0 if adapters else sum(sizes))),
        blocks=len(plan.kept),
        block_width=max(block_width(block, experts) for block in stack.blocks),
        hidden=embedding.weight.shape[1],
        vocabulary=output.weight.shape[0],
        windows=spec.batch_windows,
        window_tokens=windows.shape[1],
        number_bytes=number_bytes,
        on_host=device().type == "cpu",
        stored_bytes=stored_dtype(context.model_dir).itemsize,
    )
    whole = 0 if beside is None else beside.ahead.whole_bytes
    return HealingSizes(size, replace(size, beside=whole, shares=beside is not None))


def recorded(size: HealingSize, way: HealingWay, *, target_bytes: int, devices: int = 1) -> HowHealed:
    """A way as results show it; `size` is of each device, and so many bytes of targets were computed ahead."""
    exact_moments = way.precision == "float32" or size.adapters
    return HowHealed(
        devices=devices,
        precision=way.precision,
        moments="float32" if exact_moments else "8-bit",
        gradient_checkpointing=way.recomputed,
        gradient_accumulation=way.parts,
        needed_bytes=needed_bytes(size, way),
        targets="kept" if target_bytes else "computed",
        target_bytes=target_bytes,
    )


def block_width(block: nn.Module, experts: int | None) -> int:
    """Numbers a token that the matrices of a block take and give; of stacked experts, so many are at work."""
    width = 0
    for parameter in block.parameters():
        if parameter.dim() == 2:
            width += sum(parameter.shape)
        elif parameter.dim() == 3:
            width += min(parameter.shape[0], experts or parameter.shape[0]) * sum(parameter.shape[1:])
    return width
