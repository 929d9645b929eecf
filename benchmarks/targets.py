"""Healing without the dense model at hand: what its kept targets cost in quality, disk, memory and time.

    python -m benchmarks.targets --heal-tokens 65536
    python -m benchmarks.targets --model build/real/smollm2-135m-instruct --text build/real/brown.jsonl --removed 20 21

Memory is what Linux saw resident at most in training, mapped files apart, beyond what the process had before either
model was read. Seconds are of processor time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import fmean, stdev
from threading import Event, Thread

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.distillation import REFERENCE
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.calibration import Split, cut_windows, split_stream, stdlib_documents, token_stream
from workers.pruning.model.measure import perplexity
from workers.pruning.repair.distill import Teacher, heal, mean_loss, sequence_loss, trainable
from workers.pruning.repair.losses import LossWeights
from workers.pruning.repair.targets import Targets, computed, group_windows, token_bytes
from workers.pruning.repair.training import Journal, TrainingSettings

WINDOW_TOKENS = 256
HELD_OUT, VALIDATION = 8, 16
STREAM = 100_000
"""Tokens of a split that windows are drawn from."""
BATCH = 4
BESIDE, KEPT = "the dense model at hand", "kept targets"


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval().requires_grad_(False)
    return model


def windows(args: argparse.Namespace) -> Callable[[int], dict[Split, Tensor]]:
    """By seed: of every split (windows, tokens)."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    counts: dict[Split, int] = {
        "train": args.heal_tokens // WINDOW_TOKENS,
        "calibration": HELD_OUT,
        "validation": VALIDATION,
    }
    if args.text is None:
        streams = {split: token_stream(stdlib_documents(split), tokenizer, at_least=STREAM) for split in counts}
    else:
        documents = (json.loads(line)["text"] for line in args.text.open())
        streams = split_stream(token_stream(documents, tokenizer), tokens=WINDOW_TOKENS)
    return lambda seed: {
        split: cut_windows(streams[split], count=count, tokens=WINDOW_TOKENS, seed=seed)
        for split, count in counts.items()
    }


def resident() -> int:
    """Bytes, mapped files apart."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return 1024 * kilobytes


class Resident:
    """The most bytes that were resident, looked at many times a second."""

    def __init__(self) -> None:
        self.most = 0
        self._ended = Event()
        self._thread = Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            self.most = max(self.most, resident())

    def end(self) -> int:
        self._ended.set()
        self._thread.join()
        return self.most


def compared(args: argparse.Namespace, kept: Sequence[int]) -> Sequence[int]:
    """The blocks of the dense model that the loss looks into."""
    return kept[1:] if args.hidden else ()


def targets(args: argparse.Namespace, everything: Tensor, blocks: Sequence[int], folder: Path) -> Targets:
    """Of all windows (windows, tokens)."""
    dense, files = load(args.model), list[Path]()
    for group in everything.split(group_windows(blocks, dense.config.hidden_size, WINDOW_TOKENS)):
        files.append(folder / f"{len(files)}.safetensors")
        save_file(computed(dense, group, blocks, BATCH), files[-1])
    return Targets(everything, files)


def gradient(args: argparse.Namespace, teacher: Teacher, kept: Sequence[int], ids: Tensor) -> Tensor:
    """Of the pruned model's loss on ids (batch, time) before healing, all in a row."""
    weights = load(args.model)
    parameters = list(trainable(weights, kept, frozen=set()).values())
    loss = sequence_loss(drop_blocks(weights, args.removed), teacher, kept, LossWeights(hidden=args.hidden))
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss(ids), parameters)])


