"""A job's results, frontier and estimate as tables of text, which terminal, notebook, dashboard, report and model card
show each in its own way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pdtrim.contract.estimate import Estimate
from pdtrim.contract.frontier import Frontier, FrontierPoint
from pdtrim.contract.results import (
    Bound,
    BudgetSearch,
    EvaluatedSet,
    EvaluationResult,
    Half,
    ModelFigures,
    PairFigures,
    RemovalResult,
    Removed,
    Sample,
    SearchEffort,
    Sensitivity,
    TaskMetric,
    TaskResult,
)
from pdtrim.contract.spec import COST_NAMES, Part
from pdtrim.display.captions import objective_name
from pdtrim.display.model_figures import FIGURES
from pdtrim.display.quantities import NOTHING, UNKNOWN, counted, duration, increase, listed, size
from pdtrim.display.series import best_so_far, controls

PARTS: Mapping[Part, str] = {
    "attention": "the attention",
    "mlp": "the MLP",
    "kv_only": "all but the keys and values",
}
"""What a kept block may give up."""
PAIR = "pair"
"""What answers tasks as the two halves are served."""
PROMPT_SHOWN = 240
"""Characters of a prompt, at most, where what follows it is shown."""
SENSITIVITY_COLUMNS = 3
"""Blocks a line, where blocks stand beside each other."""
ENDED_BY = {"budget": "its budget", "neighbourhood": "having no new set near the best", "time": "its time"}


@dataclass(frozen=True)
class Table:
    """A table of ready cells; those of `numeric` columns stand to the right."""

    title: str
    columns: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[str]]


def _figures(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """The first column says what a row is about, all others are numbers."""
    return Table(title, columns, [bool(place) for place in range(len(columns))], list(rows))


# What removal found.


def controls_table(removal: Removed) -> Table:
    """The pair beside its controls."""
    rows = [(one.label, listed(one.prefill), listed(one.decode), f"{one.loss:.4f}") for one in controls(removal)]
    title = f"{objective_name(removal.losses.objective)}, on continuations, before distillation"
    return Table(title, ("", "prefill gives up", "decode gives up", "loss"), (False, False, False, True), rows)


def parts_table(removal: Removed) -> Table | None:
    """The kept blocks that give up a part; None where none does."""
    rows = [
        (half, PARTS[part], listed(block for block, given_up in plan.parts.items() if given_up == part))
        for half, plan in removal.items()
        for part in PARTS
        if part in plan.parts.values()
    ]
    return (
        Table("Parts of kept blocks", ("half", "gives up", "of blocks"), (False, False, False), rows) if rows else None
    )


def budget_tables(budgets: Sequence[BudgetSearch]) -> list[Table]:
    """For each half with a budget, where each walk ended: with units of every kind, then with one kind at a time."""
    found = []
    for search in budgets:
        kept = f"{search.share:.1%} of {search.dense:,} {COST_NAMES[search.cost]} left, asked for {search.asked:.1%}"
        unmet = "" if search.met else "; no set found keeps it"
        rows = []
        for walk in search.walks:
            last = walk.steps[-1]
            parts = [f"{PARTS[part]} of {block}" for block, part in sorted(last.parts.items())]
            kinds = [PARTS[kind] if kind != "block" else "blocks" for kind in walk.kinds]
            gives_up = "; ".join(filter(None, [listed(last.blocks) if last.blocks else "", ", ".join(parts)])) or "–"
            rows.append((", ".join(kinds), f"{last.share:.1%}", f"{last.loss:.4f}", gives_up))
        title = f"Budget of {search.half}: {kept}{unmet}"
        found.append(Table(title, ("may give up", "left", "loss", "gives up"), (False, True, True, False), rows))
    return found


def bound_lines(removal: Removed) -> list[str]:
    """What became of the bounds on perplexity, where the job has any."""
    return [
        f"Perplexity without what {half} gives up: {_kept(bound)}"
        for half, bound in removal.bounds.items()
        if bound is not None
    ]


def _kept(bound: Bound) -> str:
    kept = "" if bound.met else ", not kept by any set"
    return f"{increase(bound.perplexity_increase)} (bound {increase(bound.max_perplexity_increase)}{kept})"


def effort_lines(removal: RemovalResult) -> list[str]:
    """What each search took, where that was recorded."""
    if removal.effort is None:
        return []
    searches = [
        *removal.effort.items(),
        *((f"{PARTS[found.part]} of blocks in {found.half}", found.effort) for found in removal.parts),
        ("the control", removal.effort.control),
    ]
    return [f"Search for {what}: {_effort(effort)}" for what, effort in searches if effort is not None]


def _effort(effort: SearchEffort) -> str:
    parts = (("greedy", effort.greedy), ("annealing", effort.annealing), ("exhaustive search", effort.exhaustive))
    took = [f"{name} {part.sets:,} set{'' if part.sets == 1 else 's'}" for name, part in parts if part is not None]
    return ", ".join(took) + ("" if effort.ended_by is None else f", ended by {ENDED_BY[effort.ended_by]}")


def sensitivity_table(sensitivity: Sensitivity) -> Table:
    """What each block alone is worth."""
    dense = sensitivity.dense
    rows = [
        (str(one.block), f"{one.both - dense.both:.4f}", f"{one.decode_only - dense.decode_only:.4f}")
        for one in sensitivity.blocks
    ]
    title = "Loss added by giving up one block: in both halves, in decode only"
    return Table(title, ("block", "both", "decode"), (True, True, True), rows)


def folded(table: Table, times: int) -> Table:
    """The same in fewer lines, with so many rows beside each other: eighty columns then hold a deep model."""
    lines = -(-len(table.rows) // times)
    rows = [[cell for row in table.rows[line::lines] for cell in row] for line in range(lines)]
    return Table(table.title, [*table.columns] * times, [*table.numeric] * times, rows)


def search_table(half: Half, sets: Sequence[EvaluatedSet], count: int) -> Table:
    """The sets of `count` blocks that were better than all before."""
    rows = [(str(number), f"{loss:.4f}", listed(sets[number - 1].removed)) for number, loss in best_so_far(sets, count)]
    title = f"{half.capitalize()}: sets of {counted(count)} that were the best so far"
    return Table(title, ("set", "loss", "gives up"), (True, True, False), rows)


def frontier_tables(frontier: Frontier) -> list[Table]:
    """For prefill and for decode, a line for every count: the best set and its loss. An arrow marks what was chosen."""
    searched = listed(frontier.decode[0].removed)
    name, chosen = objective_name(frontier.objective), frontier.chosen
    return [
        _frontier(f"Prefill, or both halves: {name}", frontier.prefill, chosen.prefill),
        _frontier(f"Decode, where prefill gives up {searched}: {name}", frontier.decode, chosen.decode),
    ]


def _frontier(title: str, points: Sequence[FrontierPoint], chosen: FrontierPoint) -> Table:
    bounded = any(point.perplexity_increase is not None for point in points)
    rows = []
    for point in points:
        mark = "→ " if point.remove_blocks == chosen.remove_blocks else ""
        cells = [f"{mark}{point.remove_blocks}", f"{point.loss:.4f}"]
        if bounded:
            cells.append("" if point.perplexity_increase is None else increase(point.perplexity_increase))
        rows.append([*cells, listed(_given_up(point))])
    columns = ["blocks", "loss", *(["perplexity"] if bounded else []), "gives up"]
    return Table(title, columns, [column != "gives up" for column in columns], rows)


def _given_up(point: FrontierPoint) -> list[str]:
    """The blocks that go; with an arrow to the block that stands for both, where there is one."""
    return [f"{b}→{point.distilled[b]}" if b in point.distilled else str(b) for b in point.removed]


# What evaluation found.


def evaluation_tables(evaluation: EvaluationResult) -> list[Table]:
    """What each checkpoint gave up, what it is worth and what it costs."""
    tables = [models_table(evaluation.models), pair_table(evaluation.pair)]
    if evaluation.tasks:
        asked = {name for by_model in evaluation.tasks.values() for name in by_model}
        tables.append(_tasks(evaluation.tasks, [name for name in (*evaluation.models, PAIR) if name in asked]))
    return tables


def models_table(models: Mapping[str, ModelFigures]) -> Table:
    """The checkpoints beside the dense model."""
    found = list(models.values())
    rows = [row for figure in FIGURES for row in figure.rows(models)]
    given_up = [
        ("deleted blocks", *(listed(model.deleted_blocks) for model in found)),
        ("distilled blocks", *(listed(f"{r}→{a}" for r, a in model.distilled_blocks.items()) for model in found)),
    ]
    return _figures("Checkpoints", ("", *models), [rows[0], *given_up, *rows[1:]])


def pair_table(pair: PairFigures) -> Table:
    """What the two halves make of a request together."""
    kv = pair.kv_bytes_per_request
    losses = (pair.dense_loss, pair.pruned_loss, pair.distilled_loss)
    label = f"PD loss in nats, prompt {pair.prompt_tokens} + {pair.continuation_tokens}"
    rows = [(label, *(f"{loss:.4f}" for loss in losses)), *_first_token_rows(pair)]
    if (again := pair.copying) is not None:
        copying = (again.dense, again.pruned, again.distilled)
        rows.append(("PD loss of a prompt said again, nats", *(f"{loss:.4f}" for loss in copying)))
    share = f"{size(kv.pruned)} ({kv.pruned / kv.dense:.0%})"
    rows.append((f"KV cache, {kv.tokens}-token request", size(kv.dense), share, share))
    rows.append(("KV sent to decode a request", size(kv.dense_sent), size(kv.sent), size(kv.sent)))
    if rule := pair.kv_tokens:
        asked = f"; {rule.ratio_asked:g}× asked for" if rule.ratio_reached is False else ""
        less = f"{size(rule.bytes_sent)} ({rule.ratio:.2f}× less{asked})"
        rows.append(("KV sent with the token rule", size(kv.dense_sent), "", less))
        rows.append(("PD loss with the token rule", "", "", f"{rule.loss:.4f}"))
    return _figures("As a prefill/decode pair", ("", "dense", "pruned", "distilled"), rows)


def _first_token_rows(pair: PairFigures) -> list[tuple[str, ...]]:
    """The loss of the first token by each half, where that was measured. An arrow marks the one that is served."""
    if pair.first_token_losses is None:
        return []
    found = pair.first_token_losses
    halves: tuple[Half, ...] = ("decode", "prefill")
    return [
        (
            f"{'→ ' if half == pair.first_token else ''}first token by {half}, nats",
            *(f"{losses.of(half):.4f}" for losses in (found.dense, found.pruned, found.distilled)),
        )
        for half in halves
    ]


def _tasks(tasks: Mapping[str, Mapping[str, TaskResult]], models: Sequence[str]) -> Table:
    rows = [
        (f"{task} {metric}", *(_metric(found[name][metric]) for name in models))
        for task, found in tasks.items()
        for metric in found["dense"]
    ]
    return _figures("Tasks", ("", *models), rows)


def sample_tables(samples: Sequence[Sample]) -> list[Table]:
    """How models go on from each prompt, beside each other. The title has the prompt's end."""
    tables = []
    for sample in samples:
        names = tuple(sample.continuations)
        shown = sample.prompt[-PROMPT_SHOWN:]
        title = f"{'…' if shown != sample.prompt else ''}{shown}"
        tables.append(Table(title, names, [False] * len(names), [tuple(sample.continuations.values())]))
    return tables


