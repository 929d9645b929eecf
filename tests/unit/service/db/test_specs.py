from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import Engine as Database

from pdtrim.contract.spec import JobSpec
from service.db import jobs, views
from service.db.session import transaction
from service.db.specs import spec_of
from tests.stored_jobs import store_job

SPEC = {"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}


def spec_of_search(search: dict[str, Any]) -> JobSpec:
    return JobSpec.model_validate(SPEC | {"search": {"protect": [3], "objective": "hidden"} | search})


def read(database: Database, stored: dict[str, Any]) -> JobSpec:
    """What is read of a job whose row has entries of `search` as an earlier version stored them."""
    with transaction(database) as session:
        row = store_job(session, spec_of_search({}))
        row.spec = row.spec | {"search": row.spec["search"] | stored}
        job_id = row.id
    with transaction(database) as session:
        row = jobs.get(session, job_id)
        assert stored.items() <= row.spec["search"].items()
        return views.job(row, jobs.stages(session, [job_id])[job_id]).spec


def test_a_stored_job_that_asked_for_lazy_greedy_is_read_as_one_of_greedy(database: Database) -> None:
    assert read(database, {"algorithm": "lazy_greedy"}) == spec_of_search({"algorithm": "greedy"})


def test_a_stored_job_that_let_other_workers_help_its_search_is_read_as_one_that_did_not(database: Database) -> None:
    assert read(database, {"parallelism": 4}) == spec_of_search({})


def test_a_stored_job_that_had_merges_fitted_is_read_without(database: Database) -> None:
    asked = JobSpec.model_validate(SPEC | {"distillation": {"heal_tokens": 5}})
    with transaction(database) as session:
        row = store_job(session, asked)
        row.spec = row.spec | {"distillation": row.spec["distillation"] | {"merge_tokens": 32_768}}
        job_id = row.id
    with transaction(database) as session:
        assert spec_of(jobs.get(session, job_id)) == asked


def test_a_stored_job_that_says_nothing_of_serving_had_prefill_say_the_first_token(database: Database) -> None:
    with transaction(database) as session:
        row = store_job(session, JobSpec.model_validate(SPEC))
        assert spec_of(row).serving.first_token == "decode"  # What a new job says, as it is stored.
        row.spec = {part: value for part, value in row.spec.items() if part != "serving"}
        assert spec_of(row).serving.first_token == "prefill"


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("search", "algorithm", "lazy_greedy"), ("search", "parallelism", 2), ("distillation", "merge_tokens", 4096)],
)
def test_what_is_offered_no_longer_cannot_be_asked_for(part: str, field: str, value: str | int) -> None:
    with pytest.raises(ValidationError, match=rf"{part}\.{field}"):
        JobSpec.model_validate(SPEC | {part: {field: value}})
