"""What parts of the repair buy, at equal training tokens: MLP width beside blocks, LoRA."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, stdev

from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.ablations_search import WINDOW_TOKENS, cut, stack_of
from benchmarks.distillation import load
from benchmarks.peers import HELD_OUT_WINDOWS, training
from benchmarks.search import CHUNK_WINDOWS
from workers.inputs.models import ANCHOR_BYTES
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.calibration import Split
from workers.pruning.model.measure import parameters
from workers.pruning.model.units import NOTHING, Units, blocks_of
from workers.pruning.model.width import channel_scores, kept_channels, narrow
from workers.pruning.repair.distill import heal, trainable
from workers.pruning.repair.lora import linear_weights, lora_adapters
from workers.pruning.repair.training import Journal
from workers.pruning.search.engine import WholeEngine
from workers.pruning.search.memo import Memo
from workers.pruning.search.scores import block_scores
from workers.pruning.search.search import search

MOST = 5
"""Units that the searches remove at most."""
CHANNEL_MULTIPLE = 8
ALPHA = 2.0
"""Of adapters, by their rank: what the service's defaults come to."""
ADAM_BYTES = 8
"""What AdamW keeps for each number: two of float32."""
LEARNING_RATE = 1e-3
WINDOWS: dict[Split, int] = {"calibration": 24, "validation": 48}


@dataclass(frozen=True)
class Recipe:
    """A pruned model, and how it is repaired."""

    units: Units = NOTHING
    """What goes."""
    channels: int | None = None
    """MLP channels that every block keeps; None for all."""
    tokens: int = 0
    rank: int | None = None
    """Of adapters; None trains the weights themselves."""
    learning_rate: float = LEARNING_RATE


@dataclass(frozen=True)
class Repaired:
    """What came of it."""

    losses: tuple[float, ...]
    """Cross-entropy a token of each validation window."""
    parameters: int
    """Of the model."""
    trained: int
    """Numbers that the optimiser changed."""
    seconds: float
    """Of processor time, for healing."""

    @property
    def perplexity(self) -> str:
        return f"{math.exp(fmean(self.losses)):.2f}"

    def beside(self, other: Repaired) -> str:
        """Perplexity less the other's, in per cent of that, ± the standard error of the windows' differences."""
        differences = [ours - theirs for ours, theirs in zip(self.losses, other.losses, strict=True)]
        error = stdev(differences) / math.sqrt(len(differences))
        return f"{100 * math.expm1(fmean(differences)):+.1f} ± {100 * error:.1f} %"


