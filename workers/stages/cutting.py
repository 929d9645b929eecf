"""Cutting: what a job that was cut from another's frontier takes over from it, in place of scoring and searching.

It becomes the job's own, so that the other may be deleted once these two stages are done.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from pdtrim.contract.frontier import PLAN, Frontier, FrontierPoint
from pdtrim.contract.jobs import StageName
from workers.pruning.model.plan import Blocks
from workers.pruning.search.scores import Scores
from workers.stages.context import Parent, StageContext
from workers.stages.merging import Fit, Fits
from workers.stages.removal import SEARCH, Decided, fit, load, write_plan
from workers.stages.scoring import SCORES
from workers.stages.searching import Searcher


def take_scores(context: StageContext) -> dict[str, Any]:
    """The windows, scores and channels of the parent, as they are."""
    for stage, name in context.inputs:
        if stage == StageName.SCORING:
            context.report(0.5, "Taking over the scores.")
            shutil.move(context.input(stage, name), context.out / name)
    return _parent(context).metrics


def cut(context: StageContext) -> dict[str, Any]:
    """Writes the plan of the counts that the job asks for, by the parent's frontier, and measures it.

    What the parent's search visited is kept beside it, as it is.
    Pairs that the parent fitted are read from what it kept; what it did not, is fitted now.
    Raises: NoSuchPoint, SetsNotNested.
    """
    spec, parent = context.spec, _parent(context)
    plan = context.input_json(StageName.REMOVAL, PLAN)
    counts = (spec.prefill.remove_blocks, spec.decode.remove_blocks)
    assert counts[0] is not None
    assert counts[1] is not None
    points = Frontier.from_plan(parent.job_id, plan).cut(prefill=counts[0], decode=counts[1])

    scores = Scores.from_json(context.input_json(StageName.SCORING, SCORES))
    stack, windows = load(context)
    fits, merging = fit(context, stack, windows, scores)
    searcher = Searcher(context, stack, windows["calibration"], scores.cosine, fits)
    prefill = _units(points.prefill, fits, fits.for_prefill)
    # What prefill distils, decode inherits.
    given_up = fits.units.blocks(prefill)
    beyond = _units(points.decode, fits, fits.for_decode(prefill))
    decode = prefill | {unit for unit in beyond if fits.units.block(unit) not in given_up}
    context.report(0.5, "Measuring the pair.")
    losses = searcher.losses(prefill, decode)
    context.report(0.7, "Measuring the controls.")
    controls = searcher.simple_controls(prefill, decode)
    measured = {
        "losses": {
            "objective": spec.search.objective,
            "prefill": losses[0],
            "decode": losses[1],
            "controls": controls,
        },
        "bounds": {"prefill": None, "decode": None},
        # Jobs of earlier versions measured none.
        "sensitivity": plan.get("sensitivity") or searcher.sensitivity(),
    }
    shutil.move(context.input(StageName.REMOVAL, SEARCH), context.out / SEARCH)
    decided = Decided(prefill, decode, fits, merging, searcher.prompt_tokens)
    return write_plan(context, scores, decided, measured, plan["frontier"])


def _units(point: FrontierPoint, fits: Fits, offered: Mapping[int, Fit]) -> Blocks:
    """The units of a point: a pair where there is a fit of it, else a deletion."""
    pairs = {int(removed): fits.units.pair(int(removed), into) for removed, into in point.distilled.items()}
    return frozenset(pairs[block] if pairs.get(block) in offered else block for block in point.removed)


def _parent(context: StageContext) -> Parent:
    assert context.parent is not None
    return context.parent
