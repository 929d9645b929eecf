"""Two jobs side by side: the figures of each, by name."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from pdtrim.contract.jobs import Job
from pdtrim.contract.results import EvaluationResult, Perplexity, RemovalResult

Value = float | int | str
OF_CHECKPOINT = {
    "blocks": "blocks",
    "perplexity": "perplexity",
    "undistilled_perplexity": "perplexity before distillation",
    "kl_to_dense": "KL to dense, nats",
    "top1_agreement": "same top token",
    "parameters": "parameters",
    "bytes": "bytes of weights",
    "time_to_first_token_ms": "first token, ms",
    "inter_token_latency_ms": "each next token, ms",
}
OF_PAIR = {"dense_loss": "dense", "pruned_loss": "pruned", "distilled_loss": "distilled"}
OF_KV = {"pruned": "KV bytes of a request", "sent": "KV bytes sent to decode"}


def figures(job: Job) -> dict[str, Value]:
    """What a job was asked for, what it found and what that is worth, as far as it has come."""
    found: dict[str, Value] = {"status": job.status.value, "model": job.spec.model.source}
    found |= {"prefill asked": str(job.spec.prefill), "decode asked": str(job.spec.decode), "seed": job.spec.seed}
    if removal := job.result(RemovalResult):
        found |= _of_search(removal)
    if evaluation := job.result(EvaluationResult):
        found |= dict(_of_evaluation(evaluation))
    for stage in job.stages:
        if stage.started_at is not None and stage.finished_at is not None:
            found[f"seconds of {stage.name}"] = round((stage.finished_at - stage.started_at).total_seconds(), 1)
    return found


def _of_search(removal: RemovalResult) -> dict[str, Value]:
    gone = {"prefill": removal.prefill.removed, "decode": removal.decode.removed}
    losses = removal.losses
    return {
        **{f"{half} gives up": ", ".join(map(str, blocks)) or "nothing" for half, blocks in gone.items()},
        f"prefill loss, {losses.objective}": losses.prefill,
        f"pair loss, {losses.objective}": losses.decode,
    }


def _of_evaluation(evaluation: EvaluationResult) -> Iterator[tuple[str, Value]]:
    for role, model in evaluation.models.items():
        for key, name in OF_CHECKPOINT.items():
            found = getattr(model, key)
            value = found.value if isinstance(found, Perplexity) else found
            if value is not None:
                yield f"{role}: {name}", value
    pair = evaluation.pair
    yield from ((f"PD loss, {name}", getattr(pair, key)) for key, name in OF_PAIR.items())
    yield from ((name, getattr(pair.kv_bytes_per_request, key)) for key, name in OF_KV.items())
    for task, by_model in evaluation.tasks.items():
        for role, by_metric in by_model.items():
            yield from ((f"{role}: {task} {metric}", m.value) for metric, m in by_metric.items() if m.value)


def comparison(first: Job, second: Job) -> Table:
    """A line for every figure that one of two jobs has, and by how much the second's differs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for job in (first, second):
        table.add_column(job.id, justify="right", overflow="fold")
    table.add_column("change", justify="right")
    ours, theirs = figures(first), figures(second)
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        before, after = ours.get(name), theirs.get(name)
        table.add_row(name, *(Text(_text(value)) for value in (before, after)), _change(before, after))
    return table


def _text(value: Value | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _change(before: Value | None, after: Value | None) -> str:
    if before == after or before is None or after is None:
        return ""
    if isinstance(before, str) or isinstance(after, str) or before == 0:
        return "differs"
    return f"{after / before - 1:+.1%}"
