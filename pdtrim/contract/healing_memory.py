"""How healing fits a device: in which precision it trains, what it computes again, in how many parts a batch goes.

The arithmetic, in bytes. Let T be the numbers that are trained, O other numbers that the student has for itself, F
those of its frozen weights, and `beside` what else is held all the while: the dense model, and the prefill half whose
cache decode reads.

| held                         | float32                           | bfloat16                                      |
|------------------------------|-----------------------------------|-----------------------------------------------|
| weights                      | 4 (T + O + F)                     | 2 (T + O)                                     |
| and as they are multiplied   | 2 (T + O + F), in bfloat16        | –                                             |
| gradients                    | 4 T                               | 2 T                                           |
| both moments                 | 8 T                               | 2 (1 + 4/256) T: 8 bits, a scale for each 256 |

Products are in bfloat16 where the dense model is: on accelerators, and on CPUs as a job decides. Frozen weights in the
dense model's precision are the dense model's own, and cost nothing. Adapters are float32 in any case.

Where targets were computed ahead, no dense model is beside, F are the frozen weights that the pruned model has, and
only a half beside the other shares them.

Meanwhile a part of a batch goes through, of n tokens. Let a number take i bytes (2 where products are in bfloat16,
else 4), and let there be B blocks of hidden size h, which leave w numbers a token for their gradients (what their
matrices take and give) and 20 h bytes for those of their norms, and v words:

    hidden states between the blocks, of both models    2 B n h i
    inside every block, or one if it is recomputed      n (w i + 20 h), times B or 1
    logits                                              28 min(n v, LOSS_LOGITS)

A step in bfloat16 holds 60 bytes for each number that it changes at a time; by then those of the batch are gone, so the
larger of the two counts. On the host lie the weights before training, as they are stored, the best so far, and copies
of weights and moments while they are saved: on a CPU once the weights as stored, twice as they are trained, and once
the moments. Of adapters the latter, and what they adapt as it was before and, at the end, as it is then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pdtrim.contract.spec import DistillationSpec

Precision = Literal["float32", "bfloat16"]
USABLE = 0.92
"""Of the free memory: the rest is lost between what is allocated."""
LOSS_LOGITS = 2**26
"""Logits of one model that the loss holds at a time."""
STEP_NUMBERS = 2**24
"""Numbers that a step in bfloat16 changes at a time."""
GATHERED_BLOCKS = 2
"""That lie whole on each of several devices: the one that is at work, and the next."""
BY_LOGIT, BY_STEPPED, BY_NORM = 28, 60, 20
"""Bytes, as said above."""


@dataclass(frozen=True)
class HealingSize:
    """What decides how much memory healing a half takes. Numbers are counted, not their bytes."""

    beside: int
    """Bytes of the dense model, and of the half whose cache is read."""
    trained: int
    adapters: bool
    """Whether what is trained are adapters of weights."""
    own: int
    """What else the student has for itself: weights that adapters are added to, zeros in place of parts."""
    frozen: int
    blocks: int
    """Through which gradients go back."""
    block_width: int
    """What a block leaves for its gradients, a token."""
    hidden: int
    vocabulary: int
    windows: int
    """Of a batch."""
    window_tokens: int
    number_bytes: int
    """Of the dense model: 2 in bfloat16, in which products are then computed, 4 in float32."""
    on_host: bool
    """Whether what is kept on the host takes of the same memory."""
    stored_bytes: int = 4
    """Of a number in the checkpoint."""
    shares: bool = True
    """Whether frozen weights in the dense model's precision lie in what is beside."""

    @property
    def whole_bytes(self) -> int:
        """What the half is when it is healed, in the dense model's precision, with nobody to share it with."""
        return self.healed_bytes + self.number_bytes * self.frozen

    @property
    def healed_bytes(self) -> int:
        """What the half holds beside the dense model when it is healed, in that one's precision."""
        return self.number_bytes * (self.own + (0 if self.adapters else self.trained))


@dataclass(frozen=True)
class HealingWay:
    """How a half is healed."""

    precision: Precision
    """Of the student's weights; with bfloat16 ones, both moments have 8 bits a number."""
    recomputed: bool
    """Whether each block is computed again in the backward pass."""
    parts: int
    """That a batch is computed in, one after the other."""


