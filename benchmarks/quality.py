"""What pairs cut from a real pretrained model still answer, by whole jobs: unhealed and healed, beside the dense model.

    make build/real/.ready
    python -m benchmarks.quality --model build/real/smollm2-135m-instruct --text build/real/brown.jsonl --out FOLDER

Every row is a job of its own, all its stages up to the export: greedy search, healing of all weights. Pairs are
measured from their exported checkpoints by plain transformers, on text that no stage of a job has seen: continuations
of 128 tokens after prompts of 64, 256 and 1,024, spans copied from the prompt, which of four passages goes on and which
is in order, a needle, lookups in a list. For a GPU: hours on two cores of a CPU. Rows are written as they end, to
rows.jsonl; a run that was cut off goes on with those that are not there, and with --table the tables are made of those
that are.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.choices import CHOICES
from benchmarks.folds import folded_half
from benchmarks.questions import (
    Answers,
    Questions,
    answered,
    copied_spans,
    in_order,
    lookups,
    needles,
    next_passage,
    running_text,
    writes_digits,
)
from benchmarks.rows import append, arguments, written
from benchmarks.whole_jobs import WholeJob, layer_map
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import PLAN, HalfPlan, Healing, Plan
from pdtrim.contract.spec import JobSpec
from workers.inputs.models import device, load_model
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.calibration import split_stream, stdlib_documents, token_stream
from workers.pruning.model.costs import Cost, Costs, costs_of
from workers.pruning.model.pair import FirstToken
from workers.pruning.model.parts import pruned
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.model.units import Kind, Unit, Units, blocks_of, deleting, parts_of
from workers.pruning.repair.fold import gaps_of
from workers.stages.precision import DTYPES
from workers.stages.removal import block_plan, half_plan
from workers.stages.scoring import WINDOWS

WINDOW_TOKENS = 256
ROWS = ("depth", "cost", "healing", "peers", "calibration", "sets")
FIRST_TOKEN: FirstToken = "decode"
COSTS: tuple[Cost, ...] = ("flops", "weight_bytes", "kv_bytes")
OF_PREFILL: Mapping[Kind, str] = {"kv_only": "kv_only_blocks", "mlp": "remove_mlps"}
OF_DECODE: Mapping[Cost, tuple[Kind, ...]] = {
    "weight_bytes": ("block", "mlp", "attention"),
    "kv_bytes": ("block", "attention"),
}
FOLD_TOKENS = 20_480
COPYING, COPYING_FOLDED = 0.25, 1.0
"""The shares of copying windows that a job has by default, and where sets are compared folded."""


@dataclass(frozen=True)
class Row:
    """A job: what it is called, and what each half gives up."""

    table: str
    label: str
    prefill: Mapping[str, float]
    decode: Mapping[str, float]
    copying: float = COPYING
    method: str | None = None
    """Of `CHOICES`, in place of the job's own search."""
    amount: float = 0.0
    """What the method is given."""
    windows: int | None = None
    """Calibration windows, where they are not as many as in the other rows."""
    seed: int = 0
    """Chooses which windows of the text."""
    healing: Mapping[str, Any] = field(default_factory=dict)
    """Of `distillation`, where it is not as in the other rows."""
    search: Mapping[str, Any] = field(default_factory=dict)
    """Likewise of `search`."""

    def __str__(self) -> str:
        return f"{self.table}, {self.label}"


DENSE = Row("dense", "nothing", {}, {}, copying=0.0)
"""The model as it is, which every other row is beside."""


def by_peers(counts: Sequence[int], shares: Sequence[float]) -> Iterator[Row]:
    """What published methods choose, healed and measured as the rest; EvoPress, whose choice takes longest, at last."""
    whole = {"remove_blocks": 0}
    late = "late blocks (SwiftKV, POP)"
    for name in ("SLEB", "LLM-Streamline", "angular span", "ShortGPT", late):
        where = "decode whole" if name == late else "both halves"
        for count in counts:
            yield Row("depth", f"{name} {count}, {where}", whole, whole, method=name, amount=count)
    for share in shares:
        yield Row(f"weight_bytes {share:.0%}", "BlockPruner", whole, whole, method="BlockPruner", amount=share)
    for count in counts:
        yield Row("depth", f"EvoPress {count}, both halves", whole, whole, method="EvoPress", amount=count)


