"""Whether a model's weights are quantised, though its `config.json` does not say so: by file names and tensors.

Whoever loads such a model as it is reads its small integers as weights and leaves out their scales.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from service.sources.errors import UnreadableSource
from service.sources.safetensors_header import TensorInfo

KEYS = ("quantization_config", "compression_config")
FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""What ModelOpt, AutoGPTQ and AutoAWQ write beside a configuration."""
SCALES = re.compile(
    r"(?:^|[._])weight_scale(?:_inv|_2)?$|(?:^|\.|_proj_)(?:input|output|activation|[kqv])_scale(?:_inv|_2)?$|_scale_inv$"
    r"|\.(?:scales|qweight|qzeros|weight_packed|absmax|SCB)$|_proj_(?:scales|blocks)$"
)
"""Names of tensors that only quantised weights have; Gemma 3n's `altup.correct_output_scale` is a weight of its own."""
SMALL_TYPES = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4")
REMEDY = "give the model in bfloat16, float16 or float32"


def check_names(what: object, files: Collection[str], config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Hold a model's files, configuration and tensors against the names of quantised ones. Raises: UnreadableSource."""
    if found := next((name for name in FILES if name in files), None):
        raise UnreadableSource(f"{what} has a {found}: its weights are quantised; {REMEDY}.")
    if found := next((key for key in KEYS if config.get(key) is not None), None):
        raise UnreadableSource(f"config.json of {what} has a {found}: the weights are quantised; {REMEDY}.")
    if scale := next((name for name in tensors if SCALES.search(name)), None):
        raise UnreadableSource(f"{what} has the tensor {scale[:80]!r}: its weights are quantised; {REMEDY}.")


def check_types(what: object, tensors: Mapping[str, TensorInfo]) -> None:
    """That no matrix is of a type of 8 bits or fewer; masks, which GPT-2 calls biases, may be.

    Raises: UnreadableSource.
    """
    for name, tensor in tensors.items():
        if tensor.dtype in SMALL_TYPES and len(tensor.shape) > 1 and not name.endswith(("bias", "mask")):
            raise UnreadableSource(
                f"{what} has the tensor {name[:80]!r} in {tensor.dtype}: its weights are quantised; {REMEDY}."
            )
