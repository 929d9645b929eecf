"""What each stage of a job computes, and how long that takes on a device whose speed was measured.

Operations count two for a multiplication and addition, as in `workers/pruning/model/costs.py`; a backward pass takes
two forwards, one where weights are frozen. Bytes are read or written one after the other. Calls are those of a block:
small models wait for them. A stage takes the sum of the three, each by the probe that a worker made when it started.
Where blocks are read from disk when they run, what that reads comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from pdtrim.contract.devices import Device
from pdtrim.contract.jobs import StageName
from pdtrim.contract.spec import JobSpec
from pdtrim.contract.windows import copying_windows, windows_to_fold
from service.checking.memory import (
    RESIDENT_WALK_BYTES,
    STREAMED_WALK_BYTES,
    Checkpoint,
    StageMemory,
    batch_tokens,
    heals,
)
from service.checking.sets import NONE, Searches, Sets
from service.checking.shape import ModelShape

WORK_SHARE = 0.3
"""Of the speed of one large product, that walks and training get."""
EXACT_SHARE, HALVED_TRAINING_SHARE = 0.5, 0.1
"""The same on a CPU: in float32; and of training in bfloat16, whose casts and gradients gain little."""
RACED = 0.65
"""Of the windows, what a set of greedy's is measured on, where sets race: about the mean of the benchmarks."""
LEAST_RACED = 12
"""Windows that hardly any set leaves a race before."""
BLOCK_CALLS, BLOCK_CALLS_ON_CPU = 200, 500
"""Small operations that a block is, with what Python takes between them."""
STATE_PASSES = 4
"""Over what the matrices of a block take and give: norms, rotations, activations, sums."""
BACKWARD_CALLS = 1.5
"""Of those, what a backward pass takes besides."""
LOSS_PASSES = 20
"""Over the logits of a set, in float32, for its divergence."""
FOLDS_A_SET, SOLVED_A_FOLD, FLOAT64 = 2, 11, 2
"""New gaps of a set that is compared folded; systems that are solved for each, and how much dearer float64 is."""
GENERATED = 8
DISK_BYTES_A_SECOND = 1e9
START_SECONDS = 0.3
"""Of a stage: claiming, opening files, putting what it made into the store."""
TEXT_SECONDS, GIVEN_TEXT_SECONDS = 0.7, 1.5
"""For cutting a text into windows: of the library's source, and of a given one, some five megabytes."""
FIGURE_SECONDS = 2.0
"""For drawing the report."""
HELD_OUT_WINDOWS, HELD_OUT_CHECKS = 8, 10
CASTS = 3
"""Bytes read and written for each that comes from disk, on its way to what is computed with."""


@dataclass(frozen=True)
class Work:
    """Operations, bytes and calls of blocks."""

    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0
    disk_bytes: float = 0.0
    seconds: float = 0.0
    """What takes its time on any device."""
    training: float = 0.0
    """Of the operations, those of training."""
    streamed_bytes: float = 0.0
    """Read besides where blocks come from disk when they run."""

    def __add__(self, other: Work) -> Work:
        return Work(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * part for part in astuple(self)))

    def on(self, device: Device, memory: StageMemory) -> float:
        """Seconds in the way in which the stage will run."""
        halved = memory.number_bytes == 2 and device.bfloat16_flops is not None
        speed = (device.bfloat16_flops if halved else None) or device.flops
        walking = training = WORK_SHARE
        block_calls = BLOCK_CALLS
        if device.kind == "cpu":
            walking, training = (WORK_SHARE, HALVED_TRAINING_SHARE) if halved else (EXACT_SHARE, EXACT_SHARE)
            block_calls = BLOCK_CALLS_ON_CPU
        products = (self.flops - self.training) / (walking * speed) + self.training / (training * speed)
        streamed = self.streamed_bytes if memory.streamed else 0.0
        passed = (self.bytes + CASTS * streamed) / device.bytes_per_second
        read = (self.disk_bytes + streamed) / DISK_BYTES_A_SECOND
        called = self.calls * block_calls * device.call_seconds
        return (products + passed) / memory.devices + called + read + self.seconds


