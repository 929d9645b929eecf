"""What it costs that decode says the first token, and what search and healing win back by following it.

    python -m benchmarks.first_token --seeds 3

For each seed the reference model becomes a pair twice, once for each half that may say the first token, searched and
healed as a job of the defaults has it. Every pair is then measured both ways, on text that neither search nor training
saw, before and after healing. A third pair is made for decode with a prefill that is healed to have the dense model's
hidden states alone: its predictions are thrown away when decode says the first token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, stdev

from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.ablations_repair import named
from benchmarks.ablations_search import WINDOW_TOKENS, cut
from benchmarks.distillation import load
from benchmarks.search import CHUNK_WINDOWS
from pdtrim.contract.spec import DistillationSpec, SearchSpec
from workers.inputs.models import ANCHOR_BYTES
from workers.pruning.model.blocks import BlockStack, block_stack, drop_blocks
from workers.pruning.model.calibration import Split
from workers.pruning.model.pair import FirstToken, first_token_losses, pd_loss
from workers.pruning.model.plan import BlockPlan, assign_actions, kv_layer_map
from workers.pruning.model.units import NOTHING, Units, blocks_of
from workers.pruning.repair.distill import (
    HEALING,
    Loss,
    continuation_loss,
    kv_tensor_names,
    sequence_loss,
    train_on,
    trainable,
)
from workers.pruning.repair.losses import LossWeights
from workers.pruning.repair.training import Journal, TrainingSettings
from workers.pruning.search.engine import ChunkedEngine, PairEngine, WholeEngine
from workers.pruning.search.memo import Memo
from workers.pruning.search.scores import Scores, block_scores
from workers.pruning.search.search import search
from workers.stages.training import HELD_OUT_WINDOWS

PROMPT_TOKENS = WINDOW_TOKENS // 2
HALVES: tuple[FirstToken, ...] = ("decode", "prefill")
HIDDEN_ALONE = LossWeights(kl=0.0)
DISTILLATION = DistillationSpec()
BATCH_WINDOWS = 16


@dataclass(frozen=True)
class Measured:
    """A pair on the validation windows, in nats, by the half that says the first token."""

    pd_loss: dict[FirstToken, float]
    first_token: dict[FirstToken, float]

    @classmethod
    def of(
        cls, prefill: PreTrainedModel, decode: PreTrainedModel, layer_map: Sequence[int], windows: Tensor
    ) -> Measured:
        pair = prefill, decode, layer_map, windows
        return cls(
            {
                half: pd_loss(*pair, prompt_tokens=PROMPT_TOKENS, first_token=half, batch=BATCH_WINDOWS)
                for half in HALVES
            },
            first_token_losses(*pair, prompt_tokens=PROMPT_TOKENS, batch=BATCH_WINDOWS),
        )

    @property
    def figures(self) -> list[float]:
        """In the order of the table's columns."""
        return [loss[half] for loss in (self.pd_loss, self.first_token) for half in HALVES]


