"""Evaluation: load the exported checkpoints as a server would, and measure them beside the dense model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    Plan,
    Sample,
    SearchRecord,
    TaskResult,
)
from pdtrim.contract.results import Perplexity as MeasuredPerplexity
from service.stopping import interruptible
from workers.inputs.models import compute_dtype, device, fits_whole, load_for_walks, load_model, load_tokenizer
from workers.inputs.wording import Wording, readable
from workers.pruning.model.calibration import said_again
from workers.pruning.model.checkpoint import empty_model, stored_dtype
from workers.pruning.model.comparison import Comparison
from workers.pruning.model.configuration import read_config
from workers.pruning.model.measure import Perplexity, Quality, Speed, parameters, speeds
from workers.pruning.model.pair import handed_tokens
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.model.streaming import parameter_bytes
from workers.pruning.serving.asking import Asked, ModelAlone, ServedPair
from workers.pruning.serving.handover import EVERY_TOKEN, KvTokenRule
from workers.pruning.serving.pair_server import read_rule
from workers.reporting.card import inherited_metadata, model_card
from workers.reporting.figures import draw_all
from workers.reporting.findings import ROLES, Findings
from workers.reporting.page import render
from workers.stages.comparing import (
    Exported,
    Halves,
    Windows,
    compare_streamed,
    compare_whole,
    fit_together,
    load_all,
)
from workers.stages.context import StageContext
from workers.stages.evaluation_tasks import continuations, load_tasks, measure_tasks
from workers.stages.export import roles
from workers.stages.kv_tokens import measure_rule
from workers.stages.removal import Plans, read_plans
from workers.stages.scoring import WINDOWS, read_opening
from workers.stages.width import HalfChannels, read_channels

PAGE, FIGURES = "report.html", "figures"
PAIR = "pair"
SAMPLES, SAMPLE_PROMPT_TOKENS = 2, 64
"""Where the job gives no prompts, so many validation windows are gone on from, after so many tokens at most."""


@dataclass(frozen=True)
class Subjects:
    """The dense model and the exported checkpoints, by name: all held, or each loaded when it is wanted."""

    context: StageContext
    exported: Mapping[str, Exported]
    held: Mapping[str, PreTrainedModel] | None
    """None where they do not fit together."""

    @classmethod
    def of(cls, context: StageContext, plans: Plans, channels: HalfChannels) -> Subjects:
        """Fetches the checkpoints, and loads them if they fit."""
        exported = {"dense": Exported(context.source_dir, context.model_dir, BlockPlan(plans.prefill.num_blocks))}
        for role, (plan, trained) in roles(plans).items():
            folder = context.input_folder(StageName.EXPORT, role)
            of_training = context.input(StageName.DISTILLATION, trained)
            exported[role] = Exported(folder, context.decoder_of(folder), plan, channels.of(role), of_training)
        held = load_all(context, exported) if fit_together(context, exported) else None
        return cls(context, exported, held)

    @property
    def halves(self) -> Halves:
        return Halves(*(half if half in self.exported else "unified" for half in ("prefill", "decode")))

    @property
    def rule(self) -> KvTokenRule:
        """Which prompt tokens decode is sent."""
        return read_rule(self.exported[self.halves.prefill].folder)

    @property
    def served(self) -> str:
        """What answers as the job's checkpoints are served: the pair, or one checkpoint that does the same alone."""
        return "unified" if "unified" in self.exported and self.rule == EVERY_TOKEN else PAIR

    def model(self, name: str) -> PreTrainedModel:
        """One that is held, or loaded by itself in the way that it fits."""
        if self.held is not None:
            return self.held[name]
        context = self.context
        return load_for_walks(self.exported[name].decoder, context.check, memory_bytes=context.memory_bytes)

    def asked(self) -> Iterator[tuple[str, Asked]]:
        """The dense model and each checkpoint by itself, and the pair as it is served where that is another thing."""
        for name in self.exported:
            yield name, ModelAlone(self.model(name))
        if self.served == PAIR:
            of = self.halves
            prefill = self.model(of.prefill)
            decode = prefill if of.decode == of.prefill else self.model(of.decode)
            layer_map = kv_layer_map(self.exported[of.prefill].plan, self.exported[of.decode].plan)
            first_token = self.context.spec.serving.first_token
            yield PAIR, ServedPair(prefill, decode, tuple(layer_map), first_token, self.rule)

    def compare(self, windows: Windows) -> Comparison:
        """All figures of quality."""
        context = self.context
        if self.held is not None:
            return compare_whole(context, self.exported, self.held, self.halves, windows)
        say = partial(_say_comparing, context)
        return compare_streamed(context, self.exported, self.halves, windows, say)

    def speeds(self, windows: Tensor) -> dict[str, Speed]:
        """By name, of the models that fit: taking turns where they are held together, else each by itself."""
        spec, check, memory_bytes = self.context.spec.evaluation, self.context.check, self.context.memory_bytes
        time = partial(
            speeds,
            prompt=windows[:1, : windows.shape[1] // 2],
            new_tokens=spec.speed_tokens,
            repeats=spec.speed_repeats,
        )
        if self.held is not None:
            return time(self.held)
        timed: dict[str, Speed] = {}
        for name, one in self.exported.items():
            if fits_whole(parameter_bytes(one.decoder, compute_dtype(), check), memory_bytes):
                timed |= time({name: load_model(one.decoder, check)})
        return timed


def _say_comparing(context: StageContext, done: float) -> None:
    context.say(0.5 + 0.3 * done, "Measuring all models block by block.")


def run(context: StageContext) -> EvaluationResult:
    """Writes and returns the report: quality, PD loss, parameters, KV bytes, speed, memory, tasks.

    Also writes it as a page with figures, and each checkpoint's model card again, now with its numbers.
    """
    plans, channels = read_plans(context), read_channels(context)
    validation = load_file(context.input(StageName.SCORING, WINDOWS))["validation"].to(device())
    prompt_tokens, first_token = validation.shape[1] // 2, context.spec.serving.first_token
    windows = Windows(
        validation,
        said_again(validation, prompt_tokens, opening=len(read_opening(context))),
        prompt_tokens,
        first_token,
        (validation.shape[1], handed_tokens(prompt_tokens, first_token)),
    )
    context.say(0.05, "Loading the exported checkpoints.")
    subjects = Subjects.of(context, plans, channels)
    context.say(0.2, "Measuring speed.")
    timed = subjects.speeds(validation)
    context.say(0.5, "Measuring perplexity.")
    compared = subjects.compare(windows)
    pair = _measure_pair(subjects, plans, windows, compared)
    tasks, samples = _ask(context, subjects, windows)
    report = EvaluationResult(
        way="streamed" if subjects.held is None else "resident",
        models={
            name: _describe(context, one, compared.models[name], compared.undistilled.get(name), timed.get(name))
            for name, one in subjects.exported.items()
        },
        pair=pair,
        tasks=tasks,
        samples=samples,
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


def _ask(
    context: StageContext, subjects: Subjects, windows: Windows
) -> tuple[dict[str, dict[str, TaskResult]], list[Sample]]:
    """Task → model → metrics, and texts that the dense model and what is served go on from."""
    spec = context.spec.evaluation
    tasks = interruptible(context.check, partial(load_tasks, spec.tasks))
    tokenizer = load_tokenizer(context.model_dir)
    prompts = _prompts(context, subjects, tokenizer, windows)
    found: dict[str, dict[str, TaskResult]] = {}
    said: list[dict[str, str]] = [{} for _ in prompts]
    if not tasks and not prompts:
        return found, []
    for number, (name, asked) in enumerate(subjects.asked()):
        progress = 0.85 + 0.14 * number / (len(subjects.exported) + 1)
        ask = partial(context.say, progress, f"Asking {_named(name)}.")
        if prompts and name in ("dense", subjects.served):
            ids, most_tokens = [ids for _, ids in prompts], spec.sample_tokens
            going_on = partial(continuations, asked, tokenizer, ids, most_tokens=most_tokens, on_forward=ask)
            for of_prompt, text in zip(said, interruptible(context.check, going_on), strict=True):
                of_prompt[name] = readable(text)
        measure = partial(
            measure_tasks, asked, tokenizer, tasks, limit=spec.task_limit, seed=context.spec.seed, on_forward=ask
        )
        # Before the first question and after the last the harness asks nobody.
        for task, result in interruptible(context.check, measure).items():
            found.setdefault(task, {})[name] = result
    return found, [
        Sample(prompt=readable(text), continuations=by_model) for (text, _), by_model in zip(prompts, said, strict=True)
    ]


def _named(name: str) -> str:
    return "the pair as it is served" if name == PAIR else f"the {name} model"


def _prompts(
    context: StageContext, subjects: Subjects, tokenizer: PreTrainedTokenizerBase, windows: Windows
) -> list[tuple[str, list[int]]]:
    """What is gone on from, as text and tokens: what the job gives, or the beginnings of validation windows."""
    given = context.spec.evaluation.prompts
    if given is not None:
        return [(text, Wording.of(tokenizer).prompt(text)) for text in given]
    if subjects.held is None:
        return []
    begun = windows.text[:SAMPLES, : min(windows.prompt_tokens, SAMPLE_PROMPT_TOKENS)]
    return [(str(tokenizer.decode(ids, skip_special_tokens=True)), ids.tolist()) for ids in begun]


def _describe(
    context: StageContext, one: Exported, found: Quality, undistilled: Perplexity | None, speed: Speed | None
) -> ModelFigures:
    model = empty_model(one.decoder, context.check)
    channels = getattr(model.config, "intermediate_size", None)
    weights = one.folder.glob("*.safetensors")
    return ModelFigures(
        blocks=len(one.plan.kept),
        kept_blocks=list(one.plan.kept),
        deleted_blocks=sorted(one.plan.deleted),
        distilled_blocks=dict(sorted(one.plan.distilled.items())),
        parts=dict(sorted(one.plan.parts.items())),
        # Some configurations list them by block.
        mlp_channels=channels if isinstance(channels, int) else None,
        parameters=parameters(model),
        bytes=sum(path.stat().st_size for path in weights),
        **asdict(found),
        undistilled_perplexity=None if undistilled is None else MeasuredPerplexity(**asdict(undistilled)),
        **({} if speed is None else asdict(speed)),
    )


def _measure_pair(subjects: Subjects, plans: Plans, windows: Windows, compared: Comparison) -> PairFigures:
    context = subjects.context
    context.say(0.8, "Measuring the prefill/decode pair.")
    layer_map = kv_layer_map(plans.prefill, plans.decode)
    halves, dtype = subjects.halves, stored_dtype(context.model_dir)
    kv_tokens = None
    if context.spec.kv_tokens is not None:
        kv_tokens = measure_rule(
            context.spec.kv_tokens,
            subjects.rule,
            read_config(context.model_dir),
            (subjects.model(halves.prefill), subjects.model(halves.decode)),
            layer_map,
            windows.text,
            dtype,
            windows.first_token,
        )
    pairs = compared.pairs
    first = {
        name: FirstTokenLoss(decode=found.first_token["decode"], prefill=found.first_token["prefill"])
        for name, found in pairs.items()
    }
    dense_bytes, pruned_bytes = (compared.cached[name] for name in ("dense", halves.decode))
    tokens = windows.text.shape[1]
    return PairFigures(
        prompt_tokens=windows.prompt_tokens,
        continuation_tokens=tokens - windows.prompt_tokens,
        dense_loss=pairs["dense"].loss,
        pruned_loss=pairs["pruned"].loss,
        distilled_loss=pairs["distilled"].loss,
        first_token=windows.first_token,
        first_token_losses=FirstTokenLosses(dense=first["dense"], pruned=first["pruned"], distilled=first["distilled"]),
        copying=CopyingLosses(
            dense=pairs["dense"].copying, pruned=pairs["pruned"].copying, distilled=pairs["distilled"].copying
        ),
        kv_layer_map=layer_map,
        kv_tokens=kv_tokens,
        kv_bytes_per_request=KvBytes(
            tokens=tokens,
            dense=dense_bytes[0],
            pruned=pruned_bytes[0],
            dense_sent=dense_bytes[1],
            sent=pruned_bytes[1],
        ),
    )
