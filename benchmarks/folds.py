"""What folds bring back without training, and before it: SmolLM2 or the reference model, by kind of map, by tokens.

    python -m benchmarks.folds --out FILE
    python -m benchmarks.folds --model build/real/smollm2-135m-instruct --text build/real/brown.jsonl --out FILE \
        --set 16 17 18 --set 3 4 5 16 17 18

A row for every fold is appended to FILE as JSON when it ends, and --table prints them: what was lost on text that
nothing was chosen or made from and the share of it that came back, the same of tokens that stand in the prompt
already, and the seconds the fold took. `scalar`, `diagonal` and `full` are the form of the map; of a full one
the ridge is chosen by holding out half of the windows, or given. `sized` counts every token's error as a share of its
own hidden state. `magnitude` is Prune&Comp's factor (arXiv 2507.18212): the hidden state behind a cut is scaled to the
dense model's size, which here is done by dividing what all later blocks add, so that a tied embedding stays as it is.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.distillation import REFERENCE
from workers.inputs.models import device
from workers.pruning.model.blocks import BlockStack, block_stack, capture_calls
from workers.pruning.model.calibration import (
    Split,
    cut_windows,
    said_again,
    split_stream,
    stdlib_documents,
    token_stream,
)
from workers.pruning.model.measure import token_losses
from workers.pruning.model.parts import block_part, pruned
from workers.pruning.model.plan import BlockPlan, Blocks
from workers.pruning.model.units import NOTHING, Unit, Units, blocks_of, deleting
from workers.pruning.repair.distill import heal, load_tensors, trainable
from workers.pruning.repair.fold import (
    ChangeOf,
    Moments,
    Weighing,
    by_size,
    crossed_change,
    fold,
    gaps_of,
    ridge_change,
    scale_of,
    wanted_states,
)
from workers.pruning.repair.training import Journal, TrainingSettings
from workers.pruning.search.engine import WholeEngine

WINDOW_TOKENS = 256
COPIED_PROMPT = 64
"""Tokens of a window that the rest of it repeats."""
HELD_OUT = 8
DRAWN_FROM = 2
"""How many times as many tokens as are wanted of a split of the standard library are read, for windows to be chosen."""


def scalar(ones: Moments, others: Moments) -> Tensor:
    """The best multiple of m."""
    both = ones + others
    return torch.eye(len(both.gram), dtype=torch.float64, device=both.gram.device) * (
        both.cross.trace() / both.gram.trace()
    )


def diagonal(ones: Moments, others: Moments) -> Tensor:
    """The best factor for every direction of m."""
    both = ones + others
    return torch.diag(both.cross.diagonal() / both.gram.diagonal().clamp(min=1e-30))


def full(ridge: float) -> ChangeOf:
    """A full map, with a ridge of its own."""

    def change(ones: Moments, others: Moments) -> Tensor:
        both = ones + others
        return ridge_change(both, ridge * scale_of(both))

    return change


@dataclass(frozen=True)
class Variant:
    """A kind of fold."""

    change_of: ChangeOf
    weighing: Weighing | None = None


def variant(name: str) -> Variant:
    """By name: `scalar`, `diagonal`, `full`, `full 0.01` with that ridge, and each with `sized` before it."""
    sized, name = name.startswith("sized "), name.removeprefix("sized ")
    forms: dict[str, ChangeOf] = {"scalar": scalar, "diagonal": diagonal, "full": crossed_change}
    change = forms[name] if name in forms else full(float(name.removeprefix("full ")))
    return Variant(change, by_size if sized else None)


@torch.no_grad()
def magnitude(model: PreTrainedModel, plan: BlockPlan, windows: Tensor) -> dict[str, Tensor]:
    """Tensors by which the hidden state behind each cut is as large as the dense model's, relative to what is added."""
    dense, own = block_stack(model), block_stack(copy.deepcopy(model))
    calls = capture_calls(dense, windows)
    ends = {gap.last for gap in gaps_of(plan) if gap.first}
    wanted, states, scale = dense.embed(windows), own.embed(windows), 1.0
    changed: dict[str, Tensor] = {}
    for number in range(len(dense.blocks)):
        wanted = calls.run(dense, number, wanted)
        if number not in plan.removed:
            for half in ("attention", "mlp"):
                for name in block_part(own.blocks[number], half).last:
                    own.blocks[number].get_parameter(name).div_(scale)
                    if scale != 1.0:
                        changed[f"{own.prefix}{number}.{name}"] = own.blocks[number].get_parameter(name)
            states = calls.run(own, number, states)
        if number in ends:
            # What the state would be, had the embedding and all before been scaled in place of what is added later.
            scale *= float((wanted.norm(dim=-1) / (scale * states.norm(dim=-1))).mean())
    return changed


