"""Jobs on a terminal: tables, a job's page, live progress."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.contract.jobs import Event, Job, JobStatus, Stage, StageName, StageStatus
from service.report import report

COLOURS = {
    JobStatus.QUEUED: "yellow",
    JobStatus.RUNNING: "cyan",
    JobStatus.CANCELLING: "yellow",
    JobStatus.CANCELLED: "dim",
    JobStatus.FAILED: "bold red",
    JobStatus.SUCCEEDED: "green",
}
REMEDIES = {
    "attempts_exhausted": "Look at the worker's log, then submit the job again.",
    "model_unsupported": "Supported are Llama, Mistral, Qwen2 and Qwen3 models stored as safetensors.",
    "invalid_request": "Correct the specification and submit it again.",
    "invalid_input": "Correct the model or the specification and submit it again.",
    "internal_error": "Look at the worker's log; if the service is at fault, report it with the job's id.",
}


def job_table(jobs: Iterable[Job]) -> Table:
    """One line a job."""
    table = Table("job", "status", "model", "removes", "created", box=None, header_style="bold")
    for job in jobs:
        removes = f"prefill −{job.spec.prefill.remove_blocks}, decode −{job.spec.decode.remove_blocks}"
        colour = COLOURS[job.status]
        table.add_row(job.id, f"[{colour}]{job.status}", job.spec.model.source, removes, _when(job.created_at))
    return table


def job_page(job: Job) -> RenderableType:
    """Everything about a job: stages, error and remedy, and the report when there is one."""
    parts: list[RenderableType] = [_stages(job.stages), ""]
    if job.error is not None:
        remedy = REMEDIES.get(job.error.code, "")
        field = f"\nField: {job.error.param}" if job.error.param else ""
        parts.append(Panel(f"{job.error.message}{field}\n{remedy}".strip(), title=job.error.code, border_style="red"))
    evaluation = next((stage for stage in job.stages if stage.name == StageName.EVALUATION), None)
    if evaluation is not None and evaluation.status == StageStatus.SUCCEEDED:
        parts.append(report(evaluation.metrics))
    heading = f"[bold]{job.id}[/]  {job.spec.model.source}  [{COLOURS[job.status]}]{job.status}[/]"
    return Group(heading, "", *parts)


def _stages(stages: Iterable[Stage]) -> Table:
    table = Table("stage", "status", "took", "found", box=None, header_style="bold")
    for stage in stages:
        took = ""
        if stage.started_at and stage.finished_at:
            took = f"{(stage.finished_at - stage.started_at).total_seconds():.1f} s"
        status = f"{stage.status} {stage.progress:.0%}" if stage.status == StageStatus.RUNNING else str(stage.status)
        table.add_row(stage.name, status, took, stage.message or _figures(stage))
    return table


def _figures(stage: Stage) -> str:
    """The figure of a finished stage that people look for first."""
    if stage.status != StageStatus.SUCCEEDED:
        return ""
    metrics = stage.metrics
    if stage.name == StageName.SCORING:
        return f"cosine {min(metrics['cosine']):.3f} to {max(metrics['cosine']):.3f} over {metrics['blocks']} blocks"
    if stage.name == StageName.REMOVAL:
        return "; ".join(f"{half} −{_removed(metrics[half])}" for half in ("prefill", "decode"))
    if stage.name == StageName.DISTILLATION:
        halves = [(half, metrics.get(half)) for half in ("prefill", "decode")]
        return (
            "; ".join(f"{half} KL {r['before']:.3f} → {r['after']:.3f}" for half, r in halves if r) or "not asked for"
        )
    if stage.name == StageName.EXPORT:
        return "; ".join(f"{role} {c['bytes'] / (1 << 20):.1f} MiB" for role, c in metrics["checkpoints"].items())
    return ""


def _removed(plan: dict[str, Any]) -> str:
    return str(sorted([*plan["deleted"], *map(int, plan["distilled"])]))


def _when(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


class LiveProgress:
    """A bar for every stage where there is a terminal, a line for every event where there is none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.fields[stage]:<13}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.description}", style="dim"),
            console=console,
        )
        self._bars: dict[StageName, TaskID] = {}

    def __enter__(self) -> LiveProgress:
        if self._console.is_terminal:
            self._bars = {name: self._progress.add_task("", start=False, stage=name, total=1.0) for name in StageName}
            self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def show(self, event: Event) -> None:
        """Take in one event."""
        if not self._console.is_terminal:
            share = f" {event.data['progress']:.0%}" if "progress" in event.data else ""
            self._console.print(f"{_when(event.created_at)} {event.stage or 'job'}{share}: {event.message}")
            return
        if event.stage is None:
            return
        bar = self._bars[event.stage]
        if event.type == "stage.started":
            self._progress.start_task(bar)
        done = 1.0 if event.type == "stage.succeeded" else event.data.get("progress")
        figures = ", ".join(f"{k} {event.data[k]}" for k in ("evaluated", "step", "steps", "loss") if k in event.data)
        text = "" if event.type == "stage.succeeded" else f"{event.message} {figures}".strip()
        self._progress.update(bar, completed=done, description=text)
        if event.type in ("stage.succeeded", "stage.failed"):
            self._progress.stop_task(bar)
