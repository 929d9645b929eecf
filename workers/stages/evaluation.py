"""Evaluation: load the exported checkpoints as a server would, and measure them beside the dense model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import (
    PLAN,
    REPORT,
    SCORES,
    SEARCH,
    BlockScores,
    CopyingLosses,
    EvaluationResult,
    FirstTokenLoss,
    FirstTokenLosses,
    KvBytes,
    ModelFigures,
    PairFigures,
    Perplexity,
    Plan,
    SearchRecord,
    TaskResult,
)
from service.stopping import interruptible
from workers.inputs.models import device, load_model, load_tokenizer
from workers.pruning.model.cache import cache_bytes
from workers.pruning.model.calibration import said_again
from workers.pruning.model.checkpoint import stored_dtype
from workers.pruning.model.measure import Speed, parameters, perplexity, quality, speeds
from workers.pruning.model.pair import first_token_losses, handed_tokens, pd_loss
from workers.pruning.model.parts import pruned
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.model.width import Channels
from workers.pruning.serving.pair_server import read_rule
from workers.reporting.card import inherited_metadata, model_card
from workers.reporting.figures import draw_all
from workers.reporting.findings import ROLES, Findings
from workers.reporting.page import render
from workers.stages.context import StageContext
from workers.stages.evaluation_tasks import load_tasks, measure_tasks
from workers.stages.export import roles
from workers.stages.kv_tokens import measure_rule
from workers.stages.removal import Plans, read_plans
from workers.stages.scoring import WINDOWS, read_opening
from workers.stages.width import narrowed, read_channels

PAGE, FIGURES = "report.html", "figures"
BATCH_WINDOWS = 8


@dataclass(frozen=True)
class MeasuredModel:
    """A model under measurement, the folder it was loaded from, and what it gave up."""

    model: PreTrainedModel
    folder: Path
    plan: BlockPlan
    channels: Channels | None = None

    @property
    def pruned(self) -> bool:
        return bool(self.plan.removed or self.plan.parts) or self.channels is not None


def run(context: StageContext) -> EvaluationResult:
    """Writes and returns the report: quality, PD loss, parameters, KV bytes, speed, memory, tasks.

    Also writes it as a page with figures, and each checkpoint's model card again, now with its numbers.
    """
    plans, channels = read_plans(context), read_channels(context)
    windows = load_file(context.input(StageName.SCORING, WINDOWS))["validation"].to(device())
    context.say(0.05, "Loading the exported checkpoints.")
    dense = load_model(context.model_dir, context.check)
    subjects = {"dense": MeasuredModel(dense, context.source_dir, BlockPlan(plans.prefill.num_blocks))}
    for role, (plan, _) in roles(plans).items():
        folder = context.input_folder(StageName.EXPORT, role)
        model = load_model(context.decoder_of(folder), context.check)
        subjects[role] = MeasuredModel(model, folder, plan, channels.of(role))

    context.say(0.2, "Measuring speed.")
    spec = context.spec.evaluation
    timed = speeds(
        {name: subject.model for name, subject in subjects.items()},
        windows[:1, : windows.shape[1] // 2],
        new_tokens=spec.speed_tokens,
        repeats=spec.speed_repeats,
    )
    context.say(0.5, "Measuring perplexity.")
    report = EvaluationResult(
        models={name: _describe(context, subject, timed[name], windows, dense) for name, subject in subjects.items()},
        pair=_measure_pair(context, subjects, plans, windows),
        tasks=_measure_tasks(context, subjects),
    )
    context.write_json(REPORT, report)
    context.say(0.99, "Writing the report.")
    _write_report(context, report)
    return report


def _write_report(context: StageContext, report: EvaluationResult) -> None:
    """The report for people, its figures, and the checkpoints' model cards with its numbers."""
    scores = context.read(StageName.SCORING, SCORES, BlockScores)
    made = {
        role: json.loads(context.input(StageName.EXPORT, f"{role}/pdtrim.json").read_text())
        for role in ROLES
        if role in report.models
    }
    findings = Findings(
        job_id=context.job_id,
        spec=context.spec,
        model_revision=context.model_revision,
        scores=scores,
        plan=context.read(StageName.REMOVAL, PLAN, Plan),
        search=context.read(StageName.REMOVAL, SEARCH, SearchRecord),
        evaluation=report,
        versions={name: version(name) for name in ("pdtrim", "torch", "transformers")},
        notes=[*scores.warnings, *next(iter(made.values())).get("notes", [])],
    )
    drawings = []
    for drawing in draw_all(findings):
        context.check()
        drawings.append(drawing)
        path = context.out / FIGURES / f"{drawing.name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(drawing.png)
    (context.out / PAGE).write_text(render(findings, drawings), encoding="utf-8")
    inherited = inherited_metadata(context.source_dir)
    for role, pdtrim in made.items():
        card = context.out / role / "README.md"
        card.parent.mkdir(exist_ok=True)
        card.write_text(model_card(pdtrim, inherited, findings.evaluation_tables()), encoding="utf-8")


