"""The connector's part in vLLM's workers: the handshake, the transfer, and the block that decode would overwrite."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import zmq
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    GET_META_MSG,
    NixlAgentMetadata,
    NixlConnectorMetadata,
    NixlHandshakePayload,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.utils import zmq_ctx
from vllm.logger import init_logger
from vllm.utils.network_utils import make_zmq_path
from vllm.v1.kv_cache_interface import KVCacheConfig

from pdtrim_vllm.engines import identify
from pdtrim_vllm.half import Half
from pdtrim_vllm.identity import Identity, why_no_pair
from pdtrim_vllm.lease import Leases
from pdtrim_vllm.regions import UnmappedRegions, check_regions, sources
from pdtrim_vllm.scheduler import Instructions

# vLLM shows what loggers below its own say.
logger = init_logger("vllm.pdtrim")
ANSWER_MILLISECONDS = 30_000
"""For which decode waits for an answer from prefill, which computes its first batch meanwhile."""
PER_REGION = (
    "kv_caches_base_addr",
    "block_lens",
    "block_strides",
    "region_num_blocks",
    "region_group_ids",
    "region_mem_types",
    "region_members",
)
"""Fields of NIXL's description of an engine that have an entry for each region."""


class NoPair(RuntimeError):
    """The other engine does not serve the other half."""


@dataclass
class PairPayload(NixlHandshakePayload):
    """What an engine is told that asks for the other: NIXL's own, and who it is."""

    pdtrim: str = ""
    """`Identity.to_text`; empty from an engine without this plugin."""


class PairWorker(NixlPullConnectorWorker):
    xfer_handshake_metadata: NixlHandshakePayload

    def __init__(self, config: VllmConfig, engine_id: str, cache: KVCacheConfig, half: Half) -> None:
        super().__init__(config, engine_id, cache)
        assert config.kv_transfer_config is not None
        self.half = half
        self.decodes = config.kv_transfer_config.kv_role == "kv_consumer"
        self.leases = Leases(self._lease_extension)
        self.refused: set[str] = set()
        self.held: list[tuple[torch.Tensor, int, torch.Tensor]] = []
        """(a layer's cache, block, what it held before the step)."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        check_regions(self.region_names, len(self.half.kept_blocks), self.half.without_attention)
        blocks = self.kv_cache_config.num_blocks * self._physical_blocks_per_logical_kv_block
        if any(len(cache) != blocks for cache in kv_caches.values()):
            raise UnmappedRegions(f"the KV cache of a layer is not {blocks} blocks after one another")
        self.identity = identify(self.vllm_config, self.half, self.backend_name)
        self.compat_hash = self.identity.digest()
        self.xfer_handshake_metadata = PairPayload(
            compatibility_hash=self.compat_hash,
            agent_metadata_bytes=self.xfer_handshake_metadata.agent_metadata_bytes,
            pdtrim=self.identity.to_text(),
        )
        logger.info("PDTrim serves %s", self.identity)

    def _nixl_handshake(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        """NIXL's handshake, once the other engine has said who it is. Raises: NoPair."""
        told = self._ask(host, port)
        if not told:
            raise NoPair(f"the engine at {host}:{port} serves its model without PDTrimConnector")
        if reason := why_no_pair(self.identity, Identity.from_text(told)):
            logger.error("PDTrim: %s", reason)
            raise NoPair(reason)
        return super()._nixl_handshake(host, port, *args, **kwargs)

    @staticmethod
    def _ask(host: str, port: int) -> str:
        """The identity of the engine at an address, empty when it tells none."""
        with zmq_ctx(zmq.REQ, make_zmq_path("tcp", host, port)) as socket:
            socket.setsockopt(zmq.RCVTIMEO, ANSWER_MILLISECONDS)
            socket.send(msgspec.msgpack.encode((GET_META_MSG, 0, 0)))
            payload = socket.recv_multipart()[0]
        told: PairPayload = msgspec.msgpack.Decoder(PairPayload).decode(payload)
        return told.pdtrim

    def add_remote_agent(self, nixl_agent_meta: NixlAgentMetadata, *args: Any, **kwargs: Any) -> str:
        """Give decode's layers the regions that the map names; NIXL's own checks then see those."""
        assert nixl_agent_meta.region_names is not None
        picked = sources(self.region_names, nixl_agent_meta.region_names, self.half.kv_layer_map)
        for name in PER_REGION:
            if entries := getattr(nixl_agent_meta, name):
                setattr(nixl_agent_meta, name, [entries[region] for region in picked])
        nixl_agent_meta.region_names = list(self.region_names)
        logger.info("PDTrim: KV cache k of decode goes on from KV cache %s[k] of prefill", picked)
        agent: str = super().add_remote_agent(nixl_agent_meta, *args, **kwargs)
        return agent

    def start_load_kv(self, metadata: NixlConnectorMetadata) -> None:
        instructions: Instructions = metadata.pdtrim
        for request, reason in instructions.refused.items():
            logger.error("PDTrim refuses request %s: %s", request, reason)
            self.refused.add(request)
        super().start_load_kv(metadata)

    def _send_heartbeats(self, metadata: NixlConnectorMetadata) -> None:
        reachable = {engine for engine in metadata.heartbeat_by_engine if engine in self._remote_agents}
        super()._send_heartbeats(metadata)
        now = time.perf_counter()
        for engine in reachable:
            for request in metadata.heartbeat_by_engine[engine].req_ids:
                self.leases.beat(request, now)

    def get_transfer_results(self) -> KVConnectorTransferResults:
        """What has arrived. It has failed, too, when prefill may have reused the blocks before all of it was read."""
        reading = dict(self._recving_metadata)
        results = super().get_transfer_results()
        now = time.perf_counter()
        for request in results.finished_recving - results.failed_recving:
            remote = reading[request].remote
            assert remote is not None
            end = remote.blocks_expiry_time
            offset = self._engine_clock_offset.get(remote.engine_id)
            if end is None or offset is None or not self.leases.held(remote.request_id, end - offset, now):
                logger.error("PDTrim fails request %s: prefill kept its KV cache for too short a time", request)
                results.failed_recving.add(request)
        self.leases.forget(now - 10 * self.leases.extension)
        results.finished_recving.update(self.refused)
        results.failed_recving.update(self.refused)
        self.refused = set()
        return results

    def hold(self, instructions: Instructions) -> None:
        """Before a step: keep what decode is about to overwrite with keys and values of its own."""
        ratio = self._physical_blocks_per_logical_kv_block
        for block, token in instructions.kept:
            part = block * ratio + token * ratio // self.block_size
            self.held += [(cache, part, cache[part].clone()) for cache in self.device_kv_caches.values()]

    def put_back(self) -> None:
        """After the step."""
        for cache, block, content in self.held:
            cache[block].copy_(content)
        self.held = []
