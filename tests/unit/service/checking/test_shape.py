"""What is counted on the headers of a model's files, beside the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.checking.shape import ModelShape, shape_of
from service.sources import ModelDescription
from service.sources.files import FolderFiles
from service.sources.names import LocalPath
from service.sources.weights import check_weights
from tests.unit.workers.pruning.models import EXPERTS, FAMILIES, OTHERS, tiny_model
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.measure import parameters
from workers.stages.healing_size import block_width


def described(folder: Path) -> ModelShape:
    tensors = check_weights(FolderFiles(LocalPath(folder), folder))
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    found = shape_of(ModelDescription(json.loads((folder / "config.json").read_text()), None, sizes, tensors))
    assert found is not None
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS, *EXPERTS])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_parameters_are_exactly_those_of_the_model(family: str, shard: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    found = described(tmp_path)
    stack = block_stack(model)
    of_blocks = [sum(p.numel() for p in block.parameters()) for block in stack.blocks]
    assert found.numbers == parameters(model)
    assert found.block == sum(of_blocks) // len(of_blocks)
    assert found.largest_block == max(of_blocks)
    experts = getattr(model.config, "num_experts_per_tok", None)
    widths = [block_width(block, experts) for block in stack.blocks]
    # Experts that files keep apart are two matrices less in memory.
    assert found.block_width == pytest.approx(sum(widths) / len(widths), rel=0.2 if family in EXPERTS else 0.0)
