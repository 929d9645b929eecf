"""Blocks trained to stand for several, as LLM-Streamline and PDTrim's merging do."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.pruning.model.blocks import BlockStack, block_stack, capture_calls, run_block
from workers.pruning.repair.training import Journal, TrainingSettings, train


def fit_runs(
    model: PreTrainedModel,
    spans: Mapping[int, tuple[int, int]],
    *,
    frozen: set[str],
    windows: Tensor,
    held_out: Tensor,
    settings: TrainingSettings,
    journal: Journal,
) -> tuple[dict[str, Tensor], dict[int, tuple[float, float]]]:
    """Train blocks of the dense `model`, all at once, each to stand for the span (first block, last block) it is given.

    The loss of a span a…b is ‖f(h_a) − h_{b+1}‖² / ‖h_{b+1} − h_a‖², with h from the dense model and the denominator's
    mean over `held_out`; there 1 is what deleting the whole span would give. Every block has weights of its own.
    Returns the trained tensors by their dense names and, by trained block, the held-out loss before and after; one that
    did not improve keeps its first weights. `model` is left as it was.
    """
    stack = block_stack(model)
    calls = capture_calls(stack, windows)
    fitted = {block: _copy_block(stack, block) for block in spans}
    parameters = {
        f"{stack.prefix}{block}.{name}": parameter
        for block, module in fitted.items()
        for name, parameter in module.named_parameters()
        if f"{stack.prefix}{block}.{name}" not in frozen
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def dense_states(ids: Tensor) -> list[Tensor]:
        hidden = [stack.embed(ids)]  # h_0 … h_L, each (batch, time, hidden)
        for block in range(max(last for _, last in spans.values()) + 1):
            hidden.append(calls.run(stack, block, hidden[-1]))
        return hidden

    def mean_change(first: int, last: int, hidden: Sequence[Tensor]) -> float:
        return float((hidden[last + 1] - hidden[first]).float().pow(2).mean())

    # A constant, so that the loss of a batch is the mean of its windows' losses.
    changes = dict.fromkeys(spans, 0.0)
    for ids in held_out.split(settings.batch_windows):
        hidden = dense_states(ids)
        for block, (first, last) in spans.items():
            changes[block] += mean_change(first, last, hidden) * len(ids) / len(held_out)

    def run_losses(ids: Tensor) -> dict[int, Tensor]:
        hidden = dense_states(ids)
        losses = {}
        for block, (first, last) in spans.items():
            enters, leaves = hidden[first], hidden[last + 1]
            out = run_block(fitted[block], enters, calls.kwargs[block])
            losses[block] = F.mse_loss(out.float(), leaves.float()) / changes[block]
        return losses

    @torch.no_grad()
    def held_out_losses() -> dict[int, float]:
        parts = [(run_losses(ids), len(ids) / len(held_out)) for ids in held_out.split(settings.batch_windows)]
        return {block: sum(float(losses[block]) * share for losses, share in parts) for block in spans}

    before = held_out_losses()
    train(
        parameters,
        lambda ids: torch.stack(list(run_losses(ids).values())).sum(),
        lambda: sum(held_out_losses().values()),
        windows,
        settings,
        journal,
    )
    after = held_out_losses()
    tensors = {}
    for block in spans:
        improved = after[block] < before[block]
        after[block] = min(after[block], before[block])
        for name, parameter in parameters.items():
            if name.startswith(f"{stack.prefix}{block}."):
                tensors[name] = parameter.detach() if improved else start[name]
    return tensors, {block: (before[block], after[block]) for block in spans}


def _copy_block(stack: BlockStack, index: int) -> nn.Module:
    block = copy.deepcopy(stack.blocks[index])
    return block.float().requires_grad_(False)
