"""What prefill tells decode about a request, in `kv_transfer_params`, and which requests decode does not answer."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

KEY = "pdtrim"
"""Under this name it travels in `kv_transfer_params`, beside what NIXL needs."""

FROM_NIXL = ("remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host", "remote_port")
"""What NIXL's connector hands over, without which decode cannot read."""


@dataclass(frozen=True)
class Handover:
    """What prefill found out."""

    prompt: str
    """Digest of the prompt's tokens, see `digest`."""
    tokens: int
    """How many they are."""
    first_token: int
    """The token that prefill sampled after them."""

    def to_params(self) -> dict[str, Any]:
        return {KEY: asdict(self)}

    @classmethod
    def from_params(cls, params: Mapping[str, Any] | None) -> Handover | None:
        """None when nothing of the kind was handed over."""
        match (params or {}).get(KEY):
            case {"prompt": str(prompt), "tokens": int(tokens), "first_token": int(first_token)}:
                return cls(prompt, tokens, first_token)
        return None


def digest(tokens: Sequence[int]) -> str:
    """SHA-256 of token ids, in hexadecimal."""
    return hashlib.sha256(array("q", tokens).tobytes()).hexdigest()


def refusal_of_params(params: Mapping[str, Any] | None) -> str | None:
    """Why decode does not answer a request with these `kv_transfer_params`; None when it may."""
    if not params or not params.get("do_remote_prefill") or any(not params.get(name) for name in FROM_NIXL):
        return (
            "this engine serves the decode half of a pair and reads no prompts: send requests to the router, which has "
            "prefill read the prompt first"
        )
    if Handover.from_params(params) is None:
        return "the prefill engine said nothing of the prompt: it has to be served with PDTrimConnector too"
    return None


def refusal(params: Mapping[str, Any] | None, prompt: Sequence[int] | None, vocabulary: int) -> str | None:
    """Why decode, which knows so many tokens, does not answer `prompt` from what was handed over; None when it does."""
    if reason := refusal_of_params(params):
        return reason
    handed = Handover.from_params(params)
    if params is None or handed is None or prompt is None:
        return "a prompt of embeddings cannot be compared with what prefill has read"
    if (handed.tokens, handed.prompt) != (len(prompt), digest(prompt)):
        return (
            f"prefill has read another prompt (of {handed.tokens} tokens) than decode was given (of {len(prompt)}): "
            "one request has one prompt, send a list as several requests"
        )
    if not 0 <= handed.first_token < vocabulary:
        return f"prefill went on with token {handed.first_token}, and decode knows {vocabulary}"
    if params.get("remote_num_tokens") != len(prompt):
        return f"prefill holds {params.get('remote_num_tokens')} tokens of a prompt of {len(prompt)}"
    return None
