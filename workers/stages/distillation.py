"""Distillation: heal the prefill model, then the decode model on its KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import DistillationResult, Healing
from pdtrim.contract.results.distillation import Kept
from workers.inputs.models import device, load_model, tensor_float_32
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.checkpoint import stored_dtype
from workers.pruning.model.parts import idle_tensors, pruned
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.model.width import change_width
from workers.pruning.repair.distill import (
    Loss,
    continuation_loss,
    kv_tensor_names,
    load_tensors,
    mean_loss,
    sequence_loss,
    train_on,
    trainable,
)
from workers.pruning.repair.lora import linear_weights, lora_adapters
from workers.pruning.repair.losses import LossWeights
from workers.pruning.repair.recompute import recomputed_blocks
from workers.pruning.repair.training import Journal
from workers.stages.context import StageContext
from workers.stages.removal import Plans, read_plans
from workers.stages.scoring import WINDOWS
from workers.stages.training import HELD_OUT_WINDOWS, Tensors, journal
from workers.stages.training import settings as training_settings
from workers.stages.width import HalfChannels, narrowed, read_channels

PREFILL, DECODE = "prefill.safetensors", "decode.safetensors"


@dataclass(frozen=True)
class TrainingWindows:
    """Token windows (windows, tokens) on the worker's device."""

    training: Tensor
    held_out: Tensor

    @property
    def prompt_tokens(self) -> int:
        return self.training.shape[1] // 2


@tensor_float_32()
def run(context: StageContext) -> DistillationResult:
    """Writes the trained tensors of each serving stage, called as in the dense model, in its stored dtype."""
    plans, channels, spec = read_plans(context), read_channels(context), context.spec.distillation
    if not spec.enabled:
        for name in (PREFILL, DECODE):
            save_file({}, context.out / name)
        return DistillationResult(enabled=False)
    windows = load_file(context.input(StageName.SCORING, WINDOWS))
    data = TrainingWindows(windows["train"].to(device()), windows["calibration"][:HELD_OUT_WINDOWS].to(device()))
    teacher = load_model(context.model_dir, context.check)

    prefill_weights = narrowed(load_model(context.model_dir, context.check, dtype=torch.float32), channels.prefill)
    prefill, in_prefill = _distil_prefill(context, plans, channels, prefill_weights, teacher, data)
    context.write_tensors(context.out / PREFILL, prefill)
    if plans.unified:
        decode, in_decode = prefill, in_prefill
    else:
        dense = load_model(context.model_dir, context.check, dtype=torch.float32)
        # Decode goes on from prefill's weights, unless those learned to make keys and values for it as it is.
        inherited = change_width(
            {
                name: t
                for name, t in prefill.items()
                if _block(name) in plans.decode.kept and not plans.prefill_is_read_alone
            },
            channels.prefill,
            channels.decode,
            dict(dense.named_parameters()),
        )
        weights = narrowed(dense, channels.decode)
        load_tensors(weights, inherited)
        del dense
        trained, in_decode = _distil_decode(context, plans, channels, weights, prefill_weights, teacher, data)
        decode = inherited | trained
    context.write_tensors(context.out / DECODE, decode)
    return DistillationResult(enabled=True, prefill=in_prefill, decode=in_decode)


