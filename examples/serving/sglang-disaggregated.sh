#!/usr/bin/env bash
# Two engines and a router on one machine: sglang-disaggregated.sh PREFILL DECODE. A unified checkpoint is given twice.
# SGLang does not check that both have equally many layers; check_pair.py does.
set -euo pipefail
prefill=$1 decode=$2
python "$(dirname "$0")/check_pair.py" "$prefill" "$decode"
serve() { python -m sglang.launch_server --served-model-name pruned --disaggregation-transfer-backend nixl "$@"; }
serve --model-path "$prefill" --disaggregation-mode prefill --port 30000 &
serve --model-path "$decode" --disaggregation-mode decode --port 30001 --base-gpu-id 1 &
trap 'kill $(jobs -p)' EXIT
python -m sglang_router.launch_router --pd-disaggregation \
    --prefill http://127.0.0.1:30000 --decode http://127.0.0.1:30001 --host 0.0.0.0 --port 8000
