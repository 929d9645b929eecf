"""How long healing trains, on what it is judged, and how it survives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pdtrim.contract.healing_memory import HealingWay, Precision
from pdtrim.contract.results import Half
from pdtrim.contract.spec import DistillationSpec
from workers.pruning.repair.training import Journal, TrainingSettings
from workers.stages.context import Figure, StageContext
from workers.stages.saving import Pace, Saver, Tensors
from workers.stages.sharded_states import stored_state, whole_state

HELD_OUT_WINDOWS = 8
"""Calibration windows on which training is judged."""
SAVE_INTERVAL_S = 15.0
WAY = "way"
"""What a state calls the way in which it was trained."""
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
"""As a state numbers them."""


def steps(spec: DistillationSpec, window_tokens: int) -> int:
    """Training steps of a half, as the job's specification has it."""
    return spec.heal_tokens // (spec.batch_windows * window_tokens)


def asked_way(spec: DistillationSpec) -> HealingWay:
    """How a half is healed where memory sets no bounds."""
    return HealingWay("float32", spec.gradient_checkpointing, spec.gradient_accumulation)


def settings(context: StageContext, way: HealingWay, window_tokens: int) -> TrainingSettings:
    """Training as the job's specification has it, in batches of as many parts as fit."""
    spec = context.spec.distillation
    return TrainingSettings(
        steps=steps(spec, window_tokens),
        batch_windows=spec.batch_windows,
        learning_rate=spec.peak_learning_rate,
        seed=context.spec.seed,
        parts=way.parts,
        patience=spec.patience,
        held_out_windows=max(1, spec.batch_windows * spec.gradient_accumulation // way.parts),
    )


def kept_state(context: StageContext, half: Half) -> Tensors | None:
    """What an earlier attempt left of a half's training, on one device or on several."""
    alone, sharded = context.load_tensors(state_name(half)), stored_state(context, half)
    if sharded is None or (alone is not None and step_of(alone) >= sharded.step):
        return alone
    return whole_state(context, half, sharded)


def step_of(state: Mapping[str, Tensor]) -> int:
    """How many steps a state has behind it."""
    return int(state["progress"][0])


def kept_way(state: Mapping[str, Tensor], spec: DistillationSpec) -> HealingWay:
    """How that attempt healed, so that this one ends with the same bits."""
    if WAY not in state:  # of a version that knew one way
        return asked_way(spec)
    precision, recomputed, parts = state[WAY].tolist()
    return HealingWay(PRECISIONS[precision], bool(recomputed), parts)


def journal(
    context: StageContext,
    half: Half,
    progress_range: tuple[float, float],
    way: HealingWay,
    resume: Mapping[str, Tensor] | None,
    saver: Saver,
) -> Journal:
    """Progress between the two fractions of `progress_range`, and a state in the store every so often."""
    pace = Pace(SAVE_INTERVAL_S)

    def save_now_and_then(last: bool, state: Callable[[], Tensors]) -> None:
        # Asked at every step, so that a fault of saving shows.
        idle = not saver.is_busy()
        if last or (idle and pace.due):
            with pace.paid():
                saver.save(state_name(half), state() | {WAY: way_tensor(way)})

    return Journal(telling(context, half, progress_range), save_now_and_then, resume)


def way_tensor(way: HealingWay) -> Tensor:
    """A way as a state has it."""
    return torch.tensor([PRECISIONS.index(way.precision), int(way.recomputed), way.parts])


def telling(
    context: StageContext, half: Half, progress_range: tuple[float, float]
) -> Callable[[int, int, float, float], None]:
    """Says how far training is, between the two fractions of `progress_range`."""

    def progress(step: int, steps: int, loss: float, held_out: float) -> None:
        start, end = progress_range
        context.say(
            start + (end - start) * step / steps,
            f"Healing the {half} model.",
            **figures_of(half, step, steps, loss, held_out),
        )

    return progress


def figures_of(half: Half, step: int, steps: int, loss: float, held_out: float) -> dict[str, Figure]:
    """What progress says of a step."""
    return {"half": half, "step": step, "steps": steps, "loss": round(loss, 5), "held_out": round(held_out, 5)}


def state_name(half: Half) -> str:
    """What the store calls the state of healing on one device."""
    return f"heal-{half}.safetensors"
