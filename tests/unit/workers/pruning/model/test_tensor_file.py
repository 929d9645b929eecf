from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from workers.pruning.model.tensor_file import write_tensors

TENSORS = {"long": torch.randn(3, 5), "a.scalar": torch.randn(()), "none": torch.zeros(0, 4), "norm": torch.randn(7)}
SHAPES = {name: tensor.shape for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_written_tensor_by_tensor_is_read_by_the_library(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, SHAPES, dtype, TENSORS.__getitem__)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor.to(dtype))


def test_a_file_of_no_tensors_is_one_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "none.safetensors", {}, torch.bfloat16, TENSORS.__getitem__)
    assert load_file(tmp_path / "none.safetensors") == {}


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"norm has the shape \(7,\), not \(6,\)"):
        write_tensors(tmp_path / "file", {"norm": torch.Size([6])}, torch.float32, TENSORS.__getitem__)
