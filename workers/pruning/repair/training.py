"""The training loop of healing: AdamW, warm-up, cosine, early stop, best weights, exact resuming."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from workers.pruning.repair.optimiser import Optimiser, optimiser_of

WARMUP = 0.1
"""Fraction of the steps in which the learning rate rises."""
FLOOR = 0.05
"""Last learning rate as a fraction of the peak."""
CLIP_NORM = 1.0
HELD_OUT_CHECKS = 10
"""How often the held-out loss is measured in a run that goes to its end."""


class NonFiniteTraining(ValueError):
    """The training loss is not a finite number."""


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast to train."""

    steps: int
    batch_windows: int
    learning_rate: float
    """Peak learning rate."""
    seed: int
    parts: int = 1
    """A batch is computed in so many parts whose gradients add up to the batch's: less memory, the same step."""
    patience: int | None = None
    """Held-out checks in a row without a new best after which training stops; None never stops early."""
    held_out_windows: int | None = None
    """Windows of the held-out loss that are computed at a time; None for as many as a batch has."""

    @property
    def held_out_batch(self) -> int:
        return self.held_out_windows or self.batch_windows


@dataclass(frozen=True)
class TrainingResult:
    """Held-out loss before training and of the weights that were kept, the best ones seen, and the steps it took."""

    before: float
    after: float
    steps: int


@dataclass
class _Progress:
    step: int
    before: float
    best: float
    stale: int
    """Held-out checks since the best one."""
    best_step: int = 0
    """After which the best weights were seen; 0 for those before training."""

    def ended(self, settings: TrainingSettings) -> bool:
        exhausted = settings.patience is not None and self.stale >= settings.patience
        return exhausted or self.step >= settings.steps


@dataclass(frozen=True)
class Journal:
    """How a run tells of itself and survives its process.

    `progress(step, steps, loss, held_out)` hears the batch's loss and the least held-out loss so far, and may raise to
    stop. `save(last, state)` may call `state()` and keep what it returns, a copy on the host, and should when it is
    the last. A run that starts from the same weights and is given a kept state as `resume` ends with the same bits as
    one that was never interrupted.
    """

    progress: Callable[[int, int, float, float], None] = lambda step, steps, loss, held_out: None
    save: Callable[[bool, Callable[[], dict[str, Tensor]]], None] = lambda last, state: None
    resume: Mapping[str, Tensor] | None = None


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up to the peak, then cosine to `FLOOR` of it."""
    warmup = max(1, round(WARMUP * settings.steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def held_out_checks(step: int, settings: TrainingSettings) -> int:
    """How often the held-out loss was measured by the end of a step, the one before training apart."""
    return sum(_is_checked(one, settings) for one in range(1, step + 1))


def _is_checked(step: int, settings: TrainingSettings) -> bool:
    return step == settings.steps or step % max(1, settings.steps // HELD_OUT_CHECKS) == 0


def batch_indices(step: int, windows: int, settings: TrainingSettings) -> Tensor:
    """Which windows (batch,) a step trains on: every epoch is a new permutation, a function of seed and step alone."""
    batch = min(settings.batch_windows, windows)
    epoch, position = divmod(step, windows // batch)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    return torch.randperm(windows, generator=generator)[position * batch : (position + 1) * batch]


def train(
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    held_out_loss: Callable[[], float],
    windows: Tensor,
    settings: TrainingSettings,
    journal: Journal,
) -> TrainingResult:
    """Train `parameters` in place on `windows` (windows, tokens) and leave the weights with the lowest held-out loss.

    The weights before training count too, so a run that does harm changes nothing.
    Those are held on the host. Raises: NonFiniteTraining naming the step; whatever `journal.progress` raises.
    """
    optimiser = optimiser_of(parameters, settings.seed)
    best = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
    if journal.resume is None:
        before = held_out_loss()
        at = _Progress(step=0, before=before, best=before, stale=0)
    else:
        at = _restore(journal.resume, parameters, optimiser, best)

    while not at.ended(settings):
        batch = windows[batch_indices(at.step, len(windows), settings).to(windows.device)]
        loss = _accumulate(batch, loss_of, at.step, settings)
        nn.utils.clip_grad_norm_(parameters.values(), CLIP_NORM)
        optimiser.step(learning_rate(at.step, settings), at.step)
        at.step += 1
        if _is_checked(at.step, settings):
            held_out = held_out_loss()
            at.stale += 1
            if held_out < at.best:
                at.best, at.stale, at.best_step = held_out, 0, at.step
                # Others may still read the ones before.
                best = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
        ended = at.ended(settings)
        journal.save(
            ended, partial(_final_state, at, best) if ended else partial(_state, at, parameters, optimiser, best)
        )
        journal.progress(at.step, settings.steps, loss, at.best)

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])
    return TrainingResult(at.before, at.best, at.step)


def _accumulate(batch: Tensor, loss_of: Callable[[Tensor], Tensor], step: int, settings: TrainingSettings) -> float:
    """Add the gradients of the mean loss over `batch` (windows, tokens), part by part, and return that loss."""
    total = 0.0
    for part in batch.tensor_split(min(settings.parts, len(batch))):
        loss = loss_of(part) * (len(part) / len(batch))
        if not torch.isfinite(loss):
            raise NonFiniteTraining(f"the training loss is {loss.item()} at step {step}; lower the learning rate")
        loss.backward()
        total += float(loss.detach())
    return total


def _final_state(at: _Progress, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a run that came to its end: the best weights, if they are others than before training."""
    progress = torch.tensor([at.step, at.before, at.best, at.stale, at.best_step], dtype=torch.float64)
    return {"progress": progress, **({f"best.{name}": tensor for name, tensor in best.items()} if at.best_step else {})}


def _state(
    at: _Progress, parameters: Mapping[str, nn.Parameter], optimiser: Optimiser, best: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Of a run that is to go on: weights, moments, and the best weights, if they are not these."""
    kept = _final_state(at, best if at.best_step < at.step else {})
    current = {f"weight.{name}": parameter.detach() for name, parameter in parameters.items()} | optimiser.state()
    return kept | {name: tensor.to("cpu", copy=True) for name, tensor in current.items()}


def _restore(
    state: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimiser: Optimiser,
    best: dict[str, Tensor],
) -> _Progress:
    step, before, best_loss, stale, *best_step = state["progress"].tolist()
    at = _Progress(int(step), before, best_loss, int(stale), *map(int, best_step or [step]))
    with torch.no_grad():
        for name, parameter in parameters.items():
            if f"weight.{name}" in state:
                parameter.copy_(state[f"weight.{name}"])
            if f"best.{name}" in state:
                best[name].copy_(state[f"best.{name}"])
            elif at.best_step:
                best[name].copy_(parameter)
    optimiser.restore(state, at.step)
    return at
