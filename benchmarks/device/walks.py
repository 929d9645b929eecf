"""Parts on the reference model: losses of sets of removed blocks, and the sets that a search finds by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.device.bench import BATCH_WINDOWS, ON_CPU, REFERENCE, Bench, Place
from benchmarks.device.findings import Findings
from workers.pruning.model.blocks import BlockStack, block_stack, drop_blocks, prove
from workers.pruning.model.measure import quality
from workers.pruning.model.pair import pd_loss
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.model.streaming import load_streamed
from workers.pruning.model.units import NOTHING, Units, blocks_of, deleting
from workers.pruning.search.engine import ChunkedEngine, PairEngine, WholeEngine
from workers.pruning.search.memo import MeasuredSet, Memo
from workers.pruning.search.scores import block_scores
from workers.pruning.search.search import search

GONE_FROM_PREFILL = deleting({4, 9})
"""What the prefill model goes without whose continuations are measured."""
ANCHOR_BYTES = 256 * 2**20
Losses = dict[Units, float]


def pruned(model: PreTrainedModel, candidates: Sequence[Units]) -> dict[Units, PreTrainedModel]:
    """The model without each of the sets of blocks; all share its weights."""
    return {units: drop_blocks(model, blocks_of(units)) for units in candidates}


@torch.no_grad()
def plain_losses(models: Mapping[Units, PreTrainedModel], windows: Tensor) -> Losses:
    """Cross-entropy of whole models, each by forwards of its own, on windows (windows, time)."""
    losses = {}
    for units, model in models.items():
        total = 0.0
        for ids in windows.split(BATCH_WINDOWS):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        losses[units] = total / windows[:, 1:].numel()
    return losses


def largest_difference(one: Losses, other: Losses) -> float:
    """Of the losses of the same candidates; not a number where one of them is none."""
    differences = [abs(one[units] - other[units]) for units in one]
    return max(differences, key=lambda difference: (difference != difference, difference))


def single_removals(
    model: PreTrainedModel, windows: Tensor, prompt_tokens: int
) -> Iterator[tuple[str, Losses, Losses]]:
    """Kinds of losses on windows (windows, time): by an engine, and by whole models."""
    stack = block_stack(model)
    blocks = range(len(stack.blocks))
    singles = [NOTHING, *(deleting({block}) for block in blocks)]
    models = pruned(model, singles)
    engine = WholeEngine(stack, windows, "cross_entropy", chunk_windows=BATCH_WINDOWS)
    yield "cross-entropy", engine.losses(singles), plain_losses(models, windows)

    by_model = {units: quality(one, model, windows, batch=BATCH_WINDOWS).kl_to_dense for units, one in models.items()}
    yield "KL to dense", engine.losses(singles, "kl"), by_model

    gone = GONE_FROM_PREFILL
    sets = [gone, *(gone | deleting({block}) for block in blocks if block not in blocks_of(gone))]
    pair_engine = PairEngine(
        stack,
        windows,
        "cross_entropy",
        prefill=gone,
        prompt_tokens=prompt_tokens,
        first_token="decode",
        chunk_windows=BATCH_WINDOWS,
    )
    models = pruned(model, sets)
    by_model = {
        units: pd_loss(
            models[gone],
            decode,
            kv_layer_map(BlockPlan(len(blocks), blocks_of(gone)), BlockPlan(len(blocks), blocks_of(units))),
            windows,
            prompt_tokens=prompt_tokens,
            first_token="decode",
            batch=BATCH_WINDOWS,
        )
        for units, decode in models.items()
    }
    yield "cross-entropy of continuations", pair_engine.losses(sets), by_model


def walk(bench: Bench) -> Findings:
    """The engines' losses of single removals beside those of whole models, and beside the CPU's."""
    findings = Findings()
    table = findings.table(
        "Losses of single removals by the engines, largest differences in nats a token:",
        {"where": "", "loss": "", "from whole models": ".1e", "from the CPU": ".1e", "allowed": ".0e"},
    )
    on_cpu: dict[str, Losses] = {}

    def compared(where: str, kind: str, by_engine: Losses, by_model: Losses, allowed: float) -> None:
        from_model = largest_difference(by_engine, by_model)
        from_cpu = largest_difference(by_engine, on_cpu.setdefault(kind, by_engine))
        table.add(where, kind, from_model, from_cpu, allowed)
        findings.judge(f"{where}, {kind}, from whole models", from_model, allowed)
        findings.judge(f"{where}, {kind}, from the CPU", from_cpu, allowed)

    for place in (ON_CPU, *bench.places):
        with place.numbers():
            model, windows = place.load(), bench.windows["calibration"].to(place.device)
            prove(block_stack(model))
            for kind, by_engine, by_model in single_removals(model, windows, bench.prompt_tokens):
                compared(place.name, kind, by_engine, by_model, place.tolerance)

    place = bench.of_jobs
    model, reader = load_streamed(REFERENCE, dtype=place.dtype, device=place.device)
    windows = bench.windows["calibration"].to(place.device)
    singles = list(on_cpu["cross-entropy"])
    streamed = WholeEngine(block_stack(model), windows, "cross_entropy", chunk_windows=len(windows)).losses(singles)
    where = f"{place.name}, blocks read from disk one at a time"
    compared(where, "cross-entropy", streamed, plain_losses(pruned(place.load(), singles), windows), place.tolerance)
    findings.judge(f"{where}, blocks read", reader.blocks_read, len(block_stack(model).blocks))
    return findings


@dataclass(frozen=True)
class Searcher:
    """The reference model and its windows (windows, time) at one place, to be searched."""

    place: Place
    stack: BlockStack
    windows: Tensor
    prompt_tokens: int

    @property
    def chunk_windows(self) -> int:
        """As workers have it: few at a time on a CPU, whose caches are small."""
        return BATCH_WINDOWS if self.place.device.type == "cpu" else len(self.windows)

    @cached_property
    def scores(self) -> Sequence[float]:
        """How redundant each block is."""
        return block_scores(self.stack, self.windows, chunk_windows=self.chunk_windows).cosine

    def engine(self, prefill: Units | None) -> ChunkedEngine:
        """On whole windows, or on continuations of prompts that a prefill model without these blocks processed."""
        if prefill is None:
            return WholeEngine(
                self.stack, self.windows, "kl", chunk_windows=self.chunk_windows, anchor_bytes=ANCHOR_BYTES
            )
        return PairEngine(
            self.stack,
            self.windows,
            "kl",
            prefill=prefill,
            prompt_tokens=self.prompt_tokens,
            first_token="decode",
            chunk_windows=self.chunk_windows,
            anchor_bytes=ANCHOR_BYTES,
        )

    def search(self, engine: ChunkedEngine, remove: int, base: Units) -> Mapping[int, MeasuredSet]:
        """The best set of every count by the search of a job that says nothing about it."""
        return search(
            Memo(engine.window_losses, engine.windows, racing=True, anchor=engine.anchor),
            algorithm="annealing",
            num_blocks=len(self.scores),
            remove=remove,
            base=base,
            scores=self.scores,
            evaluations=150,
            seed=0,
            on_progress=lambda done, best: None,
        ).frontier


def searching(bench: Bench) -> Findings:
    """The sets that a search on the device ends on, and how much worse they are, by the CPU's losses, than the CPU's.

    Decode is searched from the set that the CPU found for prefill.
    """
    findings = Findings()
    table = findings.table(
        "Sets found by the search, KL in nats a token:",
        {
            "stage": "",
            "where": "",
            "seconds": ".1f",
            "removed": "",
            "loss": ".4f",
            "loss of the CPU's set": ".4f",
            "worse than the CPU's set, by the CPU": ".1e",
            "allowed": ".0e",
        },
    )
    searchers = [
        Searcher(place, block_stack(place.load()), bench.windows["calibration"].to(place.device), bench.prompt_tokens)
        for place in (ON_CPU, bench.float32, bench.bfloat16)
    ]
    prefill: Units | None = None
    for stage, remove in zip(("prefill", "decode"), bench.size.remove, strict=True):
        base = prefill or NOTHING
        cpu_sets: dict[int, Units] = {}
        engines = [searcher.engine(prefill) for searcher in searchers]
        for searcher, engine in zip(searchers, engines, strict=True):
            place = searcher.place
            start = bench.now()
            frontier = searcher.search(engine, remove, base)
            seconds = bench.now() - start
            for count in range(len(base) + 1, remove + 1):
                found = frontier[count]
                cpu_set = cpu_sets.setdefault(count, found.units)
                by_cpu = engines[0].losses([found.units, cpu_set])
                worse = by_cpu[found.units] - by_cpu[cpu_set]
                # Both sets' losses may be off by the tolerance.
                allowed = 2 * place.tolerance
                of_cpu_set = engine.losses([cpu_set])[cpu_set]
                table.add(stage, place.name, seconds, listed(found.blocks), found.loss, of_cpu_set, worse, allowed)
                findings.judge(f"{place.name}, {stage}, loss of the {count} blocks found", worse, allowed)
        prefill = cpu_sets[remove]
    return findings


def listed(blocks: Iterable[int]) -> str:
    """The numbers of blocks, ascending."""
    return ", ".join(map(str, sorted(blocks)))