def by_calibration(count: int, windows: Sequence[int], seeds: Sequence[int]) -> Iterator[Row]:
    """The same blocks to find on fewer and more windows, and on others of the same text."""
    gone = {"remove_blocks": count}
    for number in windows:
        for seed in seeds:
            yield Row("calibration", f"blocks {count}, {number} windows", gone, gone, windows=number, seed=seed)


def by_healing(count: int, tokens: int) -> Iterator[Row]:
    """Blocks healed on twice the tokens, whole and by adapters, from what a fold left as well; and at other rates."""
    gone = {"remove_blocks": count}
    longer = {"heal_tokens": 2 * tokens}
    for label, trained in (
        ("twice the tokens", longer),
        ("twice the tokens, adapters", {**longer, "trainable": "lora"}),
    ):
        yield Row("healing", f"blocks {count}, {label}", gone, gone, healing=trained)
        folded = f"blocks {count}, compared folded, {label}"
        yield Row("healing", folded, gone, gone, COPYING_FOLDED, healing=trained, search={"folded": True})
    ways: dict[str, dict[str, Any]] = {
        **{f"rate {rate:g}": {"learning_rate": rate} for rate in (1e-4, 5e-4, 1e-3)},
        "on predictions alone": {"losses": {"hidden": 0.0}},
    }
    for label, healing in ways.items():
        yield Row("healing", f"blocks {count}, {label}", gone, gone, healing=healing)


def by_sets(sets: Sequence[Sequence[int]]) -> Iterator[Row]:
    """Given blocks of both halves, healed from the weights as they are and from what a fold left."""
    for blocks in sets:
        gone = {"remove_blocks": len(blocks)}
        label = f"blocks {', '.join(map(str, sorted(blocks)))}"
        for start, fold in (("as they are", False), ("the fold", True)):
            search = {"force": sorted(blocks)}
            yield Row("sets", f"{label}, healed from {start}", gone, gone, healing={"fold": fold}, search=search)


def by_depth(counts: Sequence[int], decode_alone: int) -> Iterator[Row]:
    """Prefill shallower by whole blocks, which decode gives up as well, and by blocks that keep keys and values."""
    whole = {"remove_blocks": 0}
    for count in counts:
        for copying in (COPYING, 0.0):
            yield Row("depth", f"kv_only {count}, decode whole", {"kv_only_blocks": count}, whole, copying)
        gone = {"remove_blocks": count}
        yield Row("depth", f"blocks {count}, both halves", gone, gone)
        for copying in (COPYING_FOLDED, COPYING):
            label = f"blocks {count}, both halves, compared folded"
            yield Row("depth", label, gone, gone, copying, search={"folded": True})
        less = {"remove_blocks": decode_alone}
        yield Row("depth", f"kv_only {count}, decode blocks {decode_alone}", {"kv_only_blocks": count}, less)
        yield Row("depth", f"blocks {count}, decode alone", whole, gone)
        yield Row("depth", f"blocks {count}, both halves", gone, gone, 0.0)


def by_cost(costs: Mapping[Cost, Costs], shares: Sequence[float]) -> Iterator[Row]:
    """One kind of unit alone, by as many as the budget takes, and the free mixture."""
    whole = {"remove_blocks": 0}
    for share in shares:
        table = f"flops {share:.0%}"
        yield Row(table, "mixture", {"flops": share}, whole)
        for kind, name in OF_PREFILL.items():
            if (count := needed(costs["flops"], kind, share)) is not None:
                yield Row(table, f"{kind} {count}", {name: count}, whole)
        if (count := needed(costs["flops"], "block", share)) is not None:
            yield Row(table, f"block {count}, both halves", {"remove_blocks": count}, {"remove_blocks": count})
        for cost, kinds in OF_DECODE.items():
            names = {"block": "remove_blocks", "mlp": "remove_mlps", "attention": "remove_attentions"}
            table = f"{cost} {share:.0%}"
            yield Row(table, "mixture", whole, {cost: share})
            for kind in kinds:
                if (count := needed(costs[cost], kind, share)) is not None:
                    yield Row(table, f"{kind} {count}", whole, {names[kind]: count})


