"""vLLM's NIXL pull connector for a pair: decode's layer k goes on from prefill's layer `kv_layer_map[k]`.

Named to vLLM by `--kv-transfer-config '{"kv_connector": "PDTrimConnector", "kv_connector_module_path":
"pdtrim_vllm.connector", "kv_role": "kv_producer"}'`, and with `kv_consumer` for decode.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector, NixlPullConnector
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from pdtrim_vllm.checkpoint import read_half
from pdtrim_vllm.engines import describe
from pdtrim_vllm.scheduler import PairScheduler
from pdtrim_vllm.startup import check
from pdtrim_vllm.worker import PairWorker

logger = init_logger("vllm.pdtrim")


class PDTrimConnector(NixlPullConnector):
    """Raises: NotAHalf, NotServed when vLLM starts."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        # Not that of NixlPullConnector, which would start NIXL's own parts.
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        half = read_half(vllm_config)
        check(half, describe(vllm_config, kv_cache_config))
        if half.kv_tokens:
            logger.warning("PDTrim: kv_tokens of pdtrim.json is not applied, decode is sent every prompt token")
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = PairScheduler(vllm_config, self.engine_id, kv_cache_config, half)
        else:
            self.connector_worker = PairWorker(vllm_config, self.engine_id, kv_cache_config, half)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self.connector_worker is not None:
            metadata: Any = connector_metadata
            # Not in start_load_kv: vLLM calls that after the step where all loads go on beside it.
            self.connector_worker.hold(metadata.pdtrim)

    def wait_for_save(self) -> None:
        super().wait_for_save()
        assert self.connector_worker is not None
        self.connector_worker.put_back()