@dataclass
class Bench:
    """Data, searches and fits, each made when first needed; a recipe is carried out once."""

    heal_tokens: int
    seed: int = 0
    _done: dict[Recipe, Repaired] = field(default_factory=dict, init=False)

    @cached_property
    def windows(self) -> dict[Split, Tensor]:
        """Of every split (windows, tokens)."""
        counts: dict[Split, int] = {**WINDOWS, "train": self.heal_tokens // WINDOW_TOKENS + 1}
        return {split: cut(split, count, self.seed) for split, count in counts.items()}

    @cached_property
    def dense(self) -> PreTrainedModel:
        return stack_of(1).model

    @cached_property
    def cosine(self) -> list[float]:
        return block_scores(stack_of(1), self.windows["calibration"], chunk_windows=CHUNK_WINDOWS).cosine

    @property
    def training(self) -> argparse.Namespace:
        """What the functions of `peers.py` read."""
        return argparse.Namespace(
            batch_windows=4,
            window_tokens=WINDOW_TOKENS,
            learning_rate=LEARNING_RATE,
            seed=self.seed,
        )

    @cached_property
    def deleted(self) -> list[Units]:
        """The best set of every count."""
        engine = WholeEngine(
            stack_of(1),
            self.windows["calibration"],
            "kl",
            chunk_windows=CHUNK_WINDOWS,
            anchor_bytes=ANCHOR_BYTES,
        )
        result = search(
            Memo(engine.window_losses, engine.windows, racing=True, anchor=engine.anchor),
            algorithm="annealing",
            num_blocks=len(self.cosine),
            remove=MOST,
            base=NOTHING,
            scores=self.cosine,
            evaluations=150,
            seed=self.seed,
            on_progress=lambda done, best: None,
        )
        return [found.units for _, found in sorted(result.frontier.items())]

    def repaired(self, recipe: Recipe) -> Repaired:
        """The recipe carried out."""
        if recipe not in self._done:
            self._done[recipe] = self._repair(recipe)
        return self._done[recipe]

    def _repair(self, recipe: Recipe) -> Repaired:
        weights = load()
        if recipe.channels is not None:
            scores = channel_scores(stack_of(1), self.windows["calibration"], chunk_windows=CHUNK_WINDOWS)
            weights = narrow(weights, kept_channels(scores, recipe.channels))
        gone = blocks_of(recipe.units)
        student = drop_blocks(weights, gone)
        trained, started = 0, time.process_time()
        if recipe.tokens:
            trained = self._heal(
                recipe, weights, student, [block for block in range(len(self.cosine)) if block not in gone]
            )
        seconds = time.process_time() - started
        return Repaired(self._losses(student), parameters(student), trained, seconds)

    def _heal(self, recipe: Recipe, weights: PreTrainedModel, student: PreTrainedModel, kept: Sequence[int]) -> int:
        """Train; returns how many numbers."""
        adapted: AbstractContextManager[Mapping[str, nn.Parameter]]
        if recipe.rank is None:
            adapted = nullcontext(trainable(weights, kept, frozen=set()))
        else:
            linears = linear_weights(weights, kept, frozen=())
            adapted = lora_adapters(student, linears, rank=recipe.rank, alpha=ALPHA * recipe.rank, seed=self.seed)
        settings = argparse.Namespace(**{**vars(self.training), "learning_rate": recipe.learning_rate})
        with adapted as optimised:
            heal(
                student,
                self.dense,
                kept,
                optimised,
                windows=self.windows["train"],
                held_out=self.windows["calibration"][:HELD_OUT_WINDOWS],
                settings=training(recipe.tokens, settings),
                journal=Journal(),
            )
            return sum(parameter.numel() for parameter in optimised.values())

    def _losses(self, model: PreTrainedModel) -> tuple[float, ...]:
        windows = self.windows["validation"]
        engine = WholeEngine(block_stack(model), windows, "cross_entropy", chunk_windows=CHUNK_WINDOWS)
        return tuple(engine.window_losses([NOTHING], range(engine.windows))[NOTHING])


def named(units: Units) -> str:
    """What goes, in words."""
    return ", ".join(map(str, sorted(blocks_of(units)))) or "none"


def width(bench: Bench) -> list[str]:
    """Units, channels of every block's MLP, or both, for as many weights."""
    dense = bench.repaired(Recipe())
    config = bench.dense.config
    stack = stack_of(1)
    block = sum(parameter.numel() for parameter in stack.blocks[0].parameters())
    channel = 3 * config.hidden_size
    lines = [
        f"Dense: {dense.parameters} weights, perplexity {dense.perplexity}. {bench.heal_tokens} tokens of healing.",
        "",
        "| weights of so many blocks | blocks removed | channels of 512 | weights saved | KV bytes of dense "
        "| not healed | healed | more than blocks alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    turns = [(saved, removed) for saved in (2, 4) for removed in (saved, saved // 2, 0)]
    for saved, removed in track(turns, description="width"):
        kept = config.num_hidden_layers - removed
        narrower = round((saved - removed) * block / channel / kept / CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
        recipe = Recipe(bench.deleted[removed], config.intermediate_size - narrower if narrower else None)
        healed = bench.repaired(Recipe(recipe.units, recipe.channels, bench.heal_tokens))
        blocks_alone = bench.repaired(Recipe(bench.deleted[saved], tokens=bench.heal_tokens))
        lines.append(
            f"| {saved} | {named(recipe.units)} | {recipe.channels or config.intermediate_size} "
            f"| {dense.parameters - healed.parameters} | {kept / config.num_hidden_layers:.2f} "
            f"| {bench.repaired(recipe).perplexity} | {healed.perplexity} | {healed.beside(blocks_alone)} |"
        )
    return lines


def lora(bench: Bench) -> list[str]:
    """Adapters of every linear layer, or all weights of the kept blocks."""
    units = bench.deleted[4]
    full = Recipe(units, tokens=bench.heal_tokens)
    recipes = [
        full,
        Recipe(units, tokens=bench.heal_tokens, rank=16, learning_rate=1e-3),
        Recipe(units, tokens=bench.heal_tokens, rank=16, learning_rate=4e-3),
        Recipe(units, tokens=bench.heal_tokens, rank=4, learning_rate=4e-3),
    ]
    lines = [
        f"Without blocks {named(units)}: perplexity {bench.repaired(Recipe(units)).perplexity}, dense "
        f"{bench.repaired(Recipe()).perplexity}; {bench.heal_tokens} tokens.",
        "",
        "| healing | learning rate | perplexity | more than all weights | trained numbers | of all weights' "
        "| optimiser MB | seconds of processor time | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe in track(recipes, description="LoRA"):
        healed, base = bench.repaired(recipe), bench.repaired(full)
        lines.append(
            f"| {'all weights' if recipe.rank is None else f'LoRA, rank {recipe.rank}'} | {recipe.learning_rate} "
            f"| {healed.perplexity} | {healed.beside(base)} | {healed.trained} | {healed.trained / base.trained:.2f} "
            f"| {ADAM_BYTES * healed.trained / 1e6:.2f} | {healed.seconds:.0f} | {healed.seconds / base.seconds:.2f} |"
        )
    return lines
