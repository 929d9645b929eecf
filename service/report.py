"""A job's search, frontier, evaluation and estimate as tables for people, with Rich."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from service.contract.estimate import Estimate
from service.contract.frontier import Frontier, FrontierPoint

MIB = 1 << 20
SENSITIVITY_COLUMNS = 3


def report(evaluation: Mapping[str, Any]) -> RenderableType:
    """The evaluation stage's metrics: what each checkpoint gave up, what it is worth and what it costs."""
    tables = [_models(evaluation["models"]), _pair(evaluation["pair"])]
    if tasks := evaluation.get("tasks"):
        tables.append(_tasks(tasks, evaluation["models"]))
    return Group(*tables)


def search_report(removal: Mapping[str, Any]) -> RenderableType:
    """The removal stage's metrics: the nested pair beside its controls, bounds on perplexity, each block's worth."""
    bounds = [
        f"Perplexity without what {half} gives up: {_increase(bound)}"
        for half, bound in removal["bounds"].items()
        if bound is not None
    ]
    parts: list[RenderableType] = [_controls(removal), *bounds]
    return Group(*parts, *([""] if bounds else []), _sensitivity(removal["sensitivity"]))


def frontier_report(frontier: Frontier) -> RenderableType:
    """A line for every count: the best set and its loss, in each half; what the job chose is marked."""
    return Group(
        _curve("Prefill, or both halves", frontier.objective, frontier.prefill, frontier.chosen.prefill),
        _curve(
            f"Decode, where prefill gives up {_list(frontier.decode[0].removed)}",
            frontier.objective,
            frontier.decode,
            frontier.chosen.decode,
        ),
    )


def _curve(half: str, objective: str, points: Sequence[FrontierPoint], chosen: FrontierPoint) -> Table:
    title = f"{half}: {objective} before distillation"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    bounded = any(point.perplexity_increase is not None for point in points)
    for column in ("", "blocks", "loss", *(["perplexity"] if bounded else []), "gives up"):
        table.add_column(column, justify="left" if column in ("", "gives up") else "right")
    for point in points:
        mark = "→" if point.remove_blocks == chosen.remove_blocks else ""
        increase = "" if point.perplexity_increase is None else f"{point.perplexity_increase:+.1%}"
        removed = _list(f"{b}→{point.distilled[str(b)]}" if str(b) in point.distilled else b for b in point.removed)
        figures = (f"{point.loss:.4f}", *([increase] if bounded else []))
        table.add_row(mark, str(point.remove_blocks), *figures, removed)
    return table


def estimate_report(estimate: Estimate) -> RenderableType:
    """What a job would make and take, with the warnings last."""
    table = Table(
        title=f"{estimate.architecture}, estimated", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in ("", "blocks", "parameters", "weights", "KV cache a token"):
        table.add_column(column, justify="right" if column else "left")
    for one in (estimate.dense, *estimate.checkpoints):
        parameters = "" if one.parameters is None else f"{one.parameters:,}"
        table.add_row(one.role, str(one.blocks), parameters, _size(one.bytes), _size(one.kv_bytes_per_token))
    sets, memory = estimate.evaluations, estimate.memory_bytes
    lines = [
        f"Sets to evaluate, at most about: prefill {sets.prefill:,}, decode {sets.decode:,}, control {sets.control:,}",
        f"Memory, at least: search {_size(memory.search) or 'unknown'}, distillation "
        f"{_size(memory.distillation) or 'none'}",
    ]
    if estimate.earlier is not None:
        took = ", ".join(f"{stage} {seconds:,.0f} s" for stage, seconds in estimate.earlier.seconds.items())
        lines.append(f"On this model {estimate.earlier.job_id} took: {took}")
    lines += [f"\n! {warning.param or 'the job'}: {warning.message}" for warning in estimate.warnings]
    return Group(table, *map(Text, lines))


def _size(found: int | None) -> str:
    return "" if found is None else decimal(found)


def _controls(removal: Mapping[str, Any]) -> Table:
    losses = removal["losses"]
    controls = losses["controls"]
    prefill, decode = (_list(removed_blocks(removal[half])) for half in ("prefill", "decode"))
    title = f"Before distillation: {losses['objective']} on continuations of the calibration windows"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "prefill gives up", "decode gives up", "loss"):
        table.add_column(column, justify="right" if column == "loss" else "left")
    table.add_row("the pair", prefill, decode, f"{losses['decode']:.4f}")
    table.add_row("decode's set in both", decode, decode, f"{controls['decode_set_in_both']:.4f}")
    table.add_row("decode only", "none", decode, f"{controls['decode_only']:.4f}")
    if "non_nested" in controls:  # A job that was cut from another searches nothing.
        free = _list(controls["non_nested_removed"])
        table.add_row("not nested (bound)", prefill, free, f"{controls['non_nested']:.4f}")
    return table


