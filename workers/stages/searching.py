"""The searches of the removal stage: what prefill gives up, what decode does besides, and what to hold them against.

Losses are kept in the store as they are found, so that a later attempt goes on where this one stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from pdtrim.contract.blocks import limits
from pdtrim.contract.results import BlockWorth, Bound, Controls, DenseLoss, Sensitivity
from pdtrim.contract.spec import StageTarget
from workers.inputs.models import anchor_bytes, is_streamed, windows_at_once
from workers.pruning.model.blocks import BlockStack
from workers.pruning.model.plan import Blocks
from workers.pruning.search.batches import Recipe
from workers.pruning.search.engine import NOTHING, LossEngine, Objective
from workers.pruning.search.memo import Found, Memo
from workers.pruning.search.perplexity_bound import PerplexityBound
from workers.pruning.search.search import Algorithm, SearchResult, search
from workers.stages.context import StageContext
from workers.stages.merging import Fit, Fits, modules

STATE = "search-state.json"
SAVE_INTERVAL_S = 10.0
Span = tuple[float, float]


class Evaluated:
    """Losses of the sets evaluated so far, kept in the store so that a later attempt need not repeat them."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self._saved_at = time.monotonic()
        kept = json.loads(context.load_state(STATE) or b'{"losses": {}, "seconds": {}}')
        self._losses: dict[str, dict[Blocks, list[float]]] = {
            phase: {frozenset(removed): by_window for removed, by_window in entries}
            for phase, entries in kept["losses"].items()
        }
        self._seconds: dict[str, float] = kept["seconds"]
        """What earlier attempts spent on each phase."""

    def memo(self, phase: str, engine: LossEngine, *, objective: Objective | None = None, racing: bool = False) -> Memo:
        """The engine's losses with what this phase already knows; saved as it grows.

        Evaluating raises Cancelled, LeaseLost.
        """

        def after_batch() -> None:
            if time.monotonic() - self._saved_at >= SAVE_INTERVAL_S:
                self._saved_at = time.monotonic()
                self._save()
            self._context.check()

        losses = partial(engine.window_losses, objective=objective)
        known = self._losses.setdefault(phase, {})
        return Memo(losses, engine.windows, known, after_batch, racing, engine.anchor)

    def out_of_time(self, phase: str, limit_s: float | None) -> Callable[[], bool]:
        """Whether this phase has run for `limit_s` seconds, all attempts together."""
        started, before = time.monotonic(), self._seconds.get(phase, 0.0)

        def spent() -> bool:
            self._seconds[phase] = before + time.monotonic() - started
            return limit_s is not None and self._seconds[phase] >= limit_s

        return spent

    def _save(self) -> None:
        losses = {phase: [[sorted(r), found] for r, found in known.items()] for phase, known in self._losses.items()}
        self._context.save_state(STATE, json.dumps({"losses": losses, "seconds": self._seconds}).encode())


@dataclass(frozen=True)
class HalfFound:
    """What one serving stage gives up, and how that was found."""

    chosen: Found
    result: SearchResult
    bound: PerplexityBound | None

    @property
    def removed(self) -> Blocks:
        """The chosen units, one for each block that goes."""
        return self.chosen.removed

    @property
    def bound_result(self) -> Bound | None:
        """What came of the bound on perplexity, if the job set one."""
        frontier = [found for _, found in sorted(self.result.frontier.items())]
        return None if self.bound is None else Bound.model_validate(self.bound.to_json(self.chosen, frontier))


