"""How long healing trains, on what it is judged, and how it survives."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from pdtrim.contract.results import Half
from workers.pruning.repair.training import Journal, TrainingSettings
from workers.stages.context import StageContext

HELD_OUT_WINDOWS = 8
"""Calibration windows on which training is judged."""
SAVE_INTERVAL_S = 15.0
Tensors = dict[str, Tensor]


def settings(context: StageContext, tokens: int, window_tokens: int) -> TrainingSettings:
    """Training on so many tokens, as the job's specification has it."""
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


def journal(context: StageContext, half: Half, progress_range: tuple[float, float]) -> Journal:
    """Progress between the two fractions of `progress_range`, and a state in the store every so often."""
    saved_at = time.monotonic()
    name = f"heal-{half}.safetensors"

    def progress(step: int, steps: int, loss: float, held_out: float) -> None:
        start, end = progress_range
        context.say(
            start + (end - start) * step / steps,
            f"Healing the {half} model.",
            half=half,
            step=step,
            steps=steps,
            loss=round(loss, 5),
            held_out=round(held_out, 5),
        )

    def save_now_and_then(last: bool, state: Callable[[], Tensors]) -> None:
        nonlocal saved_at
        if last or time.monotonic() - saved_at >= SAVE_INTERVAL_S:
            saved_at = time.monotonic()
            context.save_tensors(name, state())

    return Journal(progress, save_now_and_then, context.load_tensors(name))
