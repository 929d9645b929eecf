"""The first token of an answer as prefill said it: a logits processor of the decode engine.

Named to vLLM by `--logits-processors pdtrim_vllm.first_token:FirstToken`; where vLLM's V2 model runner is at work, by
`pdtrim_vllm.first_token_v2:FirstToken`. After a remote prefill vLLM computes the last prompt token again and samples
from decode. For pairs whose first token prefill says, this leaves nothing but that token to sample. It also tells
clients at once which requests decode does not answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from pdtrim_vllm.checkpoint import read_half
from pdtrim_vllm.sampling import check_params, handover


class FirstToken(AdapterLogitsProcessor):
    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self.by_prefill = read_half(vllm_config).first_token == "prefill"

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises: ValueError, which the client sees, for a request that decode does not answer."""
        check_params(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams):  # type: ignore[no-untyped-def]
        handed = handover(params) if self.by_prefill else None
        if handed is None:
            return None

        def force(prompt: Sequence[int], output: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
            """`logits` (vocabulary,) of a request with so much `output`."""
            if not output:
                logits.fill_(-torch.inf)
                logits[handed.first_token] = 0.0
            return logits

        return force
