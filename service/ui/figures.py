"""What a job found, as charts and tables: pure functions of the stages' metrics and artifacts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pdtrim.contract.frontier import Frontier, FrontierPoint
from pdtrim.contract.results import (
    EvaluatedSet,
    Half,
    HalfPlan,
    Halves,
    PairFigures,
    Removed,
    SearchRecord,
    Sensitivity,
)
from pdtrim.contract.spec import Part
from pdtrim.display import captions
from pdtrim.display.captions import objective_name
from pdtrim.display.healing import HealingCurve, healing_line, healing_table
from pdtrim.display.quantities import counted, listed, size
from pdtrim.display.series import FATES, Fate, best_so_far, fates, kv_amounts
from pdtrim.display.series import controls as measured_controls
from pdtrim.display.tables import PARTS, Table, frontier_tables, search_table, sensitivity_table
from service.ui.charts import Chart, Point, Series, chart, without_outliers

PART_SYMBOLS: Mapping[Part, str] = {"attention": "M", "mlp": "A", "kv_only": "KV"}
"""What is left of a block that gives up a part: its MLP, its attention, its keys and values."""
ROW_BLOCKS = 24
"""Blocks in a row of the block map."""
MARKED = 40
"""More points than these are drawn as a line alone."""
MAX_DOTS = 2000
"""Evaluated sets that a trajectory draws; of more, every n-th."""


@dataclass(frozen=True)
class Figure:
    """A chart, if there is something to draw, and its numbers as tables. `lead` says how to read it."""

    title: str
    lead: str
    chart: Chart | None
    tables: Sequence[Table]


@dataclass(frozen=True)
class Cell:
    """What becomes of a block in one half: `action` is kept, deleted or distilled."""

    block: int
    action: str
    symbol: str
    meaning: str


@dataclass(frozen=True)
class MapRow:
    """The same blocks in both halves, and where decode's layers find their keys and values."""

    blocks: Sequence[int]
    halves: Mapping[str, Sequence[Cell]]
    kv_from: Sequence[str]


@dataclass(frozen=True)
class BlockMap:
    """Every block of the dense model in prefill and in decode."""

    rows: Sequence[MapRow]
    summary: Mapping[str, str]
    gives_up_parts: bool


def block_map(plans: Halves[HalfPlan]) -> BlockMap:
    """What becomes of each block by a plan."""
    blocks = range(plans.prefill.num_blocks)
    cells = {half: [_cell(plan, block) for block in blocks] for half, plan in plans.items()}
    kept = [cell.block for cell in cells["prefill"] if cell.action == "kept"]
    layer = {block: str(number) for number, block in enumerate(kept)}
    kv_from = [layer[cell.block] if cell.action == "kept" else "" for cell in cells["decode"]]
    starts = range(0, len(blocks), ROW_BLOCKS)
    rows = [
        MapRow(
            blocks[start : start + ROW_BLOCKS],
            {half: found[start : start + ROW_BLOCKS] for half, found in cells.items()},
            kv_from[start : start + ROW_BLOCKS],
        )
        for start in starts
    ]
    summary: dict[str, str] = {half: _summary(plan) for half, plan in plans.items()}
    return BlockMap(rows, summary, any(plan.parts for _, plan in plans.items()))


def _cell(plan: HalfPlan, block: int) -> Cell:
    if block in plan.deleted:
        return Cell(block, "deleted", "✕", f"block {block} is deleted")
    into = plan.distilled.get(block)
    if into is not None:
        return Cell(block, "distilled", "←" if into < block else "→", f"block {block} is distilled into block {into}")
    absorbed = [removed for removed, absorber in plan.distilled.items() if absorber == block]
    stands = f" and stands for block {absorbed[0]} too" if absorbed else ""
    part = plan.parts.get(block)
    if part is not None:
        return Cell(block, "kept", PART_SYMBOLS[part], f"block {block} is kept without {PARTS[part]}")
    return Cell(block, "kept", "+" if absorbed else "", f"block {block} is kept{stands}")


def _summary(plan: HalfPlan) -> str:
    kept = plan.num_blocks - len(plan.removed)
    parts = f", {len(plan.parts)} of those kept give up a part" if plan.parts else ""
    return f"keeps {kept} of {plan.num_blocks}: {len(plan.deleted)} deleted, {len(plan.distilled)} distilled{parts}"


def scores(cosine: Sequence[float], threshold: float, plans: Halves[HalfPlan] | None) -> Figure:
    """Each block's cosine score; those that a half gives up are coloured as it is."""
    found = fates(len(cosine), plans)
    series = [
        Series(
            name,
            fate,
            [
                Point(block, value, f"block {block}: cosine {value:.4f}, {name}")
                for block, value in enumerate(cosine)
                if found[block] == fate
            ],
            "stems",
        )
        for fate, name in FATES.items()
    ]
    low = without_outliers(cosine)
    clipped = [str(block) for block, value in enumerate(cosine) if value < low]
    below = f" A triangle marks a score below the axis (block {', '.join(clipped)})." if clipped else ""
    return Figure(
        captions.SCORES.title,
        captions.SCORES.text + below,
        chart(
            captions.SCORES.title,
            [one for one in series if one.points],
            x_name="block",
            y_name="cosine",
            y_low=low - 0.1 * (max(cosine) - low) if len(set(cosine)) > 1 else None,
            rule=(threshold, f"threshold {threshold:g}") if low < threshold <= max(cosine) else None,
        ),
        [_scores_table(cosine, found)],
    )


