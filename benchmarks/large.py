"""Peak memory and speed on a model larger than the memory it may take: scoring, one greedy round, export.

    python benchmarks/large.py --blocks 30

Writes a random bfloat16 Llama of --blocks blocks (140 MB each) in five shards to a temporary folder, then runs each
step in a process of its own and asks Linux for the most memory that was resident in it, mapped files included. `cp`
copies as many bytes as the export writes, in turns with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.progress import track
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from workers.pruning.model.blocks import block_stack
from workers.pruning.model.checkpoint import INDEX, SourceTensors, write_checkpoint
from workers.pruning.model.streaming import load_streamed
from workers.pruning.model.units import deleting
from workers.pruning.search.engine import WholeEngine
from workers.pruning.search.scores import block_scores

SHARDS = 5
WINDOWS, WINDOW_TOKENS = 2, 32
VOCABULARY = 8192
REMOVED = 2
CPU = torch.device("cpu")


def write_model(folder: Path, blocks: int) -> None:
    """A random Llama, one tensor in memory at a time but for the shard being filled."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2560,
        intermediate_size=6912,
        num_hidden_layers=blocks,
        num_attention_heads=20,
        num_key_value_heads=5,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    per_shard = -(-len(shapes) // SHARDS)
    weight_map: dict[str, str] = {}
    names = list(shapes)
    for number in track(range(SHARDS), description="writing the model"):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = names[number * per_shard : (number + 1) * per_shard]
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1
            else torch.randn(shapes[name], generator=generator).mul_(0.02).bfloat16()
            for name in part
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def windows() -> torch.Tensor:
    return torch.randint(VOCABULARY, (WINDOWS, WINDOW_TOKENS), generator=torch.Generator().manual_seed(0))


def nothing(source: Path, target: Path) -> None:
    """What the imports alone take."""


def scoring(source: Path, target: Path) -> None:
    """Cosine scores of all blocks."""
    model, _ = load_streamed(source, dtype=torch.float32, device=CPU)
    block_scores(block_stack(model), windows(), chunk_windows=WINDOWS)


def greedy_round(source: Path, target: Path) -> None:
    """The losses of all single removals."""
    model, reader = load_streamed(source, dtype=torch.float32, device=CPU)
    engine = WholeEngine(block_stack(model), windows(), "kl", chunk_windows=WINDOWS)
    before = reader.blocks_read
    num_blocks = model.config.num_hidden_layers
    engine.losses([deleting({block}) for block in range(num_blocks)])
    if reader.blocks_read - before > num_blocks:
        raise AssertionError(f"{reader.blocks_read - before} blocks were read for a round over {num_blocks}")


def export(source: Path, target: Path) -> None:
    """The checkpoint without the last two blocks."""
    kept = range(json.loads((source / "config.json").read_text())["num_hidden_layers"] - REMOVED)
    write_checkpoint(source, target, kept=kept, overrides=SourceTensors({}), pdtrim={}, model_card="")


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "imports alone": nothing,
    "scoring": scoring,
    "one greedy round": greedy_round,
    "export": export,
}


def peak_kibibytes() -> int:
    """The most that was resident in this process; `getrusage` would also count the one that forked it."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1])


def run(step: str, source: Path, target: Path) -> tuple[float, int]:
    """Seconds and the most resident bytes of a step in a process of its own."""
    command = [sys.executable, __file__, "--step", step, str(source), str(target)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, kibibytes = printed.split()
    return float(seconds), int(kibibytes) * 1024


def copied(source: Path, target: Path) -> float:
    """Seconds that `cp` takes for one file."""
    start = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    os.sync()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3, help="exports and copies to take the median of")
    parser.add_argument("--step", nargs=3, metavar=("STEP", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step, source, target = args.step
        start = time.perf_counter()
        STEPS[step](Path(source), Path(target))
        os.sync()
        print(time.perf_counter() - start, peak_kibibytes())
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source"
        source.mkdir()
        write_model(source, args.blocks)
        shards = sorted(source.glob("*.safetensors"))
        size, largest = sum(path.stat().st_size for path in shards), max(path.stat().st_size for path in shards)
        found = {step: run(step, source, folder / step) for step in list(STEPS)[:-1]}

        exports, copies = [], []
        for repeat in track(range(args.repeats), description="exporting and copying"):
            target = folder / f"export-{repeat}"
            exports.append(run("export", source, target))
            written = sorted(target.glob("*.safetensors"))
            copies.append(sum(copied(path, folder / "copy") for path in written))
            exported = sum(path.stat().st_size for path in written)
            subprocess.run(["rm", "-r", str(target), str(folder / "copy")], check=True)
        found["export"] = median(seconds for seconds, _ in exports), max(peak for _, peak in exports)

    print(f"Source: {size / 1e9:.2f} GB in {len(shards)} shards, the largest {largest / 1e6:.0f} MB.\n")
    print("| step | seconds | peak resident MB | above the imports |\n|---|---|---|---|")
    for step, (seconds, peak) in found.items():
        above = (peak - found["imports alone"][1]) / 1e6
        print(f"| {step} | {seconds:.1f} | {peak / 1e6:.0f} | {above:.0f} |")
    ratio = median(copies) / found["export"][0]
    print(
        f"\n`cp` of the {exported / 1e9:.2f} GB exported: {median(copies):.1f} s; export has {ratio:.2f} of its speed."
    )


if __name__ == "__main__":
    main()
