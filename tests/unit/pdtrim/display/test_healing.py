"""Healing's curves, and what events say in numbers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pdtrim.contract.jobs import Event, StageName
from pdtrim.contract.results import DistillationResult
from pdtrim.display.events import numbers
from pdtrim.display.healing import healing_curves, healing_line, healing_table


def told(**data: Any) -> Event:
    return Event(
        number=1, type="stage.progress", stage=StageName.DISTILLATION, message="Healing.", data=data,
        created_at=datetime(2026, 1, 5, tzinfo=UTC),
    )  # fmt: skip


def step(half: str, at: int, loss: float, held_out: float) -> Event:
    return told(half=half, step=at, steps=50, loss=loss, held_out=held_out, progress=0.5)


def test_a_curve_follows_the_steps_of_its_half_as_they_were_done_last() -> None:
    events = [
        told(progress=0.0),
        step("prefill", 1, 3.0, 2.5),
        step("prefill", 9, 2.9, 2.5),
        # A worker was lost, and the step done again.
        step("prefill", 9, 2.0, 2.5),
        step("prefill", 10, 1.9, 1.75),
        step("prefill", 11, 1.8, 1.75),
        step("decode", 1, 4.0, 4.0),
    ]
    (curve,) = healing_curves(events, None)
    assert curve.half == "prefill"
    assert curve.batches == [(1, 3.0), (9, 2.0), (10, 1.9), (11, 1.8)]
    # Where it changes, and its ends.
    assert curve.held_out == [(1, 2.5), (10, 1.75), (11, 1.75)]
    assert healing_line(curve) == "Step 11 of 50."
    assert healing_table(curve).rows[2] == ("10", "1.9000", "1.7500")


def test_a_curve_that_is_done_ends_with_what_is_kept() -> None:
    found = {"enabled": True, "prefill": {"before": 2.5, "after": 1.5, "steps": 20, "kept": "distilled"}}
    events = [step("prefill", 5, 3.0, 2.5), step("prefill", 10, 2.0, 2.0)]
    (curve,) = healing_curves(events, DistillationResult.model_validate(found))
    assert curve.held_out == [(0, 2.5), (10, 2.0), (20, 1.5)]
    assert healing_line(curve) == "Held-out loss 2.5000 → 1.5000 in 20 steps: distilled weights are kept."


def test_a_long_curve_has_a_short_table() -> None:
    (curve,) = healing_curves([step("decode", at, 1 / at, 1.0) for at in range(1, 300)], None)
    rows = healing_table(curve).rows
    assert len(rows) <= 20
    assert rows[-1][0] == "299"


def test_events_of_earlier_versions_make_no_curve() -> None:
    assert healing_curves([told(step=n, steps=9, loss=1.0) for n in range(9)], None) == []


def test_an_event_says_its_numbers_by_name() -> None:
    assert numbers(told(progress=0.25, half="decode", step=3, steps=12, loss=1.23456789, held_out=2.0)) == [
        ("done", "25%"),
        ("step", "3 of 12"),
        ("loss", "1.2346"),
        ("held out", "2"),
    ]
    assert numbers(told(attempt=2, worker="gpu-1", metrics={"a": 1})) == [("attempt", "2"), ("worker", "gpu-1")]
    assert numbers(told(removed=[2, 8])) == [("without", "2, 8")]


def test_a_curve_that_began_with_folds_says_what_these_brought() -> None:
    left_out = {"first": 0, "last": 1, "reason": "no block stands before it"}
    fold = {"before": 3.0, "after": 2.5, "kept": "folded", "left_out": [left_out]}
    healed = {"before": 2.5, "after": 1.5, "steps": 20, "kept": "distilled"}
    found = DistillationResult.model_validate({"enabled": True, "prefill": healed, "folds": {"prefill": fold}})
    (curve,) = healing_curves([step("prefill", 5, 3.0, 2.5), step("prefill", 10, 2.0, 2.0)], found)
    assert healing_line(curve) == (
        "Held-out loss 3.0000 → 2.5000 by folds alone: folded weights are kept. Nothing is folded for blocks 0 to 1: "
        "no block stands before it. Held-out loss 2.5000 → 1.5000 in 20 steps: distilled weights are kept."
    )
