"""What the pdtrim.json of a checkpoint says about the half that it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

ROLES = ("prefill", "decode", "unified")
FIRST_TOKENS = ("decode", "prefill")


class NotAHalf(ValueError):
    """A pdtrim.json that is missing, of another format, or that contradicts itself."""


@dataclass(frozen=True)
class Half:
    """One checkpoint of a pair, or a unified one."""

    role: str
    """One of `ROLES`."""
    job: str
    source: str
    """Where the dense model came from."""
    revision: str | None
    """Its commit on the hub."""
    kept_blocks: tuple[int, ...]
    """The dense model's block that each layer came from."""
    kv_layer_map: tuple[int, ...]
    """Layer of decode → layer of prefill."""
    first_token: str = "decode"
    """Which half says the token after the prompt: one of `FIRST_TOKENS`."""
    kv_tokens: bool = False
    """Whether the job chose prompt tokens that decode need not be sent. vLLM's decode is sent all."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> Half:
        """Raises: NotAHalf saying what is wrong."""
        if content is None:
            raise NotAHalf("there is no pdtrim.json beside the weights: this is no checkpoint of a PDTrim job")
        if content.get("format_version") != 1:
            raise NotAHalf(f"its format_version is {content.get('format_version')!r}; this plugin reads 1")
        try:
            half = cls(
                role=content["role"],
                job=content["job"],
                source=content["source"]["uri"],
                revision=content["source"]["revision"],
                kept_blocks=tuple(content["kept_blocks"]),
                kv_layer_map=tuple(content["kv_layer_map"]),
                # Jobs of version 0.1 knew one answer, which their files have at the top.
                first_token=content.get("serving", content).get("first_token", "decode"),
                kv_tokens="kv_tokens" in content,
            )
        except KeyError as missing:
            raise NotAHalf(f"it has no {missing}") from None
        if problem := half.contradiction():
            raise NotAHalf(problem)
        return half

    def contradiction(self) -> str | None:
        """What in it cannot be, or None."""
        layers, layer_map = len(self.kept_blocks), list(self.kv_layer_map)
        if self.role not in ROLES:
            return f"its role is {self.role!r}, none of {', '.join(ROLES)}"
        if self.first_token not in FIRST_TOKENS:
            return f"its serving.first_token is {self.first_token!r}, none of {', '.join(FIRST_TOKENS)}"
        if any(after <= before for before, after in pairwise(layer_map)):
            return f"its kv_layer_map {layer_map} does not ascend"
        if self.role != "prefill" and len(layer_map) != layers:
            return f"its kv_layer_map {layer_map} is not one entry for each of {layers} layers"
        outside = [layer for layer in layer_map if not 0 <= layer < layers]
        if self.role != "decode" and outside:
            return f"its kv_layer_map names layer {outside[0]}, and it has {layers}"
        return None
