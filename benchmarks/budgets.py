"""Quality at equal cost: whole blocks, single kinds of parts and their mixture, each down to the same budget, unhealed.

    python -m benchmarks.budgets

For prefill the operations of a prompt, for decode the bytes of weights and of keys and values. Each set is found on
calibration windows, of which a quarter count a second time with the prompt said again; losses are of continuations by
the pair on validation windows, above the dense model's.
"""

from __future__ import annotations

import argparse

from rich.progress import track
from torch import Tensor

from benchmarks.parts import COPYING_SHARE, PROMPT_TOKENS, WAYS, add_subject, losses_of, more, subject
from workers.pruning.model.blocks import BlockStack
from workers.pruning.model.calibration import interleaved, said_again
from workers.pruning.model.costs import Cost, costs_of
from workers.pruning.model.units import NOTHING, Kind, Unit, Units
from workers.pruning.search.budget import within_budget
from workers.pruning.search.memo import Memo

OFFERED: dict[Cost, tuple[str, tuple[Kind, ...]]] = {
    "flops": ("all but keys and values, prefill", ("kv_only", "mlp")),
    "weight_bytes": ("blocks, decode", ("block", "attention", "mlp")),
    "kv_bytes": ("blocks, decode", ("block", "attention")),
}
"""For each budget, in which half units go, and which."""


def rows(stack: BlockStack, calibration: Tensor, validation: Tensor, cost: Cost, share: float) -> list[str]:
    """A line for nested blocks, where prefill is to save, and one for every walk of the budget's search."""
    name, kinds = OFFERED[cost]
    way = next(way for way in WAYS if way.name == name)
    costs = costs_of(stack, cost, calibration[:1, :PROMPT_TOKENS])
    again = said_again(calibration[: round(COPYING_SHARE * len(calibration))], PROMPT_TOKENS)
    mixed, _ = interleaved(calibration, again)
    sets: list[tuple[str, Units, str]] = []
    searches = [(way, kinds)]
    if cost == "flops":
        searches.append((next(way for way in WAYS if way.name == "blocks, both halves"), ("block",)))
    for of, offered_kinds in searches:
        losses = losses_of(stack, mixed, of, "kl")
        offered = [Unit(block, kind) for block in range(len(stack.blocks)) for kind in offered_kinds]
        memo = Memo(losses, len(mixed))
        result = within_budget(
            memo, costs, base=NOTHING, offered=offered, share=share, on_step=lambda share, best: None
        )
        for walk in result.walks:
            last = walk.steps[-1][1]
            label = f"{' or '.join(walk.kinds)}{', nested in both halves' if of.prefill and of.decode else ''}"
            sets.append((f"{label}{'' if walk.met else ' (budget not kept)'}", last.units, of.name))
        if len(result.walks) > 1:
            sets.append(("the best of these walks", result.chosen.units, of.name))
    lines = []
    for label, units, of_name in sets:
        of = next(way for way in WAYS if way.name == of_name)
        cells = [
            more(losses_of(stack, held_out, of, "cross_entropy"), units, len(held_out))
            for held_out in (validation, said_again(validation, PROMPT_TOKENS))
        ]
        gone = ", ".join(
            f"{kind} {' '.join(str(unit.block) for unit in sorted(units) if unit.kind == kind)}"
            for kind in ("block", "kv_only", "attention", "mlp")
            if any(unit.kind == kind for unit in units)
        )
        lines.append(f"| {cost} {share:.0%} | {label} | {costs.share(units):.1%} | {gone} | {cells[0]} | {cells[1]} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_subject(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.6])
    parser.add_argument("--costs", nargs="+", choices=list(OFFERED), default=list(OFFERED))
    args = parser.parse_args()
    stack, windows = subject(args)
    lines = ["| budget | may give up | left | gives up | text | copying |", "|---|---|---|---|---|---|"]
    for cost, share in track([(cost, share) for cost in args.costs for share in args.shares], description="budgets"):
        lines += rows(stack, windows["calibration"], windows["validation"], cost, share)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
