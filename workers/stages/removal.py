"""Removal: search the blocks that prefill gives up, then those that decode gives up besides."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from service.contract.jobs import StageName
from workers.context import StageContext
from workers.models import device, load_for_walks, windows_at_once
from workers.pruning.blocks import BlockStack, block_stack
from workers.pruning.engine import NOTHING, Engine, Losses, PairEngine
from workers.pruning.plan import BlockPlan, Blocks, assign_actions, kv_layer_map
from workers.pruning.scores import Scores
from workers.pruning.search import Found, Memo, SearchResult, search
from workers.stages.scoring import SCORES, WINDOWS

PLAN = "plan.json"
SEARCH = "search.json"
STATE = "search-state.json"
SAVE_INTERVAL_S = 10.0


@dataclass(frozen=True)
class Plans:
    """The plan of each serving stage; the same one twice when a single checkpoint serves both."""

    prefill: BlockPlan
    decode: BlockPlan

    @property
    def unified(self) -> bool:
        return self.prefill == self.decode


def read_plans(context: StageContext) -> Plans:
    """What the removal stage decided."""
    content = context.input_json(StageName.REMOVAL, PLAN)
    return Plans(BlockPlan.from_json(content["prefill"]), BlockPlan.from_json(content["decode"]))


class Evaluated:
    """Losses of the sets evaluated so far, kept in the store so that a later attempt need not repeat them."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self._saved_at = time.monotonic()
        kept = json.loads(context.load_state(STATE) or b'{"losses": {}, "seconds": {}}')
        self._losses: dict[str, dict[Blocks, float]] = {
            phase: {frozenset(removed): loss for removed, loss in entries} for phase, entries in kept["losses"].items()
        }
        self._seconds: dict[str, float] = kept["seconds"]
        """What earlier attempts spent on each phase."""

    def memo(self, phase: str, losses: Losses) -> Memo:
        """`losses` with what this phase already knows. A new batch of sets is saved, and may meet a cancellation."""

        def after_batch(new: Mapping[Blocks, float]) -> None:
            if time.monotonic() - self._saved_at >= SAVE_INTERVAL_S:
                self._saved_at = time.monotonic()
                self._save()
            self._context.check()

        return Memo(losses, self._losses.setdefault(phase, {}), after_batch)

    def out_of_time(self, phase: str, limit_s: float | None) -> Callable[[], bool]:
        """Whether this phase has run for `limit_s` seconds, all attempts together."""
        started, before = time.monotonic(), self._seconds.get(phase, 0.0)

        def spent() -> bool:
            self._seconds[phase] = before + time.monotonic() - started
            return limit_s is not None and self._seconds[phase] >= limit_s

        return spent

    def _save(self) -> None:
        losses = {phase: [[sorted(r), loss] for r, loss in known.items()] for phase, known in self._losses.items()}
        self._context.save_state(STATE, json.dumps({"losses": losses, "seconds": self._seconds}).encode())


