"""Jobs and artifacts on a terminal. What users wrote is shown as it is, never read as markup."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pdtrim.contract.jobs import AnyStage, Artifact, Job, JobStatus, StageStatus
from pdtrim.contract.results import (
    DistillationResult,
    EvaluationResult,
    ExportResult,
    Folding,
    Half,
    HalfPlan,
    Healing,
    RemovalResult,
    ScoringResult,
)
from pdtrim.contract.spec import HalfTarget
from pdtrim.display.quantities import duration, size
from pdtrim.display.remedies import REMEDIES
from pdtrim.display.rendering import evaluation_report, search_report, verdict_report
from pdtrim.display.tables import PARTS
from pdtrim.display.verdict import verdict_of

ID_WIDTH = len("job_") + 32
COLOURS = {
    JobStatus.QUEUED: "yellow",
    JobStatus.RUNNING: "cyan",
    JobStatus.PAUSING: "yellow",
    JobStatus.PAUSED: "magenta",
    JobStatus.CANCELLING: "yellow",
    JobStatus.CANCELLED: "dim",
    JobStatus.FAILED: "bold red",
    JobStatus.SUCCEEDED: "green",
}


def job_table(jobs: Iterable[Job], now: datetime) -> Table:
    """One line of at most 80 columns a job; `now` is what ages are counted from."""
    table = Table(
        box=None,
        header_style="bold",
        caption="gives up: blocks of prefill, blocks of decode; +: parts of others; →: down to a budget",
    )
    table.add_column("job", no_wrap=True, min_width=ID_WIDTH)
    table.add_column("status", no_wrap=True)
    table.add_column("gives up", no_wrap=True)
    table.add_column("age", no_wrap=True, justify="right")
    table.add_column("name, or model", overflow="ellipsis")
    for job in jobs:
        status = f"[{COLOURS[job.status]}]{job.status}"
        gives_up = f"{_target(job.spec.prefill)}, {_target(job.spec.decode)}"
        table.add_row(job.id, status, gives_up, age(now - job.created_at), escape(job.title.removeprefix("hf://")))
    return table


def _target(half: HalfTarget) -> str:
    bound, parts = half.max_perplexity_increase, "".join(f"+{count}" for count in half.parts.values())
    if half.budget is not None:
        return f"{half.remove_blocks or ''}→{half.budget[1]:.0%}"
    return (str(half.remove_blocks) if bound is None else f"≤{bound:.0%}") + parts


def what_next(job: Job) -> str:
    """The commands that people want of a job that has ended."""
    if job.status == JobStatus.SUCCEEDED:
        return (
            f"\nNext: `pdtrim download {job.id} --to model` fetches the checkpoints,\n"
            f"`pdtrim serve {job.id}` serves them,\n`pdtrim frontier {job.id}` shows what fewer blocks cost."
        )
    return (
        f"\nNext: `pdtrim resume {job.id}` has it go on from its last saved state,\n"
        f"`pdtrim delete {job.id}` deletes it with all that it left."
    )


def artifact_table(artifacts: Iterable[Artifact]) -> Table:
    """One line an artifact."""
    table = Table(box=None, header_style="bold")
    for column in ("stage", "name", "size", "SHA-256", "where"):
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for artifact in artifacts:
        table.add_row(
            artifact.stage, Text(artifact.name), size(artifact.size), artifact.sha256[:12], Text(artifact.uri)
        )
    return table


def job_page(job: Job) -> RenderableType:
    """Everything about a job: stages, error and remedy, and the report when there is one."""
    parts: list[RenderableType] = [_stages(job.stages), ""]
    if job.error is not None:
        remedy = REMEDIES.get(job.error.code, "")
        field = f"\nField: {job.error.param}" if job.error.param else ""
        text = Text(f"{job.error.message}{field}\n{remedy}".strip())
        parts.append(Panel(text, title=escape(job.error.code), title_align="left", border_style="red"))
    if verdict := verdict_of(job):
        parts.append(verdict_report(verdict))
    if removal := job.result(RemovalResult):
        parts.append(search_report(removal))
    if evaluation := job.result(EvaluationResult):
        parts.append(evaluation_report(evaluation))
    named = f"{escape(job.spec.name)}, " if job.spec.name else ""
    heading = f"[bold]{job.id}[/]  {named}{escape(job.spec.model.source)}  [{COLOURS[job.status]}]{job.status}[/]"
    origin = [] if job.cut_from is None else [f"cut from the frontier of {job.cut_from}"]
    return Group(heading, *origin, "", *parts)


def _stages(stages: Iterable[AnyStage]) -> Table:
    table = Table("stage", "status", "took", "found", box=None, header_style="bold")
    for stage in stages:
        took = ""
        if stage.started_at and stage.finished_at:
            took = duration((stage.finished_at - stage.started_at).total_seconds())
        status = f"{stage.status} {stage.progress:.0%}" if stage.status == StageStatus.RUNNING else str(stage.status)
        table.add_row(stage.name, status, took, Text(stage.message or _figures(stage)))
    return table


def _figures(stage: AnyStage) -> str:
    """The figure of a finished stage that people look for first."""
    found = stage.metrics
    if isinstance(found, ScoringResult):
        cosine = f"cosine {min(found.cosine):.3f} to {max(found.cosine):.3f} over {found.blocks} blocks"
        return "\n".join([cosine, *(f"! {warning}" for warning in found.warnings)])
    if isinstance(found, RemovalResult):
        return f"prefill gives up {_removed(found.prefill)}; decode gives up {_removed(found.decode)}"
    if isinstance(found, DistillationResult):
        halves: tuple[tuple[Half, Healing | None], ...] = (("prefill", found.prefill), ("decode", found.decode))
        said = ((half, [*_folded(found.folds.get(half)), *_healed(healing)]) for half, healing in halves)
        return "; ".join(f"{half} {', '.join(parts)}" for half, parts in said if parts) or "not asked for"
    if isinstance(found, ExportResult):
        return "; ".join(f"{role} {size(proof.bytes)}" for role, proof in found.checkpoints.items())
    return ""


def _folded(found: Folding | None) -> Iterator[str]:
    if found is not None and found.before is not None and found.after is not None:
        if found.kept == "folded":
            yield f"folded (loss {found.before:.3f} → {found.after:.3f})"
        else:
            yield f"kept unfolded (loss {found.before:.3f}, folded {found.after:.3f})"


def _healed(found: Healing | None) -> Iterator[str]:
    if found is not None and found.kept == "undistilled":
        yield f"kept undistilled (loss {found.before:.3f}, distilled {found.after:.3f})"
    elif found is not None:
        yield f"loss {found.before:.3f} → {found.after:.3f}"


def _removed(plan: HalfPlan) -> str:
    parts = [f"{PARTS[part]} of {block}" for block, part in plan.parts.items()]
    return ", ".join([*map(str, plan.removed), *parts]) or "nothing"


def age(passed: timedelta) -> str:
    """About how long ago, in one unit."""
    seconds = max(0, int(passed.total_seconds()))
    for unit, long in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= long:
            return f"{seconds // long} {unit}"
    return f"{seconds} s"


def when(moment: datetime) -> str:
    """Local time to the second."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