@dataclass
class Bench:
    """One seed's windows, searches and trainings."""

    seed: int
    counts: dict[Split, int]
    remove: tuple[int, int]
    """Blocks that prefill and decode give up."""
    heal_tokens: int
    _healed_prefills: dict[LossWeights, PreTrainedModel] = field(default_factory=dict, init=False)

    @cached_property
    def windows(self) -> dict[Split, Tensor]:
        return {split: cut(split, count, self.seed) for split, count in self.counts.items()}

    @cached_property
    def dense(self) -> PreTrainedModel:
        return load()

    @cached_property
    def stack(self) -> BlockStack:
        return block_stack(self.dense)

    @cached_property
    def scores(self) -> Scores:
        return block_scores(self.stack, self.windows["calibration"], chunk_windows=CHUNK_WINDOWS)

    @cached_property
    def prefill_units(self) -> Units:
        """What prefill gives up, whichever half says the first token: that is searched on whole windows."""
        engine = WholeEngine(
            self.stack,
            self.windows["calibration"],
            "kl",
            chunk_windows=CHUNK_WINDOWS,
            anchor_bytes=ANCHOR_BYTES,
        )
        return self._best(engine, self.remove[0], NOTHING)

    @cached_property
    def decode_units(self) -> dict[FirstToken, Units]:
        """What decode gives up beside that prefill, by the half that says the first token."""
        found: dict[FirstToken, Units] = {}
        for first_token in HALVES:
            engine = PairEngine(
                self.stack,
                self.windows["calibration"],
                "kl",
                prefill=self.prefill_units,
                prompt_tokens=PROMPT_TOKENS,
                first_token=first_token,
                chunk_windows=CHUNK_WINDOWS,
                anchor_bytes=ANCHOR_BYTES,
            )
            found[first_token] = self._best(engine, self.remove[1], self.prefill_units)
        return found

    def plan(self, units: Units, fixed: BlockPlan | None = None) -> BlockPlan:
        return assign_actions(
            blocks_of(units),
            num_blocks=len(self.stack.blocks),
            scores=self.scores.cosine,
            threshold=DISTILLATION.threshold,
            merge_errors=self.scores.merge_errors,
            fixed=fixed,
        )

    def healed_prefill(self, losses: LossWeights) -> PreTrainedModel:
        """All blocks of the model, of which those that prefill keeps are healed."""
        if losses not in self._healed_prefills:
            weights, plan = load(), self.plan(self.prefill_units)
            student = drop_blocks(weights, plan.removed)
            self._train(sequence_loss(student, self.dense, plan.kept, losses), weights, plan.kept, set())
            self._healed_prefills[losses] = weights.requires_grad_(False)
        return self._healed_prefills[losses]

    def pair(self, first_token: FirstToken, prefill_losses: LossWeights) -> tuple[Units, Measured, Measured]:
        """What decode gives up, and the pair before and after healing."""
        units = self.decode_units[first_token]
        in_prefill = self.plan(self.prefill_units)
        in_decode = self.plan(units, in_prefill)
        layer_map, validation = kv_layer_map(in_prefill, in_decode), self.windows["validation"]
        pruned = [drop_blocks(self.dense, plan.removed) for plan in (in_prefill, in_decode)]

        prefill_weights, weights = self.healed_prefill(prefill_losses), load()
        weights.load_state_dict(prefill_weights.state_dict())
        prefill, decode = drop_blocks(prefill_weights, in_prefill.removed), drop_blocks(weights, in_decode.removed)
        loss = continuation_loss(
            prefill,
            decode,
            layer_map,
            self.dense,
            in_decode.kept,
            HEALING,
            prompt_tokens=PROMPT_TOKENS,
            first_token=first_token,
        )
        alone = {into for gone, into in in_decode.distilled.items() if gone not in in_prefill.distilled}
        frozen = {name for absorber in alone for name in kv_tensor_names(self.stack, absorber)}
        self._train(loss, weights, in_decode.kept, frozen)
        return (
            units,
            Measured.of(pruned[0], pruned[1], layer_map, validation),
            Measured.of(prefill, decode, layer_map, validation),
        )

    def dense_pair(self) -> Measured:
        return Measured.of(self.dense, self.dense, range(len(self.stack.blocks)), self.windows["validation"])

    def _best(self, engine: ChunkedEngine, remove: int, base: Units) -> Units:
        blocks = len(self.stack.blocks)
        found = search(
            Memo(engine.window_losses, engine.windows, racing=True, anchor=engine.anchor),
            algorithm="annealing",
            num_blocks=blocks,
            remove=remove,
            base=base,
            scores=self.scores.cosine,
            evaluations=SearchSpec().annealing_budget(blocks),
            seed=self.seed,
            on_progress=lambda done, best: None,
        )
        return found.frontier[remove].units

    def _train(self, loss: Loss, weights: PreTrainedModel, blocks: Sequence[int], frozen: set[str]) -> None:
        settings = TrainingSettings(
            steps=self.heal_tokens // (DISTILLATION.batch_windows * WINDOW_TOKENS),
            batch_windows=DISTILLATION.batch_windows,
            learning_rate=DISTILLATION.learning_rate,
            seed=self.seed,
            patience=DISTILLATION.patience,
        )
        held_out = self.windows["calibration"][:HELD_OUT_WINDOWS]
        parameters = trainable(weights, blocks, frozen=frozen)
        train_on(loss, parameters, self.windows["train"], held_out, settings, Journal())


WAYS: dict[str, tuple[FirstToken, LossWeights]] = {
    "decode": ("decode", HEALING),
    "prefill": ("prefill", HEALING),
    "decode, prefill healed on hidden states alone": ("decode", HIDDEN_ALONE),
}
"""What a pair is made for."""


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean ± standard deviation over seeds."""
    deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{deviation}"


def row(name: str, found: Sequence[Measured], than: Sequence[Measured]) -> str:
    """Means over seeds; and, where decode says the first token, how much more is lost than by another, seed by seed."""
    cells = [spread(values) for values in zip(*(one.figures for one in found), strict=True)]
    pairs = list(zip(found, than, strict=True))
    more = [
        spread([getattr(one, what)["decode"] - getattr(other, what)["decode"] for one, other in pairs], "+.4f")
        for what in ("pd_loss", "first_token")
    ]
    return f"| {name} | {' | '.join([*cells, *more])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prefill", type=int, default=2, metavar="N", help="blocks that prefill gives up")
    parser.add_argument("--decode", type=int, default=4, metavar="N", help="blocks that decode gives up")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="what pairs are made for")
    parser.add_argument("--heal-tokens", type=int, default=DISTILLATION.heal_tokens)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--validation-windows", type=int, default=128)
    args = parser.parse_args()
    counts: dict[Split, int] = {
        "calibration": args.calibration_windows,
        "validation": args.validation_windows,
        "train": args.heal_tokens // WINDOW_TOKENS + 1,
    }
    benches = [Bench(seed, counts, (args.prefill, args.decode), args.heal_tokens) for seed in range(args.seeds)]
    turns = [(name, bench) for bench in benches for name in args.ways]
    found: dict[str, list[tuple[Units, Measured, Measured]]] = {name: [] for name in args.ways}
    for name, bench in track(turns, description="pairs"):
        found[name].append(bench.pair(*WAYS[name]))

    print(
        "| made for | PD loss, first token by decode | by prefill | first token by decode | by prefill "
        "| PD loss by decode, more | first token by decode, more |"
    )
    print("|---|---|---|---|---|---|---|")
    dense = [bench.dense_pair() for bench in benches]
    _, before, after = zip(*found[args.ways[0]], strict=True)
    print(row("the dense model", dense, dense))
    for name, of_seeds in found.items():
        print(row(f"{name}, not healed", [pruned for _, pruned, _ in of_seeds], before))
    for name, of_seeds in found.items():
        print(row(f"{name}, healed", [healed for _, _, healed in of_seeds], after))
    print()
    for name, of_seeds in found.items():
        sets = "; ".join(named(units) for units, _, _ in of_seeds)
        print(f"Decode gives up, by seed, made for {name}: {sets}.")
    print(f"Prefill gives up, by seed: {'; '.join(named(bench.prefill_units) for bench in benches)}.")


if __name__ == "__main__":
    main()
