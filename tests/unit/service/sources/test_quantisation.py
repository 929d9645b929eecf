"""Models whose weights are quantised though their configuration does not say so."""

from __future__ import annotations

import pytest

from service.sources import UnreadableSource
from service.sources.quantisation import check_names, check_types
from service.sources.safetensors_header import TensorInfo

PLAIN = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.router.scale", "logit_scale", "layer_scale"]
PLAIN += ["model.layers.0.altup.correct_output_scale"]


def test_plain_weights_pass() -> None:
    check_names("m", ["config.json"], {"quantization_config": None}, PLAIN)
    check_types(
        "m", {"a.weight": TensorInfo("BF16", (2, 2), 0, 8), "h.0.attn.bias": TensorInfo("U8", (1, 1, 4, 4), 8, 24)}
    )


@pytest.mark.parametrize(
    "name",
    [
        *(
            "a.q_proj.weight_scale",
            "a.q_proj.weight_scale_inv",
            "a.q_proj.input_scale",
            "a.k_scale",
            "a.gate_up_proj_input_scale",
        ),
        *("a.q_proj.scales", "a.q_proj.qweight", "a.q_proj.weight_packed", "a.gate_up_proj_blocks", "a.SCB"),
    ],
)
def test_a_tensor_that_only_quantised_weights_have_is_named(name: str) -> None:
    with pytest.raises(UnreadableSource, match=f"{name}'.* quantised; give the model in bfloat16"):
        check_names("m", [], {}, [*PLAIN, name])


def test_files_and_keys_of_quantisers_are_named() -> None:
    with pytest.raises(UnreadableSource, match=r"hf_quant_config\.json: its weights are quantised"):
        check_names("m", ["config.json", "hf_quant_config.json"], {}, PLAIN)
    with pytest.raises(UnreadableSource, match="has a compression_config: the weights are quantised"):
        check_names("m", [], {"compression_config": {"format": "int"}}, PLAIN)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "F4"])
def test_a_matrix_in_few_bits_is_named(dtype: str) -> None:
    with pytest.raises(UnreadableSource, match=f"'a.weight' in {dtype}: its weights are quantised"):
        check_types("m", {"a.weight": TensorInfo(dtype, (2, 2), 0, 4)})
