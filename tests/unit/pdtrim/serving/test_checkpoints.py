from __future__ import annotations

import json
from typing import Any

import pytest

from pdtrim.serving.checkpoints import NotServable, Sizes, default_sizes, paired, read_checkpoint
from tests.served import config_json, pair, pdtrim_json


def test_a_checkpoint_says_what_an_engine_has_to_be_told() -> None:
    found = read_checkpoint(pdtrim_json("decode"), config_json("decode"), bytes_=7)
    assert (found.role, found.layers, found.context_tokens, found.bytes) == ("decode", 8, 1024, 7)
    assert found.kv_bytes_per_token("auto") == 8 * 2 * 2 * 32 * 2
    assert found.kv_bytes_per_token("float32") == 2 * found.kv_bytes_per_token("auto")
    assert pair().name == "Qwen3-8B-pruned"


@pytest.mark.parametrize(
    ("config", "windowed"),
    [
        ({}, False),
        ({"sliding_window": 4096}, True),  # Mistral
        ({"sliding_window": 4096, "use_sliding_window": False}, False),  # Qwen2
        ({"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]}, True),  # Gemma 3
        ({"sliding_window": 512, "layer_types": ["full_attention", "full_attention"]}, False),
    ],
)
def test_sliding_windows_are_seen_however_they_are_configured(config: dict[str, Any], windowed: bool) -> None:
    assert pair(**config).windowed is windowed


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (("decode", {}), ("prefill", {}), "swapped"),
        (("prefill", {}), ("prefill", {}), "no pair"),
        (("prefill", {}), ("unified", {}), "no pair"),
        (("prefill", {"job": "job_1"}), ("decode", {}), "different jobs, job_1 and job_0198"),
        (("prefill", {}), ("decode", {"kv_layer_map": [0, 1, 2, 3, 4, 5, 6, 7]}), "different KV layer maps"),
        (("prefill", {"serving": {"first_token": "prefill"}}), ("decode", {}), "different first tokens"),
    ],
)
def test_what_is_no_pair_is_refused(first: Any, second: Any, reason: str) -> None:
    halves = [read_checkpoint(pdtrim_json(role, **changes), config_json(role)) for role, changes in (first, second)]
    with pytest.raises(NotServable, match=reason):
        paired(*halves)


@pytest.mark.parametrize(
    ("entries", "first_token"),
    [
        ({}, "decode"),
        ({"first_token": "prefill"}, "prefill"),  # As version 0.1 wrote it.
        ({"serving": {"first_token": "prefill"}}, "prefill"),
        ({"serving": {"first_token": "decode"}, "first_token": "prefill"}, "decode"),
    ],
)
def test_who_says_the_first_token_is_read_from_old_files_too(entries: dict[str, Any], first_token: str) -> None:
    made = {name: part for name, part in json.loads(pdtrim_json("decode")).items() if name != "serving"}
    found = read_checkpoint(json.dumps(made | entries), config_json("decode"))
    assert found.first_token == first_token


def test_a_map_that_does_not_fit_the_layers_is_refused() -> None:
    edited = [0, 2, 3, 4, 5, 6, 8, 10]
    halves = [
        read_checkpoint(pdtrim_json(role, kv_layer_map=edited), config_json(role)) for role in ("prefill", "decode")
    ]
    with pytest.raises(NotServable, match="does not fit 10 layers of prefill"):
        paired(*halves)


@pytest.mark.parametrize("text", ["", "[]", '{"job": 1}', '{"role": "both"}'])
def test_a_foreign_file_is_named(text: str) -> None:
    with pytest.raises(NotServable, match=r"^pdtrim\.json: "):
        read_checkpoint(text, config_json("decode"))


def test_the_cache_holds_every_sequence_at_full_length_in_whole_blocks() -> None:
    sizes = Sizes(sequences=3, tokens=65, block=32)
    assert sizes.blocks == 3 * 3 + 1
    decode = pair().decode
    assert sizes.kv_cache_bytes(decode, "auto") == 10 * 32 * decode.kv_bytes_per_token("auto")


def test_sizes_follow_from_the_model_and_never_exceed_it() -> None:
    assert default_sizes(pair()) == Sizes(8, 1024)
    assert default_sizes(pair(max_position_embeddings=131072)).tokens == 8192
    assert default_sizes(pair(max_position_embeddings=131072), tokens=100_000, sequences=2) == Sizes(2, 100_000)
    with pytest.raises(NotServable, match="at most 1024 tokens, not 1025"):
        default_sizes(pair(), tokens=1025)


def test_of_a_model_that_sees_the_text_decoder_is_what_counts() -> None:
    text = json.loads(config_json("decode"))
    whole = json.dumps({"model_type": "mistral3", "dtype": text.pop("dtype", "bfloat16"), "text_config": text})
    found, alone = (read_checkpoint(pdtrim_json("decode"), config) for config in (whole, config_json("decode")))
    assert (found.layers, found.kv_numbers, found.context_tokens) == (
        alone.layers,
        alone.kv_numbers,
        alone.context_tokens,
    )
