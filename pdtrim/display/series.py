"""What charts of a job draw, as data: dashboard and report draw the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pdtrim.contract.results import EvaluatedSet, HalfPlan, Halves, PairFigures, Removed

Fate = Literal["kept", "decode", "prefill"]
FATES: dict[Fate, str] = {"kept": "kept by both", "decode": "given up by decode", "prefill": "given up by both"}
"""What becomes of a block. Decode gives up what prefill does."""


def fates(blocks: int, plans: Halves[HalfPlan] | None) -> list[Fate]:
    """For each block of the dense model what becomes of it; without plans, all are kept."""
    prefill, decode = ([], []) if plans is None else (plans.prefill.removed, plans.decode.removed)
    return ["prefill" if block in prefill else "decode" if block in decode else "kept" for block in range(blocks)]


def best_so_far(sets: Sequence[EvaluatedSet], count: int) -> list[tuple[int, float]]:
    """Of the sets that give up `count` blocks, each that was better than all before: its number from 1, its loss."""
    best: list[tuple[int, float]] = []
    for number, one in enumerate(sets, 1):
        if len(one.removed) == count and (not best or one.loss < best[-1][1]):
            best.append((number, one.loss))
    return best


@dataclass(frozen=True)
class Control:
    """What prefill and decode give up, and the loss on continuations."""

    label: str
    prefill: list[int]
    decode: list[int]
    loss: float


def controls(removal: Removed) -> list[Control]:
    """The pair, then its controls. Jobs of earlier versions searched one without nesting."""
    prefill, decode = removal.prefill.removed, removal.decode.removed
    losses, parts = removal.losses, removal.prefill.parts or removal.decode.parts
    measured = losses.controls
    found = [
        Control("the pair, without parts too" if parts else "the pair", prefill, decode, losses.decode),
        Control("decode's set in both", decode, decode, measured.decode_set_in_both),
        Control("decode only", [], decode, measured.decode_only),
    ]
    if measured.non_nested is not None and measured.non_nested_removed is not None:
        found.append(Control("not nested (bound)", prefill, measured.non_nested_removed, measured.non_nested))
    return found


@dataclass(frozen=True)
class KvAmount:
    """Bytes of keys and values of one request, and of which model."""

    label: str
    bytes: int
    of: Literal["dense", "pruned", "rule"]


def kv_amounts(pair: PairFigures) -> list[KvAmount]:
    """What a whole request's cache takes, and what prefill sends to decode for the prompt."""
    kv = pair.kv_bytes_per_request
    found = [
        KvAmount("whole request, dense", kv.dense, "dense"),
        KvAmount("whole request, pruned", kv.pruned, "pruned"),
        KvAmount("sent to decode, dense", kv.dense_sent, "dense"),
        KvAmount("sent to decode, pruned", kv.sent, "pruned"),
    ]
    if pair.kv_tokens is not None:
        found.append(KvAmount("sent with the token rule", pair.kv_tokens.bytes_sent, "rule"))
    return found