def _scores_table(cosine: Sequence[float], found: Sequence[Fate]) -> Table:
    rows = [(str(block), f"{value:.4f}", FATES[found[block]]) for block, value in enumerate(cosine)]
    return Table(captions.SCORES.title, ("block", "cosine", "what becomes of it"), (True, True, False), rows)


def trajectory(search: SearchRecord, removal: Removed) -> list[Figure]:
    """For each half the loss of every set in the order of evaluation, and the least so far for the chosen count."""
    name = objective_name(removal.losses.objective, folded=removal.losses.folded)
    return [_trajectory(half, sets, len(removal.of(half).removed), name) for half, sets in search.items() if sets]


def _trajectory(half: Half, sets: Sequence[EvaluatedSet], count: int, loss_name: str) -> Figure:
    every = math.ceil(len(sets) / MAX_DOTS)
    dots = [
        Point(number, one.loss, f"set {number}, without {listed(one.removed)}: loss {one.loss:.4f}")
        for number, one in enumerate(sets, 1)
        if one.removed and number % every == 0
    ]
    name = f"best without {counted(count)} so far"
    best = [Point(number, loss, f"{name}: loss {loss:.4f}") for number, loss in best_so_far(sets, count)]
    tail = [Point(len(sets), best[-1].y)] if best and best[-1].x < len(sets) else []
    return Figure(
        f"{captions.SEARCH.title} for {half}",
        f"{len(sets)} sets. {captions.SEARCH.text}",
        chart(
            f"Losses of the sets evaluated for {half}",
            [Series("evaluated set", "faint", dots, "dots"), Series(name, half, [*best, *tail], "steps")],
            x_name="set, in order of evaluation",
            y_name=loss_name,
        ),
        [search_table(half, sets, count)],
    )


def healing(curve: HealingCurve) -> Figure:
    """The losses of a half's healing, by step."""
    batches = [Point(step, loss, f"step {step}: batch loss {loss:.4f}") for step, loss in curve.batches]
    held_out = [Point(step, loss, f"step {step}: least held-out loss {loss:.4f}") for step, loss in curve.held_out]
    title = f"{captions.HEALING.title} of {curve.half}"
    return Figure(
        title,
        healing_line(curve),
        chart(
            title,
            [
                Series("batch", "faint", batches, "line" if len(batches) <= MARKED else "curve"),
                Series("held out, least so far", curve.half, held_out, "steps"),
            ],
            x_name="step",
            y_name="loss",
        ),
        [healing_table(curve)],
    )


def frontier(found: Frontier, link: Callable[[Half, int], str]) -> Figure:
    """The least loss for every count of removed blocks. `link` names the page that cuts an export at a point."""
    curves: Mapping[Half, Sequence[FrontierPoint]] = {"prefill": found.prefill, "decode": found.decode}
    chosen = {"prefill": found.chosen.prefill.remove_blocks, "decode": found.chosen.decode.remove_blocks}

    def meaning(half: Half, at: FrontierPoint) -> str:
        then = "this job's export" if chosen[half] == at.remove_blocks else "cut an export here"
        return f"{half} without {counted(at.remove_blocks)}: loss {at.loss:.4f}; {then}"

    series = [
        Series(
            half,
            half,
            [
                Point(
                    at.remove_blocks,
                    at.loss,
                    meaning(half, at),
                    href=link(half, at.remove_blocks),
                    chosen=chosen[half] == at.remove_blocks,
                )
                for at in points
            ],
        )
        for half, points in curves.items()
    ]
    name = objective_name(found.objective)
    return Figure(
        captions.FRONTIER.title,
        f"{captions.FRONTIER.text} Choose another point to cut checkpoints there without searching again.",
        chart(captions.FRONTIER.title, series, x_name="blocks given up", y_name=name),
        frontier_tables(found),
    )


def sensitivity(found: Sensitivity, objective: str) -> Figure:
    """What each block costs that is given up alone."""
    dense, blocks = found.dense, found.blocks
    kinds: Sequence[tuple[str, Half, list[float]]] = (
        ("in both halves", "prefill", [one.both - dense.both for one in blocks]),
        ("in decode only", "decode", [one.decode_only - dense.decode_only for one in blocks]),
    )
    series = [
        Series(
            name,
            colour,
            [
                Point(one.block, loss, f"without block {one.block} {name}: loss {loss:+.4f}")
                for one, loss in zip(blocks, added, strict=True)
            ],
            "dots",
        )
        for name, colour, added in kinds
    ]
    table = sensitivity_table(found)
    return Figure(
        captions.SENSITIVITY.title,
        captions.SENSITIVITY.text,
        chart(table.title, series, x_name="block", y_name=objective_name(objective)) if blocks else None,
        [table],
    )


@dataclass(frozen=True)
class Bar:
    """A share of the largest value, for a bar beside a number."""

    name: str
    value: str
    percent: float
    kind: str


def kv_bytes(pair: PairFigures) -> list[Bar]:
    """Bytes of keys and values of a request, and of what is sent of them from prefill to decode."""
    found = kv_amounts(pair)
    kinds = {"dense": "faint", "pruned": "decode", "rule": "prefill"}
    most = max(amount.bytes for amount in found) or 1
    return [Bar(one.label, size(one.bytes), 100 * one.bytes / most, kinds[one.of]) for one in found]


def controls(removal: Removed) -> list[Bar]:
    """The pair's loss beside its controls'."""
    found = measured_controls(removal)
    most = max(one.loss for one in found) or 1.0
    kinds = ["decode", *["faint"] * (len(found) - 1)]
    return [
        Bar(one.label, f"{one.loss:.4f}", 100 * one.loss / most, kind) for one, kind in zip(found, kinds, strict=True)
    ]