def _block(name: str) -> int:
    """The block of a tensor that is called as in the dense model; no other part of such a name is a number before."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _only_in_decode(plans: Plans) -> dict[int, int]:
    """What decode alone distils: removed block → the neighbour that stands for both."""
    return {
        removed: absorber
        for removed, absorber in plans.decode.distilled.items()
        if removed not in plans.prefill.distilled
    }


def _losses(context: StageContext) -> LossWeights:
    return LossWeights(**context.spec.distillation.losses.model_dump())


def _memory_saved(context: StageContext, student: PreTrainedModel) -> AbstractContextManager[None]:
    return recomputed_blocks(student) if context.spec.distillation.gradient_checkpointing else nullcontext()


def _trained_blocks(context: StageContext, plan: BlockPlan) -> list[int]:
    if context.spec.distillation.trainable == "distilled":
        return sorted({*plan.distilled.values(), *plan.parts})
    return list(plan.kept)


def _healed_weights(
    context: StageContext, weights: PreTrainedModel, blocks: list[int], frozen: set[str]
) -> dict[str, nn.Parameter]:
    """The parameters that healing changes, by name."""
    if context.spec.distillation.trainable == "lora":
        return linear_weights(weights, blocks, frozen=frozen)
    return trainable(weights, blocks, frozen=frozen)


def _trained(
    context: StageContext, student: PreTrainedModel, healed: Mapping[str, nn.Parameter]
) -> AbstractContextManager[Mapping[str, nn.Parameter]]:
    """The parameters to optimise while this lasts, after which `healed` hold what they learned."""
    spec = context.spec.distillation
    if spec.trainable == "lora":
        return lora_adapters(student, healed, rank=spec.lora.rank, alpha=spec.lora.alpha, seed=context.spec.seed)
    return nullcontext(healed)


def _distil_prefill(
    context: StageContext,
    plans: Plans,
    channels: HalfChannels,
    weights: PreTrainedModel,
    teacher: PreTrainedModel,
    data: TrainingWindows,
) -> tuple[Tensors, Healing | None]:
    """`weights` become what the exported prefill checkpoint will hold, rounded as it is: decode reads their cache."""
    student = pruned(weights, plans.prefill)
    for_decode = plans.prefill_is_read_alone
    return _distil(
        context,
        weights,
        student,
        _read_by_decode(context, plans, channels, student, teacher, data)
        if for_decode
        else sequence_loss(student, teacher, plans.prefill.kept, _losses(context)),
        gave_up=bool(plans.prefill.removed or plans.prefill.parts) or channels.prefill is not None,
        blocks=_trained_blocks(context, plans.prefill),
        frozen=idle_tensors(block_stack(weights), plans.prefill.parts),
        data=data,
        journal=journal(context, "prefill", (0.0, 0.5)),
        # A block that is computed again leaves no keys and values for decode.
        memory_saved=nullcontext() if for_decode else _memory_saved(context, student),
    )


def _read_by_decode(
    context: StageContext,
    plans: Plans,
    channels: HalfChannels,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: TrainingWindows,
) -> Loss:
    """The healing loss of what a decode half that is not healed yet predicts from the cache of the prefill `student`.

    Where prefill says the first token, its own predictions count as well.
    """
    dense = load_model(context.model_dir, context.check, dtype=torch.float32)
    losses, first_token = _losses(context), context.spec.serving.first_token
    read = continuation_loss(
        student,
        pruned(narrowed(dense, channels.decode), plans.decode),
        kv_layer_map(plans.prefill, plans.decode),
        teacher,
        plans.decode.kept,
        losses,
        prompt_tokens=data.prompt_tokens,
        first_token=first_token,
    )
    if first_token == "decode":
        return read
    own = sequence_loss(student, teacher, plans.prefill.kept, LossWeights(kl=losses.kl, label=losses.label, hidden=0.0))
    return lambda ids: read(ids) + own(ids)


def _distil_decode(
    context: StageContext,
    plans: Plans,
    channels: HalfChannels,
    weights: PreTrainedModel,
    prefill_weights: PreTrainedModel,
    teacher: PreTrainedModel,
    data: TrainingWindows,
) -> tuple[Tensors, Healing | None]:
    """`weights` hold what decode inherits of the prefill weights; those are also what it falls back to."""
    only_decode = _only_in_decode(plans).values()
    student = pruned(weights, plans.decode)
    loss = continuation_loss(
        pruned(prefill_weights, plans.prefill),
        student,
        kv_layer_map(plans.prefill, plans.decode),
        teacher,
        plans.decode.kept,
        _losses(context),
        prompt_tokens=data.prompt_tokens,
        first_token=context.spec.serving.first_token,
    )
    return _distil(
        context,
        weights,
        student,
        loss,
        gave_up=bool(plans.decode.removed or plans.decode.parts) or channels.decode is not None,
        blocks=_trained_blocks(context, plans.decode),
        frozen={name for absorber in only_decode for name in kv_tensor_names(block_stack(weights), absorber)}
        | idle_tensors(block_stack(weights), plans.decode.parts),
        data=data,
        journal=journal(context, "decode", (0.5, 1.0)),
        memory_saved=_memory_saved(context, student),
    )


def _distil(
    context: StageContext,
    weights: PreTrainedModel,
    student: PreTrainedModel,
    loss: Loss,
    *,
    gave_up: bool,
    blocks: list[int],
    frozen: set[str],
    data: TrainingWindows,
    journal: Journal,
    memory_saved: AbstractContextManager[None],
) -> tuple[Tensors, Healing | None]:
    """Heal `weights`, which `student` shares.

    Returns the trained tensors in the stored dtype and the held-out loss of the weights given and of those. Weights
    that do no better than those given are put back, and nothing is returned as trained.
    """
    settings = training_settings(context, context.spec.distillation.heal_tokens, data.training.shape[1])
    healed = _healed_weights(context, weights, blocks, frozen) if gave_up and settings.steps else {}
    if not healed:
        weights.requires_grad_(False)
        return {}, None
    named = dict(weights.named_parameters())
    given = {name: named[name].detach().cpu().clone() for name in healed}
    before = mean_loss(loss, data.held_out, settings.batch_windows)
    with memory_saved, _trained(context, student, healed) as parameters:
        steps = train_on(loss, parameters, data.training, data.held_out, settings, journal).steps
    weights.requires_grad_(False)
    dtype = stored_dtype(context.model_dir)
    trained = {name: named[name].detach().to(dtype, copy=True).contiguous() for name in given}
    load_tensors(weights, trained)
    after = mean_loss(loss, data.held_out, settings.batch_windows)
    kept = _verdict(before, after)
    if kept == "undistilled":
        load_tensors(weights, given)
        trained = {}
    return trained, Healing(before=before, after=after, steps=steps, kept=kept)


def _verdict(before: float, after: float) -> Kept:
    """Which weights are kept, by their held-out loss without and with distillation."""
    return "distilled" if after < before else "undistilled"
