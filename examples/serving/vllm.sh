#!/usr/bin/env bash
# One engine for everything: vllm.sh CHECKPOINT [options of `vllm serve`]
set -euo pipefail
exec vllm serve "$@"
