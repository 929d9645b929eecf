"""Windows of conversations, in which only answers count for the healing loss.

Such windows are one tensor, as others are: a token on which no loss falls is written as the number −1 − token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from workers.pruning.repair.losses import LossWeights, Outputs, healing_loss


def marked(ids: Tensor, counted: Tensor) -> Tensor:
    """Windows of token ids (windows, tokens) in which it is written which of them are `counted`, of the same shape."""
    return torch.where(counted, ids, ~ids)


def unmarked(windows: Tensor) -> tuple[Tensor, Tensor | None]:
    """The token ids of windows (windows, tokens), and whether each counts; None where all do."""
    counted = windows >= 0
    return (windows, None) if counted.all() else (torch.where(counted, windows, ~windows), counted)


def answers_loss(
    given: Outputs, wanted: Outputs, targets: Tensor, counted: Tensor | None, weights: LossWeights
) -> Tensor:
    """The healing loss of the outputs whose `targets` (batch, labelled) are `counted`: each window's mean, averaged.

    A window in which nothing counts adds nothing.
    """
    if counted is None:
        return healing_loss(given, wanted, targets, weights)
    losses = [given.hidden[-1].sum() * 0.0]  # So that there is something to go back through.
    for number, chosen in enumerate(counted):
        if (places := chosen.nonzero()[:, 0]).numel():
            ours, theirs = (_at(made, number, places) for made in (given, wanted))
            losses.append(healing_loss(ours, theirs, targets[number, places].unsqueeze(0), weights))
    return torch.stack(losses).sum() / len(counted)


def _at(made: Outputs, window: int, places: Tensor) -> Outputs:
    """What a model made of some tokens of one window, as a batch of it alone."""
    return replace(made, hidden=[state[window, places].unsqueeze(0) for state in made.hidden])
