"""What each part of the method buys: the reference model with and without it, as Markdown tables.

    python -m benchmarks.ablations width lora racing anchor bound

Everything runs on one thread and is timed by the processor time it takes, so that other work on the machine counts
little. 24 blocks are those of the reference model, each run two times in a row and adding half of what it added alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks import ablations_repair as repair
from benchmarks import ablations_search as searching


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="+", metavar="PART")
    parser.add_argument(
        "--draws", type=int, default=2, help="sets of windows on which searches are held beside another"
    )
    parser.add_argument("--seeds", type=int, default=10, help="searches within each bound")
    parser.add_argument("--heal-tokens", type=int, default=65_536)
    args = parser.parse_args()

    torch.set_num_threads(1)
    bench = repair.Bench(args.heal_tokens)
    parts: Mapping[str, Callable[[], list[str]]] = {
        "width": lambda: repair.width(bench),
        "lora": lambda: repair.lora(bench),
        "racing": lambda: searching.racing(args.draws),
        "anchor": lambda: searching.anchor(args.draws),
        "bound": lambda: searching.bound(args.seeds),
    }
    for name in args.parts:
        if name not in parts:
            parser.error(f"there is no part {name!r}; there are {', '.join(parts)}")
    for name in args.parts:
        started = time.perf_counter()
        lines = parts[name]()
        print("\n".join([f"### {name}", "", *lines, "", f"{time.perf_counter() - started:.0f} s.", ""]), flush=True)


if __name__ == "__main__":
    main()
