"""What it costs that decode says the first token, and what healing for it wins back.

    python -m benchmarks.first_token --seeds 3

For each seed the reference model becomes a pair that is healed as a job heals it, once for each half that may say the
first token. Every pair is then measured both ways, on text that training did not see. A third pair is healed for decode
with a prefill that learns the dense model's hidden states alone: where decode says the first token, prefill's
predictions are thrown away.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from statistics import fmean, stdev

from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.ablations_search import WINDOW_TOKENS, cut
from benchmarks.distillation import load
from benchmarks.search import CHUNK_WINDOWS
from pdtrim.contract.spec import DistillationSpec
from workers.pruning.model.blocks import BlockStack, block_stack, drop_blocks
from workers.pruning.model.calibration import Split
from workers.pruning.model.pair import FirstToken, first_token_losses, pd_loss
from workers.pruning.model.plan import BlockPlan, assign_actions, kv_layer_map
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
from workers.pruning.search.scores import Scores, block_scores
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
    removed: tuple[list[int], list[int]]
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
    def plans(self) -> tuple[BlockPlan, BlockPlan]:
        """Of prefill and of decode."""
        assign = partial(
            assign_actions,
            num_blocks=len(self.stack.blocks),
            scores=self.scores.cosine,
            threshold=DISTILLATION.threshold,
            merge_errors=self.scores.merge_errors,
        )
        prefill = assign(self.removed[0])
        return prefill, assign(self.removed[1], fixed=prefill)

    @cached_property
    def layer_map(self) -> list[int]:
        return kv_layer_map(*self.plans)

    @cached_property
    def pruned(self) -> Measured:
        """The pair before healing."""
        prefill, decode = (drop_blocks(self.dense, plan.removed) for plan in self.plans)
        return Measured.of(prefill, decode, self.layer_map, self.windows["validation"])

    def healed_prefill(self, losses: LossWeights) -> PreTrainedModel:
        """All blocks of the model, of which those that prefill keeps are healed."""
        if losses not in self._healed_prefills:
            weights, plan = load(), self.plans[0]
            student = drop_blocks(weights, plan.removed)
            self._train(sequence_loss(student, self.dense, plan.kept, losses), weights, plan.kept, set())
            self._healed_prefills[losses] = weights.requires_grad_(False)
        return self._healed_prefills[losses]

    def healed(self, first_token: FirstToken, prefill_losses: LossWeights) -> Measured:
        """The pair after healing for one way of serving."""
        in_prefill, in_decode = self.plans
        prefill_weights, weights = self.healed_prefill(prefill_losses), load()
        weights.load_state_dict(prefill_weights.state_dict())
        prefill, decode = drop_blocks(prefill_weights, in_prefill.removed), drop_blocks(weights, in_decode.removed)
        loss = continuation_loss(
            prefill,
            decode,
            self.layer_map,
            self.dense,
            in_decode.kept,
            HEALING,
            prompt_tokens=PROMPT_TOKENS,
            first_token=first_token,
        )
        alone = {into for gone, into in in_decode.distilled.items() if gone not in in_prefill.distilled}
        frozen = {name for absorber in alone for name in kv_tensor_names(self.stack, absorber)}
        self._train(loss, weights, in_decode.kept, frozen)
        return Measured.of(prefill, decode, self.layer_map, self.windows["validation"])

    def dense_pair(self) -> Measured:
        return Measured.of(self.dense, self.dense, range(len(self.stack.blocks)), self.windows["validation"])

    def _train(self, loss: Loss, weights: PreTrainedModel, blocks: Sequence[int], frozen: set[str]) -> None:
        settings = TrainingSettings(
            steps=self.heal_tokens // (DISTILLATION.batch_windows * WINDOW_TOKENS),
            batch_windows=DISTILLATION.batch_windows,
            learning_rate=DISTILLATION.peak_learning_rate,
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
        spread([one.pd_loss["decode"] - other.pd_loss["decode"] for one, other in pairs], "+.4f"),
        spread([one.first_token["decode"] - other.first_token["decode"] for one, other in pairs], "+.4f"),
    ]
    return f"| {name} | {' | '.join([*cells, *more])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prefill-removed", type=int, nargs="*", default=[2, 5], help="blocks prefill gives up")
    parser.add_argument("--decode-removed", type=int, nargs="*", default=[1, 2, 5, 9], help="blocks decode gives up")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="what pairs are healed for")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heal-tokens", type=int, default=DISTILLATION.heal_tokens)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--validation-windows", type=int, default=128)
    args = parser.parse_args()
    counts: dict[Split, int] = {
        "calibration": args.calibration_windows,
        "validation": args.validation_windows,
        "train": args.heal_tokens // WINDOW_TOKENS + 1,
    }
    removed = args.prefill_removed, args.decode_removed
    benches = [Bench(seed, counts, removed, args.heal_tokens) for seed in range(args.seeds)]
    turns = [(name, bench) for bench in benches for name in args.ways]
    healed: dict[str, list[Measured]] = {name: [] for name in args.ways}
    for name, bench in track(turns, description="healing"):
        healed[name].append(bench.healed(*WAYS[name]))

    columns = ["PD loss, first token by decode", "by prefill", "first token by decode", "by prefill"]
    more = ["PD loss by decode, more", "first token by decode, more"]
    dense, pruned, first = [b.dense_pair() for b in benches], [b.pruned for b in benches], healed[args.ways[0]]
    lines = [
        f"| | {' | '.join([*columns, *more])} |",
        f"|{'---|' * 7}",
        row("dense", dense, dense),
        row("pruned", pruned, dense),
        *(row(f"healed for {name}", found, first) for name, found in healed.items()),
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
