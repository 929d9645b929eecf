"""How many windows a job's data are asked for."""

from __future__ import annotations

from typing import Any

import pytest

from pdtrim.contract.spec import JobSpec
from pdtrim.contract.windows import copying_windows


@pytest.mark.parametrize(
    ("calibration", "search", "windows"),
    [
        ({}, {}, 2),
        ({}, {"folded": True}, 8),
        ({"copying": 0.0}, {"folded": True}, 0),
        ({"copying": 1.0}, {}, 8),
    ],
)
def test_where_sets_are_compared_folded_every_prompt_is_said_again_unless_a_job_says_how_many(
    calibration: dict[str, Any], search: dict[str, Any], windows: int
) -> None:
    spec = JobSpec.model_validate(
        {
            "model": {"source": "file:///models/one"},
            "prefill": {"remove_blocks": 1},
            "decode": {"remove_blocks": 1},
            "calibration": {"windows": 8, **calibration},
            "search": search,
        }
    )
    assert copying_windows(spec) == windows
