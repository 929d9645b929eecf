"""What the two engines of a pair tell each other before the first transfer, and whether they are a pair."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from pdtrim_vllm.half import Half

PROTOCOL = 2
"""Of what the halves tell each other: this page, and `handover`. Higher when an older plugin would misread it."""


@dataclass(frozen=True)
class Runtime:
    """How an engine lays out its KV cache, and by which programs."""

    vllm: str
    nixl_connector: int
    dtype: str
    cache_dtype: str
    kv_heads: int
    head_size: int
    block_size: int
    """Tokens."""
    attention: str
    """Name of the attention's implementation, which decides the layout of a block."""
    hybrid_cache: bool
    """Whether layers of different kinds have KV caches of different kinds."""
    lease_seconds: int
    """How long prefill keeps what decode has not read."""
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Identity:
    """One engine, as it tells the other."""

    half: Half
    runtime: Runtime

    def shared(self) -> dict[str, Any]:
        """What both engines of a pair have alike."""
        of_half = asdict(self.half)
        alike = {name: of_half[name] for name in ("job", "source", "revision", "kv_layer_map", "first_token")}
        return {**alike, "kv_layer_map": list(self.half.kv_layer_map), **asdict(self.runtime)}

    def digest(self) -> str:
        """SHA-256 of what is shared, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.shared(), sort_keys=True).encode()).hexdigest()

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Identity:
        """Raises: ValueError for anything but what `to_text` of this protocol wrote."""
        try:
            content = json.loads(text)
            half: dict[str, Any] = {name: _immutable(value) for name, value in content["half"].items()}
            return cls(Half(**half), Runtime(**content["runtime"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"it speaks another protocol than {PROTOCOL}: {error}") from error

    def __str__(self) -> str:
        half, runtime = self.half, self.runtime
        return (
            f"the {half.role} checkpoint of job {half.job} ({half.source}, revision {half.revision}), blocks "
            f"{list(half.kept_blocks)}, kv_layer_map {list(half.kv_layer_map)}, first token by {half.first_token}, "
            f"{runtime.dtype}, KV cache {runtime.cache_dtype}, vLLM {runtime.vllm}"
        )


def _immutable(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(_immutable(one) for one in value) if isinstance(value, list) else value


def why_no_pair(decode: Identity, prefill: Identity) -> str | None:
    """Why decode cannot go on from what prefill computes, naming both; None when it can."""
    reasons = []
    roles = (prefill.half.role, decode.half.role)
    if roles not in (("prefill", "decode"), ("unified", "unified")):
        reasons.append(f"their roles are {roles[0]} and {roles[1]}")
    here, there = decode.shared(), prefill.shared()
    reasons += [
        f"{name} is {there[name]} in prefill, {here[name]} in decode" for name in here if here[name] != there[name]
    ]
    if not reasons:
        layers = dict(enumerate(prefill.half.kept_blocks))
        mapped = [layers.get(layer, f"no layer {layer}") for layer in decode.half.kv_layer_map]
        if mapped != list(decode.half.kept_blocks):
            reasons.append(f"the map leads decode's blocks {list(decode.half.kept_blocks)} to prefill's {mapped}")
    if not reasons:
        return None
    return f"these engines are no pair: {'; '.join(reasons)}. Prefill serves {prefill}. Decode serves {decode}."