def stage_work(
    spec: JobSpec, shape: ModelShape, checkpoints: Sequence[Checkpoint], searches: Searches
) -> dict[StageName, Work]:
    """Of each stage."""
    counting = _Counting(spec, shape)
    return {
        StageName.SCORING: counting.scoring(),
        StageName.REMOVAL: counting.removal(checkpoints, searches),
        StageName.DISTILLATION: counting.healing(checkpoints),
        StageName.EXPORT: counting.exporting(checkpoints),
        StageName.EVALUATION: counting.evaluating(checkpoints),
    }


@dataclass(frozen=True)
class _Counting:
    spec: JobSpec
    shape: ModelShape

    @property
    def _tokens(self) -> int:
        return self.spec.calibration.window_tokens

    @property
    def _windows(self) -> int:
        return self.spec.calibration.windows + copying_windows(self.spec)

    def _blocks(self, tokens: float, blocks: float, context: float, calls: float) -> Work:
        """Forwards of so many tokens through blocks, in so many calls of each."""
        shape = self.shape
        flops = tokens * blocks * (2 * shape.at_work + 4 * context * shape.attention_width)
        passed = 4 * STATE_PASSES * tokens * blocks * shape.block_width
        return Work(flops=flops, bytes=passed, calls=calls * blocks)

    def _head(self, tokens: float, passes: int = LOSS_PASSES) -> Work:
        return Work(flops=2 * tokens * self.shape.head, bytes=4 * passes * tokens * self.shape.vocabulary)

    def _forward(
        self, windows: float, tokens: int, blocks: float, at_once: float = 8, passes: int = LOSS_PASSES
    ) -> Work:
        through = self._blocks(windows * tokens, blocks, tokens, math.ceil(windows / at_once))
        return through + self._head(windows * tokens, passes)

    def _loading(self, models: float, numbers: int | None = None) -> Work:
        """Reading a model, and writing it into memory as it is computed with."""
        share = 1.0 if numbers is None else numbers / self.shape.numbers
        read = models * share * self.shape.file_bytes
        return Work(bytes=8 * models * share * self.shape.numbers, disk_bytes=read)

    @property
    def _chunk(self) -> int:
        """Windows that a walk takes at once on a CPU."""
        return self._at_once(RESIDENT_WALK_BYTES, self.shape.blocks + 1)

    def _at_once(self, memory_bytes: int, streams: int) -> int:
        return max(1, memory_bytes // (streams * self._tokens * self.shape.hidden * 4))

    def _streamed(self, models: float, windows: int = 1, streams: int = 1) -> Work:
        """So many models' blocks from disk, once for as many windows as one walk takes."""
        shape = self.shape
        walks = math.ceil(windows / self._at_once(STREAMED_WALK_BYTES, streams))
        return Work(streamed_bytes=models * walks * shape.item_bytes * shape.blocks * shape.block)

    def scoring(self) -> Work:
        windows, streams = self.spec.calibration.windows, self.shape.blocks + 1
        through = self._blocks(
            windows * self._tokens, 2 * self.shape.blocks - 1, self._tokens, math.ceil(windows / self._chunk)
        )
        reading = TEXT_SECONDS if self.spec.data.origin == "builtin:stdlib" else GIVEN_TEXT_SECONDS
        read = self._streamed(1, windows, streams) + self._streamed(2)  # in both precisions
        return through + self._loading(1) + read + Work(seconds=START_SECONDS + reading)

    def removal(self, checkpoints: Sequence[Checkpoint], searches: Searches) -> Work:
        """The searches, what each block is worth, and the controls."""
        blocks = self.shape.blocks
        removed = [blocks - one.kept for one in (checkpoints[0], checkpoints[-1])]
        free = blocks - len(self.spec.search.protect)
        alone = Sets(free, free)
        parts = self.spec.prefill.possible_parts | self.spec.decode.possible_parts
        return (
            self._loading(1)
            + Work(seconds=START_SECONDS)
            + self._walks(searches.prefill, removed[0], of_pair=False, of_parts=False)
            + self._walks(searches.decode, removed[1], of_pair=True, of_parts=False)
            + (
                self._walks(searches.parts, removed[0], of_pair=not self.spec.prefill.possible_parts)
                if parts
                else Work()
            )
            + self._walks(alone, 0, of_pair=False)
            + self._walks(alone, 0, of_pair=True)
            # Of the controls and by kind of window: prompts anew, of one set each.
            + self._walks(Sets(1, 1), removed[1], of_pair=True) * 3
        )

    def _folding(self, greedy: float, others: float, blocks: float) -> Work:
        """Fitting the maps of sets that are compared folded: walks on the tokens for that, sums, and equations."""
        shape, tokens = self.shape, windows_to_fold(self.shape.hidden, self._tokens) * self._tokens
        through = 0.5 * greedy + others
        solved = 2 / 3 * SOLVED_A_FOLD * shape.hidden**3 + 4 * tokens * shape.hidden**2
        fitted = Work(flops=FLOAT64 * FOLDS_A_SET * (greedy + others) * solved)
        return fitted + self._blocks(through * tokens, blocks, self._tokens, through)

    def _walks(self, sets: Sets, removed: int, *, of_pair: bool, of_parts: bool = True) -> Work:
        """A search's: of greedy's sets the half of the blocks behind the first difference, of others two thirds."""
        if sets == NONE:
            return Work()
        blocks, windows, tokens = self.shape.blocks - removed / 2, self._windows, self._tokens
        fed = tokens // 2 if of_pair else tokens
        count = (sets.least + sets.most) / 2
        raced: float = windows
        if self.spec.search.racing:
            raced = min(windows, max(LEAST_RACED, RACED * windows))
        greedy = min(sets.greedy, count)
        evaluated = greedy * raced / windows + (count - greedy)
        through = greedy * raced / windows * 0.5 + (count - greedy) * 0.67
        chunks = math.ceil(windows / self._chunk)
        folded = self.spec.search.folded and not of_parts
        if folded:  # Every walk begins at the first block.
            through = evaluated - 0.5 * greedy * raced / windows
        walked = self._blocks(through * windows * fed, blocks, tokens, through * chunks)
        if folded:
            walked += self._folding(greedy, count - greedy, blocks)
        # The dense model's states, and those of the prompt, come once.
        once = self._blocks(windows * tokens * (1.5 if of_pair else 1), self.shape.blocks, tokens, 2 * chunks)
        # A round of greedy's tries sets together, others one after the other.
        rounds = (greedy / max(1, self.shape.blocks - removed / 2)) * 0.75 + (count - greedy) * 0.67
        read = self._streamed(math.ceil(rounds) + (2 if of_pair else 1), windows, self.shape.blocks + 1)
        return walked + once + read + self._head(evaluated * windows * (tokens // 2))

    def healing(self, checkpoints: Sequence[Checkpoint]) -> Work:
        asked = self.spec.distillation
        if not heals(self.spec):
            return Work(seconds=START_SECONDS)
        steps = asked.heal_tokens // batch_tokens(self.spec)
        checks = min(steps, HELD_OUT_CHECKS) + 3
        held_out = min(HELD_OUT_WINDOWS, self.spec.calibration.windows)
        found = self._loading(1) + Work(seconds=START_SECONDS)
        for number, one in enumerate(checkpoints):
            decode = number > 0
            back = 1.0 if asked.trainable == "lora" else 2.0
            again = 1.0 if asked.gradient_checkpointing else 0.0
            batch = self._pass(asked.batch_windows, one.kept, 1 + back + again, decode=decode)
            checked = self._pass(held_out, one.kept, 1, decode=decode)
            stepped = Work(bytes=40 * one.kept * self.shape.block) if asked.trainable != "lora" else Work()
            batch += Work(training=batch.flops)
            # The dense model, the student, and for decode the half whose cache it reads; back through the student.
            forward = 1 + one.kept / self.shape.blocks * (2 if decode else 1)
            batch += self._streamed(forward + one.kept / self.shape.blocks)
            checked += self._streamed(forward)
            found += (batch + stepped) * steps + checked * checks + self._loading(1)
        return found

    def _pass(self, windows: int, kept: int, times: float, *, decode: bool) -> Work:
        """Of a batch: the dense model forwards, the student so many times, both heads, and the loss."""
        tokens, shape = self._tokens, self.shape
        learned = tokens // 2 if decode else tokens
        calls = 1 + (times - 1) * BACKWARD_CALLS / 2
        teacher = self._blocks(windows * tokens, shape.blocks, tokens, 1)
        student = self._blocks(windows * learned, kept, tokens, calls)
        student = Work(times * student.flops, (1 + 2 * (times > 1)) * student.bytes, student.calls)
        prompt = self._blocks(windows * tokens / 2, kept, tokens, 1) if decode else Work()
        heads = self._head(windows * learned) * (3 if times > 1 else 2)
        return teacher + student + prompt + heads

    def exporting(self, checkpoints: Sequence[Checkpoint]) -> Work:
        """Writing, then the proof: a text of few tokens, and a generation with a cache and without one."""
        found = Work(seconds=START_SECONDS)
        for one in checkpoints:
            written = one.numbers * self.shape.item_bytes
            steps = 2 + 2 * GENERATED
            proved = self._blocks(32 * (2 + GENERATED), one.kept, 32, steps) + Work(bytes=steps * 4 * one.numbers)
            # Block by block the checkpoint runs three times, without a cache, and with one in two parts.
            proved += self._streamed(2 * one.kept / self.shape.blocks)
            found += Work(disk_bytes=4 * written) + self._loading(1) + self._loading(1, one.numbers) + proved
        return found

    def evaluating(self, checkpoints: Sequence[Checkpoint]) -> Work:
        asked, tokens, blocks = self.spec.evaluation, self._tokens, self.shape.blocks
        found = Work(seconds=START_SECONDS + FIGURE_SECONDS) + self._loading(1)
        kept = [blocks, *(one.kept for one in checkpoints)]
        numbers = [self.shape.numbers, *(one.numbers for one in checkpoints)]
        for depth, size in zip(kept, numbers, strict=True):
            generated = asked.speed_tokens * (asked.speed_repeats + 1)
            prompt = self._forward(1, tokens // 2, depth) * (asked.speed_repeats + 1)
            found += prompt + Work(bytes=generated * 4 * size, calls=generated * depth)
            # Beside the dense model; of a pruned one, also what it was before healing.
            found += self._forward(asked.windows, tokens, depth) + self._forward(asked.windows, tokens, blocks)
            if depth != blocks or size != self.shape.numbers or depth == kept[-1]:
                found += self._forward(asked.windows, tokens, depth, passes=4)
            found += self._loading(1, size)
        # Dense, pruned and healed pairs: their losses, on copying too, and those of the first token.
        pairs = [blocks, kept[-1], kept[-1]]
        for depth in pairs:
            through = self._blocks(asked.windows * tokens, depth, tokens, 2 * math.ceil(asked.windows / 8))
            found += through * 2.5 + self._head(asked.windows * tokens)
        # Texts that the dense model and what is served go on from; the two that are taken by default, at a time.
        texts = 1 if asked.prompts is None else len(asked.prompts)
        for depth, size in ((blocks, self.shape.numbers), (kept[-1], numbers[-1])):
            steps = texts * asked.sample_tokens
            found += Work(bytes=steps * 4 * size, calls=steps * depth)
        models = sum(numbers) / self.shape.numbers
        if asked.prompts is not None:  # Else blocks that come from disk go on from none.
            found += self._streamed((1 + numbers[-1] / self.shape.numbers) * texts * asked.sample_tokens)
        return found + self._streamed(models, asked.windows, 8 + 2 * len(checkpoints))
