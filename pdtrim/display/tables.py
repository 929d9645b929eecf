"""A job's search and evaluation as sheets of text, which terminal, report and model card all show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def evaluation_sheets(evaluation: Mapping[str, Any]) -> list[Sheet]:
    """The evaluation stage's metrics: what each checkpoint gave up, what it is worth and what it costs."""
    sheets = [models_sheet(evaluation["models"]), pair_sheet(evaluation["pair"])]
    if tasks := evaluation.get("tasks"):
        sheets.append(_tasks(tasks, list(evaluation["models"])))
    return sheets


def controls_sheet(removal: Mapping[str, Any]) -> Sheet:
    """The nested pair beside its controls, by the removal stage's metrics or the plan."""
    losses = removal["losses"]
    rows = [
        (label, listed(prefill), listed(decode), f"{loss:.4f}") for label, prefill, decode, loss in controls(removal)
    ]
    title = f"Before distillation: {losses['objective']} on continuations of the calibration windows"
    return Sheet(title, ("", "prefill gives up", "decode gives up", "loss"), (False, False, False, True), rows)


def controls(removal: Mapping[str, Any]) -> list[tuple[str, list[int], list[int], float]]:
    """The nested pair and its controls: a label, what prefill and decode give up, and the PD loss."""
    losses = removal["losses"]
    measured = losses["controls"]
    prefill, decode = (removed_blocks(removal[half]) for half in ("prefill", "decode"))
    found = [
        ("the pair", prefill, decode, losses["decode"]),
        ("decode's set in both", decode, decode, measured["decode_set_in_both"]),
        ("decode only", [], decode, measured["decode_only"]),
    ]
    if "non_nested" in measured:  # A job that was cut from another searches nothing.
        found.append(("not nested (bound)", prefill, measured["non_nested_removed"], measured["non_nested"]))
    return found


def bound_lines(removal: Mapping[str, Any]) -> list[str]:
    """What became of the bounds on perplexity, where the job has any."""
    return [
        f"Perplexity without what {half} gives up: {_increase(bound)}"
        for half, bound in removal["bounds"].items()
        if bound is not None
    ]


def _increase(bound: Mapping[str, Any]) -> str:
    kept = "" if bound["met"] else ", not kept by any set"
    return f"{bound['perplexity_increase']:+.1%} (bound {bound['max_perplexity_increase']:+.1%}{kept})"


def sensitivity_sheet(sensitivity: Mapping[str, Any]) -> Sheet:
    """What each block alone is worth; three blocks a line, so that eighty columns hold a deep model."""
    dense, blocks = sensitivity["dense"], sensitivity["blocks"]
    lines = -(-len(blocks) // SENSITIVITY_COLUMNS)
    rows = []
    for line in range(lines):
        cells: list[str] = []
        for found in blocks[line::lines]:
            added = (found[kind] - dense[kind] for kind in ("both", "decode_only"))
            cells += [str(found["block"]), *(f"{loss:.4f}" for loss in added)]
        rows.append(cells)
    columns = ("block", "both", "decode") * SENSITIVITY_COLUMNS
    title = "Loss added by giving up one block: in both halves, in decode only"
    return Sheet(title, columns, [True] * len(columns), rows)


def removed_blocks(plan: Mapping[str, Any]) -> list[int]:
    """Every block that a plan removes, deleted or distilled."""
    return sorted([*plan["deleted"], *map(int, plan["distilled"])])


def models_sheet(models: Mapping[str, Any]) -> Sheet:
    """The checkpoints beside the dense model."""
    dense = models["dense"]
    rows: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
        ("blocks", lambda m: str(m["blocks"])),
        ("deleted blocks", lambda m: listed(m["deleted_blocks"])),
        ("distilled blocks", lambda m: listed(f"{r}→{a}" for r, a in m["distilled_blocks"].items())),
        ("perplexity pruned", lambda m: _perplexity(m["undistilled_perplexity"])),
        ("perplexity distilled", lambda m: _perplexity(m["perplexity"])),
        ("KL to dense, nats", lambda m: "" if m is dense else f"{m['kl_to_dense']:.4f}"),
        ("same top token", lambda m: "" if m is dense else f"{m['top1_agreement']:.1%}"),
        ("parameters", lambda m: f"{m['parameters']:,} ({m['parameters'] / dense['parameters']:.0%})"),
        ("weights MiB", lambda m: f"{m['bytes'] / MIB:.1f}"),
        ("first token ms", lambda m: _latency(m, dense, "time_to_first_token_ms")),
        ("each next token ms", lambda m: _latency(m, dense, "inter_token_latency_ms")),
        ("decode tokens/s", lambda m: f"{m['decode_tokens_per_second']:,.0f}"),
    )
    if len({model.get("mlp_channels") for model in models.values()}) > 1:
        rows = (rows[0], ("MLP channels", lambda m: f"{m['mlp_channels']:,}"), *rows[1:])
    if dense["peak_memory_bytes"] is not None:
        rows = (*rows, ("peak memory MiB", lambda m: f"{m['peak_memory_bytes'] / MIB:.1f}"))
    cells = [(label, *(cell(model) for model in models.values())) for label, cell in rows]
    return _sheet("Checkpoints", ("", *models), cells)


