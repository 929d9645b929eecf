"""What is said of, and becomes of, the parts of a checkpoint that guess tokens ahead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.workers.pruning.models import loaded_whole, random_ids, tiny_model
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.model.checkpoint import SourceTensors, write_checkpoint
from workers.pruning.model.speculation import left_behind

KEPT = [0, 2, 4]


def source(folder: Path, extra: list[str], **config: Any) -> Path:
    """A Llama of five blocks with more tensors, and more in its configuration."""
    tiny_model("llama").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | {name: torch.ones(2) for name in extra}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    given = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(given))
    return folder


def notes(folder: Path) -> list[str]:
    return left_behind(folder, SourceTensors.of(folder).files)


@pytest.mark.parametrize(
    ("extra", "config"),
    [
        (["model.layers.5.eh_proj.weight"], {"num_nextn_predict_layers": 1}),  # DeepSeek, GLM
        (["mtp.fc.weight", "mtp.layers.0.input_layernorm.weight"], {}),  # Qwen3-Next
        (["model.mtp_layers.0.input_proj.weight"], {"num_mtp_layers": 1}),  # MiMo
        (["model.mtp_block.0.mlp.up_proj.weight", "model.mtp_emb_norm.0.weight"], {"num_nextn_predict_layers": 1}),
    ],
)
def test_layers_that_predict_further_tokens_are_left_out_and_that_is_said(
    extra: list[str], config: dict[str, Any], tmp_path: Path
) -> None:
    folder = source(tmp_path / "source", extra, **config)
    target = tmp_path / "target"
    write_checkpoint(folder, target, kept=KEPT, overrides=SourceTensors({}), pdtrim={}, model_card="")

    assert not SourceTensors.of(target).files.keys() & set(extra)
    left = json.loads((target / "config.json").read_text())
    assert all(left[key] == 0 for key in config)
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = drop_blocks(tiny_model("llama"), {1, 3})(input_ids=ids).logits
        assert torch.equal(loaded_whole(target)(input_ids=ids).logits, expected)
    (note,) = notes(folder)
    assert "predicting further tokens (MTP) are left out" in note


def test_a_head_that_drafts_tokens_is_warned_of_by_the_signs_of_it(tmp_path: Path) -> None:
    folder = source(tmp_path / "source", [], eagle_aux_hidden_state_layer_ids=[1, 3])
    (folder / "eagle_config.json").write_text("{}")
    (note,) = notes(folder)
    assert "(eagle_aux_hidden_state_layer_ids in config.json, eagle_config.json)" in note
    assert "it does not fit the pruned model" in note


def test_of_a_model_with_neither_nothing_is_said(tmp_path: Path) -> None:
    assert notes(source(tmp_path / "source", [], num_nextn_predict_layers=0, medusa_heads=None)) == []
