"""Each checkpoint alone, in vLLM without the plugin, says what transformers says."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_tests.checkpoints import Pairs
from vllm_tests.running import complete, engine, running


@pytest.mark.parametrize(("pair", "role"), [("reference", "prefill"), ("reference", "decode"), ("unified", "unified")])
def test_a_checkpoint_alone_says_what_transformers_says(pair: str, role: str, pairs: Pairs, tmp_path: Path) -> None:
    checkpoints = pairs.get(pair)
    server = engine(tmp_path, role, checkpoints.prefill.parent / role)
    with running(server):
        answers = complete(server.url, [case.prompt for case in checkpoints.cases], 24, at_once=8)

    same = sum(answer.tokens == case.alone[role] for answer, case in zip(answers, checkpoints.cases, strict=True))
    print(f"\n{role} alone: {same} of {len(answers)} equal")
    assert same == len(answers)
