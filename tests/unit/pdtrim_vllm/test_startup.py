"""How an engine may be started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pdtrim_vllm.half import Half
from pdtrim_vllm.startup import FIRST_TOKEN, Engine, NotServed, check

DECODE = Half("decode", "job_1", "hf://org/model", "abc", (0, 1, 3), (0, 1, 3))
ENGINE = Engine(
    vllm="0.32.0",
    kv_role="kv_consumer",
    layers=3,
    load_failures="fail",
    handshake_checked=True,
    windowed=False,
    shared_heads=False,
    speculative=False,
    adapters=False,
    bidirectional=False,
    pipeline=1,
    context=1,
    blocks=4 * 7 + 1,
    block_size=16,
    sequences=4,
    sequence_tokens=100,
    logits_processors=(),
)


def test_an_engine_with_room_for_all_that_it_announces_is_served() -> None:
    check(DECODE, ENGINE)
    check(replace(DECODE, first_token="prefill"), replace(ENGINE, logits_processors=FIRST_TOKEN[:1]))


def test_prefill_may_have_a_small_cache() -> None:
    check(replace(DECODE, role="prefill"), replace(ENGINE, kv_role="kv_producer", blocks=8))


def test_a_unified_checkpoint_is_served_on_either_side() -> None:
    for role in ("kv_producer", "kv_consumer"):
        check(replace(DECODE, role="unified"), replace(ENGINE, kv_role=role))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vllm": "0.33.0"}, r"vLLM 0\.33\.0, and this plugin is made for 0\.32\.x"),
        ({"vllm": "0.320.0"}, r"vLLM 0\.320\.0"),
        ({"kv_role": "kv_producer"}, "a decode checkpoint is served with kv_consumer"),
        ({"kv_role": "kv_both"}, "a decode checkpoint is served with kv_consumer"),
        ({"layers": 4}, r"the model has 4 layers.*names 3 blocks"),
        ({"load_failures": "recompute"}, "set it to fail"),
        ({"handshake_checked": False}, "enforce_handshake_compat is false"),
        ({"windowed": True}, "--disable-hybrid-kv-cache-manager"),
        ({"shared_heads": True}, "latent attention"),
        ({"speculative": True}, "speculative decoding"),
        ({"adapters": True}, "LoRA adapters"),
        ({"bidirectional": True}, "bidirectional_kv_xfer"),
        ({"pipeline": 2}, "the pipeline has 2 stages"),
        ({"context": 2}, "context parallelism"),
        ({"blocks": 28}, r"28 blocks of 16 tokens, and 4 sequences of 100 tokens need 29"),
    ],
)
def test_other_engines_are_refused_with_what_to_do(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(NotServed, match=said):
        check(DECODE, replace(ENGINE, **changes))


def test_decode_needs_the_logits_processor_where_prefill_says_the_first_token() -> None:
    with pytest.raises(NotServed, match=r"--logits-processors pdtrim_vllm\.first_token:FirstToken"):
        check(replace(DECODE, first_token="prefill"), ENGINE)


def test_all_that_stands_against_an_engine_is_said_at_once() -> None:
    with pytest.raises(NotServed, match=r"vLLM 0\.31.*speculative"):
        check(DECODE, replace(ENGINE, vllm="0.31.0", speculative=True))
