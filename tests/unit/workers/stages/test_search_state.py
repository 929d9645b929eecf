from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pdtrim.contract.spec import JobSpec
from service.storage import open_store
from workers.pruning.model.units import NOTHING, Units, blocks_of, deleting, kept_for_cache
from workers.pruning.search.engine import Objective, Walked, mean, unheard
from workers.stages import search_state
from workers.stages.context import StageContext
from workers.stages.search_state import STATE, VERSION, Phase, SearchState

SOME = deleting({1, 4})
PHASES = [
    Phase("kl"),
    Phase("cross_entropy"),
    Phase("kl", NOTHING),
    Phase("kl", SOME),
    Phase("kl", deleting({1})),
    Phase("kl", kept_for_cache({1, 4})),
    Phase("kl", None, SOME, "kv_only"),
    Phase("kl", SOME, None, "attention"),
    Phase("kl", folded=True),
    Phase("kl", SOME, folded=True),
]


class Counting:
    """An engine whose losses say what they are of, and which counts what it measures."""

    windows = 2

    def __init__(self) -> None:
        self.measured: list[tuple[Objective | None, Units]] = []

    def window_losses(
        self,
        candidates: Sequence[Units],
        windows: range,
        objective: Objective | None = None,
        *,
        walked: Walked = unheard,
    ) -> dict[Units, list[float]]:
        self.measured += [(objective, units) for units in candidates]
        return {units: [float(sum(blocks_of(units)) + window) for window in windows] for units in candidates}

    def losses(self, candidates: Sequence[Units], objective: Objective | None = None) -> dict[Units, float]:
        return mean(self.window_losses(candidates, range(self.windows), objective))

    def anchor(self, units: Units) -> None:
        """Nothing is held."""


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageContext:
    monkeypatch.setattr(search_state, "SAVE_INTERVAL_S", 0.0)
    return StageContext(
        job_id="job",
        spec=JobSpec.model_validate(
            {"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
        ),
        source_dir=tmp_path,
        model_revision=None,
        workdir=tmp_path / "work",
        inputs={},
        store=open_store((tmp_path / "store").as_uri()),
        state_prefix="state",
        rows=lambda: None,
        check=lambda: None,
        publish=lambda progress, message, figures: None,
    )


def test_every_phase_survives_json_and_no_two_are_taken_for_one() -> None:
    written = [json.dumps(phase.to_json()) for phase in PHASES]
    assert len(set(written)) == len(PHASES)
    assert [Phase.from_json(json.loads(content)) for content in written] == PHASES


def test_a_later_attempt_knows_the_losses_of_each_phase_and_measures_none_again(context: StageContext) -> None:
    sets = [SOME, deleting({0, 3})]
    first = SearchState(context)
    for phase in PHASES:
        first.memo(phase, Counting(), racing=False)(sets)
    later, engine = SearchState(context), Counting()
    for phase in PHASES:
        assert later.memo(phase, engine, racing=False)(sets) == {SOME: 5.5, deleting({0, 3}): 3.5}
    assert engine.measured == []
    assert later.memo(Phase("hidden"), engine, racing=False)(sets[:1]) == {SOME: 5.5}
    assert engine.measured == [("hidden", SOME)]


def test_the_time_of_a_search_is_that_of_all_attempts(context: StageContext) -> None:
    context.save_state(STATE, json.dumps({"version": VERSION, "phases": [], "seconds": {"prefill": 9.0}}).encode())
    state = SearchState(context)
    assert state.out_of_time("prefill", 9.0)()
    assert not state.out_of_time("decode", 9.0)()
    assert not state.out_of_time("prefill", None)()


def test_what_a_version_of_another_form_left_is_measured_again(context: StageContext) -> None:
    # Sets were numbers, and phases sentences.
    left = {"losses": {"prefill": [[[1], [0.5, 0.5]]], "decode after [1]": []}, "seconds": {"prefill": 9.0}}
    context.save_state(STATE, json.dumps(left).encode())
    engine = Counting()
    state = SearchState(context)
    assert state.memo(Phase("kl"), engine, racing=False)([deleting({1})]) == {deleting({1}): 1.5}
    assert engine.measured == [("kl", deleting({1}))]
    assert not state.out_of_time("prefill", 9.0)()
