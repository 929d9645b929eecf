"""What engines of vLLM in this process answer, and what their KV caches hold.

Call it as `python serving/vllm_tests/offline.py OUTPUT CHECKPOINT…`, each a folder beside the `expected.json` of its
pair; VLLM_PLUGINS says whether the plugin is at work. OUTPUT is a file for `torch.load`, see `Offline`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

Offline = dict[str, dict[str, Any]]
"""Checkpoint → `tokens`, what it goes on with after each prompt of the pair; `caches`, layer → its KV cache after one
of them; `classes`, layer → class of the module that computes it."""
CACHED_PROMPT = 20
"""Number of the prompt after which the caches are read, of 128 tokens."""
BLOCKS = 40


def caches(model: Any) -> dict[int, torch.Tensor]:
    """The KV cache of each layer that has one and computes it."""
    found = {}
    for number, layer in enumerate(model.model.layers):
        cache = getattr(getattr(getattr(layer, "self_attn", None), "attn", None), "kv_cache", None)
        if cache is not None:
            found[number] = cache.clone()
    return found


def classes(model: Any) -> list[str]:
    return [type(layer).__name__ for layer in model.model.layers]


def run(checkpoint: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One engine, until it has answered every prompt of its pair."""
    # vLLM reads the environment when it is imported.
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    cases = json.loads((checkpoint.parent / "expected.json").read_text())
    prompts = [TokensPrompt(prompt_token_ids=case["prompt"]) for case in cases]
    engine = LLM(
        str(checkpoint),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        block_size=32,
        num_gpu_blocks_override=BLOCKS,
        # Each layer has a cache of its own.
        disable_hybrid_kv_cache_manager=True,
        **options,
    )
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    engine.generate(prompts[CACHED_PROMPT], greedy, use_tqdm=False)
    kept = engine.apply_model(caches)[0]
    answers = engine.generate(prompts, greedy, use_tqdm=False)
    found = {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "caches": kept,
        "classes": engine.apply_model(classes)[0],
    }
    del engine
    cleanup_dist_env_and_memory()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--compiled", action="store_true", help="as vLLM does by default, which takes a minute each")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    options = {"enforce_eager": not args.compiled}
    torch.save({str(checkpoint): run(checkpoint, options) for checkpoint in args.checkpoints}, args.output)


if __name__ == "__main__":
    main()
