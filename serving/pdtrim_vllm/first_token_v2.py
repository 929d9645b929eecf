"""`first_token` for vLLM's V2 model runner, which is at work on GPUs and takes another kind of logits processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor, LogitsProcRequestState

from pdtrim_vllm.checkpoint import read_half
from pdtrim_vllm.handover import Handover
from pdtrim_vllm.sampling import check_params, handover

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


class FirstToken(LogitsProcessor):
    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        super().__init__(vllm_config, req_states)
        self.by_prefill = read_half(vllm_config).first_token == "prefill"
        self.forced: dict[int, Handover] = {}
        """Slot of a request → what was handed over for it."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises: ValueError, which the client sees, for a request that decode does not answer."""
        check_params(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Whether the request's logits are to be changed."""
        self.forced.pop(req_idx, None)
        handed = handover(sampling_params) if self.by_prefill else None
        if handed is None:
            return False
        self.forced[req_idx] = handed
        return True

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """`logits` (requests, vocabulary): without speculative decoding, which is refused, a request has one row."""
        for row, (slot, length) in enumerate(zip(ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np, strict=True)):
            handed = self.forced.get(int(slot))
            if handed is not None and length == handed.tokens:
                logits[row].fill_(-float("inf"))
                logits[row, handed.first_token] = 0.0
        return logits
