"""The searches of the removal stage: what prefill gives up, what decode does besides, and what to hold them against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

import torch
from torch import Tensor

from pdtrim.contract.blocks import limits
from pdtrim.contract.results import (
    BlockWorth,
    Bound,
    BudgetSearch,
    BudgetStep,
    BudgetWalk,
    Controls,
    DenseLoss,
    Half,
    PartSearch,
    PartSet,
    SearchEffort,
    SearchPart,
    Sensitivity,
)
from pdtrim.contract.spec import BUDGET_PARTS, COST_NAMES, Cost, HalfTarget
from pdtrim.contract.windows import copying_windows, windows_to_fold
from workers.inputs.models import anchor_bytes, is_streamed, prompt_bytes, windows_at_once
from workers.pruning.model.blocks import BlockStack
from workers.pruning.model.calibration import interleaved, said_again
from workers.pruning.model.costs import costs_of
from workers.pruning.model.plan import Part
from workers.pruning.model.units import NOTHING, Kind, Unit, Units, blocks_of, deleting, parts_of
from workers.pruning.repair.folded_sets import FoldedSets
from workers.pruning.search.budget import within_budget
from workers.pruning.search.engine import LossEngine, PairEngine, WholeEngine
from workers.pruning.search.memo import MeasuredSet, Memo
from workers.pruning.search.perplexity_bound import PerplexityBound
from workers.pruning.search.prefill_engine import PrefillEngine
from workers.pruning.search.search import Algorithm, SearchResult, search
from workers.stages.context import Figure, StageContext
from workers.stages.scoring import read_opening
from workers.stages.search_state import Phase, SearchName, SearchState

ProgressRange = tuple[float, float]
"""The part of the stage's progress that something takes: where it begins and ends, of 1."""
SOUGHT: Mapping[SearchName, str] = {
    "prefill": "which blocks prefill gives up",
    "decode": "which blocks decode gives up",
    ("decode", "attention"): "which attentions decode gives up",
    ("decode", "mlp"): "which MLPs decode gives up",
    ("prefill", "kv_only"): "which blocks prefill keeps for their keys and values alone",
    ("prefill", "mlp"): "which MLPs prefill gives up",
}
"""What a search looks for, in messages."""


@dataclass(frozen=True)
class HalfSearched:
    """What one serving stage gives up, and how that was found."""

    chosen: MeasuredSet
    result: SearchResult
    bound: PerplexityBound | None

    @property
    def units(self) -> Units:
        """The chosen units, one for each block that goes."""
        return self.chosen.units

    @property
    def bound_result(self) -> Bound | None:
        """What came of the bound on perplexity, if the job set one."""
        frontier = [found for _, found in sorted(self.result.frontier.items())]
        return None if self.bound is None else Bound.model_validate(self.bound.to_json(self.chosen, frontier))


@dataclass(frozen=True)
class PartSearched:
    """What one half gives up with a part of some blocks, and how that was found."""

    chosen: MeasuredSet
    record: PartSearch


@dataclass(frozen=True)
class BudgetsSearched:
    """What both halves give up, that within their budgets; the loss of that pair, if any half has one."""

    prefill: Units
    decode: Units
    loss: float | None
    searches: list[BudgetSearch]


@dataclass(frozen=True)
class PartsSearched:
    """What both halves give up, parts of blocks among it; the loss of that pair, if any part was searched."""

    prefill: Units
    decode: Units
    loss: float | None
    searches: list[PartSearch]


