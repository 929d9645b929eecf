"""What readers want to know of a job first: what was saved, what it costs in quality, and whether that is much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pdtrim.contract.jobs import Job
from pdtrim.contract.results import (
    Bounds,
    DistillationResult,
    EvaluationResult,
    Healing,
    ModelFigures,
    PairFigures,
    RemovalResult,
    Spread,
)
from pdtrim.display.model_figures import spread_text
from pdtrim.display.quantities import increase, size

LITTLE, MUCH = 0.05, 0.2
"""The pair's perplexity, above the dense model's as a fraction: up to the first it is little, above the second much."""
MOST_NATS = 50.0
"""A larger loss is shown as this one; what perplexity it makes means nothing any more."""

Mark = Literal["good", "fair", "bad"]
HEADLINES: Mapping[Mark, str] = {
    "good": "Little quality was lost",
    "fair": "Some quality was lost",
    "bad": "Much quality was lost",
}
ADVICE = "Before this is served, give up fewer blocks, or heal on more tokens."


@dataclass(frozen=True)
class Fact:
    """A number, and what it is to be seen beside. A `mark` says that it is good or bad."""

    name: str
    value: str
    beside: str
    mark: Mark | None = None


@dataclass(frozen=True)
class Verdict:
    """What was saved and what it costs. `sentence` says the latter in words."""

    mark: Mark
    sentence: str
    saved: Sequence[Fact]
    costs: Sequence[Fact]


def verdict_of(job: Job) -> Verdict | None:
    """A job's verdict; None until it was evaluated."""
    evaluation, removal = job.result(EvaluationResult), job.result(RemovalResult)
    if evaluation is None:
        return None
    return verdict(evaluation, bounds=removal.bounds if removal else None, healing=job.result(DistillationResult))


def verdict(
    evaluation: EvaluationResult, *, bounds: Bounds | None = None, healing: DistillationResult | None = None
) -> Verdict:
    """What evaluation found, with what else of a job tells whether its checkpoints are good."""
    pair = evaluation.pair
    rise = perplexity_rise(pair.dense_loss, served_loss(pair))
    costs = [_pair(pair, rise), *_quality(evaluation), *_unkept(bounds or Bounds())]
    mark = _worst(costs)
    place = "above" if rise >= 0 else "below"
    sentence = f"{HEADLINES[mark]}: the pair's perplexity is {abs(rise):.1%} {place} the dense model's."
    said = f"{sentence} {ADVICE}" if mark == "bad" else sentence
    return Verdict(mark, said, list(_saved(evaluation)), [*costs, *_folded(healing), *_undone(healing)])


def served_loss(pair: PairFigures) -> float:
    """The PD loss of the pair as it is served: where it has a token rule, by that."""
    return pair.distilled_loss if pair.kv_tokens is None else pair.kv_tokens.loss


def perplexity_rise(dense_loss: float, loss: float) -> float:
    """By which fraction perplexity is above the dense model's. Losses are in nats a token."""
    return math.expm1(min(loss - dense_loss, MOST_NATS))


def _worst(facts: Sequence[Fact]) -> Mark:
    marks = {fact.mark for fact in facts}
    return "bad" if "bad" in marks else "fair" if "fair" in marks else "good"


def _judged(rise: float) -> Mark:
    return "good" if rise <= LITTLE else "fair" if rise <= MUCH else "bad"


def _pair(pair: PairFigures, rise: float) -> Fact:
    beside = ["above dense"]
    if pair.kv_tokens is not None:
        beside.append(f"{increase(perplexity_rise(pair.dense_loss, pair.distilled_loss))} without the token rule")
    if pair.pruned_loss != pair.distilled_loss:
        beside.append(f"{increase(perplexity_rise(pair.dense_loss, pair.pruned_loss))} before healing")
    return Fact("perplexity as a pair", increase(rise), "; ".join(beside), _judged(rise))


