from __future__ import annotations

import pytest
from pydantic import ValidationError
from sqlalchemy import Engine

from pdtrim.contract.spec import JobSpec
from service.db import jobs, views
from service.db.session import transaction
from service.db.specs import spec_of
from tests.stored_jobs import store_job

SPEC = {"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}


def test_a_stored_job_that_asked_for_lazy_greedy_is_read_as_one_of_greedy(engine: Engine) -> None:
    asked = JobSpec.model_validate(SPEC | {"search": {"protect": [3], "objective": "hidden"}})
    with transaction(engine) as session:
        row = store_job(session, asked)
        row.spec = row.spec | {"search": row.spec["search"] | {"algorithm": "lazy_greedy"}}
        job_id = row.id
    with transaction(engine) as session:
        row = jobs.get(session, job_id)
        read = views.job(row, jobs.stages(session, [job_id])[job_id]).spec
        assert row.spec["search"]["algorithm"] == "lazy_greedy"
    assert read == asked.model_copy(update={"search": asked.search.model_copy(update={"algorithm": "greedy"})})


def test_a_stored_job_that_had_merges_fitted_is_read_without(engine: Engine) -> None:
    asked = JobSpec.model_validate(SPEC | {"distillation": {"heal_tokens": 5}})
    with transaction(engine) as session:
        row = store_job(session, asked)
        row.spec = row.spec | {"distillation": row.spec["distillation"] | {"merge_tokens": 32_768}}
        job_id = row.id
    with transaction(engine) as session:
        assert spec_of(jobs.get(session, job_id)) == asked


def test_lazy_greedy_cannot_be_asked_for() -> None:
    with pytest.raises(ValidationError, match=r"search\.algorithm"):
        JobSpec.model_validate(SPEC | {"search": {"algorithm": "lazy_greedy"}})
