"""What healing minimises: a weighted sum of distances to the dense model and of the cross-entropy on the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.pruning.model.blocks import block_stack, head
from workers.pruning.search.engine import HEAD_ELEMENTS


@dataclass(frozen=True)
class LossWeights:
    """How much each part of the healing loss counts; a part of weight 0 is not computed."""

    kl: float = 1.0
    """KL(dense ‖ pruned) of the next-token distributions, nats a token."""
    label: float = 0.0
    """−log p of the text's next token, nats a token."""
    hidden: float = 20.0
    """‖h − h_dense‖² / ‖h_dense‖² of the hidden states between the kept blocks, mean over states and tokens.

    Each block before a gap is so taught to stand for the blocks that are gone, as PDTrim's merged ones are.
    """


@dataclass(frozen=True)
class Outputs:
    """What a model makes of tokens: hidden states on the way, the last of them after the final norm, and the logits."""

    hidden: Sequence[Tensor]  # each (batch, time, hidden)
    logits: Tensor  # (batch, time, vocabulary)


def outputs(model: PreTrainedModel, ids: Tensor, blocks: Sequence[int]) -> Outputs:
    """A forward over whole windows `ids` (batch, time): the states that enter `blocks`, and the last."""
    with entering(model, blocks) as states:
        last: Tensor = block_stack(model).body(input_ids=ids, use_cache=False).last_hidden_state
    return Outputs([*states, last], head(model, last))


@contextmanager
def entering(model: PreTrainedModel, blocks: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collects the hidden states (batch, time, hidden) that enter `blocks`, ascending, in a forward meanwhile."""
    states: list[Tensor] = []

    def note(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        states.append(inputs[0])

    modules = block_stack(model).blocks
    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(modules[block].register_forward_pre_hook(note))
        yield states


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
        distances = [hidden_distance(w, g) for w, g in zip(wanted.hidden, given.hidden, strict=True)]
        parts.append(weights.hidden * torch.stack(distances).mean())
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
