from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tests.unit.workers.pruning.models import (
    EXPERTS,
    FAMILIES,
    OTHERS,
    REFERENCE,
    TOLERANCE,
    continued,
    loaded_whole,
    random_ids,
    tiny_model,
)
from tests.weights import safetensors_file
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.model.checkpoint import BrokenCheckpoint, SourceTensors, write_checkpoint
from workers.pruning.repair.distill import load_tensors

NO_OVERRIDES = SourceTensors({})


def saved(family: str, folder: Path, *, shard_size: str = "1GB") -> tuple[PreTrainedModel, Path]:
    model = tiny_model(family)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model, folder


def write(source: Path, target: Path, kept: list[int], overrides: SourceTensors = NO_OVERRIDES, **options: Any) -> Path:
    write_checkpoint(source, target, kept=kept, overrides=overrides, pdtrim={"k": 1}, model_card="card", **options)
    return target


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS, *EXPERTS, "qwen3-tied"])
def test_the_checkpoint_computes_what_the_pruned_model_computes(family: str, shard_size: str, tmp_path: Path) -> None:
    model, source = saved(family, tmp_path / "source", shard_size=shard_size)
    target = write(source, tmp_path / "target", [0, 2, 3], max_shard_bytes=20_000)
    ids = random_ids(2, 12)
    result, expected = loaded_whole(target), drop_blocks(model, {1, 4})
    assert (result(input_ids=ids).logits - expected(input_ids=ids).logits).abs().max() <= TOLERANCE
    assert torch.equal(continued(result, ids, 8, use_cache=True), continued(expected, ids, 8, use_cache=False))
    assert len(list(target.glob("*.safetensors"))) > 1


def test_a_checkpoint_whose_names_lack_the_models_first_part_keeps_them_so(tmp_path: Path) -> None:
    model: Any = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "source")  # As gpt2 is published: `h.0.…`, not `transformer.h.0.…`.
    trained = {f"transformer.h.2.{name}": value + 1 for name, value in model.transformer.h[2].state_dict().items()}
    save_file(trained, tmp_path / "trained.safetensors")
    overrides = SourceTensors.in_file(tmp_path / "trained.safetensors")
    target = write(tmp_path / "source", tmp_path / "target", [0, 2, 3], overrides)
    model.load_state_dict(trained, strict=False)
    ids = random_ids(2, 12)
    expected = drop_blocks(model, {1, 4})(input_ids=ids).logits
    assert (loaded_whole(target)(input_ids=ids).logits - expected).abs().max() <= TOLERANCE
    assert "h.2.ln_1.weight" in SourceTensors.of(target).files


@pytest.mark.parametrize("family", EXPERTS)
def test_trained_experts_replace_those_of_the_source(family: str, tmp_path: Path) -> None:
    model, source = saved(family, tmp_path / "source")
    trained = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
        for name, tensor in model.state_dict().items()
        if name.startswith(("model.layers.0.", "model.layers.3."))
    }
    save_file(trained, tmp_path / "trained.safetensors")
    target = write(source, tmp_path / "target", [0, 1, 3], SourceTensors.in_file(tmp_path / "trained.safetensors"))
    model.load_state_dict(trained, strict=False)
    ids = random_ids(2, 12)
    expected = drop_blocks(model, {2, 4})(input_ids=ids).logits
    assert (loaded_whole(target)(input_ids=ids).logits - expected).abs().max() <= TOLERANCE