def _metric(found: TaskMetric) -> str:
    if found.value is None:
        return NOTHING
    error = "" if found.stderr is None else f" ± {found.stderr:.3f}"
    return f"{found.value:.3f}{error}"


# What a job would make and take.


def estimate_table(estimate: Estimate) -> Table:
    """The checkpoints that it would make, beside the dense model."""
    rows = [
        (
            one.role,
            str(one.blocks),
            UNKNOWN if one.parameters is None else f"{one.parameters:,}",
            _known(one.bytes),
            _known(one.kv_bytes_per_token),
        )
        for one in (estimate.dense, *estimate.checkpoints)
    ]
    columns = ("", "blocks", "parameters", "weights", "KV cache a token")
    return _figures(f"{estimate.architecture}, estimated", columns, rows)


def estimate_stages(estimate: Estimate) -> Table | None:
    """What each stage would take, and how it would run; None where that is unknown."""
    if not estimate.stages:
        return None
    rows = [
        (
            one.stage,
            one.way,
            size(one.memory_bytes) + ("" if one.fits else " (too much)"),
            size(one.host_bytes),
            UNKNOWN if one.seconds is None else duration(one.seconds),
        )
        for one in estimate.stages
    ]
    at = "one GPU of 80 GB" if estimate.device is None else estimate.device.name
    columns = ("", "runs", "memory of a device", "of the machine", "time, about")
    return _figures(f"On {at}", columns, rows)


