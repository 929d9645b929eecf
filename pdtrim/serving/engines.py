"""The options and variables with which vLLM serves one half of a pair, and the router both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pdtrim.contract.results import Half
from pdtrim.serving.checkpoints import ServedPair, Sizes

Device = Literal["cpu", "cuda"]
CONNECTOR = "PDTrimConnector"
CONNECTOR_MODULE = "pdtrim_vllm.connector"
FIRST_TOKEN: Mapping[Device, str] = {
    "cpu": "pdtrim_vllm.first_token:FirstToken",
    "cuda": "pdtrim_vllm.first_token_v2:FirstToken",
}
"""The logits processor that has decode say prefill's first token where the pair is made for that, and refuses requests
that cannot be answered right. On GPUs vLLM's model runner takes those of its second kind.
"""
VLLM_VERSION = "0.32.0"
ROUTER_VERSION = "0.1.17"
SERVER = ("-m", "vllm.entrypoints.openai.api_server")
ROUTER = ("-m", "vllm_router.launch_router")
ROLES: Mapping[Half, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}
CPU_VARIABLES: Mapping[str, str] = {
    # No thread is pinned, so that the engines may share the processors.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Over shared memory an idle engine polls without rest. At work it does over TCP, too.
    "UCX_TLS": "tcp,self",
}


@dataclass(frozen=True)
class Serving:
    """How a pair is served: as `name` to clients, in numbers of `dtype`, on devices of one kind."""

    pair: ServedPair
    name: str
    sizes: Sizes
    device: Device
    dtype: str = "auto"

    def device_bytes(self, half: Half) -> int:
        """Memory for the weights and the KV cache of one half, on its device."""
        checkpoint = self.pair.of(half)
        return checkpoint.bytes + self.sizes.kv_cache_bytes(checkpoint, self.dtype)


def transfer_config(half: Half) -> str:
    """The value of `--kv-transfer-config`: a request whose keys and values do not come fails, and is never recomputed
    by the other half's weights.
    """
    return json.dumps(
        {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": CONNECTOR_MODULE,
            "kv_role": ROLES[half],
            "kv_load_failure_policy": "fail",
        }
    )


def engine_options(serving: Serving, half: Half) -> tuple[str, ...]:
    """Options of vLLM's server for one half, but for where its checkpoint is and where it listens."""
    sizes, pair = serving.sizes, serving.pair
    options = [
        *("--served-model-name", serving.name),
        *("--dtype", serving.dtype),
        *("--max-model-len", str(sizes.tokens)),
        *("--max-num-seqs", str(sizes.sequences)),
        *("--block-size", str(sizes.block)),
        # As much as all sequences at full length take: what decode preempts it would read again by its own weights.
        *("--kv-cache-memory-bytes", str(sizes.kv_cache_bytes(pair.of(half), serving.dtype))),
        *("--kv-transfer-config", transfer_config(half)),
    ]
    if pair.windowed:
        # The halves share memory between their layers differently otherwise, and the map could not be applied.
        options.append("--disable-hybrid-kv-cache-manager")
    if half == "decode":
        options += ["--logits-processors", FIRST_TOKEN[serving.device]]
    if serving.device == "cpu":
        # Compiling takes minutes there, and gains nothing for a trial.
        options.append("--enforce-eager")
        # A worker in a process of its own and its engine miss each other's messages for 5 s on a busy machine.
        options += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
    return tuple(options)


def engine_variables(serving: Serving) -> dict[str, str]:
    """Environment of an engine, but for its addresses and devices."""
    of_device = CPU_VARIABLES if serving.device == "cpu" else {}
    return {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **of_device}


def router_options(serving: Serving, *, prefill: str, decode: str) -> tuple[str, ...]:
    """Options of `vllm-router` in front of the engines at these URLs, but for where it listens itself."""
    return (
        "--vllm-pd-disaggregation",
        *("--prefill", prefill),
        *("--decode", decode),
        # There is one engine of a kind, or a Service in front of several: nothing is to be chosen.
        *("--policy", "round_robin"),
    )
