"""Engines that are no halves of one pair are refused, at start where one engine can know, else at the first request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_tests.checkpoints import Pairs
from vllm_tests.running import BLOCKS, FIRST_TOKEN, START_SECONDS, ServedPair, Server, engine, hand_over, running

AT_START: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str]] = {
    "swapped roles": (
        "reference",
        "prefill",
        {},
        {"kv_role": "kv_consumer"},
        "a prefill checkpoint is served with kv_producer",
    ),
    "hybrid cache": ("gemma3", "prefill", {}, {"kv_role": "kv_producer"}, "--disable-hybrid-kv-cache-manager"),
    "small cache": (
        "reference",
        "decode",
        {},
        {"kv_role": "kv_consumer", "blocks": BLOCKS - 1},
        f"8 sequences of 512 tokens need {BLOCKS}",
    ),
    "no logits processor": (
        "reference",
        "decode",
        {"serving": {"first_token": "prefill"}},
        {"kv_role": "kv_consumer"},
        f"start decode with --logits-processors {FIRST_TOKEN}",
    ),
    "a map of another length": (
        "reference",
        "decode",
        {"kv_layer_map": [0, 1, 2]},
        {"kv_role": "kv_consumer"},
        "is not one entry for each of 8 layers",
    ),
    "computed when a load fails": (
        "reference",
        "decode",
        {},
        {"kv_role": "kv_consumer", "transfer": {"kv_load_failure_policy": "recompute"}},
        "kv_load_failure_policy is recompute",
    ),
}
"""Pair, half, entries of its pdtrim.json, how the engine is started, what it says."""


@pytest.mark.parametrize("case", AT_START)
def test_an_engine_that_would_answer_wrongly_does_not_start(case: str, pairs: Pairs, tmp_path: Path) -> None:
    name, half, changes, how, said = AT_START[case]
    server = engine(tmp_path, half, getattr(pairs.copy(name, tmp_path, **changes), half), **how)
    server.start()
    try:
        assert server.process is not None
        assert server.process.wait(START_SECONDS) != 0
    finally:
        server.kill()

    lines = [line for line in server.log.read_text().splitlines() if said in line]
    print(f"\n{case}: {lines[-1] if lines else server.log.read_text()[-3000:]}")
    assert lines


@pytest.fixture(scope="module")
def decode(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = engine(
        tmp_path_factory.mktemp("decode"), "decode", pairs.get("reference").decode, kv_role="kv_consumer", blocks=BLOCKS
    )
    with running(server):
        yield server


AT_HANDSHAKE: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "another pair": ("other", {}, {}, "job is job_other in prefill, job_reference in decode"),
    "an edited map": (
        "reference",
        {"kv_layer_map": [0, 1, 2, 3, 4, 5, 8, 9]},
        {},
        "kv_layer_map is [0, 1, 2, 3, 4, 5, 8, 9] in prefill, [0, 1, 2, 3, 4, 6, 8, 9] in decode",
    ),
    "another dtype": (
        "reference",
        {},
        {"options": ["--dtype", "bfloat16"]},
        "dtype is bfloat16 in prefill, float32 in decode",
    ),
    "no plugin in prefill": (
        "reference",
        {},
        {"transfer": {"kv_connector": "NixlConnector", "kv_connector_module_path": None}},
        "it has to be served with PDTrimConnector too",
    ),
}


@pytest.mark.parametrize("case", AT_HANDSHAKE)
def test_a_half_of_another_pair_is_refused(case: str, pairs: Pairs, decode: Server, tmp_path: Path) -> None:
    name, changes, how, said = AT_HANDSHAKE[case]
    checkpoints = pairs.copy(name, tmp_path, half="prefill", **changes)
    prefill = engine(tmp_path, "prefill", checkpoints.prefill, kv_role="kv_producer", **how)
    with running(prefill):
        answer = hand_over(ServedPair(prefill, decode, decode), checkpoints.cases[4].prompt, 4)

    lines = [line for line in decode.log.read_text().splitlines() if said in line]
    print(f"\n{case}: {answer.error}\n{lines[-1] if lines else decode.log.read_text()[-3000:]}")
    assert answer.error.startswith("HTTP")
    assert lines
    assert decode.healthy()
