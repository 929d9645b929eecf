"""Two jobs side by side: the figures of each, by name."""

from __future__ import annotations

from collections.abc import Iterator

from pdtrim.contract.jobs import Job
from pdtrim.contract.results import EvaluationResult, RemovalResult
from pdtrim.display.model_figures import FIGURES
from pdtrim.display.quantities import listed
from pdtrim.display.series import kv_amounts
from pdtrim.display.tables import Table

Value = float | int | str


def figures(job: Job) -> dict[str, Value]:
    """What a job was asked for, what it found and what that is worth, as far as it has come."""
    found: dict[str, Value] = {"name": job.spec.name} if job.spec.name else {}
    found |= {"status": job.status.value, "model": job.spec.model.source}
    found |= {"prefill asked": str(job.spec.prefill), "decode asked": str(job.spec.decode), "seed": job.spec.seed}
    if removal := job.result(RemovalResult):
        found |= dict(_of_search(removal))
    if evaluation := job.result(EvaluationResult):
        found |= dict(_of_evaluation(evaluation))
    for stage in job.stages:
        if stage.started_at is not None and stage.finished_at is not None:
            found[f"seconds of {stage.name}"] = round((stage.finished_at - stage.started_at).total_seconds(), 1)
    return found


def _of_search(removal: RemovalResult) -> Iterator[tuple[str, Value]]:
    for half, plan in removal.items():
        yield f"{half} gives up", listed(plan.removed)
    losses = removal.losses
    yield f"prefill loss, {losses.objective}", losses.prefill
    yield f"pair loss, {losses.objective}", losses.decode
    if losses.decode_text is not None and losses.decode_copying is not None:
        yield f"pair loss on text, {losses.objective}", losses.decode_text
        yield f"pair loss on copying, {losses.objective}", losses.decode_copying


def _of_evaluation(evaluation: EvaluationResult) -> Iterator[tuple[str, Value]]:
    for role, model in evaluation.models.items():
        for figure in FIGURES:
            if (value := figure.value(model)) is not None:
                yield f"{role}: {figure.name}", value
    pair = evaluation.pair
    yield "PD loss, dense", pair.dense_loss
    yield "PD loss, pruned", pair.pruned_loss
    yield "PD loss, distilled", pair.distilled_loss
    if pair.copying is not None:
        yield "PD loss of a prompt said again, dense", pair.copying.dense
        yield "PD loss of a prompt said again, distilled", pair.copying.distilled
    yield "first token by", pair.first_token
    if pair.first_token_losses is not None:
        for half, loss in pair.first_token_losses.distilled.items():
            yield f"first token by {half}, distilled", loss
    yield from ((f"KV bytes, {amount.label}", amount.bytes) for amount in kv_amounts(pair))
    for task, by_model in evaluation.tasks.items():
        for role, by_metric in by_model.items():
            for name, metric in by_metric.items():
                if metric.value is not None:
                    yield f"{role}: {task} {name}", metric.value


def comparison(first: Job, second: Job) -> Table:
    """A line for every figure that one of two jobs has, and by how much the second's differs."""
    ours, theirs = figures(first), figures(second)
    rows = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        before, after = ours.get(name), theirs.get(name)
        rows.append((name, _text(before), _text(after), _change(before, after)))
    return Table("", ("", first.id, second.id, "change"), (False, True, True, True), rows)


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
