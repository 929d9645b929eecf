"""Removal: search the blocks that prefill gives up, then those that decode gives up besides."""

from __future__ import annotations

from dataclasses import dataclass

from safetensors.torch import load_file
from torch import Tensor

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import (
    PLAN,
    SCORES,
    SEARCH,
    BlockScores,
    Bounds,
    Frontiers,
    HalfPlan,
    Losses,
    Plan,
    RemovalResult,
    Removed,
    SearchEfforts,
    SearchRecord,
    Sensitivity,
)
from workers.inputs.models import device, load_for_walks
from workers.pruning.model.blocks import BlockStack, block_stack
from workers.pruning.model.plan import BlockPlan, assign_actions, kv_layer_map
from workers.pruning.model.units import Units, blocks_of, parts_of
from workers.pruning.search.scores import Scores
from workers.stages.context import StageContext
from workers.stages.precision import read_precision
from workers.stages.scoring import WINDOWS
from workers.stages.searching import Searcher


@dataclass(frozen=True)
class Plans:
    """The plan of each serving stage; the same one twice when a single checkpoint serves both."""

    prefill: BlockPlan
    decode: BlockPlan
    same_width: bool = True
    """Whether both keep as many MLP channels; then they keep the same ones."""

    @property
    def unified(self) -> bool:
        return self.prefill == self.decode and self.same_width

    @property
    def prefill_is_read_alone(self) -> bool:
        """Whether prefill gives up parts of blocks for a decode half that does not: its cache is then what it is for,
        not what it predicts."""
        return bool(self.prefill.parts) and not self.unified


def read_plans(context: StageContext) -> Plans:
    """What the removal stage decided."""
    plan = context.read(StageName.REMOVAL, PLAN, Plan)
    return Plans(
        block_plan(plan.prefill),
        block_plan(plan.decode),
        same_width=context.spec.prefill.mlp_width == context.spec.decode.mlp_width,
    )


def block_plan(half: HalfPlan) -> BlockPlan:
    """The inverse of `half_plan`."""
    return BlockPlan(half.num_blocks, frozenset(half.deleted), half.distilled, half.parts)


def read_scores(context: StageContext) -> Scores:
    """What the scoring stage measured."""
    return Scores.from_json(dict(context.read(StageName.SCORING, SCORES, BlockScores)))


def load(context: StageContext) -> tuple[BlockStack, dict[str, Tensor]]:
    """The dense model's blocks, and every split's windows (windows, tokens), those of calibration on the device."""
    windows = load_file(context.input(StageName.SCORING, WINDOWS))
    windows["calibration"] = windows["calibration"].to(device())
    model = load_for_walks(
        context.model_dir, context.check, dtype=read_precision(context), memory_bytes=context.memory_bytes
    )
    return block_stack(model), windows


def run(context: StageContext) -> RemovalResult:
    """Writes the plan (a function of model, windows and specification alone) and the search's trajectory."""
    spec = context.spec
    scores = read_scores(context)
    context.say(0.0, "Loading the model.")
    stack, windows = load(context)
    searcher = Searcher(context, stack, windows["calibration"], windows["train"], scores.cosine)

    for_prefill = searcher.prefill((0.0, 0.4))
    for_decode = searcher.decode(for_prefill.units, (0.4, 0.65))
    of_parts = searcher.parts(for_prefill.units, for_decode.units, (0.65, 0.9))
    chosen = searcher.budgets(of_parts.prefill, of_parts.decode, (0.65, 0.9))
    pair_loss = next(loss for loss in (chosen.loss, of_parts.loss, for_decode.chosen.loss) if loss is not None)
    sensitivity = searcher.sensitivity((0.9, 1.0))
    by_kind = searcher.by_kind_of_window(chosen.prefill, chosen.decode)
    controls = searcher.controls(for_prefill.units, for_decode.units)

    found = write_plan(
        context,
        scores,
        ChosenSets(chosen.prefill, chosen.decode, searcher.prompt_tokens),
        Measured(
            losses=Losses(
                objective=spec.search.objective,
                folded=searcher.folded,
                prefill=for_prefill.chosen.loss,
                decode=pair_loss,
                **by_kind,
                controls=controls,
            ),
            bounds=Bounds(prefill=for_prefill.bound_result, decode=for_decode.bound_result),
            sensitivity=sensitivity,
        ),
        Frontiers.model_validate(
            {"prefill": for_prefill.result.frontier_json(), "decode": for_decode.result.frontier_json()}
        ),
    )
    record = {
        "budgets": chosen.searches,
        "prefill": for_prefill.result.trajectory_json(),
        "decode": for_decode.result.trajectory_json(),
    }
    context.write_json(SEARCH, SearchRecord.model_validate(record))
    return RemovalResult(
        **dict(found),
        parts=of_parts.searches,
        budgets=chosen.searches,
        effort=SearchEfforts(prefill=searcher.efforts["prefill"], decode=searcher.efforts["decode"]),
    )


@dataclass(frozen=True)
class ChosenSets:
    """The units that each half gives up."""

    prefill: Units
    decode: Units
    prompt_tokens: int


@dataclass(frozen=True)
class Measured:
    """What it costs, by the search's losses."""

    losses: Losses
    bounds: Bounds
    sensitivity: Sensitivity


def write_plan(
    context: StageContext, scores: Scores, decided: ChosenSets, measured: Measured, frontier: Frontiers
) -> Removed:
    """Write the plan; returns what goes into the result, too."""
    prefill = _plan(context, scores, decided.prefill)
    decode = _plan(context, scores, decided.decode, prefill)
    found = Removed(
        prefill=half_plan(prefill),
        decode=half_plan(decode),
        losses=measured.losses,
        bounds=measured.bounds,
        sensitivity=measured.sensitivity,
    )
    plan = Plan(
        **dict(found),
        seed=context.spec.seed,
        prompt_tokens=decided.prompt_tokens,
        distillation_threshold=context.spec.distillation.threshold,
        kv_layer_map=kv_layer_map(prefill, decode),
        frontier=frontier,
    )
    context.write_json(PLAN, plan)
    return found


def half_plan(plan: BlockPlan) -> HalfPlan:
    """A half's plan as results hold it; its bytes depend on the plan alone."""
    distilled = dict(sorted(plan.distilled.items()))
    parts = dict(sorted(plan.parts.items()))
    return HalfPlan(num_blocks=plan.num_blocks, deleted=sorted(plan.deleted), distilled=distilled, parts=parts)


def _plan(context: StageContext, scores: Scores, units: Units, fixed: BlockPlan | None = None) -> BlockPlan:
    return assign_actions(
        blocks_of(units),
        parts=parts_of(units),
        num_blocks=len(scores.cosine),
        scores=scores.cosine,
        threshold=context.spec.distillation.threshold,
        merge_errors=scores.merge_errors,
        fixed=fixed,
    )
