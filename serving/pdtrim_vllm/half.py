"""What the pdtrim.json of a checkpoint says about the half that it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

ROLES = ("prefill", "decode", "unified")
FIRST_TOKENS = ("decode", "prefill")
PARTS = ("attention", "kv_only", "mlp")
"""What a kept block may give up: its attention; all but its keys and values; its MLP."""


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
    dead: tuple[tuple[int, str], ...] = ()
    """(layer, which of `PARTS` of it is given up), by layer."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> Half:
        """Raises: NotAHalf saying what is wrong."""
        if content is None:
            raise NotAHalf("there is no pdtrim.json beside the weights: this is no checkpoint of a PDTrim job")
        if content.get("format_version") != 1:
            raise NotAHalf(f"its format_version is {content.get('format_version')!r}; this plugin reads 1")
        try:
            layers = {block: layer for layer, block in enumerate(content["kept_blocks"])}
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
                dead=tuple(
                    sorted((layers.get(int(block), -1), part) for block, part in content.get("dead_units", {}).items())
                ),
            )
        except KeyError as missing:
            raise NotAHalf(f"it has no {missing}") from None
        if problem := half.contradiction():
            raise NotAHalf(problem)
        return half

    @property
    def without_attention(self) -> frozenset[int]:
        """Layers whose attention is given up, which need no KV cache."""
        return frozenset(layer for layer, part in self.dead if part == "attention")

    def contradiction(self) -> str | None:
        """What in it cannot be, or None."""
        layers, layer_map = len(self.kept_blocks), list(self.kv_layer_map)
        if self.role not in ROLES:
            return f"its role is {self.role!r}, none of {', '.join(ROLES)}"
        if self.first_token not in FIRST_TOKENS:
            return f"its serving.first_token is {self.first_token!r}, none of {', '.join(FIRST_TOKENS)}"
        if any(layer < 0 for layer, _ in self.dead):
            return f"its dead_units name blocks that are none of its kept_blocks {list(self.kept_blocks)}"
        if unknown := [part for _, part in self.dead if part not in PARTS]:
            return f"its dead_units name a part {unknown[0]!r}, none of {', '.join(PARTS)}"
        if any(after <= before for before, after in pairwise(layer_map)):
            return f"its kv_layer_map {layer_map} does not ascend"
        if self.role != "prefill" and len(layer_map) != layers:
            return f"its kv_layer_map {layer_map} is not one entry for each of {layers} layers"
        outside = [layer for layer in layer_map if not 0 <= layer < layers]
        if self.role != "decode" and outside:
            return f"its kv_layer_map names layer {outside[0]}, and it has {layers}"
        return None
