"""What a page shows of a job: pure functions of what the HTTP interface answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pdtrim.contract.checkpoints import checkpoint_files
from pdtrim.contract.estimate import Estimate
from pdtrim.contract.frontier import Cut, Frontier
from pdtrim.contract.jobs import Artifact, Event, Job, Stage, StageName, StageStatus
from pdtrim.contract.results import (
    DistillationResult,
    EvaluationResult,
    Half,
    HalfPlan,
    Halves,
    PairFigures,
    RemovalResult,
    Sample,
    ScoringResult,
    SearchRecord,
)
from pdtrim.contract.spec import COST_NAMES
from pdtrim.display import captions
from pdtrim.display.comparison import comparison
from pdtrim.display.events import numbers
from pdtrim.display.healing import healing_curves
from pdtrim.display.quantities import counted, duration
from pdtrim.display.remedies import REMEDIES
from pdtrim.display.tables import (
    Table,
    bound_lines,
    budget_tables,
    controls_table,
    effort_lines,
    estimate_facts,
    estimate_stages,
    estimate_table,
    evaluation_tables,
    parts_table,
    took,
)
from pdtrim.display.verdict import Verdict, verdict_of
from service.db.urgency import COUNTED
from service.ui import figures
from service.ui.figures import Bar, BlockMap, Figure
from service.ui.texts import as_text

FRAGMENT = "text/vnd.pdtrim.fragment+html"
"""What a script accepts that wants a part of a page."""
ROLES = ("unified", "prefill", "decode")
REPORT_PAGE = "report.html"
"""The evaluation stage's artifact for people."""
DID = {
    StageName.SCORING: "scores each block's redundancy",
    StageName.REMOVAL: "searches the blocks to give up",
    StageName.DISTILLATION: "heals what is left",
    StageName.EXPORT: "writes and proves the checkpoints",
    StageName.EVALUATION: "measures them beside the dense model",
}


@dataclass(frozen=True)
class Row:
    """A job in the list."""

    job: Job
    removes: str
    stage: str
    progress: float
    took: str
    verdict: Verdict | None


@dataclass(frozen=True)
class Step:
    """A stage of a job."""

    stage: Stage
    does: str
    took: str
    where: str
    """The worker that runs it or ran it, and how often it was begun."""

    @property
    def percent(self) -> int:
        return round(100 * (1.0 if self.stage.status == StageStatus.SUCCEEDED else self.stage.progress))


@dataclass(frozen=True)
class Command:
    """Something to copy into a terminal."""

    id: str
    name: str
    text: str


@dataclass(frozen=True)
class Download:
    """A file that a click fetches."""

    name: str
    href: str
    bytes: int


@dataclass(frozen=True)
class EventLine:
    """An event with its figures, by what they are called."""

    event: Event
    numbers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Progress:
    """How a job goes on: the part of its page that changes all the time."""

    took: str
    steps: Sequence[Step]
    place: str
    """Where it waits, as a sentence; empty where it does not."""
    healing: Sequence[Figure]
    events: Sequence[EventLine]
    last_event: int


@dataclass(frozen=True)
class JobPage:
    """A job's page. What its stages have not found yet is None or empty."""

    verdict: Verdict | None
    warnings: Sequence[str]
    remedy: str
    facts: Mapping[str, str]
    spec: str
    map: BlockMap | None
    frontier: Figure | None
    scores: Figure | None
    searches: Sequence[Figure]
    sensitivity: Figure | None
    controls: Sequence[Bar]
    control_table: Table | None
    parts_table: Table | None
    budget_tables: Sequence[Table]
    bounds: Sequence[str]
    efforts: Sequence[str]
    kv: Sequence[Bar]
    kv_note: str
    tables: Sequence[Table]
    samples: Sequence[Sample]
    artifacts: Mapping[StageName, Sequence[Artifact]]
    downloads: Sequence[Download]
    commands: Sequence[Command]


@dataclass(frozen=True)
class ExportPage:
    """A point of a frontier: what an export there gives up."""

    frontier: Figure
    prefill: int
    decode: int
    prefill_counts: Sequence[int]
    decode_counts: Sequence[int]
    map: BlockMap | None
    measured: str
    """What the search knows of the two halves that are chosen, as a sentence."""


@dataclass(frozen=True)
class Side:
    """One of two jobs that are compared."""

    job: Job
    verdict: Verdict | None


@dataclass(frozen=True)
class ComparisonPage:
    """Two jobs side by side."""

    sides: Sequence[Side]
    differing: Table
    same: Table


@dataclass(frozen=True)
class EstimateView:
    """An estimate as tables."""

    facts: Mapping[str, str]
    checkpoints: Table
    stages: Table | None
    earlier: str | None
    took: str
    warnings: Sequence[str]


def row(job: Job) -> Row:
    """A job's line in the list."""
    current = next((stage for stage in job.stages if stage.status != StageStatus.SUCCEEDED), None)
    done = sum(stage.status == StageStatus.SUCCEEDED for stage in job.stages)
    progress = (done + (current.progress if current else 0.0)) / max(1, len(job.stages))
    return Row(
        job,
        f"{job.spec.prefill} / {job.spec.decode}",
        "" if current is None else current.name,
        progress,
        _between(job.started_at, job.finished_at),
        verdict_of(job),
    )


