"""Vision-language models: their text decoder taken out, pruned, put back, held against hooks on the whole model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.tiny_whole_models import (
    BLOCKS,
    FAMILIES,
    decoder_blocks,
    logits,
    passing,
    question,
    reloaded_whole,
    whole_model,
)
from tests.unit.workers.pruning.models import TOLERANCE, loaded_whole
from workers.pruning.model.checkpoint import SourceTensors, write_checkpoint
from workers.pruning.model.composite import Composite
from workers.pruning.model.pair import handover
from workers.pruning.model.plan import BlockPlan, kv_layer_map


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_alone_says_what_the_whole_model_says_without_an_image(family: str, tmp_path: Path) -> None:
    whole = whole_model(family)
    whole.save_pretrained(tmp_path / "whole")
    composite = Composite.of(tmp_path / "whole")
    assert composite is not None
    composite.write_text(tmp_path / "text")

    ids = torch.randint(1, 80, (2, 12), generator=torch.Generator().manual_seed(2))
    alone = logits(loaded_whole(tmp_path / "text"), {"input_ids": ids})
    assert torch.allclose(alone, logits(whole, {"input_ids": ids}), atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_whole_model_says_of_an_image_what_the_dense_one_says_without_these_blocks(
    family: str, tmp_path: Path
) -> None:
    # What Qwen3-VL sees enters by the numbers of the first two.
    removed = [2, 4] if family == "qwen3_vl" else [0, 2, 4]
    whole = whole_model(family)
    whole.save_pretrained(tmp_path / "whole", max_shard_size="60KB")
    composite = Composite.of(tmp_path / "whole")
    assert composite is not None
    composite.write_text(tmp_path / "text")
    kept = [block for block in range(BLOCKS) if block not in removed]
    write_checkpoint(
        tmp_path / "text", tmp_path / "pruned", kept=kept, overrides=SourceTensors({}), pdtrim={"k": 1}, model_card="#"
    )
    composite.write_whole(tmp_path / "pruned", tmp_path / "target", kept)

    asked = question(family)
    blind = {**asked, "pixel_values": torch.zeros_like(asked["pixel_values"])}
    with passing(decoder_blocks(whole), removed):
        truth, unseen = logits(whole, asked), logits(whole, blind)
    assert (truth - unseen).abs().max() > 100 * TOLERANCE  # The image matters.
    assert torch.allclose(logits(reloaded_whole(tmp_path / "target"), asked), truth, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_the_decoder_is_as_it_was(family: str, tmp_path: Path) -> None:
    source, target = tmp_path / "whole", tmp_path / "target"
    whole_model(family).save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"size": 16}')
    (source / "tokenizer.json").write_text("{}")
    composite = Composite.of(source)
    assert composite is not None
    composite.write_text(tmp_path / "text")
    kept = [0, 1, 3]
    write_checkpoint(
        tmp_path / "text", tmp_path / "pruned", kept=kept, overrides=SourceTensors({}), pdtrim={"k": 1}, model_card="#"
    )
    composite.write_whole(tmp_path / "pruned", target, kept)

    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    others = before.keys() - composite.names.keys()
    assert others
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert {path.name for path in target.iterdir()} >= {
        "preprocessor_config.json", "tokenizer.json", "pdtrim.json", "README.md"
    }  # fmt: skip
    given, made = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
    text_before, text_after = given.pop("text_config"), made.pop("text_config")
    assert given == made
    changed = {key for key in text_before.keys() | text_after.keys() if text_before.get(key) != text_after.get(key)}
    assert changed <= {"num_hidden_layers", "layer_types", "max_window_layers", "moe_layers", "no_rope_layers"}
    assert text_after["num_hidden_layers"] == 3


def test_a_model_of_text_alone_is_no_composite(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert Composite.of(tmp_path) is None


@pytest.mark.parametrize(
    ("family", "named"),
    [
        (
            "gemma3",
            {
                "language_model.model.": "model.language_model.",
                "vision_tower.": "model.vision_tower.",
                "multi_modal_projector.": "model.multi_modal_projector.",
            },
        ),
        ("qwen2_5_vl", {"model.": "model.language_model.", "visual.": "model.visual."}),
        ("qwen2_5_vl", {}),
    ],
    ids=["gemma3", "qwen2_5_vl", "flat qwen2_5_vl"],
)
def test_a_decoder_is_found_whatever_the_names_of_its_tensors_begin_with(
    family: str, named: dict[str, str], tmp_path: Path
) -> None:
    """Published as first, and saved by versions of transformers between. Without `named`, as Qwen2.5-VL was."""
    whole = whole_model(family)
    whole.save_pretrained(tmp_path / "whole")
    weights = tmp_path / "whole" / "model.safetensors"
    save_file({_renamed(name, named): tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    if not named:
        given = json.loads((tmp_path / "whole" / "config.json").read_text())
        text = given.pop("text_config")
        (tmp_path / "whole" / "config.json").write_text(json.dumps(text | given))
    composite = Composite.of(tmp_path / "whole")
    assert composite is not None
    composite.write_text(tmp_path / "text")
    kept = [0, 2, 3]
    write_checkpoint(
        tmp_path / "text", tmp_path / "pruned", kept=kept, overrides=SourceTensors({}), pdtrim={}, model_card=""
    )
    composite.write_whole(tmp_path / "pruned", tmp_path / "target", kept)

    with passing(decoder_blocks(whole), [1, 4]):
        truth = logits(whole, question(family))
    assert torch.allclose(logits(reloaded_whole(tmp_path / "target"), question(family)), truth, atol=TOLERANCE)


def _renamed(name: str, named: dict[str, str]) -> str:
    for before, after in named.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


@pytest.mark.parametrize("family", ["gemma3", "smolvlm"])
def test_a_decode_half_goes_on_from_the_image_that_a_prefill_half_read(family: str, tmp_path: Path) -> None:
    whole = whole_model(family)
    whole.save_pretrained(tmp_path / "whole")
    composite = Composite.of(tmp_path / "whole")
    assert composite is not None
    composite.write_text(tmp_path / "text")
    plans = {"prefill": BlockPlan(BLOCKS, frozenset({1})), "decode": BlockPlan(BLOCKS, frozenset({1, 3}))}
    halves: dict[str, PreTrainedModel] = {}
    for half, plan in plans.items():
        pruned, target = tmp_path / f"{half}-text", tmp_path / half
        write_checkpoint(
            tmp_path / "text", pruned, kept=plan.kept, overrides=SourceTensors({}), pdtrim={}, model_card=""
        )
        composite.write_whole(pruned, target, plan.kept)
        halves[half] = reloaded_whole(target)

    def answered(prefill: PreTrainedModel, decode: PreTrainedModel, layer_map: Sequence[int], gone: bool) -> Tensor:
        cache, blocks = DynamicCache(config=prefill.config), decoder_blocks(whole)
        with passing(blocks, sorted(plans["prefill"].removed) if gone else []):
            prefill(**question(family), past_key_values=cache, use_cache=True)
        received = handover(cache, layer_map, decode.config.get_text_config())
        with passing(blocks, sorted(plans["decode"].removed) if gone else []):
            after: Tensor = decode(input_ids=torch.tensor([[5, 6]]), past_key_values=received, use_cache=True).logits
        return after

    with torch.no_grad():
        truth = answered(whole, whole, range(BLOCKS), gone=True)
        found = answered(halves["prefill"], halves["decode"], kv_layer_map(*plans.values()), gone=False)
        wrong = answered(halves["prefill"], halves["decode"], [0, 1, 2], gone=False)
    assert torch.allclose(found, truth, atol=TOLERANCE)
    assert not torch.allclose(wrong, truth, atol=100 * TOLERANCE)
