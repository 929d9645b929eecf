"""What is read of a pdtrim.json, and what is wrong with one."""

from __future__ import annotations

from typing import Any

import pytest

from pdtrim_vllm.half import Half, NotAHalf

DECODE: dict[str, Any] = {
    "format_version": 1,
    "role": "decode",
    "source": {"uri": "hf://org/model", "revision": "abc"},
    "kept_blocks": [0, 1, 3],
    "kv_layer_map": [0, 1, 2],
    "job": "job_1",
}


def test_a_decode_half_is_read() -> None:
    half = Half.from_json(DECODE)

    assert half == Half("decode", "job_1", "hf://org/model", "abc", (0, 1, 3), (0, 1, 2), "decode", False)


def test_who_says_the_first_token_is_read_where_versions_put_it_and_is_decode_where_nothing_is_said() -> None:
    assert Half.from_json(DECODE).first_token == "decode"
    assert Half.from_json({**DECODE, "first_token": "prefill"}).first_token == "prefill"
    assert (
        Half.from_json({**DECODE, "first_token": "prefill", "serving": {"first_token": "decode"}}).first_token
        == "decode"
    )


def test_a_decode_half_may_go_on_from_layers_that_it_does_not_have_itself() -> None:
    assert Half.from_json({**DECODE, "kv_layer_map": [0, 1, 8]}).kv_layer_map == (0, 1, 8)


def test_what_blocks_give_up_is_read_by_layer() -> None:
    half = Half.from_json({**DECODE, "dead_units": {"3": "attention", "1": "mlp"}})

    assert half.dead == ((1, "mlp"), (2, "attention"))
    assert half.without_attention == {2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "its format_version is 2"),
        ({"role": "both"}, "its role is 'both'"),
        ({"serving": {"first_token": "router"}}, "its serving.first_token is 'router'"),
        ({"kv_layer_map": [0, 2, 1]}, "does not ascend"),
        ({"kv_layer_map": [0, 1]}, "is not one entry for each of 3 layers"),
        ({"dead_units": {"2": "mlp"}}, "dead_units name blocks that are none of its kept_blocks"),
        ({"dead_units": {"3": "norm"}}, "a part 'norm'"),
        ({"role": "prefill", "kv_layer_map": [0, 3]}, "names layer 3, and it has 3"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(NotAHalf, match=said):
        Half.from_json({**DECODE, **changes})


def test_a_missing_file_and_a_missing_entry_are_named() -> None:
    with pytest.raises(NotAHalf, match=r"there is no pdtrim\.json"):
        Half.from_json(None)
    with pytest.raises(NotAHalf, match="it has no 'job'"):
        Half.from_json({name: value for name, value in DECODE.items() if name != "job"})