def estimate_facts(estimate: Estimate) -> dict[str, str]:
    """The rest, by its name."""
    sets = estimate.evaluations
    parts = f", parts {_sets(estimate, 'parts', sets.parts)}" if sets.parts else ""
    named = (("prefill", sets.prefill), ("decode", sets.decode))
    counts = ", ".join(f"{name} {_sets(estimate, name, most)}" for name, most in named)
    return {
        **({"Revision": estimate.model_revision} if estimate.model_revision else {}),
        "Sets to evaluate": f"{counts}{parts}",
        "Scratch disk": _known(estimate.disk_bytes),
        "Artifact store": _known(estimate.store_bytes),
        **({"Queue": estimate.queue} if estimate.queue else {}),
    }


def _sets(estimate: Estimate, search: str, most: int) -> str:
    """As many, or from the least to the most that a search may compare."""
    known = estimate.evaluations.ranges.get(search)
    return f"{most:,}" if known is None or known.least == most else f"{known.least:,} to {most:,}"


def took(estimate: Estimate) -> str:
    """What the stages would take by an earlier job on the same model."""
    seconds = {} if estimate.earlier is None else estimate.earlier.seconds
    return ", ".join(f"{stage} {duration(spent)}" for stage, spent in seconds.items())


def _known(number: int | None) -> str:
    return UNKNOWN if number is None else size(number)
