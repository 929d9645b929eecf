#!/usr/bin/env bash
# One engine for everything: sglang.sh CHECKPOINT [options of the server]
set -euo pipefail
checkpoint=$1
shift
exec python -m sglang.launch_server --model-path "$checkpoint" "$@"