def test_everything_that_a_server_reads_is_there(tmp_path: Path) -> None:
    target = write(REFERENCE, tmp_path / "target", [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11])
    assert {path.name for path in target.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "pdtrim.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((target / "pdtrim.json").read_text()) == {"k": 1}
    # The head is tied to the embedding, so it is not stored a second time.
    assert "lm_head.weight" not in load_file(target / "model.safetensors")


def test_a_tied_head_that_the_source_stores_a_second_time_does_no_harm(tmp_path: Path) -> None:
    model, source = saved("llama-tied", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = loaded_whole(write(source, tmp_path / "target", [1, 2]))
    ids = random_ids(1, 8)
    assert result.lm_head.weight.data_ptr() == result.model.embed_tokens.weight.data_ptr()
    difference = result(input_ids=ids).logits - drop_blocks(model, {0, 3, 4})(input_ids=ids).logits
    assert difference.abs().max() <= TOLERANCE


def test_attention_types_that_the_source_leaves_to_the_layer_numbers_stay_with_their_blocks(tmp_path: Path) -> None:
    _, source = saved("qwen2-mixed", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["layer_types"]
    (source / "config.json").write_text(json.dumps(config | {"max_window_layers": 3}))
    model = loaded_whole(source)
    target = write(source, tmp_path / "target", [0, 2, 3])
    ids = random_ids(2, 12)
    expected = drop_blocks(model, {1, 4})(input_ids=ids).logits
    assert (loaded_whole(target)(input_ids=ids).logits - expected).abs().max() <= TOLERANCE
    layer_types = json.loads((target / "config.json").read_text())["layer_types"]
    assert layer_types == ["full_attention", "full_attention", "sliding_attention"]


def test_chat_templates_and_licences_come_along(tmp_path: Path) -> None:
    _, source = saved("llama", tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    names = {"chat_template.jinja", "additional_chat_templates/tools.jinja", "LICENSE.txt"}
    for name in names:
        (source / name).write_text(name)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    target = write(source, tmp_path / "target", [0])
    assert {name: (target / name).read_text() for name in names} == {name: name for name in names}
    assert not (target / "pytorch_model.bin").exists()


STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_bytes(field: str) -> int:
    """VmRSS, what the process holds, or VmHWM, the most it held since the peak was reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not RESET_PEAK.exists(), reason="peak memory is read from Linux's /proc")
def test_writing_holds_about_one_shard_in_memory(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=256,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "source")
    trained = {name: tensor for name, tensor in model.state_dict().items() if ".layers.4." in name or ".5." in name}
    save_file(trained, tmp_path / "trained.safetensors")
    shard = 6_000_000
    RESET_PEAK.write_text("5")
    before = memory_bytes("VmRSS")
    overrides = SourceTensors.in_file(tmp_path / "trained.safetensors")
    write(tmp_path / "source", tmp_path / "target", [0, 1, 2, 4, 5, 7], overrides, max_shard_bytes=shard)
    growth = memory_bytes("VmHWM") - before
    written = sum(path.stat().st_size for path in (tmp_path / "target").glob("*.safetensors"))
    assert growth < 3 * shard < written / 2  # the shard, its serialised copy, and what the allocator keeps


def test_no_shard_is_larger_than_allowed_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    _, source = saved("llama", tmp_path / "source")
    target = write(source, tmp_path / "target", [0, 1], max_shard_bytes=16_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in target.glob("*.safetensors")}
    assert {name: file for file, tensors in shards.items() for name in tensors} == index["weight_map"]
    assert all(sum(t.nbytes for t in tensors.values()) <= 16_000 or len(tensors) == 1 for tensors in shards.values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in shards.values() for t in tensors.values())


def test_trained_tensors_replace_those_of_the_same_original_block_in_the_stored_dtype(tmp_path: Path) -> None:
    trained = {"model.layers.3.mlp.up_proj.weight": torch.full((512, 192), 0.1)}
    save_file(trained, tmp_path / "trained.safetensors")
    overrides = SourceTensors.in_file(tmp_path / "trained.safetensors")
    target = write(REFERENCE, tmp_path / "target", [0, 3], overrides)
    stored = load_file(target / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, trained["model.layers.3.mlp.up_proj.weight"].bfloat16())
    expected = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    load_tensors(expected, {name: tensor.bfloat16() for name, tensor in trained.items()})
    ids = random_ids(1, 8)
    pruned = drop_blocks(expected.eval(), set(range(12)) - {0, 3})
    assert (loaded_whole(target)(input_ids=ids).logits - pruned(input_ids=ids).logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "shape", "error", "reason"),
    [
        ("model.layers.1.mlp.up_proj.weight", (512, 192), KeyError, "no kept tensor is called model.layers.1.mlp"),
        ("model.layers.3.mlp.up_proj.weight", (5, 5), BrokenCheckpoint, r"has the shape \(512, 192\) in the source"),
    ],
)
def test_a_trained_tensor_that_fits_nowhere_is_refused(
    name: str, shape: tuple[int, int], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    save_file({name: torch.zeros(shape)}, tmp_path / "trained.safetensors")
    with pytest.raises(error, match=reason):
        write(REFERENCE, tmp_path / "target", [0, 3], SourceTensors.in_file(tmp_path / "trained.safetensors"))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    _, source = saved("llama", tmp_path / "source")
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors is not a whole safetensors file"):
        write(source, tmp_path / "target", [0])


def test_a_truncated_shard_is_named_with_the_tensor_that_cannot_be_read(tmp_path: Path) -> None:
    _, source = saved("llama", tmp_path / "source", shard_size="20KB")
    name = "model.layers.0.mlp.up_proj.weight"
    file = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name]
    (source / file).write_bytes((source / file).read_bytes()[:-100])
    with pytest.raises(BrokenCheckpoint, match=rf"{file} is not a whole .* so the tensor {name} cannot be read"):
        SourceTensors.of(source).read(name)
    with pytest.raises(BrokenCheckpoint, match=rf"{file} is not a whole .* so the tensor "):
        write(source, tmp_path / "target", [0])


@pytest.mark.parametrize("missing", ["model.layers.3.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_model_that_lacks_a_tensor_is_refused_rather_than_filled_up_at_random(missing: str, tmp_path: Path) -> None:
    _, source = saved("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors[missing]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrokenCheckpoint, match=rf"model\.safetensors in .* lacks 1 of .*, first {missing}"):
        write(source, tmp_path / "target", [0, 3])


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": ["model.safetensors"]}'])
def test_a_damaged_index_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors\.index\.json maps no tensors to files"):
        SourceTensors.of(tmp_path)


def test_an_index_that_lies_is_caught(tmp_path: Path) -> None:
    _, source = saved("llama", tmp_path / "source", shard_size="20KB")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == first and ".layers.0." in name)
    for file, reason in (
        (last, f"does not hold the tensor {name}"),
        ("gone.safetensors", "names the shard gone.safetensors"),
        ("../secret.safetensors", "points outside its folder"),
    ):
        index["weight_map"][name] = file
        path.write_text(json.dumps(index))
        with pytest.raises(BrokenCheckpoint, match=reason):
            write(source, tmp_path / file.replace("/", "_"), [0])


def test_a_whole_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_file("a", "b"))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"c": "other.safetensors"}}')

    assert set(SourceTensors.of(tmp_path).files) == {"a", "b"}


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BrokenCheckpoint, match=r"pytorch_model\.bin are pickles"):
        write(tmp_path, tmp_path / "target", [0])
