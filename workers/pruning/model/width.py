"""Structured width pruning: fewer channels between the two halves of every block's MLP.

Every block keeps the same number of channels, each its own, so `intermediate_size` alone describes the result and stock
loaders take it. A channel c of a gated MLP, down(act(gate(x)) · up(x)), is row c of gate and up and column c of down.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from workers.pruning.model.blocks import BlockStack, UnsupportedArchitecture, block_stack

Channels = Mapping[int, Sequence[int]]
"""Block → the channels of its MLP that stay, ascending."""
CHANNEL_DIMENSION = {
    "mlp.gate_proj.weight": 0,
    "mlp.gate_proj.bias": 0,
    "mlp.up_proj.weight": 0,
    "mlp.up_proj.bias": 0,
    "mlp.down_proj.weight": 1,
}
"""A block's tensors with one slice a channel, and the dimension along which the slices lie."""
BLOCK_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")
"""A tensor of a block, where every architecture with such an MLP keeps its blocks."""
GATED_MLP = {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def channel_scores(stack: BlockStack, windows: Tensor, *, chunk_windows: int) -> list[Tensor]:
    """How much each channel writes to the residual stream, by block, each (channels,) in float64.

    score_c = mean over tokens of |a_c| × ‖W_down[:, c]‖₂, where a is what enters the down projection on `windows`
    (windows, tokens). This is the weight times activation criterion of Wanda (Sun et al. 2023, arXiv 2306.11695,
    equation 1) taken for a whole input channel of the down projection, with the mean magnitude of activations by which
    Minitron (Muralidharan et al. 2024, arXiv 2407.14679) ranks MLP neurons in place of their norm.

    Raises: UnsupportedArchitecture when an MLP is not gated; ValueError naming a block whose scores are not finite.
    """
    projections = [_gated_mlp(stack, block)["down"] for block in range(len(stack.blocks))]
    totals = [torch.zeros(down.in_features, dtype=torch.float64, device=stack.device) for down in projections]
    norms = [torch.empty_like(total) for total in totals]

    def adding_to(total: Tensor, norm: Tensor) -> Any:
        def record(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
            magnitude = args[0].detach().abs().double().flatten(0, -2).sum(0)  # (…, channels) → (channels,)
            total.add_(magnitude.to(total.device))
            norm.copy_(module.weight.detach().double().norm(dim=0))  # Now: a streamed block has no weights later.

        return record

    handles = [
        down.register_forward_pre_hook(adding_to(total, norm))
        for down, total, norm in zip(projections, totals, norms, strict=True)
    ]
    try:
        with torch.no_grad():
            for ids in windows.split(chunk_windows):
                stack.body(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    scores = []
    for block, (total, norm) in enumerate(zip(totals, norms, strict=True)):
        score = (total / windows.numel() * norm).cpu()
        if not torch.isfinite(score).all():
            raise ValueError(f"the MLP of block {block} gives activations that are not finite on the windows")
        scores.append(score)
    return scores


def kept_channels(scores: Sequence[Tensor], keep: int) -> dict[int, tuple[int, ...]]:
    """The `keep` channels of highest score in every block; ties go to the lowest channels.

    Raises: ValueError when a block does not have so many, or none would stay.
    """
    for block, score in enumerate(scores):
        if not 1 <= keep <= len(score):
            raise ValueError(f"cannot keep {keep} of the {len(score)} MLP channels of block {block}")
    ranked = [score.argsort(descending=True, stable=True)[:keep] for score in scores]
    return {block: tuple(sorted(chosen.tolist())) for block, chosen in enumerate(ranked)}


def narrow(model: PreTrainedModel, channels: Channels) -> PreTrainedModel:
    """The model with only these MLP channels in every block, sharing all it does not slice; the original stays.

    Of a model that lost blocks, `channels` counts the blocks that are left; narrowing first and dropping then is the
    same. Raises: UnsupportedArchitecture when an MLP is not gated; ValueError when `channels` does not fit the model.
    """
    stack = block_stack(model)
    parts = [_gated_mlp(stack, block) for block in range(len(stack.blocks))]
    width = check_channels(channels, range(len(parts)), intermediate_size(model.config))
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    narrowed: PreTrainedModel = copy.deepcopy(model, shared)
    for block, linears in enumerate(parts):
        mlp = block_stack(narrowed).blocks[block].get_submodule("mlp")
        for part, linear in linears.items():
            setattr(mlp, f"{part}_proj", _sliced(f"mlp.{part}_proj", linear, channels[block]))
        if hasattr(mlp, "intermediate_size"):
            setattr(mlp, "intermediate_size", width)  # noqa: B010  (torch types attributes as modules)
    narrowed.config.intermediate_size = width
    return narrowed


def intermediate_size(config: PretrainedConfig) -> int:
    """Channels of every block's MLP. Raises: UnsupportedArchitecture when there is not one number for all."""
    size = getattr(config, "intermediate_size", None)
    if not isinstance(size, int):
        raise UnsupportedArchitecture(
            f"model_type {config.model_type!r} has the intermediate_size {size!r}, not one number that stock loaders "
            f"would build narrower MLPs from"
        )
    return size


def check_channels(channels: Channels, blocks: Iterable[int], available: int) -> int:
    """How many of `available` channels each of `blocks` keeps. Raises: ValueError naming a block that does not fit."""
    widths: dict[int, int] = {}
    for block in blocks:
        if block not in channels:
            raise ValueError(f"no MLP channels are given for block {block}; every kept block needs as many")
        kept = channels[block]
        if not kept or any(later <= earlier for earlier, later in itertools.pairwise(kept)):
            raise ValueError(f"the MLP channels of block {block} are none, or not in ascending order: {list(kept)[:8]}")
        if kept[0] < 0 or kept[-1] >= available:
            raise ValueError(f"block {block} has MLP channels 0 to {available - 1}, not {kept[0]} to {kept[-1]}")
        widths[block] = len(kept)
    if len(set(widths.values())) != 1:
        raise ValueError(
            f"every block must keep as many MLP channels, for there is one intermediate_size; got {widths}"
        )
    return next(iter(widths.values()))


def check_gated(names: Iterable[str], block: int) -> None:
    """That a block's tensors `names`, without the block's prefix, have no MLP but a gated one that can be sliced.

    Raises: UnsupportedArchitecture.
    """
    mlp = {name for name in names if name.startswith("mlp.")}
    known = CHANNEL_DIMENSION.keys() | {"mlp.down_proj.bias"}
    if not mlp >= GATED_MLP or mlp - known:
        found = sorted(mlp - known) or sorted(mlp)
        raise UnsupportedArchitecture(
            f"only MLPs of a gate, an up and a down projection can be narrowed; block {block} has {found[:4] or 'none'}"
        )


def sliced_tensor(name: str, tensor: Tensor, kept: Sequence[int]) -> Tensor:
    """A block's tensor, called `name` without the block's prefix, with only its channels `kept` if it has channels."""
    dimension = CHANNEL_DIMENSION.get(name)
    if dimension is None:
        return tensor
    return tensor.index_select(dimension, torch.tensor(kept, device=tensor.device))


def narrow_tensors(tensors: Mapping[str, Tensor], channels: Channels | None) -> dict[str, Tensor]:
    """Tensors called as in the dense model, with only the `channels` of their blocks; None keeps every channel."""
    if channels is None:
        return dict(tensors)
    return {
        name: tensor if (found := _with_channels(name)) is None else sliced_tensor(found[1], tensor, channels[found[0]])
        for name, tensor in tensors.items()
    }


def change_width(
    tensors: Mapping[str, Tensor], old: Channels | None, new: Channels | None, dense: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors called as in the dense model that have the channels `old`, with the channels `new`; None is all.

    What `tensors` lack of these comes from `dense`, the same tensors at full width.
    """
    if old == new:
        return dict(tensors)
    full = dict(tensors)
    for name, tensor in tensors.items():
        if old is not None and (found := _with_channels(name)) is not None:
            block, part = found
            kept = torch.tensor(old[block], device=tensor.device)
            wide = dense[name].detach().to(device=tensor.device, dtype=tensor.dtype)
            full[name] = wide.index_copy(CHANNEL_DIMENSION[part], kept, tensor)
    return narrow_tensors(full, new)


def has_channels(name: str) -> bool:
    """Whether a tensor, called as in the model, has one slice a channel of a block's MLP."""
    return _with_channels(name) is not None


def _with_channels(name: str) -> tuple[int, str] | None:
    """Block and name within it of a tensor that has one slice a channel."""
    match = BLOCK_TENSOR.fullmatch(name)
    return (int(match[1]), match[2]) if match is not None and match[2] in CHANNEL_DIMENSION else None


def _gated_mlp(stack: BlockStack, block: int) -> dict[str, nn.Linear]:
    """The three projections of a block's MLP. Raises: UnsupportedArchitecture."""
    module = stack.blocks[block]
    check_gated([name for name, _ in module.named_parameters()], block)
    projections: dict[str, nn.Linear] = {}
    for part in ("gate", "up", "down"):
        linear = module.get_submodule(f"mlp.{part}_proj")
        if not isinstance(linear, nn.Linear):
            raise UnsupportedArchitecture(
                f"mlp.{part}_proj of block {block} is of the class {type(linear).__name__}, not Linear"
            )
        projections[part] = linear
    return projections


def _sliced(name: str, linear: nn.Linear, kept: Sequence[int]) -> nn.Linear:
    weight = sliced_tensor(f"{name}.weight", linear.weight.detach(), kept)  # (out, in)
    result = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    result.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        bias = sliced_tensor(f"{name}.bias", linear.bias.detach(), kept)
        result.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    return result.train(linear.training)
