"""What the plugin for vLLM saves of parts that a checkpoint gives up: the same engine with it and without it.

    PYTHONPATH=.:serving .venv-vllm/bin/python -m benchmarks.skipping

Both engines of a checkpoint run at once and are asked in turns, one request at a time. Times are processor seconds of
the engine that is asked, which computes in one thread, so that what else the machine does matters little. Figures are
ratios, with the plugin to without, turn by turn. `make test-vllm` makes the environment.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import tempfile
from pathlib import Path
from statistics import fmean, stdev

from vllm_tests.checkpoints import ROOT, WORKER_PYTHON
from vllm_tests.running import NO_PLUGIN, PLUGIN, Server, engine, greedy, post, running

CASES = {"kv_only": "prefill", "mlp": "prefill", "attention": "decode"}
"""What 8 of 32 blocks give up → the half that does."""
TOKENS = 4096
OPTIONS = ("--max-model-len", str(TOKENS), "--max-num-batched-tokens", str(TOKENS), "--no-enable-prefix-caching")
BLOCKS = 256
ANSWER = 33
WEIGHTS = re.compile(r"PDTrim skips .*: (\d+) of (\d+) bytes of weights are held")


def processor_seconds(server: Server) -> float:
    """Of the server and all that it started, since they were."""
    assert server.process is not None
    used = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, which may hold anything, stands in brackets before the rest: state, parent, group, …
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It has ended since.
        if int(fields[2]) == server.process.pid:
            used += int(fields[11]) + int(fields[12])
    return used / os.sysconf("SC_CLK_TCK")


def seconds(server: Server, prompt: list[int], tokens: int) -> float:
    """For an answer of so many tokens."""
    start = processor_seconds(server)
    answer = post(server.url, greedy(prompt, tokens))
    if answer.tokens is None:
        raise RuntimeError(answer.error)
    return processor_seconds(server) - start


def asked_in_turns(
    skipping: Server, stock: Server, count: int, turns: int, drawn: random.Random
) -> dict[str, list[tuple[float, float]]]:
    """Processor seconds (with the plugin, without) of each turn: of reading `count` tokens, and of a further token."""
    found: dict[str, list[tuple[float, float]]] = {"reading the prompt": [], "a further token": []}
    for turn in range(turns + 1):
        prompt = [drawn.randrange(3, 4096) for _ in range(count)]
        # Who is first in a turn changes with it.
        order = [skipping, stock] if turn % 2 else [stock, skipping]
        read = {server.name: seconds(server, prompt, 1) for server in order}
        more = {server.name: (seconds(server, prompt, ANSWER) - read[server.name]) / (ANSWER - 1) for server in order}
        if turn:  # The one before loads what the others find loaded.
            for times, side in zip(found.values(), (read, more), strict=True):
                times.append((side[skipping.name], side[stock.name]))
    return found


def row(pairs: list[tuple[float, float]]) -> str:
    """Means of both sides in ms, and their ratio ± its standard deviation over the turns."""
    ratios = [skipping / stock for skipping, stock in pairs]
    means = " | ".join(f"{1000 * fmean(side):.0f}" for side in zip(*pairs, strict=True))
    return f"{means} | {fmean(ratios):.3f} ± {stdev(ratios):.3f}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 1024], help="tokens")
    args = parser.parse_args()

    weights, times = [], []
    drawn = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}"}
        subprocess.run([WORKER_PYTHON, "-m", "benchmarks.skipping_models", folder], check=True, env=environment)
        for part, half in CASES.items():
            engines = [
                engine(folder, name, folder / part / half, options=OPTIONS, blocks=BLOCKS, environment=plugins)
                for name, plugins in ((f"{part}-skipping", PLUGIN), (f"{part}-stock", NO_PLUGIN))
            ]
            with running(*engines):
                held, whole = map(int, WEIGHTS.findall(engines[0].log.read_text())[-1])
                weights.append(f"| {part} | {half} | {held / 1e6:.1f} | {whole / 1e6:.1f} | {held / whole:.3f} |")
                for count in args.prompts:
                    for what, pairs in asked_in_turns(engines[0], engines[1], count, args.turns, drawn).items():
                        times.append(f"| {part} | {half} | {count} | {what} | {row(pairs)} |")

    print("| given up | half | weights with the plugin, MB | without | ratio |\n|---|---|---|---|---|")
    print("\n".join(weights))
    print("\n| given up | half | tokens | time of | with the plugin, ms | without | ratio |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(times))


if __name__ == "__main__":
    main()
