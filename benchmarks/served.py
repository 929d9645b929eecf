"""A pruned pair beside the dense model, both served by vLLM the same way: two engines and a router on this machine.

    PYTHONPATH=.:serving .venv-vllm/bin/python -m benchmarks.served

Each round starts the dense model as a pair of whole halves, then the pruned pair, and asks both the same by vLLM's own
load generator. Figures are ratios, pruned to dense, round by round. `make test-vllm` makes the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vllm_tests.checkpoints import ROOT, WORKER_PYTHON
from vllm_tests.running import MODEL, greedy, post, served, wait_for

LOAD = (
    "import argparse; from vllm.benchmarks import serve; parser = argparse.ArgumentParser(); "
    "serve.add_cli_args(parser); serve.main(parser.parse_args())"
)
"""What `vllm bench serve` runs: the command of vLLM's build for CPUs looks for a distribution of another name."""
FIGURES: Mapping[str, str] = {
    "median_ttft_ms": "time to first token",
    "median_itl_ms": "inter-token latency",
    "output_throughput": "tokens a second",
}
"""The load generator's name of each figure, and ours."""


def asked(url: str, tokenizer: Path, folder: Path, *, at_once: int, requests: int, seed: int) -> dict[str, Any]:
    """What the load generator measured of requests with prompts of 256 random tokens and answers of 64."""
    command = [sys.executable, "-c", LOAD, "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"]
    command += ["--model", str(tokenizer), "--served-model-name", MODEL, "--dataset-name", "random"]
    command += ["--random-input-len", "256", "--random-output-len", "64", "--ignore-eos", "--temperature", "0"]
    command += ["--num-prompts", str(requests), "--max-concurrency", str(at_once), "--seed", str(seed)]
    command += ["--disable-tqdm", "--save-result", "--result-dir", str(folder), "--result-filename", "measured.json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"the load generator ended with {done.returncode}:\n{done.stderr[-3000:]}")
    measured: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    if measured["completed"] != requests:
        raise RuntimeError(f"{measured['completed']} of {requests} requests were answered")
    return measured


def answers(url: str) -> bool:
    """Whether a pair that was just started answers."""
    return post(url, greedy([7, 8, 9], 2)).tokens is not None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16, help="of each round, for each number at once")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()

    measured: dict[tuple[str, int, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}"}
        subprocess.run([WORKER_PYTHON, "-m", "benchmarks.served_models", folder], check=True, env=environment)
        for turn in range(args.rounds):
            for name in ("dense", "pruned"):
                # A pair of whole halves is written as one checkpoint, which serves as both.
                made = folder / name
                halves = [made / role if (made / role).exists() else made / "unified" for role in ("prefill", "decode")]
                with served(folder, (halves[0], halves[1])) as pair:
                    url = pair.router.url
                    wait_for(partial(answers, url), what="the first answer")
                    for at_once in args.at_once:
                        asked(url, halves[0], folder, at_once=at_once, requests=at_once, seed=1000 + turn)
                        measured[name, at_once, turn] = asked(
                            url, halves[0], folder, at_once=at_once, requests=args.requests, seed=turn
                        )

    print("| requests at once | figure | dense | pruned | pruned / dense |\n|---|---|---|---|---|")
    for at_once in args.at_once:
        for key, figure in FIGURES.items():
            sides = {
                name: [measured[name, at_once, turn][key] for turn in range(args.rounds)]
                for name in ("dense", "pruned")
            }
            ratios = [pruned / dense for dense, pruned in zip(sides["dense"], sides["pruned"], strict=True)]
            spread = f" ± {stdev(ratios):.3f}" if len(ratios) > 1 else ""
            means = " | ".join(f"{fmean(side):.1f}" for side in sides.values())
            print(f"| {at_once} | {figure} | {means} | {fmean(ratios):.3f}{spread} |")


if __name__ == "__main__":
    main()
