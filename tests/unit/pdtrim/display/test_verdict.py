"""What is said of a job first: what it saves, what it costs, and whether that is much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from pdtrim.contract.results import Bounds, DistillationResult
from pdtrim.display.verdict import Fact, Mark, Verdict, verdict
from tests.found import evaluation, model_figures, pair_figures, token_rule_figures


def timed(first: tuple[float, float, float], following: tuple[float, float, float], repeats: int = 5) -> dict[str, Any]:
    """Speeds as least, median and greatest, in milliseconds."""
    return {
        "speed_repeats": repeats,
        "time_to_first_token_ms": first[1],
        "time_to_first_token_spread_ms": {"low": first[0], "high": first[2]},
        "inter_token_latency_ms": following[1],
        "inter_token_latency_spread_ms": {"low": following[0], "high": following[2]},
    }


def of_pair(**changes: Any) -> Verdict:
    return verdict(evaluation(pair=pair_figures(**changes)))


def named(facts: Sequence[Fact], name: str) -> Fact:
    (found,) = [fact for fact in facts if fact.name == name]
    return found


@pytest.mark.parametrize(
    ("rise", "mark", "words"),
    [
        (-0.01, "good", "Little quality was lost: the pair's perplexity is 1.0% below"),
        (0.04, "good", "4.0% above"),
        (0.06, "fair", "Some quality was lost"),
        (0.25, "bad", "give up fewer blocks, or heal on more tokens"),
        (math.inf, "bad", "Much quality was lost"),
    ],
)
def test_the_pairs_perplexity_decides_whether_much_was_lost(rise: float, mark: Mark, words: str) -> None:
    lost = 1000.0 if rise == math.inf else 3.0 + math.log1p(rise)
    found = of_pair(distilled_loss=lost)
    assert (found.mark, named(found.costs, "perplexity as a pair").mark) == (mark, mark)
    assert words in found.sentence


def test_a_pair_with_a_token_rule_is_judged_by_what_it_saves_and_loses_with_it() -> None:
    rule = token_rule_figures(loss=3.0 + math.log1p(0.5), bytes_sent=1024)
    found = of_pair(distilled_loss=3.0, kv_tokens=rule)
    cost, saved = named(found.costs, "perplexity as a pair"), named(found.saved, "KV sent to decode")
    assert (cost.value, found.mark) == ("+50.0%", "bad")
    assert "+0.0% without the token rule" in cost.beside
    assert (saved.value, saved.beside) == ("25%", "of 4 KiB a request, by the token rule")


def test_each_half_is_led_by_the_speed_that_matters_for_it() -> None:
    fast = model_figures(**timed((9, 10, 11), (2.9, 3, 3.1)))
    dense = model_figures(**timed((29, 30, 31), (5.9, 6, 6.1)))
    pair = verdict(evaluation(models={"dense": dense, "prefill": fast, "decode": fast}))
    assert [fact.name for fact in pair.saved[:2]] == ["first token, prefill", "next token, decode"]
    assert [fact.value for fact in pair.saved[:2]] == ["3.00×", "2.00×"]
    assert [fact.mark for fact in pair.saved[:2]] == ["good", "good"]
    assert pair.saved[0].beside == "as fast as dense: 10.0 ms (9.0 to 11.0)"

    one = verdict(evaluation(models={"dense": dense, "unified": fast}))
    assert [fact.name for fact in one.saved[:2]] == ["first token, unified", "next token, unified"]


def test_a_speed_says_what_it_is_worth() -> None:
    dense = timed((29, 30, 31), (5.9, 6, 6.1))
    slower, within = timed((39, 40, 41), (5.9, 6, 6.1)), timed((28, 29, 30), (5.9, 6, 6.1))

    def first(figures: dict[str, Any], beside: dict[str, Any]) -> Fact:
        models = {"dense": model_figures(**beside), "unified": model_figures(**figures)}
        return verdict(evaluation(models=models)).saved[0]

    assert first(slower, dense).mark == "bad"
    assert first(within, dense).mark is None
    assert first(within, dense).beside.endswith("dense 29.0 to 31.0: no clear difference")
    once = first(slower | {"speed_repeats": 1}, dense | {"speed_repeats": 1})
    assert (once.mark, once.beside) == (None, "as fast as dense: 40.0 ms, measured once")
    assert first({}, {}).beside == "as fast as dense: 30.0 ms"


def test_a_bound_that_no_set_keeps_is_bad_whatever_healing_made_of_it() -> None:
    bound = {"max_perplexity_increase": 0.1, "perplexity_increase": 0.2, "met": False, "dense_perplexity": 20.0}
    bounds = Bounds.model_validate({"decode": bound | {"frontier": []}})
    found = verdict(evaluation(pair=pair_figures(distilled_loss=3.0)), bounds=bounds)
    assert found.mark == "bad"
    assert named(found.costs, "bound not kept, decode").value == "+20.0%"


def test_what_folds_brought_is_said() -> None:
    fold = {"before": 1.5, "after": 1.25, "kept": "folded"}
    kept, none = ({"enabled": True, "folds": {"prefill": one}} for one in (fold, {"kept": "unfolded"}))
    found = verdict(evaluation(), healing=DistillationResult.model_validate(kept))
    assert named(found.costs, "folds, prefill").value == "1.5000 → 1.2500"
    found = verdict(evaluation(), healing=DistillationResult.model_validate(none))
    assert "folds, prefill" not in [cost.name for cost in found.costs]


def test_healing_that_did_no_good_is_said() -> None:
    healing = {"enabled": True, "decode": {"before": 1.0, "after": 1.5, "steps": 8, "kept": "undistilled"}}
    found = verdict(evaluation(), healing=DistillationResult.model_validate(healing))
    assert "held-out loss 1.0000 → 1.5000" in named(found.costs, "healing, decode").beside


def test_a_task_is_led_by_what_answers_as_the_checkpoints_are_served() -> None:
    metric = {name: {"acc": {"value": value, "stderr": 0.01}} for name, value in (("dense", 0.75), ("decode", 0.5))}
    alone = verdict(evaluation(tasks={"sums": metric}))
    assert named(alone.costs, "sums acc").value == "0.500"
    pair = {"pair": {"acc": {"value": 0.625, "stderr": 0.01}}}
    served = named(verdict(evaluation(tasks={"sums": metric | pair})).costs, "sums acc")
    assert (served.value, served.beside) == ("0.625", "pair; dense 0.750")
