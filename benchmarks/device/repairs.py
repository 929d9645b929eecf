"""A part on the reference model: healing what is left of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from benchmarks.device.bench import BATCH_WINDOWS, ON_CPU, Bench, Place
from benchmarks.device.findings import Findings
from benchmarks.device.walks import listed
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.repair.distill import (
    HEALING,
    Loss,
    continuation_loss,
    sequence_loss,
    train_on,
    trainable,
)
from workers.pruning.repair.lora import linear_weights, lora_adapters
from workers.pruning.repair.recompute import recomputed_blocks
from workers.pruning.repair.training import Journal, TrainingResult, TrainingSettings

PREFILL = BlockPlan(12, deleted=frozenset({4, 9}))
DECODE = BlockPlan(12, deleted=frozenset({2, 4, 5, 9}))
"""A nested pair of the reference model, which is healed."""
LEARNING_RATE = 1e-3
TRAINED_TOLERANCE = 0.02
"""By how much of the CPU's held-out loss another may differ: steps in bfloat16 arrive at other weights."""


def training(steps: int) -> TrainingSettings:
    """So many steps as a job takes them."""
    return TrainingSettings(steps=steps, batch_windows=BATCH_WINDOWS, learning_rate=LEARNING_RATE, seed=0)


def judge_trained(findings: Findings, what: str, losses: tuple[float, float], on_cpu: tuple[float, float]) -> None:
    """Hold held-out losses before and after training against each other and against the CPU's."""
    findings.judge(f"{what}, held-out loss after training", losses[1], losses[0])
    for when, loss, expected in zip(("before", "after"), losses, on_cpu, strict=True):
        relative = abs(loss / expected - 1)
        findings.judge(f"{what}, held-out loss {when} training, from the CPU's", relative, TRAINED_TOLERANCE)


def healed(place: Place, bench: Bench) -> Iterator[tuple[str, TrainingResult, float]]:
    """Ways to heal the pruned reference model: what each is, the held-out losses, and its seconds."""
    teacher = place.load()
    exact = replace(place, dtype=torch.float32)  # of the weights that are trained
    train, held_out = (bench.windows[split].to(place.device) for split in ("train", "calibration"))
    kept = DECODE.kept

    def heal(loss: Loss, parameters: Mapping[str, nn.Parameter]) -> tuple[TrainingResult, float]:
        start = bench.now()
        result = train_on(loss, parameters, train, held_out, training(bench.size.heal_steps), Journal())
        return result, bench.now() - start

    for name, memory_saved in (("all weights", nullcontext), ("all weights, blocks recomputed", recomputed_blocks)):
        weights = exact.load()
        student = drop_blocks(weights, DECODE.removed)
        with memory_saved(student):
            yield name, *heal(sequence_loss(student, teacher, kept, HEALING), trainable(weights, kept, frozen=set()))

    weights = exact.load()
    student = drop_blocks(weights, DECODE.removed)
    adapted = linear_weights(weights, kept, frozen=())
    with lora_adapters(student, adapted, rank=8, alpha=16, seed=0) as adapters:
        yield "low-rank adapters", *heal(sequence_loss(student, teacher, kept, HEALING), adapters)

    weights = exact.load()
    student = drop_blocks(weights, DECODE.removed)
    loss = continuation_loss(
        drop_blocks(exact.load(), PREFILL.removed),
        student,
        kv_layer_map(PREFILL, DECODE),
        teacher,
        kept,
        HEALING,
        prompt_tokens=bench.prompt_tokens,
        first_token="decode",
    )
    yield "decode, on prefill's cache", *heal(loss, trainable(weights, kept, frozen=set()))


def healing(bench: Bench) -> Findings:
    """Healing of the pruned reference model on the device and on the CPU."""
    findings = Findings()
    table = findings.table(
        f"Held-out healing loss without blocks {listed(DECODE.removed)}, {bench.size.heal_steps} steps:",
        {"where": "", "trained": "", "before": ".4f", "after": ".4f", "seconds": ".1f"},
    )
    on_cpu: dict[str, tuple[float, float]] = {}
    for place in (ON_CPU, bench.of_jobs):
        for trained, result, seconds in healed(place, bench):
            losses = (result.before, result.after)
            table.add(place.name, trained, *losses, seconds)
            judge_trained(findings, f"{place.name}, {trained}", losses, on_cpu.setdefault(trained, losses))
    return findings
