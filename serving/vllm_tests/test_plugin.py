"""With the plugin an engine leaves out what a block gives up, and answers as without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_tests.checkpoints import HERE, Pairs
from vllm_tests.offline import Offline
from vllm_tests.running import ENVIRONMENT, NO_PLUGIN, PLUGIN

KNOWN = ("parts", "qwen2_parts", "qwen3_parts", "gemma3_parts", "mistral_parts", "phi3_parts")
"""A pair of each family whose layers the plugin knows; Phi-3 has one projection of queries, keys and values."""
UNKNOWN = "olmo2_parts"
WHOLE = "reference"
"""Gives up whole blocks alone."""
CLASSES = {"mlp": "WithoutMlp", "attention": "WithoutAttention", "kv_only": "KeysAndValuesOnly"}
DEAD = {
    "mlp": ("mlp", "post_attention_layernorm"),
    "attention": ("self_attn", "input_layernorm"),
    "kv_only": ("mlp", "post_attention_layernorm", "self_attn.q_proj", "self_attn.o_proj"),
}
"""What is given up → modules of Llama's blocks that then do nothing."""
COMPILED = 1e-4
"""Keys and values that compiled kernels make may differ by less."""


def offline(folder: Path, plugins: dict[str, str], checkpoints: list[Path], *options: str) -> tuple[Offline, str]:
    """What engines of these checkpoints do, and what they log."""
    output = folder / "offline.pt"
    command = [sys.executable, HERE / "offline.py", *options, output, *checkpoints]
    environment = {**os.environ, **ENVIRONMENT, **plugins, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    found: Offline = torch.load(output)
    return found, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkpoints(pairs: Pairs) -> dict[str, tuple[Path, Path]]:
    return {name: pairs.get(name).both for name in (*KNOWN, UNKNOWN, WHOLE)}


@pytest.fixture(scope="module")
def stock(checkpoints: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Offline:
    folders = [folder for both in checkpoints.values() for folder in both]
    return offline(tmp_path_factory.mktemp("stock"), NO_PLUGIN, folders)[0]


@pytest.fixture(scope="module")
def skipping(
    checkpoints: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Offline, str]:
    assert [found.name for found in entry_points(group="vllm.general_plugins") if found.name == "pdtrim"], (
        "pdtrim-vllm is not installed in this environment as it is here: `make test-vllm` does it"
    )
    folders = [folder for both in checkpoints.values() for folder in both]
    return offline(tmp_path_factory.mktemp("skipping"), PLUGIN, folders)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("half", [0, 1], ids=["prefill", "decode"])
def test_what_is_given_up_is_not_computed_and_all_else_is_as_without_the_plugin(
    name: str, half: int, checkpoints: dict[str, tuple[Path, Path]], stock: Offline, skipping: tuple[Offline, str]
) -> None:
    folder = checkpoints[name][half]
    pdtrim = json.loads((folder / "pdtrim.json").read_text())
    dead = {pdtrim["kept_blocks"].index(int(block)): part for block, part in pdtrim["dead_units"].items()}
    with_plugin, without = skipping[0][str(folder)], stock[str(folder)]

    assert {number: kind for number, kind in enumerate(with_plugin["classes"]) if kind in CLASSES.values()} == {
        layer: CLASSES[part] for layer, part in dead.items()
    }
    assert with_plugin["tokens"] == without["tokens"]
    expected = json.loads((folder.parent / "expected.json").read_text())
    assert with_plugin["tokens"] == [case["alone"][folder.name] for case in expected]
    assert sorted(with_plugin["caches"]) == [
        layer for layer in range(len(pdtrim["kept_blocks"])) if dead.get(layer) != "attention"
    ]
    for layer, cache in with_plugin["caches"].items():
        assert cache.any(), layer
        assert torch.equal(cache, without["caches"][layer]), layer


def test_an_architecture_that_the_plugin_does_not_know_is_served_as_without_it_and_a_line_says_so(
    checkpoints: dict[str, tuple[Path, Path]], stock: Offline, skipping: tuple[Offline, str]
) -> None:
    for folder in map(str, checkpoints[UNKNOWN]):
        assert skipping[0][folder]["classes"] == stock[folder]["classes"]
        assert skipping[0][folder]["tokens"] == stock[folder]["tokens"]
    lines = [line for line in skipping[1].splitlines() if "PDTrim skips nothing" in line]
    assert len(lines) == 2
    assert all("Olmo2DecoderLayer" in line for line in lines)


def test_a_checkpoint_of_whole_blocks_is_served_as_without_the_plugin(
    checkpoints: dict[str, tuple[Path, Path]], stock: Offline, skipping: tuple[Offline, str]
) -> None:
    for folder in map(str, checkpoints[WHOLE]):
        assert skipping[0][folder]["classes"] == stock[folder]["classes"]
        assert skipping[0][folder]["tokens"] == stock[folder]["tokens"]
    assert skipping[1].count("PDTrim skips") == 2 * (len(KNOWN) + 1)


def without_dead_weights(folder: Path, target: Path) -> Path:
    """A checkpoint whose file has none of the weights that the plugin leaves out."""
    pdtrim = json.loads((folder / "pdtrim.json").read_text())
    dead = tuple(
        f"model.layers.{pdtrim['kept_blocks'].index(int(block))}.{module}."
        for block, part in pdtrim["dead_units"].items()
        for module in DEAD[part]
    )
    weights = load_file(folder / "model.safetensors")
    left = {name: tensor for name, tensor in weights.items() if not name.startswith(dead)}
    assert len(left) < len(weights)
    shutil.copytree(folder, target)
    save_file(left, target / "model.safetensors", {"format": "pt"})
    (target.parent / "expected.json").symlink_to(folder.parent / "expected.json")
    return target


def test_weights_that_are_left_out_need_not_be_in_the_checkpoint(
    checkpoints: dict[str, tuple[Path, Path]], stock: Offline, tmp_path: Path
) -> None:
    folders = [without_dead_weights(folder, tmp_path / folder.name / "half") for folder in checkpoints["parts"]]
    found = offline(tmp_path, PLUGIN, folders)[0]

    for folder, whole in zip(folders, checkpoints["parts"], strict=True):
        assert found[str(folder)]["tokens"] == stock[str(whole)]["tokens"]


def test_a_compiled_model_writes_the_caches_that_nothing_in_it_reads(
    checkpoints: dict[str, tuple[Path, Path]], stock: Offline, tmp_path: Path
) -> None:
    folder = checkpoints["parts"][0]
    afresh = {"VLLM_CACHE_ROOT": str(tmp_path / "compiled")}
    found = offline(tmp_path, PLUGIN | afresh, [folder], "--compiled")[0][str(folder)]

    assert found["tokens"] == stock[str(folder)]["tokens"]
    for layer, cache in found["caches"].items():
        torch.testing.assert_close(cache, stock[str(folder)]["caches"][layer], rtol=0, atol=COMPILED)
