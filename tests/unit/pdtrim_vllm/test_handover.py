"""Which requests decode answers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pdtrim_vllm.handover import Handover, digest, refusal

PROMPT = [5, 6, 7]
VOCABULARY = 12
HANDED = Handover(digest(PROMPT), 3, 11)
PARAMS: dict[str, Any] = {
    "do_remote_prefill": True,
    "remote_block_ids": [[1]],
    "remote_engine_id": "engine",
    "remote_request_id": "request",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "remote_num_tokens": 3,
    **HANDED.to_params(),
}


def test_a_prompt_that_prefill_has_read_is_answered() -> None:
    assert refusal(PARAMS, PROMPT, VOCABULARY) is None
    assert Handover.from_params(PARAMS) == HANDED


@pytest.mark.parametrize(
    ("params", "prompt", "said"),
    [
        (None, PROMPT, "reads no prompts"),
        ({**PARAMS, "do_remote_prefill": False}, PROMPT, "reads no prompts"),
        ({**PARAMS, "remote_block_ids": []}, PROMPT, "reads no prompts"),
        ({**PARAMS, "pdtrim": None}, PROMPT, "served with PDTrimConnector too"),
        ({**PARAMS, "pdtrim": {"prompt": "abc"}}, PROMPT, "served with PDTrimConnector too"),
        ({**PARAMS, "remote_request_id": None}, PROMPT, "reads no prompts"),
        ({**PARAMS, "pdtrim": {**PARAMS["pdtrim"], "tokens": "3"}}, PROMPT, "served with PDTrimConnector too"),
        ({**PARAMS, "pdtrim": {**PARAMS["pdtrim"], "first_token": 12}}, PROMPT, "token 12, and decode knows 12"),
        (PARAMS, [5, 6, 8], "another prompt"),
        (PARAMS, [5, 6, 7, 8], r"of 3 tokens.*of 4"),
        (PARAMS, None, "embeddings"),
        ({**PARAMS, "remote_num_tokens": 4}, PROMPT, "prefill holds 4 tokens of a prompt of 3"),
    ],
)
def test_other_requests_are_refused(params: dict[str, Any] | None, prompt: list[int] | None, said: str) -> None:
    reason = refusal(params, prompt, VOCABULARY)

    assert re.search(said, reason or "")


def test_the_digest_depends_on_order_and_length() -> None:
    assert len({digest(ids) for ids in ([1, 2], [2, 1], [1], [1, 2, 0], [])}) == 5
