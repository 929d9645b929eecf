"""The connector's part in vLLM's scheduler: which requests are pulled, refused, or made to wait.

On decode a request either goes on from what prefill computed, to its last token, or fails. It fails where vLLM would
compute the prompt with decode's layers: without a handover, after a preemption, with `prompt_logprobs`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import BlockIds
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from pdtrim_vllm.half import Half
from pdtrim_vllm.handover import Handover, digest, refusal

REMEMBERED_HANDOVERS = 100_000


@dataclass(frozen=True)
class Instructions:
    """What the scheduler tells the workers of one step, beside what NIXL's does."""

    refused: dict[str, str] = field(default_factory=dict)
    """Request → why it fails."""
    kept: list[tuple[int, int]] = field(default_factory=list)
    """(block, token in it) of prompt tokens that are computed again although their keys and values are there."""


class PairScheduler(NixlPullConnectorScheduler):
    def __init__(self, config: VllmConfig, engine_id: str, cache: KVCacheConfig, half: Half) -> None:
        super().__init__(config, engine_id, cache)
        assert config.kv_transfer_config is not None
        self.half = half
        self.decodes = config.kv_transfer_config.kv_role == "kv_consumer"
        self.sequences = config.scheduler_config.max_num_seqs
        self.vocabulary = config.model_config.get_vocab_size()
        self.refusals: dict[str, str] = {}
        """Requests that fail as soon as they are scheduled."""
        self.read: OrderedDict[tuple[str, str], None] = OrderedDict()
        """Handovers (engine, its request) that a request has taken."""
        self.loading: set[str] = set()
        """Requests whose blocks are being written."""
        self.holding: set[str] = set()
        """Requests that have blocks: running ones, loading ones, and those that ended while they loaded."""
        self.ended: set[str] = set()
        self.repeated: dict[str, int] = {}
        """Request → position of its last prompt token, which decode is about to compute again."""
        self.refused: dict[str, str] = {}
        """What the workers are told next."""

    def on_new_request(self, request: Request) -> None:
        params = request.kv_transfer_params
        if not self.decodes:
            if params and params.get("do_remote_prefill"):
                self._refuse(request, "this engine serves the prefill half of a pair: nothing can be handed over to it")
            if params and params.get("do_remote_decode") and request.sampling_params is not None:
                # Routers ask for one token and no fewer, which would forbid prefill to say that the answer ends here.
                request.sampling_params.min_tokens = 0
            super().on_new_request(request)
            return
        if reason := self._why_not(request):
            self._refuse(request, reason)
            return
        assert params is not None
        taken = (params["remote_engine_id"], params["remote_request_id"])
        if taken in self.read:
            self._refuse(
                request, "what prefill has read for it was handed over before: ask for one answer a request (n=1)"
            )
            return
        self.read[taken] = None
        if len(self.read) > REMEMBERED_HANDOVERS:
            self.read.popitem(last=False)
        self._hide_from_prefix_cache(request)
        super().on_new_request(request)

    def _why_not(self, request: Request) -> str | None:
        params = request.sampling_params
        if params is not None and params.prompt_logprobs is not None:
            return "prompt_logprobs would have decode compute the prompt: leave it out"
        return refusal(request.kv_transfer_params, request.prompt_token_ids, self.vocabulary)

    def _refuse(self, request: Request, reason: str) -> None:
        self.refusals[request.request_id] = reason
        # vLLM drops what a connector offers for such requests, and with it the refusal.
        request.skip_reading_prefix_cache = False
        if request.kv_transfer_params:
            # Prefill is not told that its blocks are free: another request may be about to read them.
            request.kv_transfer_params["do_remote_prefill"] = False
        self._hide_from_prefix_cache(request)

    def _hide_from_prefix_cache(self, request: Request) -> None:
        """Blocks that decode made for another request hold what decode computed of it, not what prefill did."""
        request.cache_salt = f"{request.cache_salt or ''} pdtrim {self.engine_id} {request.request_id}"
        request.block_hashes = []
        request.update_block_hashes()

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load, and whether while other requests run; None for a request that has to wait."""
        if not self.decodes and request.request_id not in self.refusals:
            matched: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
            return matched
        if request.num_preemptions and request.request_id not in self.refusals:
            self.refusals[request.request_id] = (
                "it had to give way to another one, and decode cannot compute its prompt: the KV cache is too small"
            )
        if request.request_id not in self.holding and len(self.holding) >= self.sequences:
            # With as many sequences as were announced the cache suffices, and none has to give way.
            return None, False
        if request.request_id in self.refusals:
            return request.num_tokens - num_computed_tokens, True
        if not (request.kv_transfer_params or {}).get("do_remote_prefill"):
            # It has been loaded. vLLM asks again where no token counts as computed: of a prompt of one token the last,
            # which decode runs itself, is the only one.
            return 0, False
        return request.num_prompt_tokens - num_computed_tokens, True

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        name = request.request_id
        if self.decodes and num_external_tokens:
            self.holding.add(name)
            self.loading.add(name)
        if reason := self.refusals.pop(name, None):
            self.refused[name] = reason
            return
        if self.decodes and num_external_tokens and self.half.first_token == "prefill":
            self.repeated[name] = request.num_prompt_tokens - 1
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        super().update_connector_output(connector_output)
        for name in connector_output.finished_recving or ():
            self.loading.discard(name)
            if name in self.ended:
                self.ended.discard(name)
                self.holding.discard(name)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        meta = super().build_connector_meta(scheduler_output)
        kept = []
        for new in scheduler_output.scheduled_new_reqs:
            if (position := self.repeated.pop(new.req_id, None)) is not None:
                (blocks,) = new.block_ids
                kept.append((blocks[position // self.block_size], position % self.block_size))
        meta.pdtrim = Instructions(self.refused, kept)
        self.refused = {}
        return meta

    def request_finished(self, request: Request, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        name = request.request_id
        self.repeated.pop(name, None)
        self.refusals.pop(name, None)
        if name in self.loading:
            self.ended.add(name)
        else:
            self.holding.discard(name)
        hold, params = super().request_finished(request, block_ids)
        if params and params.get("do_remote_prefill") and len(request.output_token_ids):
            prompt = request.prompt_token_ids or []
            handed = Handover(digest(prompt), len(prompt), request.output_token_ids[0])
            params |= handed.to_params()
            # The end of the lease, on the clock that the handshake compares with decode's.
            params["remote_blocks_expiry_time"] = self._reqs_need_send.get(name)
        return hold, params
