from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from workers.pruning.repair.training import (
    Journal,
    NonFiniteTraining,
    TrainingResult,
    TrainingSettings,
    batch_indices,
    learning_rate,
    train,
)

SETTINGS = TrainingSettings(steps=20, batch_windows=2, learning_rate=0.05, seed=1)
HASTY = TrainingSettings(steps=60, batch_windows=2, learning_rate=0.9, seed=1)
"""Improves for a few steps, then oscillates."""


class Regression:
    """Fit w to make windows @ w equal their sum; small enough to know the optimum."""

    def __init__(self) -> None:
        self.windows = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(torch.zeros(3))

    def loss(self, windows: Tensor) -> Tensor:
        return (windows @ self.weight - windows.sum(1)).pow(2).mean()

    def held_out(self) -> float:
        return float(self.loss(self.windows).detach())

    def run(self, journal: Journal, settings: TrainingSettings = SETTINGS) -> TrainingResult:
        return train({"w": self.weight}, self.loss, self.held_out, self.windows, settings, journal)


def test_training_lowers_the_held_out_loss_and_says_by_how_much() -> None:
    problem = Regression()
    before = problem.held_out()
    result = problem.run(Journal())
    assert result == TrainingResult(before, problem.held_out(), 20)
    assert result.after < 0.5 * result.before


def test_a_run_that_only_does_harm_leaves_the_weights_as_they_were() -> None:
    problem = Regression()
    with torch.no_grad():
        problem.weight.fill_(1.0)
    result = problem.run(Journal(), TrainingSettings(steps=3, batch_windows=2, learning_rate=1.0, seed=0))
    assert result.after == result.before
    assert torch.equal(problem.weight, torch.ones(3))


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, parts=2), replace(HASTY, patience=2)])
@pytest.mark.parametrize("kept_step", [1, 5, 9, -1])
def test_a_resumed_run_ends_bit_equal_to_an_unbroken_one(kept_step: int, settings: TrainingSettings) -> None:
    states: list[dict[str, Tensor]] = []
    unbroken = Regression()
    keep = Journal(save=lambda last, state: states.append({k: v.clone() for k, v in state().items()}))
    expected = unbroken.run(keep, settings)
    resumed = Regression()
    assert resumed.run(Journal(resume=states[kept_step if kept_step < 0 else kept_step - 1]), settings) == expected
    assert torch.equal(resumed.weight, unbroken.weight)


def test_what_the_loss_does_not_depend_on_stays_as_it_is_through_an_interruption() -> None:
    idle, saved = nn.Parameter(torch.ones(2)), dict[str, Tensor]()

    def keep(last: bool, state: Callable[[], dict[str, Tensor]]) -> None:
        saved.update(state())

    for journal in (Journal(save=keep), Journal(resume=saved)):
        problem = Regression()
        parameters = {"w": problem.weight, "idle": idle}
        train(parameters, problem.loss, problem.held_out, problem.windows, SETTINGS, journal)
        assert torch.equal(idle, torch.ones(2))
    assert "weight.idle" in saved


def test_training_stops_when_the_held_out_loss_has_not_fallen_for_long_and_leaves_the_best_weights() -> None:
    problem, losses = Regression(), iter([5.0, 4.0, 6.0, 3.0, 3.0, 7.0, 1.0])  # before, then one a check
    best: list[Tensor] = []

    told: list[float] = []

    def note(step: int, steps: int, loss: float, held_out: float) -> None:
        told.append(held_out)
        if step == 6:
            best.append(problem.weight.detach().clone())

    settings = replace(SETTINGS, patience=2)  # 20 steps with a check every second one
    announced: list[bool] = []
    journal = Journal(progress=note, save=lambda last, state: announced.append(last))
    result = train({"w": problem.weight}, problem.loss, lambda: next(losses), problem.windows, settings, journal)
    assert result == TrainingResult(before=5.0, after=3.0, steps=10)
    assert torch.equal(problem.weight, best[0])
    assert announced == [False] * 9 + [True]
    # The least so far, from the loss before training on.
    assert told == [5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("parts", [2, 3, 6, 100])
def test_a_batch_in_parts_trains_as_the_whole_batch_does(parts: int) -> None:
    whole, in_parts = Regression(), Regression()
    settings = TrainingSettings(steps=20, batch_windows=6, learning_rate=0.05, seed=1)
    losses: dict[int, list[float]] = {1: [], parts: []}
    for problem, count in ((whole, 1), (in_parts, parts)):
        progress = partial(lambda kept, step, steps, loss, held_out: kept.append(loss), losses[count])
        problem.run(Journal(progress=progress), replace(settings, parts=count))
    torch.testing.assert_close(in_parts.weight, whole.weight, rtol=1e-6, atol=1e-6)
    assert losses[parts] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)


def test_the_last_state_is_announced_as_the_last() -> None:
    announced: list[bool] = []
    Regression().run(Journal(save=lambda last, state: announced.append(last)))
    assert announced == [False] * 19 + [True]


def test_reporting_may_stop_the_run() -> None:
    def stop(step: int, steps: int, loss: float, held_out: float) -> None:
        if step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Regression().run(Journal(progress=stop))


def test_a_loss_that_is_not_finite_names_the_step() -> None:
    problem = Regression()
    problem.windows[:] = torch.inf
    with pytest.raises(NonFiniteTraining, match="at step 0"):
        problem.run(Journal())


def test_every_epoch_uses_every_full_batch_once_in_a_new_order() -> None:
    first, second = ([batch_indices(epoch * 3 + step, 6, SETTINGS) for step in range(3)] for epoch in range(2))
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist()) == list(range(6))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()


def test_the_learning_rate_rises_to_the_peak_and_falls_to_its_floor() -> None:
    rates = [learning_rate(step, TrainingSettings(100, 1, 1.0, 0)) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)