class Searcher:
    """Searches and measurements on one model and its calibration windows (windows, tokens).

    Folds, where sets are compared with them, are made from the training windows (windows, tokens).
    """

    def __init__(
        self, context: StageContext, stack: BlockStack, windows: Tensor, training: Tensor, cosine: list[float]
    ) -> None:
        self.prompt_tokens = windows.shape[1] // 2
        self._context = context
        self._spec = context.spec
        self._stack = stack
        copied = windows[: copying_windows(context.spec)]
        again = said_again(copied, self.prompt_tokens, opening=len(read_opening(context)))
        self._windows, self._is_copying = interleaved(windows, again)
        self._cosine = cosine
        self._chunk_windows = windows_at_once(stack.model, windows.shape[1])
        self._state = SearchState(context)
        self.efforts: dict[SearchName, SearchEffort] = {}
        """What each search that was done took."""
        # Every heat of a race would read streamed weights once more.
        self._racing = self._spec.search.racing and not is_streamed(stack.model)
        self._text = [number for number, copying in enumerate(self._is_copying) if not copying]
        self._forced = deleting(self._spec.search.force)
        self.folded = self._spec.search.folded and not is_streamed(stack.model)
        """Whether sets of whole blocks are compared with their gaps folded."""
        self._calibration, self._training = windows, training
        self._prefill_limit, self._decode_limit = limits(self._spec, len(stack.blocks))

    def prefill(self, progress_range: ProgressRange) -> HalfSearched:
        """The units that prefill gives up: the least loss on continuations when decode gives them up as well."""
        engine = self._engine()
        bound = self._bound(self._spec.prefill, None, engine, dense=engine)
        plain = self._memo(self._phase(), engine)
        memo = self._memo(self._phase(folded=True), self._engine(self._sets)) if self.folded else plain
        return self._half("prefill", memo, plain, self._forced, self._prefill_limit, bound, progress_range)

    def decode(self, prefill: Units, progress_range: ProgressRange) -> HalfSearched:
        """The units that decode gives up, `prefill` and more: the least loss on continuations by the pair."""
        engine = self._pair(prefill)
        bound = self._bound(self._spec.decode, prefill, engine, dense=self._pair(NOTHING))
        plain = self._memo(self._phase(prefill), engine)
        memo = self._memo(self._phase(prefill, folded=True), self._pair(prefill, self._sets)) if self.folded else plain
        return self._half("decode", memo, plain, prefill, self._decode_limit, bound, progress_range)

    def parts(self, prefill: Units, decode: Units, progress_range: ProgressRange) -> PartsSearched:
        """The parts of kept blocks that each half gives up besides: the least loss on continuations by the pair.

        Decode's come first, since prefill leaves keys and values for what decode still reads. Where decode would give
        up a part of a block that a bound on perplexity let go, there are fewer to choose from.
        """
        asked: list[tuple[Half, Part, int]] = [
            *(("decode", part, count) for part, count in self._spec.decode.parts.items()),
            *(("prefill", part, count) for part, count in self._spec.prefill.parts.items()),
        ]
        start, end = progress_range
        found: list[PartSearch] = []
        loss = None
        for number, (half, part, count) in enumerate(asked):
            steps = [start + (end - start) * (number + more) / len(asked) for more in (0, 1)]
            if half == "decode":
                base, engine = decode, self._pair(prefill)
                phase = Phase(self._spec.search.objective, prefill=prefill, part=part)
            else:
                base, engine = prefill, self._of_prefill(decode)
                phase = Phase(self._spec.search.objective, decode=decode, part=part)
            searched = self._search_part((half, part), self._memo(phase, engine), base, count, (steps[0], steps[1]))
            found.append(searched.record)
            loss = searched.chosen.loss
            prefill, decode = (searched.chosen.units, decode) if half == "prefill" else (prefill, searched.chosen.units)
        return PartsSearched(prefill, decode, loss, found)

    def budgets(self, prefill: Units, decode: Units, progress_range: ProgressRange) -> BudgetsSearched:
        """What each half that has a budget gives up besides: the least loss on continuations by the pair.

        Decode's comes first, as with parts.
        """
        found: list[BudgetSearch] = []
        loss = None
        halves: list[tuple[Half, HalfTarget]] = [("decode", self._spec.decode), ("prefill", self._spec.prefill)]
        for half, target in halves:
            if target.budget is None:
                continue
            of_prefill = half == "prefill"
            base, engine = (prefill, self._of_prefill(decode)) if of_prefill else (decode, self._pair(prefill))
            objective = self._spec.search.objective
            phase = Phase(objective, decode=decode) if of_prefill else self._phase(prefill)
            chosen, record = self._search_budget(
                half, target.budget, self._memo(phase, engine), base, decode, progress_range
            )
            found.append(record)
            loss = chosen.loss
            prefill, decode = (chosen.units, decode) if of_prefill else (prefill, chosen.units)
        return BudgetsSearched(prefill, decode, loss, found)

    def _search_budget(
        self,
        half: Half,
        budget: tuple[Cost, float],
        memo: Memo,
        base: Units,
        decode: Units,
        progress_range: ProgressRange,
    ) -> tuple[MeasuredSet, BudgetSearch]:
        cost, asked = budget
        costs = costs_of(self._stack, cost, self._windows[:1, : self.prompt_tokens])
        touched = {unit.block for unit in base} | set(self._spec.search.protect)
        free = [block for block in range(len(self._cosine)) if block not in touched]
        # Prefill may give up whole blocks only where decode does.
        whole = blocks_of(decode) if half == "prefill" else free
        offered = [Unit(block) for block in free if block in whole]
        offered += [Unit(block, part) for block in free for part in BUDGET_PARTS[cost]]

        def on_step(share: float, best: MeasuredSet) -> None:
            start, end = progress_range
            done = min(1.0, (1 - share) / max(1 - asked, 1e-9))

            def tell(of_next: float) -> None:
                self._context.say(
                    start + (end - start) * done,
                    f"Searching what {half} gives up for its budget: {share:.0%} of the {COST_NAMES[cost]} left.",
                    evaluated=len(memo.asked),
                    loss=round(best.loss, 5),
                )

            tell(0.0)
            memo.measuring = tell  # while the next step is looked for

        result = within_budget(memo, costs, base=base, offered=offered, share=asked, on_step=on_step)
        record = BudgetSearch(
            half=half,
            cost=cost,
            dense=costs.dense,
            asked=asked,
            share=result.share,
            met=result.share <= asked,
            sets=len(memo.asked),
            walks=[
                BudgetWalk(
                    kinds=list(walk.kinds),
                    met=walk.met,
                    steps=[
                        BudgetStep(
                            share=share,
                            loss=found.loss,
                            blocks=sorted(found.blocks),
                            parts=parts_of(found.units),
                        )
                        for share, found in walk.steps
                    ],
                )
                for walk in result.walks
            ],
        )
        return result.chosen, record

    def _search_part(
        self, name: tuple[Half, Part], memo: Memo, base: Units, count: int, progress_range: ProgressRange
    ) -> PartSearched:
        half, part = name
        untouched = len(self._cosine) - len({unit.block for unit in base} | set(self._spec.search.protect))
        last = len(base) + min(count, untouched)
        algorithm = self._spec.search.algorithm
        result = self._search(name, memo, base, last, progress_range, algorithm=algorithm, kind=part)
        frontier = [
            PartSet(blocks=sorted(unit.block for unit in best.units - base), loss=best.loss)
            for _, best in sorted(result.frontier.items())
        ]
        record = PartSearch(half=half, part=part, frontier=frontier, effort=_effort(result))
        return PartSearched(result.frontier[last], record)

    def sensitivity(self, progress_range: ProgressRange) -> Sensitivity:
        """The loss on continuations without each block alone, in both halves and in decode only.

        Protected blocks are left out: that they cannot go may be why they are protected.
        """
        blocks = [block for block in range(len(self._stack.blocks)) if block not in self._spec.search.protect]
        alone = {block: deleting([block]) for block in blocks}
        start, end = progress_range
        middle, asked = (start + end) / 2, [NOTHING, *alone.values()]
        both = self._worth(self._memo(self._phase(), self._engine()), asked, (start, middle))
        decode = self._worth(self._memo(self._phase(NOTHING), self._pair(NOTHING)), asked, (middle, end))
        return Sensitivity(
            dense=DenseLoss(both=both[NOTHING], decode_only=decode[NOTHING]),
            blocks=[BlockWorth(block=b, both=both[one], decode_only=decode[one]) for b, one in alone.items()],
        )

    def _worth(self, memo: Memo, sets: Sequence[Units], progress_range: ProgressRange) -> dict[Units, float]:
        """The losses of sets."""
        start, end = progress_range

        def tell(share: float) -> None:
            self._context.say(start + (end - start) * share, "Measuring what each block is worth.")

        tell(0.0)
        memo.measuring = tell
        return memo(sets)

    def controls(self, prefill: Units, decode: Units) -> Controls:
        """Losses on continuations to hold the pair's against: `decode` given up by both halves, and by decode alone."""
        in_both = self._memo(self._phase(decode), self._pair(decode))([decode])
        alone = self._memo(self._phase(NOTHING), self._pair(NOTHING))([decode])
        return Controls(decode_set_in_both=in_both[decode], decode_only=alone[decode])

    def by_kind_of_window(self, prefill: Units, decode: Units) -> dict[str, float]:
        """The pair's loss on running text alone and on copying alone, by its name in `Losses`.

        Nothing where the search has no copying windows.
        """
        if not any(self._is_copying):
            return {}
        memo = self._memo(self._phase(prefill), self._pair(prefill))
        memo([decode])
        kinds: dict[bool, list[float]] = {False: [], True: []}
        for loss, copying in zip(memo.known[decode], self._is_copying, strict=True):
            kinds[copying].append(loss)
        return {"decode_text": fmean(kinds[False]), "decode_copying": fmean(kinds[True])}

    def losses(self, prefill: Units, decode: Units) -> tuple[float, float]:
        """The losses on continuations of a pair that gives up `prefill` in both halves, and of the pair."""
        of_prefill = self._memo(self._phase(), self._engine())([prefill])[prefill]
        of_pair = self._memo(self._phase(prefill), self._pair(prefill))([decode])[decode]
        return of_prefill, of_pair

    def _half(
        self,
        name: SearchName,
        memo: Memo,
        plain: Memo,
        base: Units,
        limit: int,
        bound: PerplexityBound | None,
        progress_range: ProgressRange,
    ) -> HalfSearched:
        """The search by the losses of `memo`; those that are reported are of `plain`."""
        algorithm = self._spec.search.algorithm
        if bound is None:
            result = self._search(name, memo, base, limit, progress_range, algorithm=algorithm)
            chosen = result.frontier[limit]
        else:
            bound.increase(base)
            result = self._search(name, memo, base, limit, progress_range, algorithm=algorithm, acceptable=bound.holds)
            chosen = bound.largest(memo, smallest=result.frontier[len(base)])
        of = plain(list(dict.fromkeys([chosen.units, *(found.units for found in result.frontier.values())])))
        frontier = {count: replace(found, loss=of[found.units]) for count, found in result.frontier.items()}
        return HalfSearched(replace(chosen, loss=of[chosen.units]), replace(result, frontier=frontier), bound)

    def _search(
        self,
        name: SearchName,
        memo: Memo,
        base: Units,
        remove: int,
        progress_range: ProgressRange,
        *,
        algorithm: Algorithm,
        kind: Kind = "block",
        acceptable: Callable[[MeasuredSet], bool] | None = None,
    ) -> SearchResult:
        start, end = progress_range
        spec = self._spec.search

        def on_progress(done: float, best: MeasuredSet | None) -> None:
            found: dict[str, Figure] = {}
            if best is not None:
                found["loss"] = round(best.loss, 5)
                found["removed"] = sorted(unit.block for unit in best.units if unit.kind == kind)
            at = start + (end - start) * done
            self._context.say(at, f"Searching {SOUGHT[name]}.", evaluated=len(memo.asked), **found)

        on_progress(0.0, None)

        result = search(
            memo,
            algorithm=algorithm,
            num_blocks=len(self._cosine),
            remove=remove,
            base=base,
            kind=kind,
            protect=frozenset(spec.protect),
            scores=self._cosine,
            evaluations=spec.annealing_budget(len(self._cosine)),
            out_of_time=self._state.out_of_time(name, spec.seconds),
            seed=self._spec.seed,
            on_progress=on_progress,
            acceptable=acceptable,
        )
        self.efforts[name] = _effort(result)
        return result

    def _bound(
        self, target: HalfTarget, prefill: Units | None, engine: LossEngine, *, dense: LossEngine
    ) -> PerplexityBound | None:
        if target.max_perplexity_increase is None:
            return None
        memo = self._memo(Phase("cross_entropy", prefill), engine)
        by_window = dense.window_losses([NOTHING], range(engine.windows), "cross_entropy")[NOTHING]
        of_dense = fmean(by_window[window] for window in self._text)
        return PerplexityBound(memo, of_dense, target.max_perplexity_increase, self._text)

    def _phase(self, prefill: Units | None = None, *, folded: bool = False) -> Phase:
        """The losses that a search goes by: of sets that both halves give up, or beside a prefill half."""
        return Phase(self._spec.search.objective, prefill, folded=folded)

    def _memo(self, phase: Phase, engine: LossEngine) -> Memo:
        return self._state.memo(phase, engine, racing=self._racing)

    @cached_property
    def _sets(self) -> FoldedSets:
        windows = self._calibration
        count = windows_to_fold(self._stack.model.config.hidden_size, windows.shape[1])
        to_fold = torch.cat([self._training[:count].to(windows), windows])[:count]
        return FoldedSets(self._stack, to_fold, held_bytes=anchor_bytes(self._stack.model))

    def _engine(self, repaired: FoldedSets | None = None) -> LossEngine:
        return WholeEngine(
            self._stack,
            self._windows,
            self._spec.search.objective,
            chunk_windows=self._chunk_windows,
            anchor_bytes=anchor_bytes(self._stack.model),
            prompt_tokens=self.prompt_tokens,
            repaired=repaired,
        )

    def _of_prefill(self, decode: Units) -> LossEngine:
        return PrefillEngine(
            self._stack,
            self._windows,
            self._spec.search.objective,
            decode=decode,
            prompt_tokens=self.prompt_tokens,
            first_token=self._spec.serving.first_token,
            chunk_windows=self._chunk_windows,
        )

    def _pair(self, prefill: Units, repaired: FoldedSets | None = None) -> LossEngine:
        return PairEngine(
            self._stack,
            self._windows,
            self._spec.search.objective,
            prefill=prefill,
            prompt_tokens=self.prompt_tokens,
            first_token=self._spec.serving.first_token,
            chunk_windows=self._chunk_windows,
            anchor_bytes=anchor_bytes(self._stack.model),
            prompt_bytes=prompt_bytes(self._stack.model),
            repaired=repaired,
        )


def _effort(result: SearchResult) -> SearchEffort:
    parts = {
        name: SearchPart(sets=effort.sets, whole_evaluations=round(effort.whole, 2))
        for name, effort in result.efforts.items()
    }
    return SearchEffort(**parts, ended_by=result.ended_by)
