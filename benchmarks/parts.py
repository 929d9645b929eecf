"""What parts of blocks cost beside whole blocks, unhealed, on running text and on what answers copy from the prompt.

    python -m benchmarks.parts
    python -m benchmarks.parts --model build/real/smollm2-135m-instruct --text build/real/brown.jsonl --dtype bfloat16

Prompts and continuations of 128 tokens. Each set is found by greedy on the calibration windows; losses are of
continuations by the pair on validation windows, above the dense model's. In the copying windows the continuation
repeats a span from the middle of the prompt. Sets are found on text alone, and on text with a quarter as many copying
windows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.ablations_search import WINDOW_TOKENS, cut
from benchmarks.distillation import load
from benchmarks.search import CHUNK_WINDOWS
from workers.pruning.model.blocks import BlockStack, block_stack
from workers.pruning.model.calibration import Split, cut_windows, split_stream, token_stream
from workers.pruning.model.units import NOTHING, Kind, Units
from workers.pruning.search.engine import Objective, PairEngine
from workers.pruning.search.memo import Memo
from workers.pruning.search.prefill_engine import PrefillEngine
from workers.pruning.search.search import search

PROMPT_TOKENS = WINDOW_TOKENS // 2
COPIED_TOKENS = 64
COPYING_SHARE = 0.25


def copying(windows: Tensor) -> Tensor:
    """Windows (windows, tokens) whose continuations begin with 64 tokens from the middle of their prompts."""
    start = (PROMPT_TOKENS - COPIED_TOKENS) // 2
    copied = windows[:, : PROMPT_TOKENS + COPIED_TOKENS].clone()
    copied[:, PROMPT_TOKENS:] = windows[:, start : start + COPIED_TOKENS]
    return copied


@dataclass(frozen=True)
class Way:
    """What is given up where, one at a time."""

    name: str
    kind: Kind
    prefill: bool
    decode: bool

    def pair(self, units: Units) -> tuple[Units, Units]:
        """What prefill gives up, and decode."""
        return units if self.prefill else NOTHING, units if self.decode else NOTHING


WAYS = (
    Way("blocks, both halves", "block", prefill=True, decode=True),
    Way("all but keys and values, prefill", "kv_only", prefill=True, decode=False),
    Way("MLPs, prefill", "mlp", prefill=True, decode=False),
    Way("blocks, decode", "block", prefill=False, decode=True),
    Way("attentions, decode", "attention", prefill=False, decode=True),
    Way("MLPs, decode", "mlp", prefill=False, decode=True),
)
Losses = Callable[[Sequence[Units], range], dict[Units, list[float]]]


def losses_of(stack: BlockStack, windows: Tensor, way: Way, objective: Objective) -> Losses:
    """The losses by window of sets that are given up in one way."""

    def pair(prefill: Units) -> PairEngine:
        return PairEngine(
            stack,
            windows,
            objective,
            prefill=prefill,
            prompt_tokens=PROMPT_TOKENS,
            first_token="decode",
            chunk_windows=CHUNK_WINDOWS,
        )

    def in_both(sets: Sequence[Units], chosen: range) -> dict[Units, list[float]]:
        return {units: pair(units).window_losses([units], chosen)[units] for units in sets}

    if way.prefill and way.decode:
        return in_both
    if way.decode:
        return pair(NOTHING).window_losses
    of_prefill = PrefillEngine(
        stack,
        windows,
        objective,
        decode=NOTHING,
        prompt_tokens=PROMPT_TOKENS,
        first_token="decode",
        chunk_windows=CHUNK_WINDOWS,
    )
    return of_prefill.window_losses


def found(stack: BlockStack, texts: Sequence[Tensor], way: Way, most: int) -> Mapping[int, Units]:
    """Greedy's best set of every count on the KL divergence, over all windows of `texts`."""
    parts = [losses_of(stack, windows, way, "kl") for windows in texts]

    def together(sets: Sequence[Units], chosen: range) -> dict[Units, list[float]]:
        each = [part(sets, range(len(windows))) for part, windows in zip(parts, texts, strict=True)]
        return {units: [loss for by_text in each for loss in by_text[units]] for units in sets}

    result = search(
        Memo(together, sum(map(len, texts)), racing=False),
        algorithm="greedy",
        num_blocks=len(stack.blocks),
        remove=most,
        base=NOTHING,
        kind=way.kind,
        scores=[0.0] * len(stack.blocks),
        evaluations=1,
        seed=0,
        on_progress=lambda done, best: None,
    )
    return {count: best.units for count, best in result.frontier.items()}


def more(losses: Losses, units: Units, windows: int) -> str:
    """Above the dense model's, with the standard error of the windows' differences."""
    by_window = losses([NOTHING, units], range(windows))
    differences = [after - before for before, after in zip(by_window[NOTHING], by_window[units], strict=True)]
    return f"{fmean(differences):+.4f} ± {stdev(differences) / len(differences) ** 0.5:.4f}"


def own_windows(model: Path, text: Path, counts: Mapping[Split, int]) -> dict[Split, Tensor]:
    """Windows (windows, tokens) of a text with a JSON object a line, by split."""
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    stream = token_stream(documents, AutoTokenizer.from_pretrained(model))
    parts = split_stream(stream, tokens=WINDOW_TOKENS)
    return {
        split: cut_windows(parts[split], count=count, tokens=WINDOW_TOKENS, seed=0) for split, count in counts.items()
    }


def add_subject(parser: argparse.ArgumentParser) -> None:
    """The options that say what is measured."""
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--validation-windows", type=int, default=160)
    parser.add_argument("--model", type=Path, help="a model's folder, in place of the reference model")
    parser.add_argument("--text", type=Path, help="its text, an object with `text` a line")
    parser.add_argument("--dtype", default="float32")


def subject(args: argparse.Namespace) -> tuple[BlockStack, dict[Split, Tensor]]:
    """A model's blocks, and its calibration and validation windows (windows, tokens)."""
    torch.manual_seed(0)
    counts: dict[Split, int] = {"calibration": args.calibration_windows, "validation": args.validation_windows}
    if args.model is None:
        return block_stack(load()), {split: cut(split, count) for split, count in counts.items()}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval().requires_grad_(False)
    return block_stack(model), own_windows(args.model, args.text, counts)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_subject(parser)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS], default=[way.name for way in WAYS])
    args = parser.parse_args()
    stack, windows_of = subject(args)
    calibration, validation = windows_of["calibration"], windows_of["validation"]
    few = calibration[: max(1, round(COPYING_SHARE * len(calibration)))]
    texts = {"text": [calibration], "text and copying": [calibration, copying(few)]}
    lines = ["| given up | found on | how many | of blocks | text | copying |", "|---|---|---|---|---|---|"]
    ways = [way for way in WAYS if way.name in args.ways]
    for way, (name, windows) in track([(way, text) for way in ways for text in texts.items()], description="sets"):
        sets = found(stack, windows, way, max(args.counts))
        on_text, on_copying = (
            losses_of(stack, held_out, way, "cross_entropy") for held_out in (validation, copying(validation))
        )
        for count in args.counts:
            units = sets[count]
            blocks = ", ".join(str(unit.block) for unit in sorted(units, key=lambda unit: unit.block))
            cells = [more(losses, units, len(validation)) for losses in (on_text, on_copying)]
            lines.append(f"| {way.name} | {name} | {count} | {blocks} | {cells[0]} | {cells[1]} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
