"""What the sampling parameters of a request at decode say, for both kinds of logits processors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdtrim_vllm.handover import Handover, refusal_of_params

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


def _handed(params: SamplingParams) -> dict[str, Any] | None:
    """`kv_transfer_params` of the request."""
    found: dict[str, Any] | None = (params.extra_args or {}).get("kv_transfer_params")
    return found


def check_params(params: SamplingParams) -> None:
    """Raises: ValueError saying why decode does not answer."""
    if reason := refusal_of_params(_handed(params)):
        raise ValueError(f"PDTrim: {reason}")
    if params.prompt_logprobs is not None:
        raise ValueError("PDTrim: prompt_logprobs would have decode compute the prompt: leave it out")
    if params.n > 1:
        raise ValueError("PDTrim: what prefill has read serves one answer: ask for one answer a request (n=1)")


def handover(params: SamplingParams) -> Handover | None:
    """What prefill found out about the request; None where its token would end an answer that is to be longer.

    Of such a request (`min_tokens`) prefill is not told, so decode says its first token.
    """
    handed = Handover.from_params(_handed(params))
    if handed is not None and params.min_tokens and handed.first_token in params.all_stop_token_ids:
        return None
    return handed
