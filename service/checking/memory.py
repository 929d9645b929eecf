"""What each stage of a job holds at its peak, in the way in which the worker's own rules will have it run.

Bytes of the fullest device; on a CPU those of the process, files that it reads among them. Let the model have n
numbers, of which a block has b and what is outside of blocks o, and let i be the bytes of a number in computation (2 in
bfloat16, 4 in float32):

    scoring, removal    i n and hidden states; where i n is over 0.7 of the device, n shared out among the devices,
                        or i (o + b) with the blocks read one at a time
    distillation        what `pdtrim/contract/healing_memory.py` says, of the half that takes more; where adapters are
                        trained and that is too much, the same with i (o + b) in place of all models
    export              4 n of the dense model, then 4 n of what is left of it and of the checkpoint that is proved; or,
                        block by block, 4 (o + b) for both, before which a file of the checkpoint was held
    evaluation          i n and i times the numbers of each checkpoint, and logits; or, block by block, i (o + b) for
                        all, and hidden states of each

On a CPU, what is read of files counts until all of a model is there; numbers that are stored as they are computed with
are the file's own pages. A stage begins without what the one before held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pdtrim.contract.blocks import limits
from pdtrim.contract.devices import Device
from pdtrim.contract.healing_memory import (
    USABLE,
    HealingSize,
    HealingWay,
    healing_devices,
    healing_way,
    keeps_targets,
    needed_bytes,
    sharded_size,
)
from pdtrim.contract.jobs import StageName
from pdtrim.contract.spec import HalfTarget, JobSpec
from pdtrim.contract.windows import copying_windows, windows_to_fold
from service.checking.shape import ModelShape

RESIDENT_SHARE = 0.7
"""Of a device, that weights may take; as the worker has it."""
RESIDENT_WALK_BYTES, STREAMED_WALK_BYTES, ANCHOR_BYTES = 16 * 2**20, 512 * 2**20, 256 * 2**20
"""Hidden states on a CPU; as the worker has it."""
PROMPT_BYTES = 2 * 2**30
"""Keys and values of prompts on a CPU, a quarter of what is free elsewhere; as the worker has it."""
PROCESS_BYTES = 430_000_000
"""A worker before it has read anything: Python, PyTorch, transformers."""
CONTEXT_BYTES = 700_000_000
"""What CUDA itself takes of a device."""
REPORT_BYTES = 50_000_000
"""For drawing figures."""
GAINING_NUMBERS = 50_000_000
"""Of a model, from which on a CPU computes in bfloat16 where it can; as the worker has it."""
HEAD_TOKENS = 256
LOGITS_BYTES = 64 << 20
FILES_IN_MEMORY = 8
"""Files of a checkpoint that a worker could hold, of which it holds one."""
BATCH_WINDOWS = 8
"""Of evaluation; as the worker has them."""


@dataclass(frozen=True)
class StageMemory:
    """How a stage runs, and what it takes at its peak."""

    way: str
    device_bytes: int
    host_bytes: int
    """Besides; on a CPU what is on the device is on the host."""
    number_bytes: int = 4
    """Of a number in products."""
    devices: int = 1
    """That work at a time."""
    streamed: bool = False
    """Whether blocks are read from disk when they run."""


@dataclass(frozen=True)
class Checkpoint:
    """What comes out for a half, or for both."""

    numbers: int
    kept: int
    target: HalfTarget


def stage_memory(
    spec: JobSpec, shape: ModelShape, checkpoints: Sequence[Checkpoint], device: Device
) -> dict[StageName, StageMemory]:
    """Of each stage of a job that makes `checkpoints`, prefill's first, on a worker with such devices."""
    room = _Room(shape, device)
    measured, searched = (2 if device.kind == "cuda" else 4), room.number_bytes(spec)
    return {
        StageName.SCORING: replace(room.scoring(spec), number_bytes=measured),
        StageName.REMOVAL: replace(room.removal(spec), number_bytes=searched),
        StageName.DISTILLATION: replace(room.healing(spec, checkpoints), number_bytes=searched),
        StageName.EXPORT: room.exporting(checkpoints),
        StageName.EVALUATION: replace(room.evaluating(spec, checkpoints), number_bytes=measured),
    }


