"""Safetensors files made by hand, as small as a test needs them or as large."""

from __future__ import annotations

import json
import struct


def safetensors_file(*names: str, size: int = 4) -> bytes:
    """A file of tensors called `names`, each of `size` bytes that depend on its name."""
    header = {
        name: {"dtype": "U8", "shape": [size], "data_offsets": [place * size, (place + 1) * size]}
        for place, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    data = b"".join((name.encode() * size)[:size] for name in names)
    return struct.pack("<Q", len(text)) + text + data
