"""A safetensors file that is written one tensor after the other, so that memory never holds more than one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What the format calls a kind of number."""


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, read: Callable[[str], Tensor]
) -> None:
    """Write tensors of these names and shapes as `dtype`; `read` gives each of them, on any device and of any dtype.

    The format: 8 bytes with the length of a header, little end first; the header, JSON with each tensor's dtype, shape
    and place; the numbers. Raises: ValueError where `read` gives another shape; KeyError for other dtypes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, shape in shapes.items():
            tensor = read(name)
            if tensor.shape != torch.Size(shape):
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(shape)}")
            numbers = tensor.detach().to("cpu", dtype).contiguous().flatten()
            file.write(numbers.view(torch.uint8).numpy().data)