def healing_way(size: HealingSize, asked: HealingWay, free_bytes: int) -> HealingWay:
    """The first way that fits `free_bytes`: as asked; with blocks recomputed; with batches in more parts; then the same
    in bfloat16. Where none does, the one that takes the least.
    """
    ways = list(_ways(asked, size.windows))
    least = min(ways, key=lambda way: needed_bytes(size, way))
    return next((way for way in ways if needed_bytes(size, way) <= USABLE * free_bytes), least)


def keeps_targets(beside: HealingSize, ahead: HealingSize, asked: HealingWay, free_bytes: int) -> bool:
    """Whether to compute targets ahead: `ahead` is the size without the dense model, `beside` the one with it.

    Only where that one does not fit, or not without less precision.
    """
    one, other = (healing_way(size, asked, free_bytes) for size in (beside, ahead))
    needs, needs_ahead = needed_bytes(beside, one), needed_bytes(ahead, other)
    if one.precision != other.precision and needs_ahead <= USABLE * free_bytes:
        return True
    return needs > USABLE * free_bytes and needs_ahead < needs


def _ways(asked: HealingWay, windows: int) -> Iterator[HealingWay]:
    precisions: list[Precision] = ["float32", "bfloat16"] if asked.precision == "float32" else ["bfloat16"]
    for precision in precisions:
        yield HealingWay(precision, asked.recomputed, asked.parts)
        parts = asked.parts
        yield HealingWay(precision, True, parts)
        while parts < windows:
            parts = min(2 * parts, windows)
            yield HealingWay(precision, True, parts)


def needed_bytes(size: HealingSize, way: HealingWay) -> int:
    """What healing that way takes at its peak, as the table above has it."""
    exact = way.precision == "float32"
    halved = size.number_bytes == 2
    multiplied = 2 if halved else 0
    by_weight = 4 + multiplied if exact else 2
    by_trained = 4 + multiplied if exact or size.adapters else 2
    shared = size.shares and exact != halved
    moments = 8.0 if exact or size.adapters else 2 * (1 + 4 / 256)
    stored = 4 if exact or size.adapters else 2
    learning = moments + stored
    kept = 2 * stored + moments if size.on_host else 0
    held = (by_trained + learning + kept) * size.trained + by_weight * (size.own + (0 if shared else size.frozen))
    changed = size.own if size.adapters else size.trained
    before = size.stored_bytes * changed if size.on_host else 0
    after = before if size.adapters else 0  # else it takes no more than what is no longer kept then

    number = 2 if halved or not exact else 4
    tokens = math.ceil(size.windows / way.parts) * size.window_tokens
    of_block = tokens * (size.block_width * number + BY_NORM * size.hidden)
    passing = (
        2 * size.blocks * tokens * size.hidden * number
        + of_block * (1 if way.recomputed else size.blocks)
        + BY_LOGIT * min(tokens * size.vocabulary, LOSS_LOGITS)
    )
    stepping = 0 if exact or size.adapters else BY_STEPPED * min(size.trained, STEP_NUMBERS)
    return size.beside + math.ceil(held) + before + max(passing, stepping, after)


def healing_devices(spec: DistillationSpec, gpus: int) -> int:
    """Over how many devices a worker that sees so many GPUs heals a job; without any, processes are such devices."""
    asked = spec.devices or max(1, gpus)
    return min(asked, gpus or asked, spec.batch_windows)


def sharded_size(size: HealingSize, devices: int, *, outside: int, block: int) -> HealingSize:
    """What healing takes on each of so many devices, given what it takes on one.

    Every model's blocks are shared out, each model for itself; the `outside` numbers of what is in no block lie whole
    on every device, once for all models of one precision. So do GATHERED_BLOCKS, of `block` numbers, and the
    gradients of one in float32.
    """
    gathered = block * (GATHERED_BLOCKS * size.number_bytes + 4)
    whole = outside * size.number_bytes
    return replace(
        size,
        beside=math.ceil((size.beside - whole) / devices) + whole + gathered,
        trained=math.ceil(size.trained / devices),
        own=math.ceil((size.own + max(0, size.frozen - outside)) / devices),
        frozen=outside,
        windows=math.ceil(size.windows / devices),
    )