@dataclass(frozen=True)
class _Room:
    shape: ModelShape
    device: Device

    @property
    def _accelerated(self) -> bool:
        return self.device.kind == "cuda"

    @property
    def _item(self) -> int:
        """Bytes of a number where models are measured as they are served: in evaluation."""
        return 2 if self._accelerated else 4

    def number_bytes(self, spec: JobSpec) -> int:
        """Of a number in search and healing, as scoring decides it; a CPU's loss in bfloat16 is taken for the same."""
        if spec.precision != "auto":
            return 2 if spec.precision == "bfloat16" else 4
        if self._accelerated:
            return 2
        return 2 if self.device.bfloat16_flops and self.shape.numbers >= GAINING_NUMBERS else 4

    def _at_peak(self, way: str, device_bytes: float, host_bytes: float) -> StageMemory:
        """With what a process takes anyway."""
        if self._accelerated:
            return StageMemory(way, math.ceil(device_bytes) + CONTEXT_BYTES, math.ceil(host_bytes) + PROCESS_BYTES)
        both = math.ceil(device_bytes + host_bytes) + PROCESS_BYTES
        return StageMemory(way, both, both)

    def _streamed(self, way: str, device_bytes: float, host_bytes: float) -> StageMemory:
        return replace(self._at_peak(way, device_bytes, host_bytes), streamed=True)

    @property
    def _free(self) -> int:
        """Of the device, before a stage has read anything."""
        return self.device.memory_bytes - (CONTEXT_BYTES if self._accelerated else PROCESS_BYTES)

    def _fits(self, weights: int) -> bool:
        return weights <= RESIDENT_SHARE * self._free

    def _mapped(self, item: int, file_bytes: int) -> int:
        """What counts of files while numbers of `item` bytes are copied out of them."""
        return 0 if self._accelerated or item == self.shape.item_bytes else file_bytes

    def scoring(self, spec: JobSpec) -> StageMemory:
        """On a CPU in float32; beside it in bfloat16, where both are compared."""
        shape, item = self.shape, 2 if self._accelerated and spec.precision != "float32" else 4
        found = self._walking(spec, item, besides=0)
        if self._accelerated or spec.precision != "auto" or self.number_bytes(spec) == 4:
            return found
        if found.streamed:
            both = found.device_bytes + 2 * (shape.outside + shape.largest_block)
        else:
            loaded = (4 + 2) * shape.numbers + self._mapped(2, shape.file_bytes)
            both = max(found.device_bytes, loaded + PROCESS_BYTES)
        return replace(found, device_bytes=both, host_bytes=both)

    def removal(self, spec: JobSpec) -> StageMemory:
        item = self.number_bytes(spec)
        return self._walking(spec, item, besides=self._held_by_a_search(spec, item))

    def _walking(self, spec: JobSpec, item: int, *, besides: int) -> StageMemory:
        shape, device = self.shape, self.device
        weights = item * shape.numbers
        states = self._walked(spec, item, RESIDENT_WALK_BYTES) + besides
        if self._fits(weights):
            return self._at_peak("resident", weights + max(states, self._mapped(item, shape.file_bytes)), 0)
        states = self._walked(spec, item, STREAMED_WALK_BYTES) + besides
        if self._accelerated and device.count > 1:
            share = weights / device.count + item * shape.largest_block
            if self._fits(math.ceil(share)):
                return self._at_peak(f"sharded over {device.count} devices", share + states, 0)
        held = item * (shape.outside + shape.largest_block)
        return self._streamed("block by block", held + states, shape.item_bytes * shape.largest_block)

    def _walked(self, spec: JobSpec, item: int, walk_bytes: int) -> int:
        """Hidden states of a walk through all blocks: of one window, or of as many as may be."""
        window = (self.shape.blocks + 1) * spec.calibration.window_tokens * self.shape.hidden * item
        return max(window, min(walk_bytes, self._windows(spec) * window))

    def _held_by_a_search(self, spec: JobSpec, item: int) -> int:
        """Hidden states on the way of the set that it moves from, the dense model's last, caches of prompts, logits."""
        shape, tokens = self.shape, self._windows(spec) * spec.calibration.window_tokens
        anchored = min(ANCHOR_BYTES, (shape.blocks - 1) * tokens * shape.hidden * item)
        if spec.search.folded:
            # The dense model's states, those of the sets that are fitted at a time, and the maps of a round.
            window = spec.calibration.window_tokens * shape.hidden * item
            states = windows_to_fold(shape.hidden, spec.calibration.window_tokens) * window
            fitted = max(2 * states, min(ANCHOR_BYTES, 2 * shape.blocks * states))
            anchored = shape.blocks * states + fitted + 2 * shape.blocks * shape.hidden**2 * item
        kept = self._free // 4 if self._accelerated else PROMPT_BYTES
        cached = min(kept, tokens // 2 * shape.blocks * shape.kv_width * item)
        logits = 6 * 4 * min(HEAD_TOKENS, tokens) * shape.vocabulary
        return anchored + cached + tokens * shape.hidden * item + logits

    @staticmethod
    def _windows(spec: JobSpec) -> int:
        return spec.calibration.windows + copying_windows(spec)

    def healing(self, spec: JobSpec, checkpoints: Sequence[Checkpoint]) -> StageMemory:
        if not heals(spec):
            return self._at_peak("nothing is trained", 0, 0)
        ways = []
        beside = whole = 0
        for checkpoint in checkpoints:
            size = self._healing_size(spec, checkpoint, beside)
            ahead = replace(size, beside=whole, shares=whole > 0)
            ways.append(self._healed(spec, size, ahead))
            beside, whole = size.healed_bytes, ahead.whole_bytes
            if ways[-1].devices > 1:  # Sharded models have nothing in common.
                beside = size.number_bytes * (checkpoint.numbers - self.shape.outside)
        return max(ways, key=lambda one: one.device_bytes)

    def _healed(self, spec: JobSpec, size: HealingSize, ahead: HealingSize) -> StageMemory:
        """Of a half, beside the dense model, or on targets computed `ahead`, as the worker would do it."""
        asked = spec.distillation
        first = HealingWay("float32", asked.gradient_checkpointing, asked.gradient_accumulation)
        free = self._free
        devices = healing_devices(asked, self.device.count if self._accelerated else 1)
        if devices > 1:
            return self._sharded(size, free, first, devices)
        # Where prefill is healed for what decode reads as it came, the dense model's blocks are needed all the same.
        on_targets = not spec.prefill.possible_parts and keeps_targets(size, ahead, first, free)
        size = ahead if on_targets else size
        way = healing_way(size, first, free)
        needed = needed_bytes(size, way)
        if size.adapters and needed > USABLE * free:
            return self._healed_from_disk(size, first, free)
        # All of the student is read before what it has in common with others is shared, and what it gives up is gone.
        item = 4 if way.precision == "float32" else 2
        loaded = size.beside + item * self.shape.numbers + self._mapped(item, self.shape.file_bytes)
        needed = max(needed, loaded)
        kept = 0 if not self._accelerated else 4 * (4 if way.precision == "float32" else 2) * size.trained
        said = f"{_said(way)}, the dense model's targets computed ahead" if on_targets else _said(way)
        return self._at_peak(said, needed, kept)

    def _healed_from_disk(self, size: HealingSize, asked: HealingWay, free: int) -> StageMemory:
        """Dense model and student take turns in the memory of one block."""
        held = size.number_bytes * (self.shape.outside + self.shape.largest_block)
        own = replace(size, beside=held, own=0, frozen=0)
        way = healing_way(own, replace(asked, recomputed=True), free)
        read = self.shape.item_bytes * self.shape.largest_block
        return self._streamed(f"block by block, {_said(way)}", needed_bytes(own, way), read)

    def _sharded(self, size: HealingSize, free: int, asked: HealingWay, count: int) -> StageMemory:
        """Weights, gradients and moments shared out among the devices, each of which takes its part of a batch."""
        own = sharded_size(size, count, outside=self.shape.outside, block=self.shape.largest_block)
        way = healing_way(own, replace(asked, parts=max(1, min(asked.parts, own.windows))), free)
        needed = needed_bytes(own, way)
        found = self._at_peak(f"sharded over {count} devices, {_said(way)}", needed, 8 * size.trained)
        return replace(found, devices=count)

    def _healing_size(self, spec: JobSpec, checkpoint: Checkpoint, beside: int) -> HealingSize:
        shape, asked, parts = self.shape, spec.distillation, checkpoint.target.parts
        # What gives up all but its keys and values has its last projections as zeros, and no MLP to train.
        idle = parts.get("kv_only", 0) * (shape.mlp_at_work + shape.hidden * shape.attention_width)
        idle += parts.get("mlp", 0) * shape.mlp_at_work
        idle += parts.get("attention", 0) * (shape.at_work - shape.mlp_at_work)
        zeros = parts.get("kv_only", 0) * (shape.mlp_at_work // 3 + shape.hidden * shape.attention_width)
        zeros += parts.get("mlp", 0) * (shape.mlp_at_work // 3)
        zeros += parts.get("attention", 0) * shape.hidden * shape.attention_width
        removed = shape.blocks - checkpoint.kept
        blocks = (
            checkpoint.kept if asked.trainable != "distilled" else min(checkpoint.kept, removed + sum(parts.values()))
        )
        weights = max(0, blocks * shape.block - idle)
        adapters = asked.trainable == "lora"
        trained = asked.lora.rank * shape.block_width * blocks if adapters else weights
        own = zeros + (weights if adapters else 0)
        return HealingSize(
            beside=self.number_bytes(spec) * shape.numbers + beside,
            trained=trained,
            adapters=adapters,
            own=own,
            frozen=max(0, shape.numbers - removed * shape.block - own - (0 if adapters else trained)),
            blocks=checkpoint.kept,
            block_width=shape.block_width,
            hidden=shape.hidden,
            vocabulary=shape.vocabulary,
            windows=asked.batch_windows,
            window_tokens=spec.calibration.window_tokens,
            number_bytes=self.number_bytes(spec),
            on_host=not self._accelerated,
            stored_bytes=shape.item_bytes,
        )

    def exporting(self, checkpoints: Sequence[Checkpoint]) -> StageMemory:
        shape = self.shape
        exact = 4 * shape.numbers
        written = min(shape.largest_file, self.device.memory_bytes // FILES_IN_MEMORY)
        if not self._fits(2 * exact):
            held = 4 * (shape.outside + shape.largest_block)
            if self._accelerated:
                return self._streamed("block by block", held, written)
            return self._streamed("block by block", max(held + shape.item_bytes * shape.largest_block, written), 0)
        proved = [2 * 4 * one.numbers + self._mapped(4, shape.item_bytes * one.numbers) for one in checkpoints]
        held = max(exact + self._mapped(4, shape.file_bytes), *proved)
        return self._at_peak("resident", held, written if self._accelerated else 0)

    def evaluating(self, spec: JobSpec, checkpoints: Sequence[Checkpoint]) -> StageMemory:
        shape = self.shape
        weights = self._item * (shape.numbers + sum(one.numbers for one in checkpoints))
        batch = min(BATCH_WINDOWS, spec.evaluation.windows) * spec.calibration.window_tokens
        logits = 5 * min(LOGITS_BYTES, 4 * batch * shape.vocabulary)
        if self._fits(weights):
            read = self._mapped(self._item, shape.item_bytes * checkpoints[-1].numbers)
            return self._at_peak("resident", weights + max(logits, read), REPORT_BYTES)
        window = (8 + 2 * len(checkpoints)) * spec.calibration.window_tokens * shape.hidden * self._item
        walked = self.device.memory_bytes // 4 if self._accelerated else STREAMED_WALK_BYTES
        states = max(window, min(walked, spec.evaluation.windows * window))
        held = self._item * (shape.outside + shape.largest_block)
        return self._streamed("block by block", held + states + logits, REPORT_BYTES)


def _said(way: HealingWay) -> str:
    """A way of healing, in words."""
    parts = "" if way.parts == 1 else f", batches in {way.parts} parts"
    recomputed = ", blocks computed again" if way.recomputed else ""
    moments = ", moments of 8 bits" if way.precision == "bfloat16" else ""
    return f"{way.precision}{moments}{recomputed}{parts}"


def heals(spec: JobSpec) -> bool:
    """Whether a job trains anything."""
    return spec.distillation.enabled and spec.distillation.heal_tokens >= batch_tokens(spec)


def batch_tokens(spec: JobSpec) -> int:
    """Tokens of a training batch."""
    return spec.distillation.batch_windows * spec.calibration.window_tokens


def checkpoints_of(spec: JobSpec, shape: ModelShape) -> list[Checkpoint]:
    """One for both halves where they give up the same, else prefill's and decode's."""
    counts = limits(spec, shape.blocks)
    found = []
    for count, target in zip(counts, (spec.prefill, spec.decode), strict=True):
        kept = shape.blocks - count
        narrowed = 0 if shape.channels is None else shape.narrowed_by(target.mlp_channels(shape.channels))
        found.append(Checkpoint(shape.numbers - count * shape.block - kept * narrowed, kept, target))
    return found[:1] if is_unified(spec, shape.blocks) else found


def is_unified(spec: JobSpec, blocks: int) -> bool:
    """Whether both halves give up the same, so that one checkpoint serves both."""
    prefill, decode = limits(spec, blocks)
    return (
        prefill == decode
        and spec.prefill.mlp_width == spec.decode.mlp_width
        and not (spec.prefill.parts or spec.decode.parts or spec.prefill.budget or spec.decode.budget)
    )
