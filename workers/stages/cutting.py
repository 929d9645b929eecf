"""Cutting: what a job that was cut from another's frontier takes over from it, in place of scoring and searching.

It becomes the job's own, so that the other may be deleted once these two stages are done.
"""

from __future__ import annotations

import shutil

from pdtrim.contract.frontier import Frontier
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import PLAN, SEARCH, Bounds, Losses, Plan, RemovalResult, ScoringResult
from workers.pruning.model.units import deleting
from workers.stages.context import Parent, StageContext
from workers.stages.removal import ChosenSets, Measured, load, read_scores, write_plan
from workers.stages.searching import Searcher


def take_scores(context: StageContext) -> ScoringResult:
    """The windows, scores and channels of the parent, as they are."""
    for stage, name in context.inputs:
        if stage == StageName.SCORING:
            context.say(0.5, "Taking over the scores.")
            shutil.move(context.input(stage, name), context.out / name)
    found = _parent(context).result
    assert isinstance(found, ScoringResult)
    return found


def cut(context: StageContext) -> RemovalResult:
    """Writes the plan of the counts that the job asks for, by the parent's frontier, and measures it.

    What the parent's search visited is kept beside it, as it is.
    Raises: NoSuchPoint, SetsNotNested.
    """
    spec, parent = context.spec, _parent(context)
    plan = context.read(StageName.REMOVAL, PLAN, Plan)
    counts = (spec.prefill.remove_blocks, spec.decode.remove_blocks)
    assert counts[0] is not None
    assert counts[1] is not None
    points = Frontier.from_plan(parent.job_id, plan).cut(prefill=counts[0], decode=counts[1])

    scores = read_scores(context)
    stack, windows = load(context)
    searcher = Searcher(context, stack, windows["calibration"], windows["train"], scores.cosine)
    prefill, decode = deleting(points.prefill.removed), deleting(points.decode.removed)
    context.say(0.3, "Measuring the pair.")
    losses = searcher.losses(prefill, decode)
    of_parts = searcher.parts(prefill, decode, (0.4, 0.7))
    chosen = searcher.budgets(of_parts.prefill, of_parts.decode, (0.4, 0.7))
    pair_loss = next(loss for loss in (chosen.loss, of_parts.loss, losses[1]) if loss is not None)
    context.say(0.7, "Measuring the controls.")
    controls = searcher.controls(prefill, decode)
    by_kind = searcher.by_kind_of_window(chosen.prefill, chosen.decode)
    measured = Measured(
        losses=Losses(
            objective=spec.search.objective,
            folded=plan.losses.folded,
            prefill=losses[0],
            decode=pair_loss,
            **by_kind,
            controls=controls,
        ),
        bounds=Bounds(),
        # Jobs of earlier versions measured none.
        sensitivity=plan.sensitivity or searcher.sensitivity((0.8, 1.0)),
    )
    shutil.move(context.input(StageName.REMOVAL, SEARCH), context.out / SEARCH)
    decided = ChosenSets(chosen.prefill, chosen.decode, searcher.prompt_tokens)
    found = write_plan(context, scores, decided, measured, plan.frontier)
    return RemovalResult(**dict(found), parts=of_parts.searches, budgets=chosen.searches)


def _parent(context: StageContext) -> Parent:
    assert context.parent is not None
    return context.parent
