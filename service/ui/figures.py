"""What a job found, as charts and tables: pure functions of the stages' metrics and artifacts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table

from pdtrim.contract.frontier import Frontier, FrontierPoint
from pdtrim.contract.results import (
    EvaluatedSet,
    EvaluationResult,
    Half,
    HalfPlan,
    Halves,
    PairFigures,
    RemovalResult,
    SearchRecord,
    Sensitivity,
)
from pdtrim.display import rendering as report
from service.ui.charts import Chart, Point, Series, chart, without_outliers

ROW_BLOCKS = 24
"""Blocks in a row of the block map."""
MAX_DOTS = 2000
"""Evaluated sets that a trajectory draws; of more, every n-th."""
OBJECTIVES = {"kl": "KL to dense, nats", "cross_entropy": "cross-entropy, nats", "hidden": "hidden distance"}


@dataclass(frozen=True)
class Grid:
    """A table; the first cell of each row heads it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A chart, if there is something to draw, and its numbers as a table. `lead` says how to read it."""

    title: str
    lead: str
    chart: Chart | None
    grid: Grid


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
    return BlockMap(rows, {half: _summary(plan) for half, plan in plans.items()})


def _cell(plan: HalfPlan, block: int) -> Cell:
    if block in plan.deleted:
        return Cell(block, "deleted", "✕", f"block {block} is deleted")
    into = plan.distilled.get(block)
    if into is not None:
        return Cell(block, "distilled", "←" if into < block else "→", f"block {block} is distilled into block {into}")
    absorbed = [removed for removed, absorber in plan.distilled.items() if absorber == block]
    stands = f" and stands for block {absorbed[0]} too" if absorbed else ""
    return Cell(block, "kept", "+" if absorbed else "", f"block {block} is kept{stands}")


def _summary(plan: HalfPlan) -> str:
    kept = plan.num_blocks - len(plan.removed)
    return f"keeps {kept} of {plan.num_blocks}: {len(plan.deleted)} deleted, {len(plan.distilled)} distilled"


def scores(cosine: Sequence[float], threshold: float, plans: Halves[HalfPlan] | None) -> Figure:
    """Each block's cosine score; those that a half gives up are coloured as it is."""
    kinds = {"kept": "kept", "decode": "decode", "prefill": "prefill"}
    names = {"kept": "kept by both", "decode": "given up by decode", "prefill": "given up by both"}
    in_prefill, in_decode = ([], []) if plans is None else (plans.prefill.removed, plans.decode.removed)
    gone = [
        "prefill" if block in in_prefill else "decode" if block in in_decode else "kept" for block in range(len(cosine))
    ]
    series = [
        Series(
            names[kind],
            kinds[kind],
            [
                Point(block, value, f"block {block}: cosine {value:.4f}, {names[kind]}")
                for block, value in enumerate(cosine)
                if gone[block] == kind
            ],
            "stems",
        )
        for kind in kinds
    ]
    low = without_outliers(cosine)
    clipped = [str(block) for block, value in enumerate(cosine) if value < low]
    lead = "The cosine of what enters and leaves each block: the higher, the more redundant the block is." + (
        f" A triangle marks a score below the axis (block {', '.join(clipped)})." if clipped else ""
    )
    return Figure(
        "Cosine scores",
        lead,
        chart(
            "Cosine score of each block",
            [one for one in series if one.points],
            x_name="block",
            y_name="cosine",
            y_low=low - 0.1 * (max(cosine) - low) if len(set(cosine)) > 1 else None,
            rule=(threshold, f"threshold {threshold:g}") if low < threshold <= max(cosine) else None,
        ),
        Grid(
            "Cosine score of each block",
            ("block", "cosine", "given up by"),
            [
                (str(block), f"{value:.4f}", {"prefill": "both", "decode": "decode", "kept": "nobody"}[gone[block]])
                for block, value in enumerate(cosine)
            ],
        ),
    )


def trajectory(search: SearchRecord, objective: str) -> list[Figure]:
    """For each half the loss of every set in the order of evaluation, and the least so far for the final count."""
    return [_trajectory(half, found, objective) for half, found in search.items() if found]


def _trajectory(half: Half, found: Sequence[EvaluatedSet], objective: str) -> Figure:
    most = max(len(one.removed) for one in found)
    every = math.ceil(len(found) / MAX_DOTS)
    dots = [
        Point(number, one.loss, f"set {number}, without {_blocks(one.removed)}: loss {one.loss:.4f}")
        for number, one in enumerate(found, 1)
        if one.removed and number % every == 0
    ]
    best: list[Point] = []
    for number, one in enumerate(found, 1):
        if len(one.removed) == most and (not best or one.loss < best[-1].y):
            best.append(Point(number, one.loss, f"best of {counted(most)} so far: loss {one.loss:.4f}"))
    improved = Grid(
        f"{half.capitalize()}: sets of {counted(most)} that were the best so far",
        ("set", "loss", "without blocks"),
        [(str(int(p.x)), f"{p.y:.4f}", _blocks(found[int(p.x) - 1].removed)) for p in best],
    )
    tail = [Point(len(found), best[-1].y)] if best and best[-1].x < len(found) else []
    return Figure(
        f"Search for {half}",
        f"{len(found)} sets of blocks were evaluated; the line is the least loss so far with {counted(most)} given up.",
        chart(
            f"Losses of the sets evaluated for {half}",
            [
                Series("evaluated set", "faint", dots, "dots"),
                Series(f"best of {counted(most)} so far", half, [*best, *tail], "steps"),
            ],
            x_name="set, in order of evaluation",
            y_name=OBJECTIVES.get(objective, objective),
        ),
        improved,
    )


