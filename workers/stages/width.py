"""The MLP channels that each serving stage keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pdtrim.contract.errors import ModelUnsupported
from pdtrim.contract.jobs import StageName
from workers.pruning.model.blocks import BlockStack, UnsupportedArchitecture
from workers.pruning.model.width import Channels, channel_scores, intermediate_size, kept_channels, narrow
from workers.stages.context import StageContext

CHANNELS = "channels.safetensors"
"""Tensors `prefill.3`: the channels (kept,) of block 3 that prefill keeps. A stage that keeps all has none."""


@dataclass(frozen=True)
class HalfChannels:
    """The channels of every block of the dense model that a stage keeps; None for all of them.

    Both stages rank channels alike, so the narrower one keeps a part of what the other keeps.
    """

    prefill: Channels | None
    decode: Channels | None

    def of(self, role: str) -> Channels | None:
        """Those of a checkpoint; a unified one has prefill's, which are decode's too."""
        return self.decode if role == "decode" else self.prefill


def choose_channels(context: StageContext, stack: BlockStack, windows: Tensor, *, chunk_windows: int) -> None:
    """Write the channels that stay in each stage: those that weigh most on the calibration `windows`.

    They are chosen on the dense model, whose blocks are all scored. Raises: ModelUnsupported.
    """
    targets = {"prefill": context.spec.prefill, "decode": context.spec.decode}
    narrowed = {stage: target for stage, target in targets.items() if target.mlp_width < 1}
    if not narrowed:
        return
    try:
        available = intermediate_size(stack.model.config)
        scores = channel_scores(stack, windows, chunk_windows=chunk_windows)
    except UnsupportedArchitecture as error:
        raise ModelUnsupported(str(error), param=f"{min(narrowed)}.mlp_width") from error
    save_file(
        {
            f"{stage}.{block}": torch.tensor(channels, dtype=torch.int32)
            for stage, target in narrowed.items()
            for block, channels in kept_channels(scores, target.mlp_channels(available)).items()
        },
        context.out / CHANNELS,
    )


def read_channels(context: StageContext) -> HalfChannels:
    """What the scoring stage chose."""
    if context.spec.prefill.mlp_width == context.spec.decode.mlp_width == 1:
        return HalfChannels(None, None)
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, channels in load_file(context.input(StageName.SCORING, CHANNELS)).items():
        stage, block = name.split(".")
        found.setdefault(stage, {})[int(block)] = tuple(channels.tolist())
    return HalfChannels(found.get("prefill"), found.get("decode"))


def narrowed(model: PreTrainedModel, channels: Channels | None) -> PreTrainedModel:
    """The model with only these channels; the model itself when they are all."""
    return model if channels is None else narrow(model, channels)