def fidelity(args: argparse.Namespace, data: dict[Split, Tensor]) -> str:
    """By how much a batch's gradient is off on kept targets, and on another batch."""
    dense, (ids, others, *_) = load(args.model), data["train"].split(BATCH)
    kept = [block for block in range(dense.config.num_hidden_layers) if block not in args.removed]
    exact = gradient(args, dense, kept, ids)

    def off(found: Tensor) -> str:
        return f"{100 * float(torch.linalg.norm(found - exact) / torch.linalg.norm(exact)):.2f} %"

    with tempfile.TemporaryDirectory() as folder, closing(targets(args, ids, compared(args, kept), Path(folder))) as at:
        found = gradient(args, at, kept, ids)
    return (
        f"Gradient off by {off(found)} on kept targets, by {off(gradient(args, dense, kept, others))} on another batch."
    )


def once(args: argparse.Namespace, data: dict[Split, Tensor], name: str, seed: int) -> dict[str, float]:
    """One healing."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, config = resident(), AutoConfig.from_pretrained(args.model)
    kept = [block for block in range(config.num_hidden_layers) if block not in args.removed]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        started = time.process_time()
        teacher: Teacher
        if name == BESIDE:
            teacher = load(args.model)
        else:
            everything = torch.cat([data["train"], data["calibration"]])
            teacher = opened.enter_context(closing(targets(args, everything, compared(args, kept), Path(folder))))
        gc.collect()
        ahead_s, looked = time.process_time() - started, Resident()
        weights = load(args.model)
        parameters = trainable(weights, kept, frozen=set())
        for block in args.removed:
            block_stack(weights).blocks[block].to_empty(device="meta")
        student = drop_blocks(weights, args.removed)
        started = time.process_time()
        steps = args.heal_tokens // (BATCH * WINDOW_TOKENS)
        heal(
            student,
            teacher,
            kept,
            parameters,
            losses=LossWeights(hidden=args.hidden),
            windows=data["train"],
            held_out=data["calibration"],
            settings=TrainingSettings(steps, BATCH, args.learning_rate, seed),
            journal=Journal(),
        )
        trained_s, most = time.process_time() - started, looked.end()
    dense = teacher if isinstance(teacher, PreTrainedModel) else load(args.model)
    return {
        "kl": mean_loss(sequence_loss(student, dense, kept, LossWeights(hidden=0)), data["validation"], BATCH),
        "perplexity": perplexity(student, data["validation"], batch=BATCH).value,
        "bytes": 0 if name == BESIDE else token_bytes(compared(args, kept), config.hidden_size),
        "ahead": 0 if name == BESIDE else ahead_s,
        "seconds": trained_s,
        "resident": most - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=REFERENCE)
    parser.add_argument("--text", type=Path, help="JSON lines with a text each; by default the standard library")
    parser.add_argument("--removed", type=int, nargs="+", default=[2, 4, 5, 9])
    parser.add_argument("--heal-tokens", type=int, default=65_536)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden", type=float, default=20.0, help="weight of the hidden states in the loss")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    cut = windows(args)
    print(fidelity(args, cut(0)), flush=True)
    found: dict[str, list[dict[str, float]]] = {BESIDE: [], KEPT: []}
    for seed, name in track([(seed, name) for seed in range(args.seeds) for name in found], description="healing"):
        found[name].append(once(args, cut(seed), name, seed))
        print(f"seed {seed}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    print(
        "| targets | bytes a token | KL to dense | beside the dense model: KL | perplexity "
        "| seconds ahead | in training | MB in training |\n|---|---|---|---|---|---|---|---|"
    )
    for name, ran in found.items():
        more = [
            [one[key] - other[key] for one, other in zip(ran, found[BESIDE], strict=True)]
            for key in ("kl", "perplexity")
        ]
        cells = [
            name,
            f"{ran[0]['bytes']:,.0f}",
            f"{fmean(one['kl'] for one in ran):.4f}",
            *(f"{fmean(part):+.4f} ± {(stdev(part) if len(part) > 1 else 0.0):.4f}" for part in more),
            *(f"{fmean(one[key] for one in ran):.0f}" for key in ("ahead", "seconds")),
            f"{fmean(one['resident'] for one in ran) / 1e6:.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
