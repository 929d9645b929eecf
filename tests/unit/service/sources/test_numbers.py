from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdtrim.contract.spec import MAX_BLOCKS
from service.sources import UnreadableSource, describe_model, fetch_model, models, reference_model
from service.sources.numbers import TensorBounds, check_numbers
from service.sources.safetensors_header import read_header
from tests.gateway import write_model
from tests.weights import safetensors_file

HELD = TensorBounds(blocks=6, largest=97)
FITTING: dict[str, Any] = {
    "num_hidden_layers": 6,
    "vocab_size": 97,
    "intermediate_size": None,
    "num_labels": 2,
    "rope_theta": 1_000_000,
    "rope_parameters": {"rope_theta": 500_000_000, "original_max_position_embeddings": 8192},
    "max_position_embeddings": 10_485_760,
    "sliding_window": 32768,
    "eos_token_id": [128001, 128009],
    "pad_token_id": -1,
    "max_window_layers": 28,
    "initializer_range": 0.02,
    "embedding_multiplier": 1e30,
    "tie_word_embeddings": True,
}


def test_a_configuration_that_fits_its_tensors_passes() -> None:
    check_numbers(FITTING, HELD, "config.json")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_hidden_layers": 7}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**10}, "num_hidden_layers"),
        ({"num_hidden_layers": 1e10}, "num_hidden_layers"),
        ({"n_layer": 10**10}, "n_layer"),
        ({"text_config": {"num_hidden_layers": 10**10}}, "num_hidden_layers"),
        ({"vocab_size": 98}, "vocab_size"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"intermediate_size": [48, 10**9]}, "intermediate_size"),
        ({"num_attention_heads": 10**8}, "num_attention_heads"),
        ({"num_experts": 10**8}, "num_experts"),
        ({"head_dim": 10**400}, "head_dim"),
        ({"num_labels": 10**8}, "num_labels"),
        ({"vision_config": [{"num_labels": 10**8}]}, "num_labels"),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings"),
        ({"decoder_layers": 10**8}, "decoder_layers"),
        ({"rope_theta": 10**400}, "rope_theta"),
    ],
)
def test_a_number_beyond_what_the_tensors_hold_is_refused_by_its_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(UnreadableSource, match=rf"config\.json has {key} = 1?\d") as refused:
        check_numbers({**FITTING, **change}, HELD, "config.json")

    assert len(refused.value.message) < 200


def test_blocks_are_counted_by_the_numbers_in_tensors_names() -> None:
    names = ["embed.weight", *(f"model.layers.{block}.mlp.experts.{n}.weight" for block in (0, 2, 7) for n in range(9))]

    assert TensorBounds.in_index(names, 10).blocks == 3
    assert TensorBounds.in_index(["h.0.a", "h.1.a", "h.1.b"], 10).blocks == 2


def test_the_reference_model_s_own_numbers_pass() -> None:
    path = reference_model() / "model.safetensors"
    with path.open("rb") as file:
        held = TensorBounds.in_headers(read_header(file, path.stat().st_size))

    check_numbers(json.loads((reference_model() / "config.json").read_text()), held, "config.json")
    assert held.blocks == 12


def refuse_both(model: Path, complaint: str) -> None:
    for refused in (describe_model, lambda source: fetch_model(source, None, Path("unused"))):
        with pytest.raises(UnreadableSource, match=complaint):
            refused(model.as_uri())


def test_gateway_and_worker_hold_a_model_s_configuration_against_its_headers(tmp_path: Path) -> None:
    refuse_both(
        write_model(tmp_path, num_hidden_layers=10**10), "has num_hidden_layers = 10000000000, but there are .* 6"
    )
    refuse_both(write_model(tmp_path, num_labels=10**8), "has num_labels = 100000000; .* 4 at most")


def test_where_headers_are_left_to_the_worker_an_index_or_the_most_blocks_that_a_job_can_name_bound_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "CHEAP_HEADER_BYTES", 10)
    model = write_model(tmp_path, num_hidden_layers=MAX_BLOCKS + 1)
    refuse_both(model, "has num_hidden_layers = 1025")
    with pytest.raises(UnreadableSource, match="there are tensors of 1024"):
        describe_model(model.as_uri())

    write_model(tmp_path, num_hidden_layers=3)
    (model / "model.safetensors").rename(model / "all.safetensors")
    (model / "all.safetensors").write_bytes(safetensors_file("layers.0.a", "layers.1.a"))
    index = {"weight_map": {"layers.0.a": "all.safetensors", "layers.1.a": "all.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnreadableSource, match="has num_hidden_layers = 3, but there are tensors of 2"):
        describe_model(model.as_uri())