def _quality(evaluation: EvaluationResult) -> Iterator[Fact]:
    """Of the half that reads prompts, or of the one checkpoint for both: decode is measured in the pair, as it runs."""
    dense = evaluation.models["dense"]
    for role in ("unified", "prefill"):
        if (model := evaluation.models.get(role)) is not None:
            error = model.perplexity.standard_error
            beside = "of one window" if error is None else f"± {error:.2f}"
            value = f"{model.perplexity.value:.2f}"
            yield Fact(f"perplexity, {role}", value, f"{beside}; dense {dense.perplexity.value:.2f}")
    for task, by_model in evaluation.tasks.items():
        # Where the pair was asked, decode alone is not what answers.
        for role in ["pair"] if "pair" in by_model else ["unified", "decode"]:
            for metric, measured in list(by_model.get(role, {}).items())[:1]:
                before = by_model["dense"][metric].value
                if measured.value is not None and before is not None:
                    yield Fact(f"{task} {metric}", f"{measured.value:.3f}", f"{role}; dense {before:.3f}")


def _unkept(bounds: Bounds) -> Iterator[Fact]:
    for half, bound in bounds.items():
        if bound is not None and not bound.met:
            beside = f"asked for {increase(bound.max_perplexity_increase)} at most, before healing"
            yield Fact(f"bound not kept, {half}", increase(bound.perplexity_increase), beside, "bad")


def _folded(healing: DistillationResult | None) -> Iterator[Fact]:
    for half, found in ({} if healing is None else healing.folds).items():
        if found.before is not None and found.after is not None:
            beside = "held-out loss, without training" + ("" if found.kept == "folded" else "; not kept")
            yield Fact(f"folds, {half}", f"{found.before:.4f} → {found.after:.4f}", beside)


def _undone(healing: DistillationResult | None) -> Iterator[Fact]:
    halves: Sequence[tuple[str, Healing | None]] = (
        () if healing is None else (("prefill", healing.prefill), ("decode", healing.decode))
    )
    for half, found in halves:
        if found is not None and found.kept == "undistilled":
            beside = f"held-out loss {found.before:.4f} → {found.after:.4f}: undistilled weights are kept"
            yield Fact(f"healing, {half}", "in vain", beside, "fair")


@dataclass(frozen=True)
class _Speed:
    name: str
    of: Callable[[ModelFigures], float | None]
    spread: Callable[[ModelFigures], Spread | None]


FIRST = _Speed("first token", lambda m: m.time_to_first_token_ms, lambda m: m.time_to_first_token_spread_ms)
NEXT = _Speed("next token", lambda m: m.inter_token_latency_ms, lambda m: m.inter_token_latency_spread_ms)
MATTERS: Mapping[str, Sequence[_Speed]] = {"unified": (FIRST, NEXT), "prefill": (FIRST,), "decode": (NEXT,)}
"""Which speed matters for each checkpoint: prefill is done when the first token can be said, decode says the others."""


def _saved(evaluation: EvaluationResult) -> Iterator[Fact]:
    dense, pair = evaluation.models["dense"], evaluation.pair
    roles = [role for role in MATTERS if role in evaluation.models]
    for role in roles:
        for speed in MATTERS[role]:
            found = _speed(role, speed, evaluation.models[role], dense)
            yield from [] if found is None else [found]
    kv = pair.kv_bytes_per_request
    sent = kv.sent if pair.kv_tokens is None else pair.kv_tokens.bytes_sent
    by_rule = "" if pair.kv_tokens is None else ", by the token rule"
    yield Fact("KV sent to decode", f"{sent / kv.dense_sent:.0%}", f"of {size(kv.dense_sent)} a request{by_rule}")
    for role in roles:
        model = evaluation.models[role]
        beside = f"of {size(dense.bytes)}; {model.blocks} of {dense.blocks} blocks"
        yield Fact(f"weights, {role}", f"{model.bytes / dense.bytes:.0%}", beside)


def _speed(role: str, speed: _Speed, model: ModelFigures, dense: ModelFigures) -> Fact | None:
    """None where either was too large to be timed."""
    time, dense_time = speed.of(model), speed.of(dense)
    if time is None or dense_time is None:
        return None
    faster = dense_time / time
    mine, theirs = speed.spread(model), speed.spread(dense)
    times = f"as fast as dense: {time:.1f} ms"
    mark: Mark | None = None
    if mine is not None and theirs is not None:
        if model.speed_repeats == 1:
            times += ", measured once"
        else:
            times += f" ({spread_text(mine)})"
            if mine.meets(theirs):
                times += f", dense {spread_text(theirs)}: no clear difference"
            else:
                mark = "good" if faster > 1 else "bad"
    return Fact(f"{speed.name}, {role}", f"{faster:.2f}×", times, mark)