def progress(job: Job, *, events: Sequence[Event], healing: Sequence[Event], ahead: int | None) -> Progress:
    """How a job goes on. `healing` is what its distillation told, `ahead` how many stages are taken before its own."""
    curves = healing_curves(healing, job.result(DistillationResult))
    return Progress(
        took=_between(job.started_at, job.finished_at),
        steps=[
            Step(stage, DID[stage.name], _between(stage.started_at, stage.finished_at), _where(stage))
            for stage in job.stages
        ],
        place="" if ahead is None else _place(ahead, job.queue),
        healing=[figures.healing(curve) for curve in curves],
        events=[EventLine(event, numbers(event)) for event in reversed(events)],
        last_event=events[-1].number if events else 0,
    )


def _where(stage: Stage) -> str:
    by = {StageStatus.RUNNING: "runs on", StageStatus.PENDING: "", StageStatus.QUEUED: ""}.get(stage.status, "ran on")
    worker = f"{by} {stage.worker}" if by and stage.worker else ""
    return " · ".join(part for part in (worker, f"attempt {stage.attempt}" if stage.attempt > 1 else "") if part)


def _place(ahead: int, queue: str) -> str:
    if ahead == 0:
        return f"It is the next that a worker of the queue {queue} takes."
    many = f"{ahead} stage{' is' if ahead == 1 else 's are'}" if ahead < COUNTED else f"{COUNTED} stages or more are"
    return f"{many} ahead of it in the queue {queue}."


def job_page(
    job: Job,
    *,
    artifacts: Sequence[Artifact],
    frontier: Frontier | None,
    search: SearchRecord | None,
    address: str,
) -> JobPage:
    """Everything about a job. `address` is the service's, for commands."""
    scored, removal, evaluation = job.result(ScoringResult), job.result(RemovalResult), job.result(EvaluationResult)
    worth = removal.sensitivity if removal else None
    pair = evaluation.pair if evaluation else None
    return JobPage(
        verdict=verdict_of(job),
        warnings=scored.warnings if scored else [],
        remedy=REMEDIES.get(job.error.code, "") if job.error else "",
        facts=_facts(job),
        spec=as_text(job.spec.model_dump(mode="json", exclude_defaults=True)),
        map=figures.block_map(removal) if removal else None,
        frontier=figures.frontier(frontier, export_link(job.id, frontier)) if frontier else None,
        scores=figures.scores(scored.cosine, job.spec.distillation.threshold, removal) if scored else None,
        searches=figures.trajectory(search, removal) if search and removal else [],
        sensitivity=figures.sensitivity(worth, job.spec.search.objective) if worth else None,
        controls=figures.controls(removal) if removal else [],
        control_table=controls_table(removal) if removal else None,
        parts_table=parts_table(removal) if removal else None,
        budget_tables=budget_tables(removal.budgets) if removal else [],
        bounds=bound_lines(removal) if removal else [],
        efforts=effort_lines(removal) if removal else [],
        kv=figures.kv_bytes(pair) if pair else [],
        kv_note=_kv_note(pair) if pair else "",
        tables=evaluation_tables(evaluation) if evaluation else [],
        samples=evaluation.samples if evaluation else [],
        artifacts={stage: mine for stage in StageName if (mine := [one for one in artifacts if one.stage == stage])},
        downloads=_downloads(job, artifacts),
        commands=_commands(job, artifacts, address),
    )


def export_link(job_id: str, frontier: Frontier) -> Callable[[Half, int], str]:
    """Where a point leads: to the job's own counts, a decode point beside the prefill half that it was searched with,
    a prefill point as one checkpoint for both halves."""
    chosen, searched = frontier.chosen, frontier.decode[0].remove_blocks
    own = {"prefill": chosen.prefill.remove_blocks, "decode": chosen.decode.remove_blocks}

    def link(half: Half, count: int) -> str:
        if count == own[half]:
            prefill, decode = own["prefill"], own["decode"]
        else:
            prefill, decode = (searched if half == "decode" else count), count
        return f"/ui/jobs/{job_id}/exports/new?prefill={prefill}&decode={decode}"

    return link


def export_page(job: Job, frontier: Frontier, prefill: int, decode: int, cut: Cut | None) -> ExportPage:
    """The page on which an export is cut: without a `cut` where the counts do not go together."""
    made = None
    if cut is not None and (scored := job.result(ScoringResult)):
        halves = (
            HalfPlan(num_blocks=scored.blocks, deleted=point.removed, distilled={})
            for point in (cut.prefill, cut.decode)
        )
        made = figures.block_map(Halves(prefill=next(halves), decode=next(halves)))
    return ExportPage(
        frontier=figures.frontier(frontier, export_link(job.id, frontier)),
        prefill=prefill,
        decode=decode,
        prefill_counts=_counts(frontier.prefill, frontier.chosen.prefill, prefill),
        decode_counts=_counts([*frontier.decode, *frontier.unified], frontier.chosen.decode, decode),
        map=made,
        measured="" if cut is None else _measured(cut, frontier),
    )


