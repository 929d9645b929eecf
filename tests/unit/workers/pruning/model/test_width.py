from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Starcoder2Config,
)

from tests.unit.workers.pruning.models import (
    FAMILIES,
    TOLERANCE,
    loaded_whole,
    random_ids,
    reference_model,
    reference_windows,
    tiny_model,
)
from workers.pruning.model.blocks import UnsupportedArchitecture, block_stack, drop_blocks
from workers.pruning.model.checkpoint import BrokenCheckpoint, SourceTensors, write_checkpoint
from workers.pruning.model.measure import parameters, perplexity
from workers.pruning.model.streaming import load_streamed
from workers.pruning.model.width import (
    Channels,
    change_width,
    channel_scores,
    intermediate_size,
    kept_channels,
    narrow,
    narrow_tensors,
)

KEEP = 20
IDS = random_ids(2, 12)
ALL_BLOCKS = range(5)


def best_channels(model: PreTrainedModel, keep: int = KEEP) -> dict[int, tuple[int, ...]]:
    return kept_channels(channel_scores(block_stack(model), random_ids(4, 12), chunk_windows=3), keep)


def model_with_biases() -> PreTrainedModel:
    config = LlamaConfig(**tiny_model("llama").config.to_dict() | {"mlp_bias": True})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.float().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def exported(
    model: PreTrainedModel,
    folder: Path,
    kept: list[int],
    channels: Channels,
    overrides: dict[str, Tensor] | None = None,
) -> PreTrainedModel:
    """Written from disk to disk and loaded as any server would, but with nothing missing or left over."""
    model.save_pretrained(folder / "source")
    save_file(overrides or {}, folder / "trained.safetensors")
    write_checkpoint(
        folder / "source",
        folder / "target",
        kept=kept,
        overrides=SourceTensors.in_file(folder / "trained.safetensors"),
        pdtrim={},
        model_card="card",
        kept_channels=channels,
    )
    return loaded_whole(folder / "target")


def distance(one: PreTrainedModel, other: PreTrainedModel) -> float:
    with torch.no_grad():
        return float((one(input_ids=IDS).logits - other(input_ids=IDS).logits).abs().max())


@pytest.mark.parametrize("removed", [set(), {1, 4}], ids=["width alone", "width and blocks"])
@pytest.mark.parametrize("family", [*FAMILIES, "llama-biases"])
def test_the_checkpoint_computes_what_the_narrowed_model_computes(
    family: str, removed: set[int], tmp_path: Path
) -> None:
    model = model_with_biases() if family == "llama-biases" else tiny_model(family)
    channels = best_channels(model)
    expected = drop_blocks(narrow(model, channels), removed)
    result = exported(model, tmp_path, [block for block in ALL_BLOCKS if block not in removed], channels)
    assert distance(result, expected) <= TOLERANCE
    assert distance(result, drop_blocks(model, removed)) > 0.1
    assert result.config.intermediate_size == expected.config.intermediate_size == KEEP
    assert parameters(result) == parameters(expected)


def test_a_narrowed_model_computes_what_zeroed_channels_compute() -> None:
    model = model_with_biases()
    channels = best_channels(model)
    zeroed = copy.deepcopy(model)
    for block, kept in channels.items():
        gone = [channel for channel in range(48) if channel not in kept]
        zeroed.model.layers[block].mlp.down_proj.weight[:, gone] = 0
    assert distance(narrow(model, channels), zeroed) <= TOLERANCE


