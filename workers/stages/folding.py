"""Folds of a half: what its gaps did, as far as a linear map can, multiplied into the MLPs before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.contract.results import FoldedGap, Folding, Half, UnfoldedGap
from pdtrim.contract.spec import JobSpec
from pdtrim.contract.windows import copying_share
from workers.inputs.models import RESIDENT_WALK_BYTES
from workers.pruning.model.blocks import BlockStack
from workers.pruning.model.calibration import said_again
from workers.pruning.model.plan import BlockPlan
from workers.pruning.repair.answers import unmarked
from workers.pruning.repair.fold import Fold, Unfolded, Wanted, by_size, fold, gaps_of, wanted_states
from workers.pruning.search.engine import windows_in
from workers.stages.context import StageContext
from workers.stages.removal import Plans
from workers.stages.scoring import read_opening
from workers.stages.training import steps

FOLD_TOKENS = 32_768
"""That maps are fitted on at most."""
STATES_BYTES = 4 * 2**30
"""That the hidden states of these tokens may take on the host."""
LEAST_WINDOWS = 2
"""Without which nothing is fitted: each half of them is held out once."""
STACKED = "healing on several devices reads blocks one at a time, which stacked experts do not allow"
TOO_LITTLE = "there are too few windows to fit a map on"
TOO_LARGE = "the dense model and this half do not fit the worker's memory together"


def folds(spec: JobSpec, window_tokens: int) -> bool:
    """Whether a job's halves are folded: as it says, else where nothing is trained or folds chose what goes."""
    if spec.distillation.fold is not None:
        return spec.distillation.fold
    return spec.search.folded or not steps(spec.distillation, window_tokens)


@dataclass(frozen=True)
class HalfFold:
    """What could be folded of a half, before it is known whether that helps."""

    tensors: Mapping[str, Tensor]
    """Called as in the dense model, in the stored dtype, on the host."""
    found: Folding | None
    """None where none was asked for, or there are no gaps."""


def fold_windows(training: Tensor, calibration: Tensor, held_out: int) -> Tensor:
    """Token ids (windows, tokens) to fit maps on: of training, and of calibration what is not held out."""
    windows = torch.cat([training, calibration[held_out:].to(training.device)])
    return unmarked(windows)[0][: max(LEAST_WINDOWS, FOLD_TOKENS // windows.shape[1])]


def copied(context: StageContext, windows: Tensor) -> Tensor:
    """As many of the windows (windows, tokens) as the search has of its own, with their prompt said again."""
    some = windows[: round(copying_share(context.spec) * len(windows))]
    return said_again(some.cpu(), windows.shape[1] // 2, opening=len(read_opening(context))).to(windows)


def wanted_of(context: StageContext, dense: BlockStack, plan: BlockPlan, windows: Tensor) -> Wanted:
    """What the maps of a half are fitted to, of the dense model on the first windows (windows, tokens)."""
    # States behind every gap, and while walking of a block of both models, and what an MLP adds.
    held = (len(gaps_of(plan)) + 3) * windows[0].numel() * dense.model.config.hidden_size * dense.model.dtype.itemsize
    windows = windows[: max(LEAST_WINDOWS, STATES_BYTES // held)]
    chunk = windows_in(
        RESIDENT_WALK_BYTES,
        streams=2,
        tokens=windows.shape[1],
        hidden=dense.model.config.hidden_size,
        itemsize=dense.model.dtype.itemsize,
    )
    return wanted_states(dense, plan, windows, chunk_windows=chunk, check=context.check)


def folded_half(
    context: StageContext, own: BlockStack, plan: BlockPlan, wanted: Wanted, dtype: torch.dtype
) -> HalfFold:
    """Fit the maps of a half, `own` being all its blocks. Nothing is changed."""
    made = fold(own, plan, wanted, weighing=by_size, check=context.check)
    found = _found(made, sum(ids.numel() for ids in wanted.chunks))
    return HalfFold({name: tensor.to(dtype) for name, tensor in made.tensors.items()}, found)


def _found(made: Fold, tokens: int) -> Folding:
    gaps = [
        FoldedGap(first=one.gap.first, last=one.gap.last, error_before=one.before, error_after=one.after)
        for one in made.errors
    ]
    return Folding(kept="unfolded", tokens=tokens if gaps else 0, gaps=gaps, left_out=_reasons(made.left_out))


def _reasons(left_out: Sequence[Unfolded]) -> list[UnfoldedGap]:
    return [UnfoldedGap(first=one.gap.first, last=one.gap.last, reason=one.reason) for one in left_out]


def left_unfolded(spec: JobSpec, plan: BlockPlan, windows: Tensor, *, reason: str | None = None) -> HalfFold | None:
    """What is said of a half of which nothing can be folded, for a `reason` or for too few windows (windows, tokens);
    None where something can.
    """
    if not folds(spec, windows.shape[1]) or not gaps_of(plan):
        return HalfFold({}, None)
    reason = TOO_LITTLE if len(windows) < LEAST_WINDOWS else reason
    return None if reason is None else HalfFold({}, _left_out(plan, reason))


def _left_out(plan: BlockPlan, reason: str) -> Folding:
    return Folding(kept="unfolded", left_out=_reasons([Unfolded(gap, reason) for gap in gaps_of(plan)]))


def none_folded(plans: Plans, reason: str) -> dict[Half, Folding]:
    """The same of both halves."""
    halves: dict[Half, BlockPlan] = {"prefill": plans.prefill, "decode": plans.decode}
    return {half: _left_out(plan, reason) for half, plan in halves.items() if gaps_of(plan)}


def judged(made: Folding, before: float, after: float) -> Folding:
    """Which weights are kept, by their held-out loss without and with the folds."""
    kept = "folded" if after < before else "unfolded"
    return made.model_copy(update={"before": before, "after": after, "kept": kept})


def folds_of(prefill: Folding | None, decode: Folding | None) -> dict[Half, Folding]:
    """As a result has them."""
    halves: dict[Half, Folding | None] = {"prefill": prefill, "decode": decode}
    return {half: found for half, found in halves.items() if found is not None}