class Searcher:
    """Searches and measurements on one model and its calibration windows (windows, tokens), with the fits of pairs."""

    def __init__(
        self, context: StageContext, stack: BlockStack, windows: Tensor, cosine: list[float], fits: Fits
    ) -> None:
        self.prompt_tokens = windows.shape[1] // 2
        self._context = context
        self._spec = context.spec
        self._stack = stack
        self._windows = windows
        self._cosine = cosine
        self._fits = fits
        self._units = fits.units
        chunk_windows = windows_at_once(stack.model, windows.shape[1])
        self._recipe = Recipe(self._spec.search.objective, chunk_windows, self.prompt_tokens)
        self._evaluated = Evaluated(context)
        # Every heat of a race would read streamed weights once more.
        self._racing = self._spec.search.racing and not is_streamed(stack.model)
        self._forced = frozenset(self._spec.search.force)
        self._prefill_limit, self._decode_limit = limits(self._spec, len(stack.blocks))

    def prefill(self, span: Span) -> HalfFound:
        """The blocks that prefill gives up: the least loss on whole windows."""
        engine = self._engine()
        bound = self._bound(self._spec.prefill, "prefill", engine, dense=engine)
        memo = self._memo("prefill", engine)
        pairs = sorted(self._fits.for_prefill)
        return self._half("prefill", memo, self._forced, self._prefill_limit, bound, span, pairs)

    def decode(self, prefill: Blocks, span: Span) -> HalfFound:
        """The blocks that decode gives up, `prefill` and more: the least loss on continuations by the pair."""
        engine = self._pair(prefill)
        phase = f"decode after {sorted(prefill)}"
        bound = self._bound(self._spec.decode, phase, engine, dense=self._pair(NOTHING))
        memo = self._memo(phase, engine)
        pairs = sorted(self._fits.for_decode(prefill))
        return self._half("decode", memo, prefill, self._decode_limit, bound, span, pairs)

    def sensitivity(self) -> Sensitivity:
        """The loss without each block alone, in both stages (on whole windows) and in decode only (on continuations).

        Protected blocks are left out: that they cannot go may be why they are protected.
        """
        blocks = [block for block in range(len(self._stack.blocks)) if block not in self._spec.search.protect]
        alone = {block: frozenset({block}) for block in blocks}
        both = self._memo("prefill", self._engine())([NOTHING, *alone.values()])
        decode = self._memo("decode only", self._pair(NOTHING))([NOTHING, *alone.values()])
        return Sensitivity(
            dense=DenseLoss(both=both[NOTHING], decode_only=decode[NOTHING]),
            blocks=[BlockWorth(block=b, both=both[one], decode_only=decode[one]) for b, one in alone.items()],
        )

    def controls(self, prefill: Blocks, decode: Found, span: Span) -> Controls:
        """Losses on continuations to hold the nested pair's against.

        `decode_set_in_both`: prefill gives up what decode does; `decode_only`: it gives up nothing, and pairs without a
        fit for decode alone are deleted; `non_nested`: it gives up `prefill`, but projects keys and values for every
        block, so that decode gives up any blocks (of the count in `decode`, whose set is among those tried: this loss
        is never higher).
        """
        self._context.report(span[0], "Measuring the controls.")
        free = self._non_nested(prefill, decode, span)
        simple = self.simple_controls(prefill, decode.removed)
        removed = sorted(self._units.blocks(free.removed))
        return simple.model_copy(update={"non_nested": free.loss, "non_nested_removed": removed})

    def simple_controls(self, prefill: Blocks, removed: Blocks) -> Controls:
        """Of the controls, those that take no search; decode gives up `removed`."""
        fits = self._fits.for_decode(prefill)
        in_both = self._memo(f"decode after {sorted(removed)}", self._pair(removed, fits))([removed])
        fitted = removed.intersection(self._fits.for_decode(NOTHING))
        in_decode = fitted | self._units.blocks(removed - fitted)
        alone = self._memo("decode only", self._pair(NOTHING))([in_decode])
        return Controls(decode_set_in_both=in_both[removed], decode_only=alone[in_decode])

    def losses(self, prefill: Blocks, decode: Blocks) -> tuple[float, float]:
        """The loss of the prefill half on whole windows, and that of the pair on continuations."""
        of_prefill = self._memo("prefill", self._engine())([prefill])[prefill]
        of_pair = self._memo(f"decode after {sorted(prefill)}", self._pair(prefill))([decode])[decode]
        return of_prefill, of_pair

    def _non_nested(self, prefill: Blocks, decode: Found, span: Span) -> Found:
        if prefill == self._forced:
            return decode  # Nesting asked for nothing.
        phase = f"non-nested beside {sorted(prefill)}"
        memo = self._memo(phase, self._pair(prefill, project_skipped=True))
        memo([decode.removed])
        algorithm = self._spec.search.algorithm
        # Without nesting there are far more sets; exhaustive search is affordable only where it was asked for.
        algorithm = "annealing" if algorithm == "exhaustive" else algorithm
        name = "decode without nesting"
        pairs, count = sorted(self._fits.for_decode(prefill)), len(decode.removed)
        result = self._search(memo, name, self._forced, count, span, pairs, algorithm=algorithm)
        return result.frontier[count]

    def _half(
        self,
        name: str,
        memo: Memo,
        base: Blocks,
        limit: int,
        bound: PerplexityBound | None,
        span: Span,
        pairs: Sequence[int],
    ) -> HalfFound:
        algorithm = self._spec.search.algorithm
        if bound is None:
            result = self._search(memo, name, base, limit, span, pairs, algorithm=algorithm)
            return HalfFound(result.frontier[limit], result, None)
        bound.increase(base)
        result = self._search(memo, name, base, limit, span, pairs, algorithm=algorithm, acceptable=bound.holds)
        return HalfFound(bound.largest(memo, smallest=result.frontier[len(base)]), result, bound)

    def _search(
        self,
        memo: Memo,
        name: str,
        base: Blocks,
        remove: int,
        span: Span,
        pairs: Sequence[int],
        *,
        algorithm: Algorithm,
        acceptable: Callable[[Found], bool] | None = None,
    ) -> SearchResult:
        start, end = span
        spec = self._spec.search

        def on_progress(done: float, best: Found) -> None:
            self._context.report(
                start + (end - start) * done,
                f"Searching what {name} gives up.",
                evaluated=len(memo.visited),
                loss=round(best.loss, 5),
                removed=sorted(self._units.blocks(best.removed)),
            )

        return search(
            memo,
            algorithm=algorithm,
            num_blocks=len(self._cosine),
            remove=remove,
            base=base,
            protect=frozenset(spec.protect),
            pairs=pairs,
            scores=self._cosine,
            evaluations=spec.evaluations,
            out_of_time=self._evaluated.out_of_time(name, spec.seconds),
            seed=self._spec.seed,
            on_progress=on_progress,
            acceptable=acceptable,
        )

    def _bound(
        self, target: StageTarget, phase: str, engine: LossEngine, *, dense: LossEngine
    ) -> PerplexityBound | None:
        if target.max_perplexity_increase is None:
            return None
        # A phase of its own unless the search's losses are cross-entropies already.
        known = phase if self._spec.search.objective == "cross_entropy" else f"{phase}, cross-entropy"
        memo = self._memo(known, engine, "cross_entropy")
        of_dense = dense.losses([NOTHING], "cross_entropy")[NOTHING]
        return PerplexityBound(memo, of_dense, target.max_perplexity_increase)

    def _memo(self, phase: str, engine: LossEngine, objective: Objective | None = None) -> Memo:
        return self._evaluated.memo(phase, engine, objective=objective, racing=self._racing)

    def _engine(self) -> LossEngine:
        return self._built(self._recipe, self._fits.for_prefill)

    def _pair(
        self, prefill: Blocks, fits: Mapping[int, Fit] | None = None, *, project_skipped: bool = False
    ) -> LossEngine:
        """With the fits that decode has beside `prefill`, unless given others."""
        recipe = replace(self._recipe, prefill=prefill, project_skipped=project_skipped)
        return self._built(recipe, self._fits.for_decode(prefill) if fits is None else fits)

    def _built(self, recipe: Recipe, fits: Mapping[int, Fit]) -> LossEngine:
        engine = recipe.build(
            self._stack, self._windows, anchor_bytes=anchor_bytes(self._stack.model), modules=modules(fits)
        )
        # Helpers have the model's own blocks alone.
        return engine if self._context.fan_out is None or fits else self._context.fan_out.over(engine, recipe)
