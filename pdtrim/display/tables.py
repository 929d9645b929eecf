"""A job's search and evaluation as sheets of text, which terminal, report and model card all show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pdtrim.contract.results import (
    Bound,
    EvaluationResult,
    ModelFigures,
    PairFigures,
    Perplexity,
    Removed,
    Sensitivity,
    TaskMetric,
    TaskResult,
)

MIB = 1 << 20
SENSITIVITY_COLUMNS = 3


@dataclass(frozen=True)
class Sheet:
    """A table of ready cells; those of `numeric` columns stand to the right."""

    title: str
    columns: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[str]]


def _sheet(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Sheet:
    """The first column says what a row is about, all others are numbers."""
    return Sheet(title, columns, [bool(place) for place in range(len(columns))], list(rows))


def evaluation_sheets(evaluation: EvaluationResult) -> list[Sheet]:
    """What each checkpoint gave up, what it is worth and what it costs."""
    sheets = [models_sheet(evaluation.models), pair_sheet(evaluation.pair)]
    if evaluation.tasks:
        sheets.append(_tasks(evaluation.tasks, list(evaluation.models)))
    return sheets


def controls_sheet(removal: Removed) -> Sheet:
    """The nested pair beside its controls."""
    rows = [
        (label, listed(prefill), listed(decode), f"{loss:.4f}") for label, prefill, decode, loss in controls(removal)
    ]
    title = f"Before distillation: {removal.losses.objective} on continuations of the calibration windows"
    return Sheet(title, ("", "prefill gives up", "decode gives up", "loss"), (False, False, False, True), rows)


def controls(removal: Removed) -> list[tuple[str, list[int], list[int], float]]:
    """The nested pair and its controls: a label, what prefill and decode give up, and the PD loss."""
    measured = removal.losses.controls
    prefill, decode = removal.prefill.removed, removal.decode.removed
    found: list[tuple[str, list[int], list[int], float]] = [
        ("the pair", prefill, decode, removal.losses.decode),
        ("decode's set in both", decode, decode, measured.decode_set_in_both),
        ("decode only", [], decode, measured.decode_only),
    ]
    if measured.non_nested is not None and measured.non_nested_removed is not None:
        found.append(("not nested (bound)", prefill, measured.non_nested_removed, measured.non_nested))
    return found


def bound_lines(removal: Removed) -> list[str]:
    """What became of the bounds on perplexity, where the job has any."""
    return [
        f"Perplexity without what {half} gives up: {_increase(bound)}"
        for half, bound in (("prefill", removal.bounds.prefill), ("decode", removal.bounds.decode))
        if bound is not None
    ]


def _increase(bound: Bound) -> str:
    kept = "" if bound.met else ", not kept by any set"
    return f"{bound.perplexity_increase:+.1%} (bound {bound.max_perplexity_increase:+.1%}{kept})"


def sensitivity_sheet(sensitivity: Sensitivity) -> Sheet:
    """What each block alone is worth; three blocks a line, so that eighty columns hold a deep model."""
    dense, blocks = sensitivity.dense, sensitivity.blocks
    lines = -(-len(blocks) // SENSITIVITY_COLUMNS)
    rows = []
    for line in range(lines):
        cells: list[str] = []
        for found in blocks[line::lines]:
            added = (found.both - dense.both, found.decode_only - dense.decode_only)
            cells += [str(found.block), *(f"{loss:.4f}" for loss in added)]
        rows.append(cells)
    columns = ("block", "both", "decode") * SENSITIVITY_COLUMNS
    title = "Loss added by giving up one block: in both halves, in decode only"
    return Sheet(title, columns, [True] * len(columns), rows)


def models_sheet(models: Mapping[str, ModelFigures]) -> Sheet:
    """The checkpoints beside the dense model."""
    dense = models["dense"]
    rows: tuple[tuple[str, Callable[[ModelFigures], str]], ...] = (
        ("blocks", lambda m: str(m.blocks)),
        ("deleted blocks", lambda m: listed(m.deleted_blocks)),
        ("distilled blocks", lambda m: listed(f"{r}→{a}" for r, a in m.distilled_blocks.items())),
        ("perplexity pruned", lambda m: _perplexity(m.undistilled_perplexity)),
        ("perplexity distilled", lambda m: _perplexity(m.perplexity)),
        ("KL to dense, nats", lambda m: "" if m is dense else f"{m.kl_to_dense:.4f}"),
        ("same top token", lambda m: "" if m is dense else f"{m.top1_agreement:.1%}"),
        ("parameters", lambda m: f"{m.parameters:,} ({m.parameters / dense.parameters:.0%})"),
        ("weights MiB", lambda m: f"{m.bytes / MIB:.1f}"),
        ("first token ms", lambda m: _latency(m, dense, "time_to_first_token_ms")),
        ("each next token ms", lambda m: _latency(m, dense, "inter_token_latency_ms")),
        ("decode tokens/s", lambda m: f"{m.decode_tokens_per_second:,.0f}"),
    )
    if len({model.mlp_channels for model in models.values()}) > 1:
        rows = (rows[0], ("MLP channels", lambda m: "" if m.mlp_channels is None else f"{m.mlp_channels:,}"), *rows[1:])
    if dense.peak_memory_bytes is not None:
        rows = (
            *rows,
            ("peak memory MiB", lambda m: f"{(m.peak_memory_bytes or 0) / MIB:.1f}"),
        )
    cells = [(label, *(cell(model) for model in models.values())) for label, cell in rows]
    return _sheet("Checkpoints", ("", *models), cells)


def pair_sheet(pair: PairFigures) -> Sheet:
    """What the two halves make of a request together."""
    kv = pair.kv_bytes_per_request
    losses = (pair.dense_loss, pair.pruned_loss, pair.distilled_loss)
    label = f"PD loss in nats, prompt {pair.prompt_tokens} + {pair.continuation_tokens}"
    rows = [(label, *(f"{loss:.4f}" for loss in losses))]
    ratio = f"{kv.pruned / 1024:.0f} KiB ({kv.pruned / kv.dense:.0%})"
    rows.append((f"KV cache, {kv.tokens}-token request", f"{kv.dense / 1024:.0f} KiB", ratio, ratio))
    sent = f"{kv.sent / 1024:.0f} KiB"
    rows.append(("KV sent to decode a request", f"{kv.dense_sent / 1024:.0f} KiB", sent, sent))
    if rule := pair.kv_tokens:
        asked = f"; {rule.ratio_asked:g}× asked for" if rule.ratio_reached is False else ""
        less = f"{rule.bytes_sent / 1024:.0f} KiB ({rule.ratio:.2f}× less{asked})"
        rows.append(("KV sent with the token rule", f"{kv.dense_sent / 1024:.0f} KiB", "", less))
        rows.append(("PD loss with the token rule", "", "", f"{rule.loss:.4f}"))
    return _sheet("As a prefill/decode pair", ("", "dense", "pruned", "distilled"), rows)


def _tasks(tasks: Mapping[str, Mapping[str, TaskResult]], models: Sequence[str]) -> Sheet:
    rows = [
        (f"{task} {metric}", *(_metric(found[name][metric]) for name in models))
        for task, found in tasks.items()
        for metric in found["dense"]
    ]
    return _sheet("Tasks", ("", *models), rows)


def _metric(found: TaskMetric) -> str:
    if found.value is None:
        return "none"
    error = "" if found.stderr is None else f" ± {found.stderr:.3f}"
    return f"{found.value:.3f}{error}"


def listed(items: Iterable[Any]) -> str:
    """As one cell shows several things."""
    return ", ".join(str(item) for item in items) or "none"


def _perplexity(found: Perplexity | None) -> str:
    return "" if found is None else f"{found.value:.2f} ± {found.standard_error:.2f}"


def _latency(
    model: ModelFigures, dense: ModelFigures, kind: Literal["time_to_first_token_ms", "inter_token_latency_ms"]
) -> str:
    took, of_dense = getattr(model, kind), getattr(dense, kind)
    faster = "" if model is dense else f" ({of_dense / took:.2f}×)"
    return f"{took:.1f}{faster}"
