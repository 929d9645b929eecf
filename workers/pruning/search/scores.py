"""How redundant each block is, and how well a neighbour could stand in for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.pruning.model.blocks import BlockStack, capture_calls


@dataclass(frozen=True)
class Scores:
    """What scoring measured on the calibration windows."""

    cosine: list[float]
    """s_i = mean over tokens of cos(h_i, h_{i+1}); high means redundant (PDTrim; ShortGPT's influence is 1 − s_i)."""
    merge_errors: Mapping[tuple[int, int], float]
    """(removed, neighbour) → ‖f(h_a) − h_{a+2}‖² / ‖h_{a+2} − h_a‖² of the pair at a, f the neighbour alone."""

    def to_json(self) -> dict[str, Any]:
        errors = [[removed, neighbour, error] for (removed, neighbour), error in sorted(self.merge_errors.items())]
        return {"cosine": self.cosine, "merge_errors": errors}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Scores:
        """The inverse of `to_json`."""
        errors = {(int(removed), int(neighbour)): float(error) for removed, neighbour, error in content["merge_errors"]}
        return cls([float(value) for value in content["cosine"]], errors)


@torch.no_grad()
def block_scores(
    stack: BlockStack, windows: Tensor, *, chunk_windows: int, walked: Callable[[float], None] = lambda share: None
) -> Scores:
    """Score every block on `windows` (windows, tokens) in one walk; memory holds the hidden states of one chunk.

    `walked` hears after every block which share of the walk is done.
    Raises: ValueError naming the block at which a hidden state is not finite.
    """
    num_blocks = len(stack.blocks)
    calls = capture_calls(stack, windows)
    cosine = torch.zeros(num_blocks, dtype=torch.float64)
    moved = torch.zeros(num_blocks, dtype=torch.float64)
    errors: dict[tuple[int, int], float] = {}
    done = 0
    for chunk in windows.split(chunk_windows):
        before, h = None, stack.embed(chunk)  # (batch, time, hidden)
        for block in range(num_blocks):
            after = calls.run(stack, block, h)
            h = h.to(after.device)
            if not torch.isfinite(after).all():
                raise ValueError(f"block {block} gives hidden states that are not finite on the calibration windows")
            cosine[block] += F.cosine_similarity(h.float(), after.float(), dim=-1).sum().double().cpu()
            if before is not None:
                before = before.to(after.device)
                moved[block - 1] += _squared(after - before)
                alone = calls.run(stack, block, before)
                _add(errors, (block - 1, block), _squared(alone - after))
                _add(errors, (block, block - 1), _squared(h - after))
            before, h = h, after
            done += len(chunk)
            walked(done / (len(windows) * num_blocks))
    tokens = windows.numel()
    relative = {pair: error / max(float(moved[min(pair)]), 1e-30) for pair, error in errors.items()}
    return Scores((cosine / tokens).tolist(), relative)


def _squared(difference: Tensor) -> float:
    return float(difference.float().pow(2).sum())


def _add(totals: dict[tuple[int, int], float], pair: tuple[int, int], value: float) -> None:
    totals[pair] = totals.get(pair, 0.0) + value