def _increase(bound: Mapping[str, Any]) -> str:
    kept = "" if bound["met"] else ", not kept by any set"
    return f"{bound['perplexity_increase']:+.1%} (bound {bound['max_perplexity_increase']:+.1%}{kept})"


def _sensitivity(sensitivity: Mapping[str, Any]) -> Table:
    """Three blocks a line, so that eighty columns hold a deep model."""
    dense, blocks = sensitivity["dense"], sensitivity["blocks"]
    title = "Loss added by giving up one block: in both halves, in decode only"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for _ in range(SENSITIVITY_COLUMNS):
        for column in ("block", "both", "decode"):
            table.add_column(column, justify="right")
    lines = -(-len(blocks) // SENSITIVITY_COLUMNS)
    for line in range(lines):
        cells: list[str] = []
        for found in blocks[line::lines]:
            added = (found[kind] - dense[kind] for kind in ("both", "decode_only"))
            cells += [str(found["block"]), *(f"{loss:.4f}" for loss in added)]
        table.add_row(*cells)
    return table


def removed_blocks(plan: Mapping[str, Any]) -> list[int]:
    """Every block that a plan removes, deleted or distilled."""
    return sorted([*plan["deleted"], *map(int, plan["distilled"])])


def _models(models: Mapping[str, Any]) -> Table:
    table = Table(title="Checkpoints", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right")
    dense = models["dense"]
    rows: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
        ("blocks", lambda m: str(m["blocks"])),
        ("deleted blocks", lambda m: _list(m["deleted_blocks"])),
        ("distilled blocks", lambda m: _list(f"{r}→{a}" for r, a in m["distilled_blocks"].items())),
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
    for label, cell in rows:
        table.add_row(label, *(cell(model) for model in models.values()))
    return table


def _pair(pair: Mapping[str, Any]) -> Table:
    kv = pair["kv_bytes_per_request"]
    table = Table(title="As a prefill/decode pair", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "dense", "pruned", "distilled"):
        table.add_column(column, justify="right" if column else "left")
    losses = (pair["dense_loss"], pair["pruned_loss"], pair["distilled_loss"])
    label = f"PD loss in nats, prompt {pair['prompt_tokens']} + {pair['continuation_tokens']}"
    table.add_row(label, *(f"{loss:.4f}" for loss in losses))
    ratio = f"{kv['pruned'] / 1024:.0f} KiB ({kv['pruned'] / kv['dense']:.0%})"
    table.add_row(f"KV cache, {kv['tokens']}-token request", f"{kv['dense'] / 1024:.0f} KiB", ratio, ratio)
    sent = f"{kv['sent'] / 1024:.0f} KiB"
    table.add_row("KV sent to decode a request", f"{kv['dense_sent'] / 1024:.0f} KiB", sent, sent)
    if rule := pair["kv_tokens"]:
        asked = "" if rule["ratio_reached"] in (None, True) else f"; {rule['ratio_asked']:g}× asked for"
        less = f"{rule['bytes_sent'] / 1024:.0f} KiB ({rule['ratio']:.2f}× less{asked})"
        table.add_row("KV sent with the token rule", f"{kv['dense_sent'] / 1024:.0f} KiB", "", less)
        table.add_row("PD loss with the token rule", "", "", f"{rule['loss']:.4f}")
    return table


def _tasks(tasks: Mapping[str, Any], models: Iterable[str]) -> Table:
    table = Table(title="Tasks", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right")
    for task, found in tasks.items():
        for metric in found["dense"]:
            table.add_row(f"{task} {metric}", *(_metric(found[name][metric]) for name in models))
    return table


def _metric(found: Mapping[str, float | None]) -> str:
    if found["value"] is None:
        return "none"
    error = "" if found["stderr"] is None else f" ± {found['stderr']:.3f}"
    return f"{found['value']:.3f}{error}"


def _list(items: Any) -> str:
    return ", ".join(str(item) for item in items) or "none"


def _perplexity(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['value']:.2f} ± {found['standard_error']:.2f}"


def _latency(model: Mapping[str, Any], dense: Mapping[str, Any], key: str) -> str:
    faster = "" if model is dense else f" ({dense[key] / model[key]:.2f}×)"
    return f"{model[key]:.1f}{faster}"
