"""Distillation: merge distilled pairs, heal the prefill model, then the decode model on its KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor
from transformers import PreTrainedModel

from service.contract.jobs import StageName
from workers.context import StageContext
from workers.models import device, load_model
from workers.pruning.blocks import drop_blocks
from workers.pruning.checkpoint import stored_dtype
from workers.pruning.distill import heal, heal_decode, kv_tensor_names, load_tensors, merge, trainable
from workers.pruning.losses import LossWeights
from workers.pruning.plan import BlockPlan, kv_layer_map
from workers.pruning.recompute import recomputed_blocks
from workers.pruning.training import Journal, TrainingResult, TrainingSettings
from workers.stages.removal import Plans, read_plans
from workers.stages.scoring import WINDOWS

PREFILL, DECODE = "prefill.safetensors", "decode.safetensors"
HELD_OUT_WINDOWS = 8
SAVE_INTERVAL_S = 15.0
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """Token windows (windows, tokens) on the worker's device."""

    training: Tensor
    held_out: Tensor

    @property
    def prompt_tokens(self) -> int:
        return self.training.shape[1] // 2


def run(context: StageContext) -> dict[str, Any]:
    """Writes the trained tensors of each serving stage, called as in the dense model, in its stored dtype."""
    plans, spec = read_plans(context), context.spec.distillation
    if not spec.enabled:
        for name in (PREFILL, DECODE):
            save_file({}, context.out / name)
        return {"enabled": False}
    windows = load_file(context.input(StageName.SCORING, WINDOWS))
    data = Data(windows["train"].to(device()), windows["calibration"][:HELD_OUT_WINDOWS].to(device()))
    dtype = stored_dtype(context.model_dir)
    teacher = load_model(context.model_dir)

    merged, merge_metrics = _merge(context, plans, teacher, data)
    prefill_tensors = {name: t for name, t in merged.items() if _block(name) in plans.prefill.distilled.values()}
    prefill_weights = load_model(context.model_dir, dtype=torch.float32)
    load_tensors(prefill_weights, prefill_tensors)
    prefill, prefill_result = _heal_prefill(context, plans, prefill_weights, teacher, data)
    # What decode reads must be what the exported prefill checkpoint computes, so it is rounded first.
    prefill_tensors = {name: t.to(dtype) for name, t in {**prefill_tensors, **prefill}.items()}
    load_tensors(prefill_weights, prefill_tensors)
    save_file(prefill_tensors, context.out / PREFILL)

    if plans.unified:
        decode_tensors, decode_result = prefill_tensors, prefill_result
    else:
        start = {name: t for name, t in {**merged, **prefill_tensors}.items() if _block(name) in plans.decode.kept}
        only_decode = _only_in_decode(plans)
        start |= {name: t for name, t in merged.items() if _block(name) in only_decode.values()}
        trained, decode_result = _heal_decode(context, plans, start, prefill_weights, teacher, data)
        decode_tensors = {name: t.to(dtype) for name, t in {**start, **trained}.items()}
    save_file({name: t.contiguous() for name, t in decode_tensors.items()}, context.out / DECODE)
    return {
        "enabled": True,
        "merged": merge_metrics,
        "prefill": asdict(prefill_result) if prefill_result else None,
        "decode": asdict(decode_result) if decode_result else None,
    }


def _block(name: str) -> int:
    return int(name.split(".")[2])


def _only_in_decode(plans: Plans) -> dict[int, int]:
    """Pairs that decode merges and prefill does not."""
    return {
        removed: absorber
        for removed, absorber in plans.decode.distilled.items()
        if removed not in plans.prefill.distilled
    }


def _settings(context: StageContext, tokens: int, window_tokens: int) -> TrainingSettings:
    spec = context.spec.distillation
    batch_tokens = spec.batch_windows * window_tokens
    return TrainingSettings(
        steps=tokens // batch_tokens,
        batch_windows=spec.batch_windows,
        learning_rate=spec.learning_rate,
        seed=context.spec.seed,
        parts=spec.gradient_accumulation,
        patience=spec.patience,
    )


def _losses(context: StageContext) -> LossWeights:
    return LossWeights(**context.spec.distillation.losses.model_dump())


