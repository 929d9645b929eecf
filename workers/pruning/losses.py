"""What healing minimises: a weighted sum of distances to the dense model and of the cross-entropy on the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from workers.pruning.blocks import head
from workers.pruning.engine import HEAD_ELEMENTS


@dataclass(frozen=True)
class LossWeights:
    """How much each part of the healing loss counts; a part of weight 0 is not computed."""

    kl: float = 1.0
    """KL(dense ‖ pruned) of the next-token distributions, nats a token."""
    label: float = 0.0
    """−log p of the text's next token, nats a token."""
    hidden: float = 0.0
    """‖h − h_dense‖² / ‖h_dense‖² of the last hidden state after the final norm, mean over tokens."""


@dataclass(frozen=True)
class Outputs:
    """What a model makes of tokens: the last hidden state after the final norm, and the logits."""

    hidden: Tensor  # (batch, time, hidden)
    logits: Tensor  # (batch, time, vocabulary)


def outputs(model: PreTrainedModel, ids: Tensor) -> Outputs:
    """A forward over whole windows `ids` (batch, time)."""
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return Outputs(hidden, head(model, hidden))


def healing_loss(given: Outputs, wanted: Outputs, targets: Tensor, weights: LossWeights) -> Tensor:
    """The weighted loss of a pruned model's outputs beside the dense model's for the same tokens.

    `targets` (batch, labelled) are the tokens that the first `labelled` outputs predict.
    """
    parts = []
    if weights.kl:
        parts.append(weights.kl * kl_divergence(wanted.logits, given.logits))
    if weights.label:
        predictions = given.logits[:, : targets.shape[1]].flatten(0, 1)
        parts.append(weights.label * cross_entropy(predictions, targets.flatten()))
    if weights.hidden:
        parts.append(weights.hidden * hidden_distance(wanted.hidden, given.hidden))
    return torch.stack(parts).sum()


def kl_divergence(wanted: Tensor, given: Tensor) -> Tensor:
    """Mean KL(wanted ‖ given) in nats a token, of logits (…, vocabulary); a bounded number of logits at a time."""
    rows = max(1, HEAD_ELEMENTS // wanted.shape[-1])
    parts = [
        F.kl_div(F.log_softmax(g.float(), -1), F.log_softmax(w.float(), -1), reduction="sum", log_target=True)
        for w, g in zip(wanted.flatten(0, -2).split(rows), given.flatten(0, -2).split(rows), strict=True)
    ]
    return torch.stack(parts).sum() / wanted[..., 0].numel()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean −log p(target) in nats, of logits (tokens, vocabulary); a bounded number of logits at a time."""
    rows = max(1, HEAD_ELEMENTS // logits.shape[-1])
    parts = [
        F.cross_entropy(some.float(), wanted, reduction="sum")
        for some, wanted in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(parts).sum() / len(targets)


def hidden_distance(wanted: Tensor, given: Tensor) -> Tensor:
    """Mean over tokens of ‖given − wanted‖² / ‖wanted‖², of hidden states (…, hidden)."""
    wanted, given = wanted.float(), given.float()
    return ((given - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)).mean()
