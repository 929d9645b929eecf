"""What healing minimises: a weighted sum of distances to the dense model and of the cross-entropy on the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from workers.pruning.model.blocks import block_stack, head
from workers.pruning.search.engine import HEAD_ELEMENTS

LOSS_LOGITS = 2**26
"""Logits of one model that the loss holds at a time; with more, they are computed again for the gradients."""
NO_TARGET = -1
"""Stands where no token follows."""


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
    """What a model makes of tokens: hidden states on the way, the last of them after the final norm, and its head."""

    hidden: Sequence[Tensor]  # each (batch, time, hidden)
    head: Callable[[Tensor], Tensor]
    """Last hidden states (…, hidden) → logits (…, vocabulary)."""
    vocabulary: int


def outputs(model: PreTrainedModel, ids: Tensor, blocks: Sequence[int]) -> Outputs:
    """A forward over whole windows `ids` (batch, time): the states that enter `blocks`, and the last."""
    with entering(model, blocks) as states:
        last: Tensor = block_stack(model).body(input_ids=ids, use_cache=False).last_hidden_state
    return with_head(model, [*states, last])


def with_head(model: PreTrainedModel, hidden: Sequence[Tensor]) -> Outputs:
    """The states that a model made, and the head that belongs to them."""
    embedding: Any = model.get_output_embeddings()
    return Outputs(hidden, partial(head, model), embedding.weight.shape[0])


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

    `targets` (batch, labelled) are the tokens that the first `labelled` outputs predict. Of each model no more than
    `LOSS_LOGITS` logits are held at a time.
    """
    parts = []
    if weights.kl or weights.label:
        kl, label = _losses_of_words(given, wanted, targets, weights)
        parts += [*([weights.kl * kl] if weights.kl else []), *([weights.label * label] if weights.label else [])]
    if weights.hidden:
        distances = [_kept_small(hidden_distance, w, g) for w, g in zip(wanted.hidden, given.hidden, strict=True)]
        parts.append(weights.hidden * torch.stack(distances).mean())
    return torch.stack(parts).sum()


def _losses_of_words(given: Outputs, wanted: Outputs, targets: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """Mean divergence of the two models' distributions, and mean −log p of the text; 0 for what does not count."""
    ours, theirs = given.hidden[-1], wanted.hidden[-1]
    following = F.pad(targets, (0, ours.shape[1] - targets.shape[1]), value=NO_TARGET).flatten()

    def summed(ours: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
        """(2,): both, summed over tokens."""
        logits = given.head(ours)
        kl = nll = torch.zeros((), device=logits.device)
        if weights.kl:
            kl = _summed_divergence(wanted.head(theirs), logits)
        if weights.label:
            labelled = targets != NO_TARGET
            nll = _summed_nll(logits[labelled], targets[labelled])
        return torch.stack([kl, nll])

    rows = max(1, LOSS_LOGITS // given.vocabulary)
    parts = list(zip(*(t.split(rows) for t in (ours.flatten(0, 1), theirs.flatten(0, 1), following)), strict=True))
    sums = summed(*parts[0]) if len(parts) == 1 else torch.stack([_kept_small(summed, *part) for part in parts]).sum(0)
    return sums[0] / len(following), sums[1] / max(1, targets.numel())


def _kept_small(part: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """`part(*given)`, of which only `given` is held until the backward pass, which computes it again."""
    if not torch.is_grad_enabled():
        return part(*given)
    found: Tensor = checkpoint(part, *given, use_reentrant=False, preserve_rng_state=False)
    return found


def kl_divergence(wanted: Tensor, given: Tensor) -> Tensor:
    """Mean KL(wanted ‖ given) in nats a token, of logits (…, vocabulary)."""
    return _summed_divergence(wanted.flatten(0, -2), given.flatten(0, -2)) / wanted[..., 0].numel()


def _summed_divergence(wanted: Tensor, given: Tensor) -> Tensor:
    """Of logits (tokens, vocabulary), a bounded number of them at a time."""
    rows = max(1, HEAD_ELEMENTS // wanted.shape[-1])
    parts = [
        F.kl_div(F.log_softmax(g.float(), -1), F.log_softmax(w.float(), -1), reduction="sum", log_target=True)
        for w, g in zip(wanted.split(rows), given.split(rows), strict=True)
    ]
    return torch.stack(parts).sum()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean −log p(target) in nats, of logits (tokens, vocabulary)."""
    return _summed_nll(logits, targets) / len(targets)


def _summed_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Of logits (tokens, vocabulary), a bounded number of them at a time."""
    rows = max(1, HEAD_ELEMENTS // logits.shape[-1])
    parts = [
        F.cross_entropy(some.float(), wanted, reduction="sum")
        for some, wanted in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(parts).sum()


def hidden_distance(wanted: Tensor, given: Tensor) -> Tensor:
    """Mean over tokens of ‖given − wanted‖² / ‖wanted‖², of hidden states (…, hidden)."""
    wanted, given = wanted.float(), given.float()
    return ((given - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)).mean()
