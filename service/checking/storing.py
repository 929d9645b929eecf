"""What a job's files take: on a worker's scratch disk, and in the artifact store."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim.contract.spec import JobSpec
from service.checking.memory import Checkpoint, checkpoints_of, heals
from service.checking.shape import ModelShape

STATE_BYTES = 16
"""Of healing's state for each trained number: weights, both moments and the best weights, in float32."""
SMALL_BYTES = 1_000_000
"""Tokenizer, report, figures and what a search measured; each checkpoint has a tokenizer again."""
LOCAL = ("file://", "reference")


@dataclass(frozen=True)
class StoredBytes:
    """In the artifact store."""

    kept: int
    """Once the job has succeeded."""
    peak: int
    """While healing saves its state."""


def trained_numbers(spec: JobSpec, shape: ModelShape, one: Checkpoint) -> int:
    """What healing writes down of a half: whole weights, to which adapters were added, too."""
    if not heals(spec):
        return 0
    blocks = one.kept
    if spec.distillation.trainable == "distilled":
        blocks = min(one.kept, shape.blocks - one.kept + sum(one.target.parts.values()))
    idle = one.target.parts.get("kv_only", 0) * (shape.mlp_at_work + shape.hidden * shape.attention_width)
    return max(0, blocks * shape.block - idle)


def store_bytes(spec: JobSpec, shape: ModelShape) -> StoredBytes:
    """Of a job, at most: where training did no better, a half's trained weights are not kept."""
    made = checkpoints_of(spec, shape)
    tokens = spec.calibration.window_tokens
    windows = spec.calibration.windows + spec.evaluation.windows + spec.distillation.heal_tokens // tokens + 1
    trained = [shape.item_bytes * trained_numbers(spec, shape, one) for one in made]
    written = sum(shape.item_bytes * one.numbers for one in made)
    # One checkpoint's trained weights are written down for both halves.
    trained *= 2 if len(made) == 1 else 1
    kept = 8 * windows * tokens + sum(trained) + written + (1 + len(made)) * SMALL_BYTES
    learned = max(_learned(spec, shape, one) for one in made)
    return StoredBytes(kept, max(kept, 8 * windows * tokens + sum(trained) + STATE_BYTES * learned))


def disk_bytes(spec: JobSpec, shape: ModelShape) -> int:
    """On the scratch disk, at most at one time: the model, if it is fetched, and what a stage reads and writes."""
    made = checkpoints_of(spec, shape)
    fetched = 0 if spec.model.source.startswith(LOCAL) else shape.file_bytes
    written = sum(shape.item_bytes * one.numbers for one in made)
    trained = sum(shape.item_bytes * trained_numbers(spec, shape, one) for one in made)
    state = STATE_BYTES * max(_learned(spec, shape, one) for one in made)
    return fetched + max(written + trained, state + trained) + SMALL_BYTES


def _learned(spec: JobSpec, shape: ModelShape, one: Checkpoint) -> int:
    """Numbers that an optimiser changes."""
    if heals(spec) and spec.distillation.trainable == "lora":
        return spec.distillation.lora.rank * shape.block_width * one.kept
    return trained_numbers(spec, shape, one)