def needed(costs: Costs, kind: Kind, share: float) -> int | None:
    """How many blocks have to give up a kind of unit until `share` of the dense model's cost is left, at most.

    None when the cost is not kept by all blocks but one.
    """
    units = [Unit(block, kind) for block in range(costs.blocks)]
    return next((count for count in range(1, costs.blocks) if costs.share(units[:count]) <= share), None)


@dataclass(frozen=True)
class Subject:
    """The dense model, its text, and what it answers."""

    model: PreTrainedModel
    documents: list[str]
    questions: list[Questions]
    answers: dict[str, Answers]
    costs: Mapping[Cost, Costs]


@lru_cache
def subject(
    model: Path, text: Path | None, prompts: tuple[int, ...], count: int, batch: int, dtype: torch.dtype | None
) -> Subject:
    """Read once in each process. What needs a token for every digit is asked where the tokenizer has one."""
    documents = unseen_files() if text is None else [json.loads(line)["text"] for line in text.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model)
    # The end of the text: the jobs here ask for less than what stands before it, and read no further.
    held_out = split_stream(token_stream(documents, tokenizer), tokens=WINDOW_TOKENS)["validation"]
    questions = [
        *(running_text(held_out, prompt, count=count, longest=max(prompts)) for prompt in prompts),
        copied_spans(held_out, prompts[1], count=count),
        next_passage(held_out, prompts[1], count=count, seed=0),
        in_order(held_out, prompts[0], count=count, seed=0),
    ]
    if writes_digits(tokenizer):
        questions.append(needles(held_out, tokenizer, max(prompts), count=count, seed=0))
        questions.append(lookups(held_out, tokenizer, max(prompts) // 2, count=count, seed=0))
    dense = load_model(model, dtype=dtype)
    blocks = list(range(len(block_stack(dense).blocks)))
    ask = partial(answered, dense, dense, blocks, first_token=FIRST_TOKEN, batch=batch)
    prompt = held_out[None, : WINDOW_TOKENS // 2].to(device())
    return Subject(
        dense,
        documents,
        questions,
        {asked.name: ask(asked) for asked in questions},
        {cost: costs_of(block_stack(dense), cost, prompt) for cost in COSTS},
    )


def unseen_files() -> list[str]:
    """Files of the standard library that the reference model was not trained on."""
    return [*stdlib_documents("validation"), *stdlib_documents("calibration")]


def asked_of(args: argparse.Namespace) -> Subject:
    """What the arguments name."""
    dtype = DTYPES.get(args.precision)
    return subject(args.model, args.text, tuple(args.prompts), args.questions, args.batch, dtype)


def units_of(half: HalfPlan) -> Units:
    """What a half gives up."""
    return deleting(half.removed) | {Unit(block, part) for block, part in half.parts.items()}


def measured(row: Row, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run a row's job, ask its pair, and delete its files. Returns the row as JSON; of `DENSE` what that answers."""
    given = asked_of(args)
    if row == DENSE:
        named = {"table": row.table, "label": row.label, "copying": row.copying, "seed": row.seed}
        return [{**named, "answers": dense_answers(given)}]
    spec = JobSpec.model_validate(
        {
            "model": {"source": f"file://{args.model.resolve()}"},
            "prefill": dict(row.prefill),
            "decode": dict(row.decode),
            "calibration": {
                "windows": row.windows or args.calibration_windows,
                "window_tokens": WINDOW_TOKENS,
                "copying": row.copying,
            },
            "search": {"algorithm": "greedy", **row.search},
            "distillation": {"heal_tokens": args.heal_tokens, **row.healing},
            "evaluation": {"windows": 1},
            "precision": args.precision,
            "seed": row.seed,
        }
    )
    folder = (
        args.out
        / "jobs"
        / "".join(c if c.isalnum() else "-" for c in f"{row.table} {row.label} {row.copying} {row.seed}")
    )
    # What a run that was cut off left would be taken for this one's.
    shutil.rmtree(folder, ignore_errors=True)
    job = WholeJob(spec, args.model, given.documents, folder)
    try:
        job.run((StageName.SCORING, StageName.REMOVAL))
        if row.method is not None:
            choose(job, row.method, row.amount, given)
        job.run((StageName.DISTILLATION, StageName.EXPORT))
        plan = Plan.model_validate_json((job.artifacts(StageName.REMOVAL) / PLAN).read_bytes())
        healed = _checkpoints(job, DTYPES.get(args.precision))
        kv_map = layer_map(job.artifacts(StageName.EXPORT) / ("unified" if healed[0] is healed[1] else "decode"))
        halves: list[BlockPlan] = [block_plan(plan.prefill), block_plan(plan.decode)]
        unhealed = [pruned(given.model, half) for half in halves]
        windows = load_file(job.artifacts(StageName.SCORING) / WINDOWS)["train"]
        evenly = torch.arange(0, len(windows), max(1, len(windows) * WINDOW_TOKENS // FOLD_TOKENS))
        ask = partial(_asked, given, kv_map, args.batch)
        folded = {}
        if any(gaps_of(half) for half in halves):
            to_fold = windows[evenly].to(device())
            folded["folded"] = ask(*(folded_half(given.model, half, to_fold, args.batch) for half in halves))
        distilled: Any = job.results[StageName.DISTILLATION]
        found = {
            "table": row.table,
            "label": row.label,
            "copying": row.copying,
            "seed": row.seed,
            "left": {
                cost: costs.share(units_of(plan.prefill if cost == "flops" else plan.decode))
                for cost, costs in given.costs.items()
            },
            "prefill": sorted([unit.block, unit.kind] for unit in units_of(plan.prefill)),
            "decode": sorted([unit.block, unit.kind] for unit in units_of(plan.decode)),
            "unhealed": ask(*unhealed),
            **folded,
            "healed": ask(*healed),
            "healing": {half: _healing(getattr(distilled, half)) for half in ("prefill", "decode")},
            "seconds": {stage.value: round(seconds, 1) for stage, seconds in job.seconds.items()},
        }
        return [found]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def choose(job: WholeJob, method: str, amount: float, given: Subject) -> None:
    """Put what a method chooses into the plan of a job that gave up nothing."""
    windows = load_file(job.artifacts(StageName.SCORING) / WINDOWS)["calibration"].to(device())
    halves = CHOICES[method](block_stack(given.model), windows, amount)
    blocks = len(block_stack(given.model).blocks)
    prefill, decode = (BlockPlan(blocks, blocks_of(units), parts=parts_of(units)) for units in halves)
    path = job.artifacts(StageName.REMOVAL) / PLAN
    plan = json.loads(path.read_text())
    plan |= {"prefill": half_plan(prefill).model_dump(mode="json"), "decode": half_plan(decode).model_dump(mode="json")}
    path.write_text(json.dumps({**plan, "kv_layer_map": kv_layer_map(prefill, decode)}))


def _checkpoints(job: WholeJob, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedModel]:
    exported = job.artifacts(StageName.EXPORT)
    if (exported / "unified").is_dir():
        unified = load_model(exported / "unified", dtype=dtype)
        return unified, unified
    return load_model(exported / "prefill", dtype=dtype), load_model(exported / "decode", dtype=dtype)


def _asked(
    given: Subject, kv_map: Sequence[int], batch: int, prefill: PreTrainedModel, decode: PreTrainedModel
) -> dict[str, dict[str, float]]:
    found = {}
    for questions in given.questions:
        answers = answered(prefill, decode, kv_map, questions, first_token=FIRST_TOKEN, batch=batch)
        more, error = answers.above(given.answers[questions.name])
        found[questions.name] = {"loss": more, "error": error, "exact": fmean(answers.exact)}
    return found


def _healing(healing: Healing | None) -> dict[str, float | str] | None:
    return None if healing is None else {"before": healing.before, "after": healing.after, "kept": healing.kept}


def dense_answers(given: Subject) -> dict[str, dict[str, float]]:
    """The dense model's own losses and exact answers."""
    return {name: {"loss": fmean(a.losses), "exact": fmean(a.exact)} for name, a in given.answers.items()}


EXACT = ("needle", "lookup", "next of", "right of")
"""Questions that are answered right or wrong."""


def tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: a table of each name, a line a row, unhealed and healed."""
    dense = next(row["answers"] for row in rows if row["table"] == "dense")
    names = list(dense)
    own = [f"{dense[n]['exact']:.0%}" if n.startswith(EXACT) else f"{dense[n]['loss']:.4f}" for n in names]
    for table in dict.fromkeys(row["table"] for row in rows if row["table"] != "dense"):
        yield f"\n{table}\n\n| gives up | copying windows | left of FLOPs, weights, KV | | {' | '.join(names)} |"
        yield "|---" * (4 + len(names)) + "|"
        yield f"| nothing | | | | {' | '.join(own)} |"
        for row in sorted((row for row in rows if row["table"] == table), key=_by_name_and_count):
            left = ", ".join(f"{row['left'][cost]:.0%}" for cost in COSTS)
            for when in ("unhealed", "folded", "healed"):
                if when not in row:  # There was nothing to fold.
                    continue
                cells = [
                    f"{row[when][n]['exact']:.0%}"
                    if n.startswith(EXACT)
                    else f"{row[when][n]['loss']:+.4f} ± {row[when][n]['error']:.4f}"
                    for n in names
                ]
                yield f"| {row['label']} | {row['copying']:.0%} | {left} | {when} | {' | '.join(cells)} |"


def _by_name_and_count(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return re.sub(r"\d+", "", row["label"]), [int(n) for n in re.findall(r"\d+", row["label"])], -row["copying"]


def main() -> None:
    """Run the jobs, and print the tables."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--text", type=Path, help="a JSON object with `text` a line; by default what the reference model never saw"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--only", default="", help="a regular expression: rows whose table and label hold it")
    parser.add_argument("--prompts", type=int, nargs=3, default=[64, 256, 1024], help="tokens, ascending")
    parser.add_argument("--counts", type=int, nargs="*", default=[3, 6, 9, 12])
    parser.add_argument("--set", type=int, nargs="+", action="append", default=[], help="blocks, a row of `sets` each")
    parser.add_argument("--decode-alone", type=int, default=4)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.75, 0.6])
    parser.add_argument("--heal-tokens", type=int, default=200_000)
    parser.add_argument("--calibration-windows", type=int, default=16)
    args = parser.parse_args()
    rows_file = args.out / "rows.jsonl"
    if not args.table:
        run(args, rows_file)
    print("\n".join(tables(written(rows_file))))


def _key(table: str, label: str, copying: float, seed: int, **others: Any) -> tuple[str, str, float, int]:
    """What tells a row from all others."""
    return table, label, copying, seed


def run(args: argparse.Namespace, rows_file: Path) -> None:
    """Run the job of every row that the file does not have yet, and append the row."""
    until = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    middle = args.counts[(len(args.counts) - 1) // 2]
    kinds: dict[str, Iterable[Row]] = {
        "depth": by_depth(args.counts, args.decode_alone),
        "peers": by_peers(args.counts, args.shares),
        "cost": by_cost(asked_of(args).costs, args.shares) if "cost" in args.rows else [],
        "calibration": by_calibration(middle, [8, 64], range(3)),
        "healing": by_healing(middle, args.heal_tokens),
        "sets": by_sets(args.set),
    }
    rows = [row for kind in args.rows for row in kinds[kind] if re.search(args.only, f"{row.table} {row.label}")]
    rows_file.touch()
    done_before = {_key(**row) for row in written(rows_file)}
    rows = [row for row in [DENSE, *rows] if _key(row.table, row.label, row.copying, row.seed) not in done_before]
    append(rows_file, measured, rows, args, until)


if __name__ == "__main__":
    main()