def test_narrowing_leaves_the_model_as_it_was_and_shares_the_rest() -> None:
    model = tiny_model("llama-tied")
    before = copy.deepcopy(model.state_dict())
    narrowed = narrow(model, best_channels(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.intermediate_size == 48
    assert narrowed.model.layers[2].self_attn.q_proj.weight is model.model.layers[2].self_attn.q_proj.weight
    assert narrowed.lm_head.weight is narrowed.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in narrowed.parameters())


def test_keeping_every_channel_changes_nothing() -> None:
    model = tiny_model("qwen3")
    assert distance(narrow(model, best_channels(model, 48)), model) == 0


def test_a_channel_scores_its_mean_magnitude_times_the_norm_of_what_it_writes_with() -> None:
    model = tiny_model("llama")
    windows = random_ids(3, 10)
    scores = channel_scores(block_stack(model), windows, chunk_windows=2)
    entering: list[Tensor] = []
    down = model.model.layers[3].mlp.down_proj
    down.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    model(input_ids=windows)
    expected = entering[0].abs().mean((0, 1)) * down.weight.pow(2).sum(0).sqrt()
    assert torch.allclose(scores[3].float(), expected, rtol=1e-5)


def test_channels_are_scored_alike_with_blocks_read_one_at_a_time(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    streamed, reader = load_streamed(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    expected = channel_scores(block_stack(model), IDS, chunk_windows=2)
    found = channel_scores(block_stack(streamed), IDS, chunk_windows=2)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert reader.blocks_read == 5


def test_tensors_change_their_width_as_the_model_does() -> None:
    model = model_with_biases()
    dense = dict(model.named_parameters())
    wide, slim = best_channels(model, 32), best_channels(model, 8)
    of_wide, of_slim = (dict(narrow(model, channels).named_parameters()) for channels in (wide, slim))
    for found, expected in (
        (narrow_tensors(dense, wide), of_wide),
        (narrow_tensors(dense, None), dense),
        (change_width(of_wide, wide, slim, dense), of_slim),
        (change_width(of_slim, slim, wide, dense), of_wide),
        (change_width(of_slim, slim, None, dense), dense),
        (change_width(dense, None, slim, dense), of_slim),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_what_was_trained_stays_when_the_width_changes() -> None:
    model = tiny_model("llama")
    dense, channels = dict(model.named_parameters()), best_channels(model, 8)
    name = "model.layers.1.mlp.down_proj.weight"
    trained = {name: torch.full((32, 8), 7.0)}
    full = change_width(trained, channels, None, dense)[name]
    others = [channel for channel in range(48) if channel not in channels[1]]
    assert torch.equal(full[:, list(channels[1])], trained[name])
    assert torch.equal(full[:, others], dense[name][:, others])


def test_the_best_channels_stay_in_order() -> None:
    scores = [torch.tensor([0.1, 3.0, 2.0, 2.0, 5.0]), torch.tensor([9.0, 1.0, 8.0, 1.0, 1.0])]
    assert kept_channels(scores, 3) == {0: (1, 2, 4), 1: (0, 1, 2)}


@pytest.mark.parametrize("keep", [0, -1, 6])
def test_keeping_no_channel_or_more_than_there_are_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {keep} of the 5 MLP channels of block 0"):
        kept_channels([torch.ones(5)], keep)


BAD_CHANNELS = [
    ({3: []}, "the MLP channels of block 3 are none"),
    ({3: [5, 4]}, r"block 3 are none, or not in ascending order: \[5, 4\]"),
    ({3: [4, 4]}, "not in ascending order"),
    ({3: [1, 48]}, "block 3 has MLP channels 0 to 47, not 1 to 48"),
    ({3: [-1, 4]}, "block 3 has MLP channels 0 to 47, not -1 to 4"),
    ({3: [1, 2, 3]}, "every block must keep as many MLP channels"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_CHANNELS)
def test_channels_that_do_not_fit_are_refused_in_memory_and_in_the_export(
    bad: dict[int, list[int]], reason: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    channels = {block: [0, 1] for block in ALL_BLOCKS} | bad
    with pytest.raises(ValueError, match=reason):
        narrow(model, channels)
    with pytest.raises(ValueError, match=reason):
        exported(model, tmp_path, [2, 3], channels)
    assert not (tmp_path / "target").exists()


def test_a_kept_block_without_channels_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no MLP channels are given for block 4"):
        narrow(model, {block: [0] for block in range(4)})
    with pytest.raises(ValueError, match="no MLP channels are given for block 3"):
        exported(model, tmp_path, [2, 3], {2: [0]})


def test_trained_tensors_are_as_narrow_as_the_model_they_were_trained_in(tmp_path: Path) -> None:
    model = tiny_model("llama")
    channels = best_channels(model)
    trained = narrow(model, channels)
    name = "model.layers.3.mlp.down_proj.weight"
    trained.model.layers[3].mlp.down_proj.weight.mul_(1.5)
    overrides = {name: dict(trained.named_parameters())[name].clone()}
    result = exported(model, tmp_path / "narrow", [0, 3], channels, overrides)
    assert distance(result, drop_blocks(trained, {1, 2, 4})) <= TOLERANCE
    wide = {name: model.model.layers[3].mlp.down_proj.weight.clone()}
    with pytest.raises(BrokenCheckpoint, match=r"has the shape \(32, 20\)"):
        exported(model, tmp_path / "wide", [0, 3], channels, wide)


SMALL = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("family", "found"),
    [(Phi3Config, "mlp.gate_up_proj.weight"), (Starcoder2Config, "mlp.c_fc.bias"), (MixtralConfig, "none")],
)
def test_the_export_refuses_a_family_whose_mlp_has_no_gate_up_and_down_projection(
    family: Callable[..., PretrainedConfig], found: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(family(**SMALL, intermediate_size=16, vocab_size=97, pad_token_id=0))
    with pytest.raises(UnsupportedArchitecture, match=rf"only MLPs of a gate, an up .* block 0 has .*{found}"):
        exported(model, tmp_path, [0], {0: [0, 1]})


def test_a_model_with_another_mlp_is_refused_in_memory() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    with pytest.raises(UnsupportedArchitecture, match=r"block 1 has \['mlp.0.bias', 'mlp.0.weight'"):
        channel_scores(block_stack(model), IDS, chunk_windows=2)
    with pytest.raises(UnsupportedArchitecture, match="block 1 has"):
        narrow(model, {block: [0] for block in ALL_BLOCKS})


def test_a_projection_that_is_no_linear_layer_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj = nn.Embedding(48, 32)
    with pytest.raises(UnsupportedArchitecture, match="gate_proj of block 1 is of the class Embedding"):
        narrow(model, {block: [0] for block in ALL_BLOCKS})


@pytest.mark.parametrize("config", [GPT2Config(), Gemma3nTextConfig()])
def test_a_configuration_without_one_width_is_refused(config: PretrainedConfig) -> None:
    with pytest.raises(
        UnsupportedArchitecture, match=rf"'{config.model_type}' has the intermediate_size (None|\[16384)"
    ):
        intermediate_size(config)


def test_activations_that_are_not_finite_are_named() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the MLP of block 2 gives activations that are not finite"):
        channel_scores(block_stack(model), IDS, chunk_windows=2)


def test_the_exported_configuration_differs_in_width_and_depth_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    exported(model, tmp_path, [0, 3], best_channels(model))
    source, target = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "target"))
    assert {key for key in target if target[key] != source.get(key)} == {"intermediate_size", "num_hidden_layers"}


def test_on_the_reference_model_the_best_channels_are_worth_more_than_the_worst() -> None:
    model = reference_model()
    windows = reference_windows("calibration", 4, 64)
    scores = channel_scores(block_stack(model), windows, chunk_windows=4)
    best, worst = kept_channels(scores, 384), kept_channels([-score for score in scores], 384)
    dense, kept, lost = (
        perplexity(candidate, reference_windows("validation", 4, 64), batch=4).value
        for candidate in (model, narrow(model, best), narrow(model, worst))
    )
    assert dense < kept < 0.5 * lost
