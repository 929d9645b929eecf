"""Repair of a pruned model: healing on the dense model's predictions.

Healing distils the dense model: the prefill model on whole sequences, the decode model on continuations that read the
frozen prefill model's KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from workers.pruning.model.blocks import BlockStack, block_stack
from workers.pruning.model.cache import held_tensors
from workers.pruning.model.pair import FirstToken, handed_tokens, pair_hidden
from workers.pruning.repair.answers import answers_loss, unmarked
from workers.pruning.repair.losses import LossWeights, Outputs, entering, outputs, with_head
from workers.pruning.repair.targets import Targets
from workers.pruning.repair.training import Journal, TrainingResult, TrainingSettings, train

HEALING = LossWeights()
"""What healing minimises unless told otherwise."""


def kv_tensor_names(stack: BlockStack, block: int) -> set[str]:
    """Names of the tensors through which a block makes its keys and values: those that have a gradient of them.

    Frozen in a block that is distilled for decode alone, so that what prefill sends stays valid.
    """
    module, cache = stack.blocks[block], DynamicCache(config=stack.model.config)
    ids = torch.zeros((1, 2), dtype=torch.long, device=stack.device)
    h, calls = stack.enter(ids)
    parameters = dict(module.named_parameters())
    required = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        module.requires_grad_(True)
        with torch.enable_grad():
            calls.run(stack, block, h.detach(), cache)
            held = torch.stack([tensor.float().sum() for tensor in held_tensors(cache.layers[block])]).sum()
        gradients = torch.autograd.grad(held, list(parameters.values()), allow_unused=True)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
    made = zip(parameters, gradients, strict=True)
    return {f"{stack.prefix}{block}.{name}" for name, gradient in made if gradient is not None}


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


Loss = Callable[[Tensor], Tensor]
"""Windows of token ids (batch, time), `marked` or not → the mean loss of a model on them, or on what counts in them."""


Teacher = PreTrainedModel | Targets
"""The dense model, or what was kept of it."""


def sequence_loss(student: PreTrainedModel, teacher: Teacher, kept: Sequence[int], weights: LossWeights) -> Loss:
    """The healing loss on whole windows of the pruned `student`, whose blocks are the teacher's `kept` ones."""
    ours, theirs = _matched(kept, weights)

    def loss(windows: Tensor) -> Tensor:
        ids, counted = unmarked(windows)
        wanted = _wanted(teacher, student, ids, theirs, start=0)
        with _mixed_precision(student):
            given = outputs(student, ids, ours)
        return answers_loss(_in_mixed_precision(given, student), wanted, *_after(0, ids, counted), weights)

    return loss


def _matched(kept: Sequence[int], weights: LossWeights) -> tuple[Sequence[int], Sequence[int]]:
    """Blocks of the student and of the teacher that the compared hidden states enter: all but the student's first."""
    return (range(1, len(kept)), kept[1:]) if weights.hidden else ((), ())


def continuation_loss(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    layer_map: Sequence[int],
    teacher: Teacher,
    kept: Sequence[int],
    weights: LossWeights,
    *,
    prompt_tokens: int,
    first_token: FirstToken,
) -> Loss:
    """The healing loss of a decode model on what follows the prompt, reading the prefill model's cache.

    Whichever of the two has parameters that require gradients learns: decode, or prefill for what decode reads of it.
    The decode model's blocks are the teacher's `kept` ones. The loss is over the tokens that it predicts: all after
    the prompt where decode says the first token, all but the first where that one is the prefill model's.
    """
    ours, theirs = _matched(kept, weights)
    handed = handed_tokens(prompt_tokens, first_token)

    def loss(windows: Tensor) -> Tensor:
        ids, counted = unmarked(windows)
        wanted = _wanted(teacher, decode, ids[:, :-1], theirs, start=handed)
        with _mixed_precision(prefill, decode), entering(decode, ours) as states:
            last = pair_hidden(prefill, decode, layer_map, ids, prompt_tokens, first_token)[1]
            given = with_head(decode, [*states, last])
        return answers_loss(_in_mixed_precision(given, prefill, decode), wanted, *_after(handed, ids, counted), weights)

    return loss


def _after(first: int, ids: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the tokens of `ids` (batch, time) from the number `first` on predict, and whether each of that counts."""
    return ids[:, first + 1 :], None if counted is None else counted[:, first + 1 :]


@torch.no_grad()
def _wanted(teacher: Teacher, student: PreTrainedModel, ids: Tensor, blocks: Sequence[int], *, start: int) -> Outputs:
    """What the dense model makes of `ids` (batch, time) from the token `start` on; the head is the student's too."""
    if isinstance(teacher, Targets):
        by = _in_mixed_precision(with_head(student, []), student)
        return teacher.of(ids, blocks, by, start=start, dtype=student.dtype)
    made = outputs(teacher, ids, blocks)
    return replace(made, hidden=[state[:, start:] for state in made.hidden])


@torch.no_grad()
def mean_loss(loss_of: Loss, windows: Tensor, batch: int) -> float:
    """The loss over all `windows` (windows, time), `batch` of them at a time."""
    return sum(float(loss_of(ids)) * len(ids) for ids in windows.split(batch)) / len(windows)


def heal(
    student: PreTrainedModel,
    teacher: Teacher,
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
        return mean_loss(loss_of, held_out, settings.held_out_batch)

    return train(parameters, loss_of, held_out_loss, windows, settings, journal)


def _mixed_precision(*models: PreTrainedModel) -> torch.autocast:
    """bfloat16 where the device or a model has it; on the CPU else nothing, so that results are bit-equal."""
    device = block_stack(models[0]).device
    enabled = device.type == "cuda" or any(model.dtype == torch.bfloat16 for model in models)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _in_mixed_precision(made: Outputs, *models: PreTrainedModel) -> Outputs:
    """The same states with a head that computes as their models did."""

    def head(h: Tensor) -> Tensor:
        with _mixed_precision(*models):
            return made.head(h)

    return replace(made, head=head)
