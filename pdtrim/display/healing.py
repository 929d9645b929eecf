"""How healing went, as curves: from what the stage told of its progress, while it runs and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pdtrim.contract.jobs import Event
from pdtrim.contract.results import DistillationResult, Folding, Half, Healing
from pdtrim.display.folding import folding_line
from pdtrim.display.tables import Table

TABLE_ROWS = 20
HALVES: tuple[Half, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class HealingCurve:
    """Of one half, by step: the loss of a batch, and the least held-out loss so far, which decides what is kept."""

    half: Half
    steps: int
    """So many there will be, or were until it stopped."""
    batches: Sequence[tuple[int, float]]
    held_out: Sequence[tuple[int, float]]
    found: Healing | None
    """What came of it, when it has ended."""
    folding: Folding | None = None
    """What it started from, when it has ended."""


def healing_curves(told: Iterable[Event], result: DistillationResult | None) -> list[HealingCurve]:
    """The curve of each half that told of two steps at least. Of a step that was done again, the last time counts."""
    batches: dict[Half, dict[int, float]] = {half: {} for half in HALVES}
    held_out: dict[Half, dict[int, float]] = {half: {} for half in HALVES}
    steps: dict[Half, int] = {}
    for event in told:
        match event.data:
            case {"half": ("prefill" | "decode") as half, "step": int(step), "steps": int(most), **rest}:
                steps[half] = most
                for kept, name in ((batches, "loss"), (held_out, "held_out")):
                    if isinstance(value := rest.get(name), int | float):
                        kept[half][step] = float(value)
    ended = {} if result is None else {"prefill": result.prefill, "decode": result.decode}
    folds = {} if result is None else result.folds
    return [
        _curve(half, steps[half], batches[half], held_out[half], ended.get(half), folds.get(half))
        for half in HALVES
        if len(batches[half]) > 1
    ]


def _curve(
    half: Half,
    steps: int,
    batches: dict[int, float],
    held_out: dict[int, float],
    found: Healing | None,
    folding: Folding | None,
) -> HealingCurve:
    ends = {} if found is None else {0: found.before, found.steps: found.after}
    return HealingCurve(
        half,
        steps if found is None else found.steps,
        sorted(batches.items()),
        _turns(sorted((held_out | ends).items())),
        found,
        folding,
    )


def _turns(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points at which a value changes, the first and the last."""
    turns = [now for before, now in pairwise(points) if before[1] != now[1]]
    return list(dict.fromkeys([*points[:1], *turns, *points[-1:]]))


def healing_line(curve: HealingCurve) -> str:
    """What came of it, or how far it is."""
    found = curve.found
    if found is None:
        return f"Step {curve.batches[-1][0]} of {curve.steps}."
    kept = "distilled weights are kept" if found.kept == "distilled" else "in vain, undistilled weights are kept"
    healed = f"Held-out loss {found.before:.4f} → {found.after:.4f} in {found.steps} steps: {kept}."
    return healed if curve.folding is None else f"{folding_line(curve.folding)} {healed}".strip()


def healing_table(curve: HealingCurve) -> Table:
    """The curve in at most `TABLE_ROWS` lines."""
    every = -(-len(curve.batches) // TABLE_ROWS)
    rows = [
        (str(step), f"{loss:.4f}", next((f"{least:.4f}" for at, least in reversed(curve.held_out) if at <= step), ""))
        for step, loss in curve.batches[::-1][::every][::-1]
    ]
    return Table(f"Healing of {curve.half}", ("step", "batch", "held out, least so far"), (True, True, True), rows)