def _measured(cut: Cut, frontier: Frontier) -> str:
    """What the search knows of a cut."""
    prefill = f"{cut.prefill.loss:.4f}"
    if cut.prefill == cut.decode:
        return f"One unified checkpoint for both halves: loss {prefill}. It is before distillation."
    if cut.loss is not None:
        of_pair = f"{cut.loss:.4f} for the pair on continuations"
        return f"A pair: loss {prefill} for prefill, {of_pair}. Both are before distillation."
    return (
        f"A pair: loss {prefill} for prefill, before distillation. The two were not measured together: the search put "
        f"this decode half beside a prefill half that gives up {frontier.decode[0].remove_blocks}, where it lost "
        f"{cut.decode.loss:.4f}. The new job measures them."
    )


def _counts(points: Sequence[Any], chosen: Any, shown: int) -> list[int]:
    return sorted({shown, chosen.remove_blocks, *(point.remove_blocks for point in points)})


def comparison_page(first: Job, second: Job) -> ComparisonPage:
    """Two jobs side by side: what differs, and what does not."""
    found = comparison(first, second)
    differing = [row for row in found.rows if row[1] != row[2]]
    same = [row for row in found.rows if row[1] == row[2]]
    columns = ("", *(f"{job.title} (…{job.id[-6:]})" for job in (first, second)), "change")
    return ComparisonPage(
        [Side(job, verdict_of(job)) for job in (first, second)],
        replace(found, title="What differs", columns=columns, rows=differing),
        replace(found, title="What is the same", columns=columns, rows=same),
    )


def estimate(found: Estimate | None) -> EstimateView | None:
    """An estimate for people."""
    if found is None:
        return None
    return EstimateView(
        facts=estimate_facts(found),
        checkpoints=estimate_table(found),
        stages=estimate_stages(found),
        earlier=found.earlier.job_id if found.earlier else None,
        took=took(found),
        warnings=[warning.message for warning in found.warnings],
    )


def _kv_note(pair: PairFigures) -> str:
    tokens = pair.kv_bytes_per_request.tokens
    return f"{captions.KV_BYTES.text} The request has {tokens} tokens, of which {pair.prompt_tokens} are the prompt."


def _facts(job: Job) -> dict[str, str]:
    search = job.spec.search
    most = "" if search.evaluations is None else f", {search.evaluations} sets for annealing"
    return {
        "Prefill gives up": _target(job.spec.prefill),
        "Decode gives up": _target(job.spec.decode),
        "Text": job.spec.data.origin,
        "Search": f"{search.algorithm}, {search.objective}{most}",
        "First token": f"by {job.spec.serving.first_token}",
        "Queue": f"{job.queue}, {job.spec.priority} priority",
        "Seed": str(job.spec.seed),
        **({"Revision": job.model_revision} if job.model_revision else {}),
        **({"Labels": ", ".join(f"{k}={v}" for k, v in job.metadata.items())} if job.metadata else {}),
        **({"Computed with": ", ".join(f"{k} {v}" for k, v in job.versions.items())} if job.versions else {}),
    }


def _target(target: Any) -> str:
    bounded = target.max_perplexity_increase is not None
    blocks = f"blocks {target}" if bounded else counted(target.remove_blocks)
    if target.budget is not None:
        cost, share = target.budget
        blocks = f"what leaves {share:.0%} of the {COST_NAMES[cost]}"
    return blocks if target.mlp_width == 1 else f"{blocks}, keeps {target.mlp_width:g} of MLP channels"


def _downloads(job: Job, artifacts: Sequence[Artifact]) -> list[Download]:
    """Each checkpoint in one file, and the report."""
    sizes: dict[str, int] = {}
    for file in checkpoint_files(artifacts):
        role = file.name.split("/")[0]
        sizes[role] = sizes.get(role, 0) + file.size
    found = [
        Download(f"{role} checkpoint", f"/ui/jobs/{job.id}/checkpoints/{role}.tar", sizes[role])
        for role in ROLES
        if role in sizes
    ]
    reports = [one for one in artifacts if one.stage == StageName.EVALUATION and one.name == REPORT_PAGE]
    return found + [Download("report", f"/v1/jobs/{job.id}/artifacts/{one.id}/content", one.size) for one in reports]


def _commands(job: Job, artifacts: Sequence[Artifact], address: str) -> list[Command]:
    """How to get and load each checkpoint."""
    exported = {one.name.split("/")[0] for one in artifacts if one.stage == StageName.EXPORT}
    roles = [role for role in ROLES if role in exported]
    if not roles:
        return []
    downloads = [
        Command(f"download-{role}", f"Download {role}", f"pdtrim download {job.id} --only {role}/ --url {address}")
        for role in roles
    ]
    last = roles[-1]
    load = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{last}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{last}")'
    )
    return [*downloads, Command("load", f"Load {last} in Python", load)]


def _between(start: datetime | None, end: datetime | None) -> str:
    return "" if start is None or end is None else duration((end - start).total_seconds())