@dataclass(frozen=True)
class Losses:
    """Mean negative log-likelihood a token in nats, of text and of what repeats the prompt."""

    text: float
    copied: float


@dataclass(frozen=True)
class Bench:
    """The dense model and its text, on one device."""

    model: PreTrainedModel
    train: Tensor
    """(tokens,)."""
    calibration: Tensor
    validation: Tensor
    """Each (windows, time)."""
    batch: int
    heal_tokens: int
    learning_rate: float

    @property
    def device(self) -> torch.device:
        return block_stack(self.model).device

    def windows(self, tokens: int, seed: int = 0) -> Tensor:
        """Of the training text, (windows, time)."""
        cut = cut_windows(self.train, count=max(2, tokens // WINDOW_TOKENS), tokens=WINDOW_TOKENS, seed=seed)
        return cut.to(self.device)

    @torch.no_grad()
    def losses(self, model: PreTrainedModel) -> Losses:
        """On the validation text."""
        again = said_again(self.validation.cpu(), COPIED_PROMPT)[:, : 2 * COPIED_PROMPT].to(self.device)
        copied = again[: len(again) // 2]
        return Losses(self._loss(model, self.validation, 1), self._loss(model, copied, COPIED_PROMPT))

    def _loss(self, model: PreTrainedModel, windows: Tensor, first: int) -> float:
        """Of the tokens from the number `first` on."""
        total = 0.0
        for ids in windows.split(self.batch):
            hidden = block_stack(model).body(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            total += float(token_losses(model, hidden[:, first - 1 :].flatten(0, 1), ids[:, first:].flatten()).sum())
        return total / windows[:, first:].numel()

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
        """The dense model with these in place of its own, which are shared else."""
        kept = {id(p): p for name, p in self.model.named_parameters() if name not in tensors}
        changed: PreTrainedModel = copy.deepcopy(self.model, kept)
        load_tensors(changed, tensors)
        return changed

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def folded(bench: Bench, plan: BlockPlan, name: str, windows: Tensor) -> tuple[dict[str, Tensor], float]:
    """The tensors that a variant changes, and the seconds it took."""
    bench.synchronise()
    started = time.perf_counter()
    if name == "magnitude":
        tensors = magnitude(bench.model, plan, windows[: 8 * bench.batch])
    else:
        kind, stack = variant(name), block_stack(bench.model)
        wanted = wanted_states(stack, plan, windows, chunk_windows=bench.batch, held_on=bench.device)
        made = fold(stack, plan, wanted, change_of=kind.change_of, weighing=kind.weighing)
        tensors = dict(made.tensors)
    bench.synchronise()
    return tensors, time.perf_counter() - started


def folded_half(model: PreTrainedModel, half: BlockPlan, windows: Tensor, batch: int) -> PreTrainedModel:
    """A half whose removed blocks are folded into those before, by windows (windows, tokens)."""
    stack = block_stack(model)
    wanted = wanted_states(stack, half, windows, chunk_windows=batch, held_on=device())
    tensors = fold(stack, half, wanted, weighing=by_size).tensors
    kept = {id(parameter): parameter for name, parameter in model.named_parameters() if name not in tensors}
    changed: PreTrainedModel = copy.deepcopy(model, kept)
    load_tensors(changed, tensors)
    return pruned(changed, half)


def healed(bench: Bench, plan: BlockPlan, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """All weights of the blocks that stay, healed from `tensors`."""
    weights = copy.deepcopy(bench.model)
    load_tensors(weights, tensors)
    student = pruned(weights, plan)
    windows = bench.windows(bench.heal_tokens, seed=1)
    batch = 8
    heal(
        student,
        bench.model,
        plan.kept,
        trainable(weights, plan.kept, frozen=set()),
        windows=windows,
        held_out=bench.calibration[:HELD_OUT],
        settings=TrainingSettings(len(windows) // batch, batch, bench.learning_rate, 0),
        journal=Journal(),
    )
    weights.requires_grad_(False)
    return student


@dataclass(frozen=True)
class Row:
    """One fold of one set."""

    found_by: str
    removed: list[int]
    variant: str
    tokens: int
    seed: int
    healed_on: int
    seconds: float
    text: float
    copied: float
    dense: Losses
    pruned: Losses

    @property
    def share(self) -> float:
        """Of the log-perplexity that was lost on text, that came back."""
        return (self.pruned.text - self.text) / (self.pruned.text - self.dense.text)


@dataclass
class Rows:
    """Measures sets and folds, and writes them down."""

    bench: Bench
    out: Path
    dense: Losses
    _without: dict[Blocks, Losses] = field(default_factory=dict, init=False)

    def plan(self, removed: Sequence[int]) -> BlockPlan:
        """That removes these whole blocks."""
        return BlockPlan(len(block_stack(self.bench.model).blocks), frozenset(removed))

    def add(
        self, found_by: str, removed: Sequence[int], name: str, tokens: int, *, seed: int = 0, heals: bool = False
    ) -> Row:
        """Fold and measure; `nothing` as a name folds nothing."""
        bench, plan = self.bench, self.plan(removed)
        without = self._without.get(plan.removed) or bench.losses(pruned(bench.model, plan))
        self._without[plan.removed] = without
        tensors, seconds = ({}, 0.0) if name == "nothing" else folded(bench, plan, name, bench.windows(tokens, seed))
        model = healed(bench, plan, tensors) if heals else pruned(bench.with_tensors(tensors), plan)
        found = bench.losses(model)
        healed_on = bench.heal_tokens if heals else 0
        row = Row(
            found_by, list(removed), name, tokens, seed, healed_on, seconds, **asdict(found), dense=self.dense,
            pruned=without,
        )  # fmt: skip
        with self.out.open("a") as file:
            print(json.dumps(asdict(row)), file=file, flush=True)
        print(line(row), flush=True)
        return row


HEADER = (
    "| set | removed | fold | tokens | seed | healed on | seconds | text: nats lost | came back | copied: nats lost "
    "| still lost |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """Of the Markdown table."""
    cells = [
        f"{row.found_by} {len(row.removed)}",
        " ".join(map(str, row.removed)),
        row.variant,
        f"{row.tokens:,}",
        row.seed,
        f"{row.healed_on:,}",
        f"{row.seconds:.2f}",
        f"{row.pruned.text - row.dense.text:.4f}",
        f"{row.share:.1%}",
        f"{row.pruned.copied - row.dense.copied:.4f}",
        f"{row.copied - row.dense.copied:.4f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def greedy_sets(engine: WholeEngine, last: int) -> list[Units]:
    """Greedy's sets of every count up to `last`."""
    path = [NOTHING]
    for _ in range(last):
        engine.anchor(path[-1])
        candidates = extensions(path[-1], engine.num_blocks)
        losses = engine.losses(candidates)
        path.append(min(candidates, key=lambda units: losses[units]))
    return path


def extensions(units: Units, num_blocks: int) -> list[Units]:
    """The sets with one block more."""
    return [units | {Unit(block)} for block in range(num_blocks) if block not in blocks_of(units)]


def best_span(engine: WholeEngine, count: int) -> Units:
    """The run of `count` blocks with the least loss."""
    spans = [deleting(range(first, first + count)) for first in range(engine.num_blocks - count + 1)]
    losses = engine.losses(spans)
    return min(spans, key=lambda units: losses[units])


def read(args: argparse.Namespace) -> Bench:
    """The model and text that are named."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.to(args.device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.text is None:
        wanted: dict[Split, int] = {
            "train": max(args.tokens) + args.heal_tokens,
            "calibration": args.calibration_tokens,
            "validation": args.validation_tokens,
        }
        streams = {
            split: token_stream(stdlib_documents(split), tokenizer, at_least=DRAWN_FROM * tokens)
            for split, tokens in wanted.items()
        }
    else:
        documents = (json.loads(text)["text"] for text in args.text.open())
        whole = token_stream(documents, tokenizer, at_least=args.text_tokens)
        streams = split_stream(whole, tokens=WINDOW_TOKENS)

    def cut(split: Split, tokens: int) -> Tensor:
        count = tokens // WINDOW_TOKENS
        return cut_windows(streams[split], count=count, tokens=WINDOW_TOKENS, seed=0).to(args.device)

    return Bench(
        model,
        streams["train"],
        cut("calibration", args.calibration_tokens),
        cut("validation", args.validation_tokens),
        args.batch,
        args.heal_tokens,
        args.learning_rate,
    )


def sets(args: argparse.Namespace, bench: Bench) -> list[tuple[str, list[int]]]:
    """What goes, and where that is from: as given, else as greedy and the best span have it."""
    if args.set:
        return [("given", removed) for removed in args.set]
    engine = engine_of(bench)
    path = greedy_sets(engine, max(args.counts))
    found = [("greedy", path[count]) for count in args.counts]
    found += [("span", best_span(engine, count)) for count in args.counts]
    return [(found_by, sorted(blocks_of(units))) for found_by, units in found]


def engine_of(bench: Bench) -> WholeEngine:
    """That compares sets on the calibration windows as a job does."""
    stack: BlockStack = block_stack(bench.model)
    return WholeEngine(stack, bench.calibration, "kl", chunk_windows=bench.batch)


def work(args: argparse.Namespace, rows: Rows) -> Iterator[Callable[[], Any]]:
    """What to measure, the most telling first."""
    chosen = sets(args, rows.bench)
    middle = args.tokens[len(args.tokens) // 2]
    for name in args.variants:
        for kind, removed in chosen:
            yield partial(rows.add, kind, removed, name, middle)
    for tokens in args.tokens:
        for name in args.by_tokens:
            for kind, removed in chosen:
                if tokens != middle or name not in args.variants:
                    yield partial(rows.add, kind, removed, name, tokens)
    if args.heal_tokens:
        healed_sets = [
            (kind, removed) for kind, removed in chosen if kind != "span" and len(removed) in args.heal_counts
        ]
        for kind, removed in healed_sets:
            for name in ("nothing", *args.before_healing):
                yield partial(rows.add, kind, removed, name, middle, heals=True)


def main() -> None:
    """Measure, and print the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=REFERENCE)
    parser.add_argument("--text", type=Path, help="JSON lines with a `text` each; by default the standard library")
    parser.add_argument("--text-tokens", type=int, help="how many of the text to read; by default all")
    parser.add_argument("--out", type=Path, required=True, help="file that a line of JSON is appended to for each row")
    parser.add_argument("--table", action="store_true", help="print the rows of an earlier run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", type=int, nargs="+", action="append", default=[], help="found before")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 5120, 20480, 81920])
    parser.add_argument(
        "--variants", nargs="+", default=["scalar", "diagonal", "magnitude", "full", "sized full"], metavar="NAME"
    )
    parser.add_argument("--by-tokens", nargs="*", default=["full", "sized full"], metavar="NAME")
    parser.add_argument("--before-healing", nargs="*", default=["sized full"], metavar="NAME")
    parser.add_argument("--heal-tokens", type=int, default=0)
    parser.add_argument(
        "--heal-counts", type=int, nargs="*", default=[6], help="how many blocks of healed sets are gone"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--calibration-tokens", type=int, default=16 * WINDOW_TOKENS)
    parser.add_argument("--validation-tokens", type=int, default=80 * WINDOW_TOKENS)
    parser.add_argument("--batch", type=int, default=4, help="windows at a time")
    parser.add_argument("--seconds", type=float, default=1e9, help="when to begin nothing more")
    args = parser.parse_args()
    print(HEADER)
    if args.table:
        for text in args.out.read_text().splitlines():
            content = json.loads(text)
            content |= {key: Losses(**content[key]) for key in ("dense", "pruned")}
            print(line(Row(**content)))
        return
    until = time.monotonic() + args.seconds
    bench = read(args)
    rows = Rows(bench, args.out, bench.losses(bench.model))
    for measure in work(args, rows):
        if time.monotonic() > until:
            print("the time is up", flush=True)
            break
        measure()


if __name__ == "__main__":
    main()