def frontier(found: Frontier, link: Callable[[str, int], str]) -> Figure:
    """The least loss for every count of removed blocks. `link` names the page that cuts an export at a point."""
    curves = {"prefill": found.prefill, "decode": found.decode}
    chosen = {"prefill": found.chosen.prefill.remove_blocks, "decode": found.chosen.decode.remove_blocks}

    def meaning(half: str, at: FrontierPoint) -> str:
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
    bounded = any(at.perplexity_increase is not None for points in curves.values() for at in points)
    rows = [
        [
            f"{half}, {at.remove_blocks}",
            f"{at.loss:.4f}",
            *([_percent(at.perplexity_increase)] if bounded else []),
            _blocks(at.removed),
        ]
        for half, points in curves.items()
        for at in points
    ]
    name = OBJECTIVES.get(found.objective, found.objective)
    return Figure(
        "Loss frontier",
        "The least loss found for every number of removed blocks, before distillation: prefill's on whole windows, "
        "decode's on continuations by the pair. Rings mark this job's export; choose another point to cut checkpoints "
        "there without searching again.",
        chart("Loss by number of removed blocks", series, x_name="blocks removed", y_name=name),
        Grid(
            "Loss by number of removed blocks",
            ["half, removed", "loss", *(["perplexity"] if bounded else []), "without blocks"],
            rows,
        ),
    )


def _percent(increase: float | None) -> str:
    return "" if increase is None else f"{increase:+.1%}"


def counted(blocks: int) -> str:
    """A number of blocks in words."""
    return f"{blocks} block{'' if blocks == 1 else 's'}"


def _blocks(removed: Sequence[int]) -> str:
    return ", ".join(map(str, removed)) or "none"


def sensitivity(found: Sensitivity, objective: str) -> Figure:
    """What each block costs that is given up alone."""
    dense, blocks = found.dense, found.blocks
    kinds = {"both": ("in both halves", "prefill"), "decode_only": ("in decode alone", "decode")}
    added = {
        "both": [(one.block, one.both - dense.both) for one in blocks],
        "decode_only": [(one.block, one.decode_only - dense.decode_only) for one in blocks],
    }
    series = [
        Series(
            name,
            colour,
            [Point(block, loss, f"without block {block} {name}: loss {loss:+.4f}") for block, loss in added[kind]],
            "dots",
        )
        for kind, (name, colour) in kinds.items()
    ]
    title = "Loss added by giving up one block"
    return Figure(
        "What each block is worth",
        "The loss that is added when this block alone is given up.",
        chart(title, series, x_name="block", y_name=OBJECTIVES.get(objective, objective)) if blocks else None,
        Grid(
            title,
            ("block", *(name for name, _ in kinds.values())),
            [
                (str(block), f"{both:.4f}", f"{alone:.4f}")
                for (block, both), (_, alone) in zip(added["both"], added["decode_only"], strict=True)
            ],
        ),
    )


def control_table(removal: RemovalResult) -> Grid:
    """The nested pair beside its controls, with the blocks that each gives up."""
    return _grids(report.search_report(removal))[0]


def bounds(removal: RemovalResult) -> list[str]:
    """What came of the job's bounds on perplexity."""
    rendered = report.search_report(removal)
    assert isinstance(rendered, Group)
    return [part for part in rendered.renderables if isinstance(part, str) and part]


def evaluation_tables(evaluation: EvaluationResult) -> list[Grid]:
    """Checkpoints, pair and tasks, as the `pdtrim` command shows them."""
    return _grids(report.report(evaluation))


def _grids(rendered: object) -> list[Grid]:
    assert isinstance(rendered, Group)
    return [_grid(part) for part in rendered.renderables if isinstance(part, Table)]


def _grid(table: Table) -> Grid:
    cells = zip(*(column.cells for column in table.columns), strict=True)
    rows = [[str(cell) for cell in row] for row in cells]
    return Grid(str(table.title), [str(column.header) for column in table.columns], rows)


@dataclass(frozen=True)
class Bar:
    """A share of the largest value, for a bar beside a number."""

    name: str
    value: str
    percent: float
    kind: str


def kv_bytes(pair: PairFigures) -> list[Bar]:
    """Bytes of keys and values that a request sends from prefill to decode: dense, pruned, and by the token rule."""
    kv = pair.kv_bytes_per_request
    found = [("dense model", kv.dense_sent, "faint"), ("pruned pair", kv.sent, "decode")]
    if rule := pair.kv_tokens:
        found.append(("with the token rule", rule.bytes_sent, "prefill"))
    return [Bar(name, size(sent), 100 * sent / kv.dense_sent, kind) for name, sent, kind in found]


def controls(removal: RemovalResult) -> list[Bar]:
    """The pair's loss beside its controls'."""
    losses = removal.losses
    found = [
        ("the nested pair", losses.decode, "decode"),
        ("decode's set in both halves", losses.controls.decode_set_in_both, "faint"),
        ("decode only, prefill dense", losses.controls.decode_only, "faint"),
    ]
    if losses.controls.non_nested is not None:
        found.append(("not nested (bound)", losses.controls.non_nested, "faint"))
    most = max(loss for _, loss, _ in found) or 1.0
    return [Bar(name, f"{loss:.4f}", 100 * loss / most, kind) for name, loss, kind in found]


def size(number: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:,.3g} GiB" if number < 999.5 else f"{number:,.0f} GiB"
