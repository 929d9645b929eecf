"""Published ways to choose the blocks a model gives up, written from their papers, to compare this package's with.

All have one interface (`Peer`), see the same calibration windows and number blocks as in the dense model; `PEERS` lists
them. They choose only: how well the result serves before and after training is measured outside, alike for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.pruning.model.blocks import BlockStack, capture_calls, drop_blocks
from workers.pruning.model.plan import Blocks
from workers.pruning.search.engine import NonFiniteLoss

PROTECTED_FIRST = 4
PROTECTED_LAST = 2
"""Blocks that Shortened LLaMA's criteria marked "+" leave alone at either end."""


@dataclass(frozen=True)
class PeerPlan:
    """What a method removes, and what it took to find out."""

    removed: Blocks
    forwards: int
    """Passes of a whole model over all calibration windows."""
    spans: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Kept block that the method trains → first and last block of the span it then stands for (`spans.fit_runs`)."""


class Peer(Protocol):
    """A method: choose `remove` blocks on calibration `windows` (windows, tokens), `chunk_windows` at a time.

    Raises: ValueError when the method cannot remove so many.
    """

    def __call__(self, stack: BlockStack, windows: Tensor, remove: int, *, chunk_windows: int) -> PeerPlan: ...


def shortgpt(stack: BlockStack, windows: Tensor, remove: int, *, chunk_windows: int) -> PeerPlan:
    """The blocks of lowest block influence, BI_i = 1 − mean over tokens of cos(h_i, h_{i+1}).

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect"
    (arXiv 2403.03853), equation 1.
    """
    _check(stack, remove, range(len(stack.blocks)))
    cosine = _span_means(stack, windows, 1, chunk_windows, _cosine)
    return PeerPlan(_lowest([1 - value for value in cosine], range(len(cosine)), remove), forwards=1)


def angular_span(stack: BlockStack, windows: Tensor, remove: int, *, chunk_windows: int) -> PeerPlan:
    """The span of `remove` adjacent blocks with the least angular distance between what enters and what leaves it.

    d(l, l + n) = arccos(cos(h_l, h_{l+n})) / π at the last token of a window, averaged over windows. Read so: hidden
    states are those between blocks, before the final norm, and every span may be chosen, the last block's included.

    Source: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), the
    similarity-informed strategy: steps 1 to 3 and the angular distance of its section on layer pruning.
    """
    _check(stack, remove, range(len(stack.blocks)))
    distances = _span_means(stack, windows, remove, chunk_windows, _last_token_angle)
    first = _argmin(distances)
    return PeerPlan(frozenset(range(first, first + remove)), forwards=1)


def sleb(stack: BlockStack, windows: Tensor, remove: int, *, chunk_windows: int) -> PeerPlan:
    """One block after another, each time the one without which the calibration perplexity of what is left is lowest.

    Every candidate of every round is one forward of the whole model that is left, in a plain loop as published: this is
    the procedure that the engine's shared walk is timed against. All blocks are candidates, as in the paper; its
    published program leaves out the first and the last.

    Source: Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer
    Blocks" (ICML 2024, arXiv 2402.09025), the third of its metrics and the elimination algorithm.
    """
    _check(stack, remove, range(len(stack.blocks)))
    return next(islice(sleb_rounds(stack, windows, chunk_windows=chunk_windows), remove - 1, None))


def sleb_rounds(stack: BlockStack, windows: Tensor, *, chunk_windows: int) -> Iterator[PeerPlan]:
    """What `sleb` has removed after each round, and the forwards up to there."""
    plan = PeerPlan(frozenset(), forwards=0)
    while len(plan.removed) < len(stack.blocks) - 1:
        candidates = [block for block in range(len(stack.blocks)) if block not in plan.removed]
        losses = [_loss_without(stack, plan.removed | {block}, windows, chunk_windows) for block in candidates]
        plan = PeerPlan(plan.removed | {candidates[_argmin(losses)]}, plan.forwards + len(candidates))
        yield plan


def shortened_llama_perplexity(stack: BlockStack, windows: Tensor, remove: int, *, chunk_windows: int) -> PeerPlan:
    """The blocks whose removal alone leaves the lowest calibration perplexity, all judged once on the dense model.

    Source: Kim et al. 2024, "Shortened LLaMA: Depth Pruning for Large Language Models with Comparison of Retraining
    Methods" (arXiv 2402.02834), the criterion PPL of its section on block-level importance, one-shot pruning.
    """
    blocks = range(len(stack.blocks))
    _check(stack, remove, blocks)
    losses = [_loss_without(stack, frozenset({block}), windows, chunk_windows) for block in blocks]
    return PeerPlan(_lowest(losses, blocks, remove), forwards=len(blocks))


def shortened_llama_taylor(stack: BlockStack, windows: Tensor, remove: int, *, chunk_windows: int) -> PeerPlan:
    """The blocks of lowest Σ |w · ∂L/∂w| over all their weights, but for the first four and the last two blocks.

    L is the mean next-token cross-entropy of the calibration windows; its gradient is taken once, so the pass counted
    is one forward and one backward. The model is left as it was, its `requires_grad` flags included.

    Source: Kim et al. 2024, "Shortened LLaMA" (arXiv 2402.02834), the criterion Taylor+ of its section on block-level
    importance; the plus is the protection of the outer blocks.
    """
    candidates = range(PROTECTED_FIRST, len(stack.blocks) - PROTECTED_LAST)
    _check(stack, remove, candidates)
    weights = {block: list(stack.blocks[block].parameters()) for block in candidates}
    gradients = _gradients(stack, [weight for block in candidates for weight in weights[block]], windows, chunk_windows)
    remaining = iter(gradients)
    with torch.no_grad():
        importance = [
            sum(float((weight.float() * next(remaining)).abs().sum()) for weight in weights[block])
            for block in candidates
        ]
    return PeerPlan(_lowest(importance, candidates, remove), forwards=1)


def llm_streamline(stack: BlockStack, windows: Tensor, remove: int, *, chunk_windows: int) -> PeerPlan:
    """A span of adjacent blocks with the highest mean cos between what enters and what leaves it, made one block.

    Of the paper's lightweight networks this is the transformer block, which stays within a stock checkpoint. Read so:
    for `remove` blocks to be gone in the end, the span has `remove` + 1; its first block stays, lends the replacement
    its first weights and its place, and is trained by mean squared error to map h_l to h_{l+remove+1}.

    Source: Chen et al. 2024, "Streamlining Redundant Layers to Compress Large Language Models" (ICLR 2025,
    arXiv 2403.19135), layer pruning by cosine similarity and layer replacement.
    """
    _check(stack, remove, range(len(stack.blocks)))
    cosine = _span_means(stack, windows, remove + 1, chunk_windows, _cosine)
    first = _argmin([-value for value in cosine])
    last = first + remove
    return PeerPlan(frozenset(range(first + 1, last + 1)), forwards=1, spans={first: (first, last)})


PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "ShortGPT": shortgpt,
        "angular span": angular_span,
        "SLEB": sleb,
        "Shortened LLaMA Taylor+": shortened_llama_taylor,
        "Shortened LLaMA PPL": shortened_llama_perplexity,
        "LLM-Streamline": llm_streamline,
    }
)
"""The methods by the names their papers give them."""


def _check(stack: BlockStack, remove: int, candidates: Sequence[int]) -> None:
    most = min(len(candidates), len(stack.blocks) - 1)
    if not 1 <= remove <= most:
        raise ValueError(
            f"cannot remove {remove} of {len(stack.blocks)} blocks: the method may choose among {len(candidates)}, "
            f"and at least one block must stay"
        )


def _argmin(values: Sequence[float]) -> int:
    """Index of the lowest value; ties go to the lowest index."""
    return min(range(len(values)), key=lambda index: (values[index], index))


def _lowest(values: Sequence[float], blocks: Sequence[int], count: int) -> Blocks:
    """The `count` blocks of lowest value; ties go to the lowest block."""
    return frozenset(block for _, block in sorted(zip(values, blocks, strict=True))[:count])


def _cosine(enters: Tensor, leaves: Tensor) -> Tensor:
    return F.cosine_similarity(enters, leaves, dim=-1)  # (batch, time)


def _last_token_angle(enters: Tensor, leaves: Tensor) -> Tensor:
    cosine = F.cosine_similarity(enters[:, -1], leaves[:, -1], dim=-1)  # (batch,)
    return torch.arccos(cosine.clamp(-1, 1)) / math.pi


def _span_means(
    stack: BlockStack, windows: Tensor, length: int, chunk_windows: int, measure: Callable[[Tensor, Tensor], Tensor]
) -> list[float]:
    """Mean of `measure(h_l, h_{l+length})` for every span start l. Raises: ValueError naming one that is not finite."""
    totals = torch.zeros(len(stack.blocks) - length + 1, dtype=torch.float64)
    count = 0
    for hidden in _hidden_states(stack, windows, chunk_windows):
        for first in range(len(totals)):
            measured = measure(hidden[first].float(), hidden[first + length].float())
            totals[first] += measured.double().sum().cpu()
        count += measured.numel()
    if not torch.isfinite(totals).all():
        first = int((~torch.isfinite(totals)).nonzero()[0])
        raise ValueError(f"hidden states around block {first} are not finite on the calibration windows")
    means: list[float] = (totals / count).tolist()
    return means


@torch.no_grad()
def _hidden_states(stack: BlockStack, windows: Tensor, chunk_windows: int) -> Iterator[list[Tensor]]:
    """h_0 … h_L of the dense model, each (batch, time, hidden), chunk by chunk."""
    calls = capture_calls(stack, windows)
    for chunk in windows.split(chunk_windows):
        hidden = [stack.embed(chunk)]
        for block in range(len(stack.blocks)):
            hidden.append(calls.run(stack, block, hidden[-1]))
        yield hidden


@torch.no_grad()
def _loss_without(stack: BlockStack, removed: Blocks, windows: Tensor, chunk_windows: int) -> float:
    """Mean cross-entropy a token, by plain forwards of the pruned model; its exponential is the perplexity."""
    model = drop_blocks(stack.model, removed)
    total = math.fsum(float(_summed_loss(model, ids)) for ids in windows.split(chunk_windows))
    if not math.isfinite(total):
        raise NonFiniteLoss(f"removing blocks {sorted(removed)} gives the loss {total} on the calibration windows")
    return total / windows[:, 1:].numel()


def _summed_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # (batch, time − 1, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")


def _gradients(stack: BlockStack, weights: Sequence[nn.Parameter], windows: Tensor, chunk_windows: int) -> list[Tensor]:
    """∂/∂weight of the mean cross-entropy a token of the windows, float32."""
    flags = [weight.requires_grad for weight in weights]
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    tokens = windows[:, 1:].numel()
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for ids in windows.split(chunk_windows):
            with torch.enable_grad():
                loss = _summed_loss(stack.model, ids) / tokens
            for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
                total += gradient
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    return totals
