"""Which two engines are a pair, and what is said of others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pdtrim_vllm.half import Half
from pdtrim_vllm.identity import Identity, Runtime, why_no_pair

RUNTIME = Runtime("0.32.0", 14, "bfloat16", "auto", 8, 128, 16, "FLASH_ATTN", True, 30)
PREFILL = Identity(Half("prefill", "job_1", "hf://org/model", "abc", (0, 1, 2, 3, 5), (0, 1, 3)), RUNTIME)
DECODE = Identity(Half("decode", "job_1", "hf://org/model", "abc", (0, 1, 3), (0, 1, 3)), RUNTIME)


def of_half(identity: Identity, **changes: Any) -> Identity:
    return replace(identity, half=replace(identity.half, **changes))


def test_the_halves_of_one_job_are_a_pair_and_have_one_digest() -> None:
    assert why_no_pair(DECODE, PREFILL) is None
    assert DECODE.digest() == PREFILL.digest()


def test_a_unified_checkpoint_is_a_pair_with_itself_and_with_nothing_else() -> None:
    unified = of_half(DECODE, role="unified", kept_blocks=(0, 1, 3), kv_layer_map=(0, 1, 2))

    assert why_no_pair(unified, unified) is None
    assert "their roles are prefill and unified" in (why_no_pair(unified, PREFILL) or "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"job": "job_2"}, "job is job_2 in prefill, job_1 in decode"),
        ({"source": "hf://org/other"}, "source is hf://org/other in prefill"),
        ({"revision": "def"}, "revision is def in prefill, abc in decode"),
        ({"kv_layer_map": (0, 1, 4)}, r"kv_layer_map is [0, 1, 4] in prefill, [0, 1, 3] in decode"),
        ({"first_token": "prefill"}, "first_token is prefill in prefill, decode in decode"),
        ({"role": "decode"}, "their roles are decode and decode"),
    ],
)
def test_a_half_of_another_pair_is_refused_by_a_message_that_names_both(changes: dict[str, Any], said: str) -> None:
    other = of_half(PREFILL, **changes)
    reason = why_no_pair(DECODE, other) or ""

    assert said in reason
    assert f"Prefill serves {other}" in reason
    assert f"Decode serves {DECODE}" in reason


@pytest.mark.parametrize(
    "changes", [{"dtype": "float16"}, {"vllm": "0.32.1"}, {"block_size": 32}, {"kv_heads": 4}, {"attention": "OTHER"}]
)
def test_another_layout_of_the_cache_is_refused_and_changes_the_digest(changes: dict[str, Any]) -> None:
    other = replace(PREFILL, runtime=replace(RUNTIME, **changes))
    (name,) = changes

    assert f"{name} is {changes[name]} in prefill" in (why_no_pair(DECODE, other) or "")
    assert other.digest() != DECODE.digest()


def test_a_map_that_both_halves_were_given_and_that_leads_to_other_blocks_is_refused() -> None:
    reason = why_no_pair(of_half(DECODE, kv_layer_map=(0, 1, 4)), of_half(PREFILL, kv_layer_map=(0, 1, 4)))

    assert "the map leads decode's blocks [0, 1, 3] to prefill's [0, 1, 5]" in (reason or "")


def test_a_map_to_a_layer_that_prefill_does_not_have_is_refused() -> None:
    reason = why_no_pair(of_half(DECODE, kv_layer_map=(0, 1, 9)), of_half(PREFILL, kv_layer_map=(0, 1, 9)))

    assert "no layer 9" in (reason or "")


def test_an_identity_is_read_from_its_own_text_and_from_nothing_else() -> None:
    assert Identity.from_text(DECODE.to_text()) == DECODE
    with pytest.raises(ValueError, match="another protocol"):
        Identity.from_text('{"half": {"role": "decode"}}')
