"""An engine of vLLM in the words of this package."""

from __future__ import annotations

import vllm
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NIXL_CONNECTOR_VERSION
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, UniformTypeKVCacheSpecs

from pdtrim_vllm.half import Half
from pdtrim_vllm.identity import Identity, Runtime
from pdtrim_vllm.startup import Engine

LEASE_SECONDS = 30
"""vLLM's own, where `kv_lease_duration` says nothing."""


def describe(config: VllmConfig, cache: KVCacheConfig) -> Engine:
    """How an engine was started."""
    transfer, model, parallel = config.kv_transfer_config, config.model_config, config.parallel_config
    assert transfer is not None
    return Engine(
        vllm=vllm.__version__,
        kv_role=str(transfer.kv_role),
        layers=model.get_total_num_hidden_layers(),
        load_failures=transfer.kv_load_failure_policy,
        handshake_checked=transfer.get_from_extra_config("enforce_handshake_compat", True),
        windowed=not _one_kind(cache),
        shared_heads=model.use_mla,
        speculative=config.speculative_config is not None,
        adapters=config.lora_config is not None,
        bidirectional=transfer.get_from_extra_config("bidirectional_kv_xfer", False),
        pipeline=parallel.pipeline_parallel_size,
        context=max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size),
        blocks=cache.num_blocks,
        block_size=config.cache_config.block_size,
        sequences=config.scheduler_config.max_num_seqs,
        sequence_tokens=model.max_model_len,
        logits_processors=tuple(
            named if isinstance(named, str) else f"{named.__module__}:{named.__name__}"
            for named in model.logits_processors or ()
        ),
    )


def _one_kind(cache: KVCacheConfig) -> bool:
    """Whether all layers keep all tokens, in blocks of one table."""
    if len(cache.kv_cache_groups) != 1:
        return False
    spec = cache.kv_cache_groups[0].kv_cache_spec
    specs = spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else (spec,)
    return all(isinstance(one, FullAttentionSpec) for one in specs)


def identify(config: VllmConfig, half: Half, attention: str) -> Identity:
    """What an engine tells the other; `attention` names its implementation."""
    transfer, model, cache = config.kv_transfer_config, config.model_config, config.cache_config
    assert transfer is not None
    return Identity(
        half,
        Runtime(
            vllm=vllm.__version__,
            nixl_connector=NIXL_CONNECTOR_VERSION,
            dtype=str(model.dtype).removeprefix("torch."),
            cache_dtype=str(cache.cache_dtype),
            kv_heads=model.get_total_num_kv_heads(),
            head_size=model.get_head_size(),
            block_size=cache.block_size,
            attention=attention,
            hybrid_cache=not config.scheduler_config.disable_hybrid_kv_cache_manager,
            lease_seconds=transfer.get_from_extra_config("kv_lease_duration", LEASE_SECONDS),
        ),
    )