def _memory_saved(context: StageContext, student: PreTrainedModel) -> AbstractContextManager[None]:
    return recomputed_blocks(student) if context.spec.distillation.gradient_checkpointing else nullcontext()


def _journal(context: StageContext, phase: str, span: tuple[float, float], message: str) -> Journal:
    """Progress between the two fractions of `span`, and a state in the store every so often."""
    saved_at = time.monotonic()
    name = f"{phase}.safetensors"

    def report(step: int, steps: int, loss: float) -> None:
        start, end = span
        context.report(start + (end - start) * step / steps, message, step=step, steps=steps, loss=round(loss, 5))

    def save_now_and_then(last: bool, state: Callable[[], Tensors]) -> None:
        nonlocal saved_at
        if last or time.monotonic() - saved_at >= SAVE_INTERVAL_S:
            saved_at = time.monotonic()
            context.save_state(name, save(state()))

    kept = context.load_state(name)
    return Journal(report, save_now_and_then, None if kept is None else load(kept))


def _merge(context: StageContext, plans: Plans, teacher: PreTrainedModel, data: Data) -> tuple[Tensors, dict[str, Any]]:
    only_decode = _only_in_decode(plans)
    pairs = dict(plans.prefill.distilled) | only_decode
    settings = _settings(context, context.spec.distillation.merge_tokens, data.training.shape[1])
    if not pairs or settings.steps == 0:
        return {}, {}
    frozen = {name for absorber in only_decode.values() for name in kv_tensor_names(absorber)}
    tensors, losses = merge(
        teacher,
        pairs,
        frozen=frozen,
        windows=data.training,
        held_out=data.held_out,
        settings=settings,
        journal=_journal(context, "merge", (0.0, 0.2), "Merging distilled pairs."),
    )
    return tensors, {
        str(removed): {"into": pairs[removed], "before": before, "after": after}
        for removed, (before, after) in losses.items()
    }


def _trained_blocks(context: StageContext, plan: BlockPlan) -> list[int]:
    if context.spec.distillation.trainable == "all":
        return list(plan.kept)
    return sorted(plan.distilled.values())


def _heal_prefill(
    context: StageContext, plans: Plans, weights: PreTrainedModel, teacher: PreTrainedModel, data: Data
) -> tuple[Tensors, TrainingResult | None]:
    settings = _settings(context, context.spec.distillation.heal_tokens, data.training.shape[1])
    parameters = trainable(weights, _trained_blocks(context, plans.prefill), frozen=set())
    if not plans.prefill.removed or settings.steps == 0 or not parameters:
        weights.requires_grad_(False)
        return {}, None
    student = drop_blocks(weights, plans.prefill.removed)
    with _memory_saved(context, student):
        result = heal(
            student,
            teacher,
            parameters,
            losses=_losses(context),
            windows=data.training,
            held_out=data.held_out,
            settings=settings,
            journal=_journal(context, "heal-prefill", (0.2, 0.6), "Healing the prefill model."),
        )
    weights.requires_grad_(False)
    return {name: parameter.detach() for name, parameter in parameters.items()}, result


def _heal_decode(
    context: StageContext,
    plans: Plans,
    start: Tensors,
    prefill_weights: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Data,
) -> tuple[Tensors, TrainingResult | None]:
    settings = _settings(context, context.spec.distillation.heal_tokens, data.training.shape[1])
    weights = load_model(context.model_dir, dtype=torch.float32)
    load_tensors(weights, start)
    frozen = {name for absorber in _only_in_decode(plans).values() for name in kv_tensor_names(absorber)}
    parameters = trainable(weights, _trained_blocks(context, plans.decode), frozen=frozen)
    if settings.steps == 0 or not parameters:
        return {}, None
    student = drop_blocks(weights, plans.decode.removed)
    with _memory_saved(context, student):
        result = heal_decode(
            drop_blocks(prefill_weights, plans.prefill.removed),
            student,
            kv_layer_map(plans.prefill, plans.decode),
            teacher,
            parameters,
            prompt_tokens=data.prompt_tokens,
            losses=_losses(context),
            windows=data.training,
            held_out=data.held_out,
            settings=settings,
            journal=_journal(context, "heal-decode", (0.6, 1.0), "Healing the decode model."),
        )
    return {name: parameter.detach() for name, parameter in parameters.items()}, result
