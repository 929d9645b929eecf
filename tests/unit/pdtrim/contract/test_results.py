"""Results of stages: written in one form, read in every form that was ever written."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from pdtrim.contract.frontier import Frontier
from pdtrim.contract.jobs import RESULTS, AnyStage, Job, ScoringStage, StageName
from pdtrim.contract.results import BlockScores, EvaluationResult, Plan, RemovalResult, ScoringResult, SearchRecord
from tests import found
from tests.earlier import EARLIER

STAGES: TypeAdapter[list[AnyStage]] = TypeAdapter(list[AnyStage])


def rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "status": "succeeded", "progress": 1.0, "attempt": 1, "metrics": recorded}
        for name, recorded in metrics.items()
    ]


@pytest.mark.parametrize("job", EARLIER)
def test_what_earlier_versions_recorded_is_read_whole(job: str) -> None:
    recorded = EARLIER[job]["metrics"]
    for stage in STAGES.validate_python(rows(recorded)):
        assert type(stage.metrics) is RESULTS[stage.name]
        # Merges were called pairs.
        expected = recorded[stage.name]
        if pairs := expected.get("merging"):
            expected = {**expected, "merging": {"weighed": True, "merges": pairs["pairs"]}}
        assert stage.metrics.model_dump(mode="json", exclude_unset=True) == expected


@pytest.mark.parametrize("job", EARLIER)
def test_what_earlier_versions_left_as_files_is_read(job: str) -> None:
    left = EARLIER[job]["artifacts"]
    plan = Plan.model_validate(left["plan.json"])
    assert Frontier.from_plan("job_1", plan).chosen.decode.removed == plan.decode.removed
    assert SearchRecord.model_validate(left["search.json"]).prefill[0].removed == []
    assert len(BlockScores.model_validate(left["scores.json"]).merge_errors) == 8


def test_a_search_of_a_version_that_measured_less_is_read_without_it() -> None:
    recorded = EARLIER["pair"]["metrics"]["removal"]
    losses = {**recorded["losses"], "controls": {"decode_set_in_both": 0.5, "decode_only": 0.25}}
    first = {"prefill": recorded["prefill"], "decode": recorded["decode"], "losses": losses}

    read = RemovalResult.model_validate(first)

    assert (read.sensitivity, read.bounds.prefill, read.losses.controls.non_nested) == (None, None, None)


def test_a_stage_that_has_found_nothing_yet_has_no_result() -> None:
    unfinished = rows({"removal": {}, "distillation": None})
    assert [stage.metrics for stage in STAGES.validate_python(unfinished)] == [None, None]


def test_fields_of_a_later_version_are_ignored() -> None:
    recorded = EARLIER["cut"]["metrics"]["scoring"]
    (stage,) = STAGES.validate_python(rows({"scoring": {**recorded, "entropy": [0.5]}}))
    assert isinstance(stage, ScoringStage)
    assert stage.metrics == ScoringResult.model_validate(recorded)


def test_a_result_that_cannot_be_read_is_left_out_and_the_job_is_still_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (stage,) = STAGES.validate_python(rows({"scoring": {"blocks": "many"}}))
    assert stage.metrics is None
    assert "what the stage scoring found cannot be read" in caplog.text


def test_a_job_gives_each_result_by_its_kind() -> None:
    job = Job.model_validate(
        {
            "id": "job_1",
            "status": "running",
            "spec": {"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}},
            "metadata": {},
            "stages": rows({StageName.SCORING: found.RESULTS[StageName.SCORING].model_dump(), "evaluation": {}}),
            "created_at": "2026-01-05T10:00:00Z",
        }
    )
    scored = job.result(ScoringResult)
    assert scored is not None
    assert scored.cosine == [0.5] * 6
    assert job.result(EvaluationResult) is None


def test_every_stage_has_a_kind_of_result() -> None:
    assert set(RESULTS) == set(StageName)


def test_keys_that_are_blocks_are_numbers_in_python_and_text_in_json() -> None:
    removal = found.removal()
    assert removal.decode.distilled == {3: 1}
    assert removal.model_dump(mode="json")["decode"]["distilled"] == {"3": 1}
    assert removal.decode.removed == [2, 3, 4]
