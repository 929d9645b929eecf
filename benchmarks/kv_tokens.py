"""What sending fewer prompt tokens costs: PD loss against bytes sent for a pair of the reference model, as a table.

    python benchmarks/kv_tokens.py --prefill-removed 2 5 --decode-removed 2 4 5 9 --ratios 2 4.95

Rules are chosen on calibration windows and judged on validation windows. The pair is pruned, not healed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import workers
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.model.calibration import Split, cut_windows, stdlib_documents, token_stream
from workers.pruning.model.pair import FirstToken, handed_tokens, pd_loss
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.serving.handover import EVERY_TOKEN, KvTokenRule
from workers.pruning.serving.kv_tokens import (
    pd_loss_with_rule,
    prompt_attention,
    rule_by_loss,
    rule_by_ratio,
    rule_by_threshold,
    sent_bytes,
)

REFERENCE = Path(workers.__file__).parent / "reference_model"
BATCH_WINDOWS = 8


def edges(text: str) -> tuple[int, int]:
    """`4:28` → the first 4 and the last 28 tokens."""
    first, last = text.split(":")
    return int(first), int(last)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prefill-removed", type=int, nargs="*", default=[2, 5], help="blocks prefill gives up")
    parser.add_argument("--decode-removed", type=int, nargs="*", default=[2, 4, 5, 9], help="blocks decode gives up")
    parser.add_argument("--prompt-tokens", type=int, default=192)
    parser.add_argument("--first-token", choices=["decode", "prefill"], default="decode", help="the half that says it")
    parser.add_argument("--continuation-tokens", type=int, default=64)
    parser.add_argument(
        "--edges", type=edges, nargs="+", default=[(4, 28), (16, 48)], metavar="A:B", help="first and last tokens sent"
    )
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.8, 0.7, 0.5], help="least edge mass")
    parser.add_argument("--ratios", type=float, nargs="*", default=[2, 3, 4.95], help="dense bytes over bytes sent")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--validation-windows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@dataclass(frozen=True)
class Pair:
    """The reference model, dense and as a pruned pair, and the windows on which it is measured."""

    dense: PreTrainedModel
    prefill: PreTrainedModel
    decode: PreTrainedModel
    layer_map: list[int]
    windows: dict[Split, Tensor]
    prompt_tokens: int
    first_token: FirstToken

    @classmethod
    def prepared(cls, args: argparse.Namespace) -> Pair:
        tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
        counts: dict[Split, int] = {"calibration": args.calibration_windows, "validation": args.validation_windows}
        tokens = args.prompt_tokens + args.continuation_tokens
        windows = {
            split: cut_windows(
                token_stream(stdlib_documents(split), tokenizer), count=count, tokens=tokens, seed=args.seed
            )
            for split, count in counts.items()
        }
        dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
        dense.eval().requires_grad_(False)
        plans = [
            BlockPlan(dense.config.num_hidden_layers, frozenset(removed))
            for removed in (args.prefill_removed, args.decode_removed)
        ]
        prefill, decode = (drop_blocks(dense, plan.removed) for plan in plans)
        return cls(dense, prefill, decode, kv_layer_map(*plans), windows, args.prompt_tokens, args.first_token)

    def loss(self, rule: KvTokenRule, split: Split) -> float:
        return pd_loss_with_rule(
            self.prefill,
            self.decode,
            self.layer_map,
            rule,
            self.windows[split],
            prompt_tokens=self.prompt_tokens,
            first_token=self.first_token,
            batch=BATCH_WINDOWS,
        )

    def dense_loss(self) -> float:
        blocks = range(self.dense.config.num_hidden_layers)
        windows = self.windows["validation"]
        return pd_loss(
            self.dense,
            self.dense,
            blocks,
            windows,
            prompt_tokens=self.prompt_tokens,
            first_token=self.first_token,
            batch=BATCH_WINDOWS,
        )

    def attention(self) -> Tensor:
        return prompt_attention(
            self.prefill,
            self.decode,
            self.layer_map,
            self.windows["calibration"],
            prompt_tokens=self.prompt_tokens,
            first_token=self.first_token,
            batch=BATCH_WINDOWS,
        )


Choice = tuple[str, Callable[[], KvTokenRule]]
"""What a rule is called, and how to find it."""


def choices(pair: Pair, args: argparse.Namespace) -> Iterator[Choice]:
    """Every rule that the arguments ask for."""
    attention = pair.attention()
    configs = pair.dense.config, pair.decode.config

    @cache
    def calibration_loss(rule: KvTokenRule) -> float:
        return pair.loss(rule, "calibration")

    yield "every token", lambda: EVERY_TOKEN
    for first, last in args.edges:
        for threshold in args.thresholds:
            yield (
                f"edge mass of {first} + {last} ≥ {threshold:g}",
                partial(rule_by_threshold, attention, first=first, last=last, threshold=threshold),
            )
    for ratio in args.ratios:
        for first, last in args.edges:
            yield (
                f"ratio {ratio:g} by edge mass of {first} + {last}",
                partial(rule_by_ratio, attention, *configs, first=first, last=last, ratio=ratio),
            )
        yield f"ratio {ratio:g} by loss", partial(rule_by_loss, calibration_loss, attention, *configs, ratio=ratio)


def main() -> None:
    args = arguments()
    pair = Pair.prepared(args)
    kept = BlockPlan(pair.dense.config.num_hidden_layers, frozenset(args.decode_removed)).kept
    # The checkpoint's own number format, in which a server would send.
    handed = handed_tokens(args.prompt_tokens, args.first_token)
    dense_bytes = sent_bytes(pair.dense.config, EVERY_TOKEN, handed, torch.bfloat16)
    full = pair.loss(EVERY_TOKEN, "validation")
    lines = [
        "| rule | first + last | restricted blocks | bytes a request | dense / sent | PD loss | more |",
        "|---|---|---|---|---|---|---|",
        f"| dense model | – | – | {dense_bytes} | 1.00 | {pair.dense_loss():.4f} | – |",
    ]
    for name, choose in track(list(choices(pair, args)), description="choosing"):
        rule = choose()
        size = sent_bytes(pair.decode.config, rule, handed, torch.bfloat16)
        loss = pair.loss(rule, "validation")
        blocks = ", ".join(str(kept[layer]) for layer in sorted(rule.layers)) or "none"
        tokens = f"{rule.first} + {rule.last}" if rule.layers else "–"
        cells = (name, tokens, blocks, size, f"{dense_bytes / size:.2f}", f"{loss:.4f}", f"{loss - full:+.4f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