def run(context: StageContext) -> dict[str, Any]:
    """Writes the plan (a function of model, windows and seed alone) and the search's trajectory."""
    spec = context.spec
    windows = load_file(context.input(StageName.SCORING, WINDOWS))["calibration"].to(device())
    scores = Scores.from_json(context.input_json(StageName.SCORING, SCORES))
    stack = block_stack(load_for_walks(context.model_dir))
    evaluated = Evaluated(context)

    chunk_windows = windows_at_once(stack.model, windows.shape[1])
    engine = Engine(stack, windows, spec.search.objective, chunk_windows=chunk_windows)
    memo = evaluated.memo("prefill", engine.losses)
    forced = frozenset(spec.search.force)
    for_prefill = _search(context, evaluated, memo, scores, forced, spec.prefill.remove_blocks, (0.0, 0.45), "prefill")
    removed_in_prefill = for_prefill.frontier[spec.prefill.remove_blocks].removed
    prefill = assign_actions(
        removed_in_prefill,
        num_blocks=len(stack.blocks),
        scores=scores.cosine,
        threshold=spec.distillation.threshold,
        merge_errors=scores.merge_errors,
    )

    prompt_tokens = windows.shape[1] // 2
    pair = _pair_engine(context, stack, windows, removed_in_prefill)
    memo = evaluated.memo("decode", pair.losses)
    for_decode = _search(
        context, evaluated, memo, scores, removed_in_prefill, spec.decode.remove_blocks, (0.45, 0.9), "decode"
    )
    removed_in_decode = for_decode.frontier[spec.decode.remove_blocks].removed
    decode = assign_actions(
        removed_in_decode,
        num_blocks=len(stack.blocks),
        scores=scores.cosine,
        threshold=spec.distillation.threshold,
        merge_errors=scores.merge_errors,
        fixed=prefill,
    )

    context.report(0.9, "Measuring the controls.")
    losses = {
        "objective": spec.search.objective,
        "prefill": for_prefill.frontier[spec.prefill.remove_blocks].loss,
        "decode": for_decode.frontier[spec.decode.remove_blocks].loss,
        "controls": {
            "decode_set_in_both": _pair_loss(context, stack, windows, removed_in_decode, removed_in_decode),
            "decode_only": _pair_loss(context, stack, windows, NOTHING, removed_in_decode),
        },
    }
    context.write_json(
        PLAN,
        {
            "format_version": 1,
            "seed": spec.seed,
            "prompt_tokens": prompt_tokens,
            "distillation_threshold": spec.distillation.threshold,
            "prefill": prefill.to_json(),
            "decode": decode.to_json(),
            "kv_layer_map": kv_layer_map(prefill, decode),
            "losses": losses,
            "frontier": {"prefill": for_prefill.frontier_json(), "decode": for_decode.frontier_json()},
        },
    )
    context.write_json(SEARCH, {"prefill": _trajectory(for_prefill), "decode": _trajectory(for_decode)})
    return {
        "prefill": prefill.to_json(),
        "decode": decode.to_json(),
        "losses": losses,
        "evaluated": {"prefill": len(for_prefill.trajectory), "decode": len(for_decode.trajectory)},
    }


def _search(
    context: StageContext,
    evaluated: Evaluated,
    memo: Memo,
    scores: Scores,
    base: Blocks,
    remove: int,
    span: tuple[float, float],
    name: str,
) -> SearchResult:
    start, end = span

    def on_progress(done: float, best: Found) -> None:
        context.report(
            start + (end - start) * done,
            f"Searching what {name} gives up.",
            evaluated=len(memo.visited),
            loss=round(best.loss, 5),
            removed=sorted(best.removed),
        )

    spec = context.spec.search
    return search(
        memo,
        algorithm=spec.algorithm,
        num_blocks=len(scores.cosine),
        remove=remove,
        base=base,
        protect=frozenset(spec.protect),
        scores=scores.cosine,
        evaluations=spec.evaluations,
        out_of_time=evaluated.out_of_time(name, spec.seconds),
        seed=context.spec.seed,
        on_progress=on_progress,
    )


def _pair_engine(context: StageContext, stack: BlockStack, windows: Tensor, prefill: Blocks) -> PairEngine:
    return PairEngine(
        stack,
        windows,
        context.spec.search.objective,
        prefill=prefill,
        prompt_tokens=windows.shape[1] // 2,
        chunk_windows=windows_at_once(stack.model, windows.shape[1]),
    )


def _pair_loss(context: StageContext, stack: BlockStack, windows: Tensor, prefill: Blocks, decode: Blocks) -> float:
    context.check()
    return _pair_engine(context, stack, windows, prefill).losses([decode])[decode]


def _trajectory(result: SearchResult) -> list[dict[str, Any]]:
    return [{"removed": sorted(found.removed), "loss": found.loss} for found in result.trajectory]