def _measure_tasks(context: StageContext, subjects: Mapping[str, MeasuredModel]) -> dict[str, dict[str, TaskResult]]:
    """Task → model → metrics."""
    spec = context.spec.evaluation
    tasks = interruptible(context.check, partial(load_tasks, spec.tasks))
    if tasks is None:
        return {}
    tokenizer = load_tokenizer(context.model_dir)
    found: dict[str, dict[str, TaskResult]] = {}
    for number, (name, subject) in enumerate(subjects.items()):
        progress = 0.85 + 0.15 * number / len(subjects)
        ask = partial(context.say, progress, f"Asking the {name} model the evaluation tasks.")
        measure = partial(
            measure_tasks,
            subject.model,
            tokenizer,
            tasks,
            limit=spec.task_limit,
            seed=context.spec.seed,
            on_forward=ask,
        )
        # Before the first question and after the last the harness asks nobody.
        for task, result in interruptible(context.check, measure).items():
            found.setdefault(task, {})[name] = result
    return found


def _describe(
    context: StageContext, subject: MeasuredModel, speed: Speed, windows: Tensor, dense: PreTrainedModel
) -> ModelFigures:
    context.check()
    undistilled = None
    if subject.pruned:
        undistilled = Perplexity(**asdict(perplexity(_pruned(dense, subject), windows, batch=BATCH_WINDOWS)))
    weights = subject.folder.glob("*.safetensors")
    channels = getattr(subject.model.config, "intermediate_size", None)
    return ModelFigures(
        blocks=len(subject.plan.kept),
        kept_blocks=list(subject.plan.kept),
        deleted_blocks=sorted(subject.plan.deleted),
        distilled_blocks=dict(sorted(subject.plan.distilled.items())),
        parts=dict(sorted(subject.plan.parts.items())),
        # Some configurations list them by block.
        mlp_channels=channels if isinstance(channels, int) else None,
        parameters=parameters(subject.model),
        bytes=sum(path.stat().st_size for path in weights),
        **asdict(quality(subject.model, dense, windows, batch=BATCH_WINDOWS)),
        undistilled_perplexity=undistilled,
        **asdict(speed),
    )


def _pruned(dense: PreTrainedModel, subject: MeasuredModel) -> PreTrainedModel:
    """What the subject was before distillation."""
    return pruned(narrowed(dense, subject.channels), subject.plan)


def _measure_pair(
    context: StageContext, subjects: Mapping[str, MeasuredModel], plans: Plans, windows: Tensor
) -> PairFigures:
    context.say(0.8, "Measuring the prefill/decode pair.")
    dense = subjects["dense"].model
    prefill_subject, decode_subject = (subjects.get(half) or subjects["unified"] for half in ("prefill", "decode"))
    prefill, decode = prefill_subject.model, decode_subject.model
    layer_map = kv_layer_map(plans.prefill, plans.decode)
    tokens = windows.shape[1]
    prompt_tokens, first_token = tokens // 2, context.spec.serving.first_token

    def loss(
        prefill: PreTrainedModel, decode: PreTrainedModel, layer_map: list[int], windows: Tensor = windows
    ) -> float:
        context.check()
        return pd_loss(
            prefill,
            decode,
            layer_map,
            windows,
            prompt_tokens=prompt_tokens,
            first_token=first_token,
            batch=BATCH_WINDOWS,
        )

    def first_token_loss(prefill: PreTrainedModel, decode: PreTrainedModel, layer_map: list[int]) -> FirstTokenLoss:
        context.check()
        found = first_token_losses(
            prefill, decode, layer_map, windows, prompt_tokens=prompt_tokens, batch=BATCH_WINDOWS
        )
        return FirstTokenLoss(decode=found["decode"], prefill=found["prefill"])

    dtype = stored_dtype(context.model_dir)
    kv_tokens = None
    if context.spec.kv_tokens is not None:
        rule = read_rule(prefill_subject.folder)
        kv_tokens = measure_rule(
            context.spec.kv_tokens, rule, dense.config, (prefill, decode), layer_map, windows, dtype, first_token
        )
    pruned = (_pruned(dense, prefill_subject), _pruned(dense, decode_subject))
    every_block = list(range(plans.prefill.num_blocks))
    copying = said_again(windows, prompt_tokens, opening=len(read_opening(context)))
    return PairFigures(
        prompt_tokens=prompt_tokens,
        continuation_tokens=tokens - prompt_tokens,
        dense_loss=loss(dense, dense, every_block),
        pruned_loss=loss(*pruned, layer_map),
        distilled_loss=loss(prefill, decode, layer_map),
        first_token=first_token,
        first_token_losses=FirstTokenLosses(
            dense=first_token_loss(dense, dense, every_block),
            pruned=first_token_loss(*pruned, layer_map),
            distilled=first_token_loss(prefill, decode, layer_map),
        ),
        copying=CopyingLosses(
            dense=loss(dense, dense, every_block, copying),
            pruned=loss(*pruned, layer_map, copying),
            distilled=loss(prefill, decode, layer_map, copying),
        ),
        kv_layer_map=layer_map,
        kv_tokens=kv_tokens,
        kv_bytes_per_request=KvBytes(
            tokens=tokens,
            dense=cache_bytes(dense, tokens, dtype),
            pruned=cache_bytes(decode, tokens, dtype),
            dense_sent=cache_bytes(dense, handed_tokens(prompt_tokens, first_token), dtype),
            sent=cache_bytes(decode, handed_tokens(prompt_tokens, first_token), dtype),
        ),
    )
