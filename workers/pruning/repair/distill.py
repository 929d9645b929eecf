"""Repair of a pruned model: merge block pairs, then heal on the dense model's predictions.

Merging follows PDTrim (Zhang et al., ACL 2026): the pair {removed, absorber} becomes one block, started from the
absorber and trained to map the hidden state that enters the pair to the one that leaves it. Healing distils the
dense model: the prefill model on whole sequences, the decode model on continuations that read the frozen prefill
model's KV cache.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.pruning.model.blocks import BlockStack, block_stack, capture_calls, head, run_block
from workers.pruning.model.pair import pair_hidden
from workers.pruning.repair.losses import LossWeights, Outputs, entering, healing_loss, outputs
from workers.pruning.repair.training import Journal, TrainingResult, TrainingSettings, train

HEALING = LossWeights()
"""What healing minimises unless told otherwise."""
KV_TENSOR = re.compile(
    r"(^|\.)(input_layernorm|ln_1|self_attn_layer_norm|k_proj|v_proj|k_norm|qkv_proj|query_key_value|c_attn)\."
)
"""In a tensor's name: that it shapes its block's keys and values for a given input."""


def kv_tensor_names(stack: BlockStack, block: int) -> set[str]:
    """Names of the tensors through which a block makes its keys and values, all of them where that cannot be told.

    Frozen in a block that is distilled for decode alone, so that what prefill sends stays valid.
    """
    names = {f"{stack.prefix}{block}.{name}" for name, _ in stack.blocks[block].named_parameters()}
    return {name for name in names if KV_TENSOR.search(name)} or names


def trainable(model: PreTrainedModel, blocks: Sequence[int], *, frozen: set[str]) -> dict[str, nn.Parameter]:
    """The parameters of `blocks` in the dense model's numbering, except `frozen`; only these require gradients."""
    prefix = block_stack(model).prefix
    prefixes = tuple(f"{prefix}{block}." for block in blocks)
    chosen = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes) and name not in frozen)
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` into the parameters of those names. Raises: KeyError naming one that does not exist."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def merge(
    model: PreTrainedModel,
    pairs: Mapping[int, int],
    *,
    frozen: set[str],
    windows: Tensor,
    held_out: Tensor,
    settings: TrainingSettings,
    journal: Journal,
) -> tuple[dict[str, Tensor], dict[int, tuple[float, float]]]:
    """Fit every pair (removed → absorber) of the dense `model` at once, as `fit_spans` does.

    Returns the trained tensors by their dense names and, by removed block, the held-out loss before and after.
    """
    spans = {absorber: (min(removed, absorber), max(removed, absorber)) for removed, absorber in pairs.items()}
    tensors, losses = fit_spans(
        model, spans, frozen=frozen, windows=windows, held_out=held_out, settings=settings, journal=journal
    )
    return tensors, {removed: losses[absorber] for removed, absorber in pairs.items()}


def fit_spans(
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

    def span_losses(ids: Tensor) -> dict[int, Tensor]:
        hidden = dense_states(ids)
        losses = {}
        for block, (first, last) in spans.items():
            enters, leaves = hidden[first], hidden[last + 1]
            with _mixed_precision(ids.device):
                out = run_block(fitted[block], enters, calls.kwargs[block])
            losses[block] = F.mse_loss(out.float(), leaves.float()) / changes[block]
        return losses

    @torch.no_grad()
    def held_out_losses() -> dict[int, float]:
        parts = [(span_losses(ids), len(ids) / len(held_out)) for ids in held_out.split(settings.batch_windows)]
        return {block: sum(float(losses[block]) * share for losses, share in parts) for block in spans}

    before = held_out_losses()
    train(
        parameters,
        lambda ids: torch.stack(list(span_losses(ids).values())).sum(),
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


def fitted_block(stack: BlockStack, absorber: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The absorber with the trained `tensors` of its pair, by their dense names, to run in its place."""
    block = copy.deepcopy(stack.blocks[absorber]).requires_grad_(False)
    parameters = dict(block.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name.removeprefix(f"{stack.prefix}{absorber}.")].copy_(tensor)
    return block


def _copy_block(stack: BlockStack, index: int) -> nn.Module:
    block = copy.deepcopy(stack.blocks[index])
    return block.float().requires_grad_(False)


Loss = Callable[[Tensor], Tensor]
"""Windows of token ids (batch, time) → the mean loss of a model on them."""


def sequence_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, kept: Sequence[int], weights: LossWeights
) -> Loss:
    """The healing loss on whole windows of the pruned `student`, whose blocks are the teacher's `kept` ones."""
    ours, theirs = _matched(kept, weights)

    def loss(ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = outputs(teacher, ids, theirs)
        with _mixed_precision(ids.device):
            given = outputs(student, ids, ours)
        return healing_loss(given, wanted, ids[:, 1:], weights)

    return loss


def _matched(kept: Sequence[int], weights: LossWeights) -> tuple[Sequence[int], Sequence[int]]:
    """Blocks of the student and of the teacher that the compared hidden states enter: all but the student's first."""
    return (range(1, len(kept)), kept[1:]) if weights.hidden else ((), ())


def continuation_loss(
    prefill: PreTrainedModel,
    student: PreTrainedModel,
    layer_map: Sequence[int],
    teacher: PreTrainedModel,
    kept: Sequence[int],
    weights: LossWeights,
    *,
    prompt_tokens: int,
) -> Loss:
    """The healing loss of the decode `student` on what follows the prompt, reading the frozen prefill model's cache.

    The student's blocks are the teacher's `kept` ones. The first token after the prompt is the prefill model's, so the
    loss is over the others.
    """
    ours, theirs = _matched(kept, weights)

    def loss(ids: Tensor) -> Tensor:
        with torch.no_grad(), entering(teacher, theirs) as states:
            last = teacher.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            hidden = [state[:, prompt_tokens:] for state in (*states, last)]
            wanted = Outputs(hidden, head(teacher, hidden[-1]))
        with _mixed_precision(ids.device), entering(student, ours) as states:
            last = pair_hidden(prefill, student, layer_map, ids, prompt_tokens)[1]
            given = Outputs([*states, last], head(student, last))
        return healing_loss(given, wanted, ids[:, prompt_tokens + 1 :], weights)

    return loss


@torch.no_grad()
def mean_loss(loss_of: Loss, windows: Tensor, batch: int) -> float:
    """The loss over all `windows` (windows, time), `batch` of them at a time."""
    return sum(float(loss_of(ids)) * len(ids) for ids in windows.split(batch)) / len(windows)


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    kept: Sequence[int],
    parameters: Mapping[str, nn.Parameter],
    *,
    losses: LossWeights = HEALING,
    windows: Tensor,
    held_out: Tensor,
    settings: TrainingSettings,
    journal: Journal,
) -> TrainingResult:
    """Train `parameters` of the pruned `student` as `sequence_loss` says."""
    return train_on(sequence_loss(student, teacher, kept, losses), parameters, windows, held_out, settings, journal)


def train_on(
    loss_of: Loss,
    parameters: Mapping[str, nn.Parameter],
    windows: Tensor,
    held_out: Tensor,
    settings: TrainingSettings,
    journal: Journal,
) -> TrainingResult:
    """Train `parameters` on `loss_of` windows (windows, time); the best of them on `held_out` stay."""

    def held_out_loss() -> float:
        return mean_loss(loss_of, held_out, settings.batch_windows)

    return train(parameters, loss_of, held_out_loss, windows, settings, journal)


def _mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 where the device has it; on the CPU nothing, so that results are bit-equal."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
