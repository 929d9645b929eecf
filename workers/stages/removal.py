"""Removal: search the blocks that prefill gives up, then those that decode gives up besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from pdtrim.contract.blocks import limits
from pdtrim.contract.frontier import PLAN
from pdtrim.contract.jobs import StageName
from workers.inputs.models import can_train, device, load_for_walks
from workers.pruning.model.blocks import BlockStack, block_stack
from workers.pruning.model.plan import BlockPlan, Blocks, assign_actions, kv_layer_map
from workers.pruning.model.units import Units
from workers.pruning.search.scores import Scores
from workers.stages.context import StageContext
from workers.stages.merging import Fits, Fitter
from workers.stages.scoring import SCORES, WINDOWS
from workers.stages.searching import Searcher

SEARCH = "search.json"
MERGED = "merged.safetensors"


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


def read_plans(context: StageContext) -> Plans:
    """What the removal stage decided."""
    content = context.input_json(StageName.REMOVAL, PLAN)
    return Plans(
        BlockPlan.from_json(content["prefill"]),
        BlockPlan.from_json(content["decode"]),
        same_width=context.spec.prefill.mlp_width == context.spec.decode.mlp_width,
    )


def load(context: StageContext) -> tuple[BlockStack, dict[str, Tensor]]:
    """The dense model's blocks, and every split's windows (windows, tokens), those of calibration on the device."""
    windows = load_file(context.input(StageName.SCORING, WINDOWS))
    windows["calibration"] = windows["calibration"].to(device())
    return block_stack(load_for_walks(context.model_dir, context.check)), windows


def run(context: StageContext) -> dict[str, Any]:
    """Writes the plan (a function of model, windows and specification alone), the search's trajectory, and the trained
    tensors of the pairs that the plan distils, where the search weighed that."""
    spec = context.spec
    scores = Scores.from_json(context.input_json(StageName.SCORING, SCORES))
    stack, windows = load(context)
    fits, merging = fit(context, stack, windows, scores)
    searcher = Searcher(context, stack, windows["calibration"], scores.cosine, fits)

    for_prefill = searcher.prefill((0.2 if merging else 0.0, 0.3))
    for_decode = searcher.decode(for_prefill.removed, (0.3, 0.6))
    context.report(0.6, "Measuring what each block is worth.")
    sensitivity = searcher.sensitivity()
    controls = searcher.controls(for_prefill.removed, for_decode.chosen, (0.65, 1.0))

    found = write_plan(
        context,
        scores,
        Decided(for_prefill.removed, for_decode.removed, fits, merging, searcher.prompt_tokens),
        {
            "losses": {
                "objective": spec.search.objective,
                "prefill": for_prefill.chosen.loss,
                "decode": for_decode.chosen.loss,
                "controls": controls,
            },
            "bounds": {"prefill": for_prefill.bound_json(), "decode": for_decode.bound_json()},
            "sensitivity": sensitivity,
        },
        {"prefill": for_prefill.result.frontier_json(), "decode": for_decode.result.frontier_json()},
    )
    trajectories = (for_prefill.result.trajectory_json(), for_decode.result.trajectory_json())
    context.write_json(SEARCH, {"prefill": trajectories[0], "decode": trajectories[1]})
    evaluated = {"prefill": len(for_prefill.result.trajectory), "decode": len(for_decode.result.trajectory)}
    workers = {"workers": 1, "helpers_share": 0.0} if context.fan_out is None else context.fan_out.to_json()
    return {**found, "evaluated": evaluated, **workers}


@dataclass(frozen=True)
class Decided:
    """The units that each half gives up, the fits they are of, and what the plan says about those."""

    prefill: Blocks
    decode: Blocks
    fits: Fits
    merging: dict[str, Any]
    prompt_tokens: int

    @property
    def weighed(self) -> bool:
        """Whether the search chose between deleting and distilling; else the threshold does."""
        return bool(self.merging.get("weighed"))


def write_plan(
    context: StageContext, scores: Scores, decided: Decided, measured: dict[str, Any], frontier: dict[str, Any]
) -> dict[str, Any]:
    """Write the plan, and the trained tensors of its pairs; returns what goes into the metrics, too."""
    if decided.weighed:
        units = decided.fits.units
        prefill, decode = units.plan(decided.prefill), units.plan(decided.decode)
        context.write_tensors(context.out / MERGED, decided.fits.tensors(decided.prefill, decided.decode))
    else:
        prefill = _plan(context, scores, decided.prefill)
        decode = _plan(context, scores, decided.decode, prefill)
    found = {
        "prefill": prefill.to_json(),
        "decode": decode.to_json(),
        **measured,
        **({"merging": decided.merging} if decided.merging else {}),
    }
    context.write_json(
        PLAN,
        {
            "format_version": 1,
            "seed": context.spec.seed,
            "prompt_tokens": decided.prompt_tokens,
            "distillation_threshold": context.spec.distillation.threshold,
            "kv_layer_map": kv_layer_map(prefill, decode),
            "frontier": frontier,
            **found,
        },
    )
    return found


def fit(
    context: StageContext, stack: BlockStack, windows: Mapping[str, Tensor], scores: Scores
) -> tuple[Fits, dict[str, Any]]:
    """What the search may distil, and what the plan says about it: nothing where the job asks for no merging."""
    none = Fits(Units(len(stack.blocks)))
    fitter = Fitter(context, stack, windows)
    if not context.spec.distillation.enabled or fitter.training.steps == 0:
        return none, {}
    if not can_train(stack.model):
        return none, {"weighed": False, "reason": "the model's weights do not fit one device"}
    most = limits(context.spec, len(stack.blocks))
    may_differ = most[0] < most[1] or context.spec.prefill.max_perplexity_increase is not None
    free = most[0] > len(context.spec.search.force)
    fits = fitter.fits(scores.cosine, free=free, frozen=may_differ, span=(0.0, 0.2))
    return fits, {"weighed": True, "pairs": fits.to_json()}


def _plan(context: StageContext, scores: Scores, removed: frozenset[int], fixed: BlockPlan | None = None) -> BlockPlan:
    return assign_actions(
        removed,
        num_blocks=len(scores.cosine),
        scores=scores.cosine,
        threshold=context.spec.distillation.threshold,
        merge_errors=scores.merge_errors,
        fixed=fixed,
    )
