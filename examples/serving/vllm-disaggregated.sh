#!/usr/bin/env bash
# Two engines on one machine, GPU 0 for prefill and GPU 1 for decode: vllm-disaggregated.sh PREFILL DECODE
# A unified checkpoint is given twice. In front of them goes a proxy that sends each request to prefill, then to decode
# with the `kv_transfer_params` of its answer: that of llm-d or Dynamo, or vLLM's toy_proxy_server.py.
set -euo pipefail
prefill=$1 decode=$2
python "$(dirname "$0")/check_pair.py" "$prefill" "$decode"
# The handshake compares paths, so that two folders always differ; the check above stands in for it.
enforce=$([ "$prefill" = "$decode" ] && echo true || echo false)
transfer='{"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"enforce_handshake_compat": '$enforce'}}'
CUDA_VISIBLE_DEVICES=0 VLLM_NIXL_SIDE_CHANNEL_PORT=5600 \
    vllm serve "$prefill" --served-model-name pruned --port 8100 --kv-transfer-config "$transfer" &
trap 'kill $!' EXIT
CUDA_VISIBLE_DEVICES=1 VLLM_NIXL_SIDE_CHANNEL_PORT=5601 \
    vllm serve "$decode" --served-model-name pruned --port 8200 --kv-transfer-config "$transfer"