def pair_sheet(pair: Mapping[str, Any]) -> Sheet:
    """What the two halves make of a request together."""
    kv = pair["kv_bytes_per_request"]
    losses = (pair["dense_loss"], pair["pruned_loss"], pair["distilled_loss"])
    label = f"PD loss in nats, prompt {pair['prompt_tokens']} + {pair['continuation_tokens']}"
    rows = [(label, *(f"{loss:.4f}" for loss in losses))]
    ratio = f"{kv['pruned'] / 1024:.0f} KiB ({kv['pruned'] / kv['dense']:.0%})"
    rows.append((f"KV cache, {kv['tokens']}-token request", f"{kv['dense'] / 1024:.0f} KiB", ratio, ratio))
    sent = f"{kv['sent'] / 1024:.0f} KiB"
    rows.append(("KV sent to decode a request", f"{kv['dense_sent'] / 1024:.0f} KiB", sent, sent))
    if rule := pair["kv_tokens"]:
        asked = "" if rule["ratio_reached"] in (None, True) else f"; {rule['ratio_asked']:g}× asked for"
        less = f"{rule['bytes_sent'] / 1024:.0f} KiB ({rule['ratio']:.2f}× less{asked})"
        rows.append(("KV sent with the token rule", f"{kv['dense_sent'] / 1024:.0f} KiB", "", less))
        rows.append(("PD loss with the token rule", "", "", f"{rule['loss']:.4f}"))
    return _sheet("As a prefill/decode pair", ("", "dense", "pruned", "distilled"), rows)


def _tasks(tasks: Mapping[str, Any], models: Sequence[str]) -> Sheet:
    rows = [
        (f"{task} {metric}", *(_metric(found[name][metric]) for name in models))
        for task, found in tasks.items()
        for metric in found["dense"]
    ]
    return _sheet("Tasks", ("", *models), rows)


def _metric(found: Mapping[str, float | None]) -> str:
    if found["value"] is None:
        return "none"
    error = "" if found["stderr"] is None else f" ± {found['stderr']:.3f}"
    return f"{found['value']:.3f}{error}"


def listed(items: Iterable[Any]) -> str:
    """As one cell shows several things."""
    return ", ".join(str(item) for item in items) or "none"


def _perplexity(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['value']:.2f} ± {found['standard_error']:.2f}"


def _latency(model: Mapping[str, Any], dense: Mapping[str, Any], key: str) -> str:
    faster = "" if model is dense else f" ({dense[key] / model[key]:.2f}×)"
    return f"{model[key]:.1f}{faster}"
