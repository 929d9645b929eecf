"""What healing trains of each half, and how it ends: the same on one device and on several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim.contract.results.distillation import Kept
from pdtrim.contract.spec import DistillationSpec
from workers.pruning.model.plan import BlockPlan
from workers.pruning.repair.losses import LossWeights
from workers.stages.removal import Plans

PREFILL, DECODE = "prefill.safetensors", "decode.safetensors"


@dataclass(frozen=True)
class TrainingWindows:
    """Token windows (windows, tokens) on the worker's device, `marked` where only answers count."""

    training: Tensor
    held_out: Tensor
    copied: Tensor
    """Of some of those held out the prompt, said again: folds are judged on both."""

    @property
    def prompt_tokens(self) -> int:
        return self.training.shape[1] // 2

    @property
    def judging(self) -> Tensor:
        """Those on which folds are judged."""
        return torch.cat([self.held_out, self.copied])

    @property
    def all(self) -> Tensor:
        """Those of training, then those held out."""
        return torch.cat([self.training, self.judging])


def block_of(name: str) -> int:
    """The block of a tensor that is called as in the dense model; no other part of such a name is a number before."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def only_in_decode(plans: Plans) -> dict[int, int]:
    """What decode alone distils: removed block → the neighbour that stands for both."""
    return {
        removed: absorber
        for removed, absorber in plans.decode.distilled.items()
        if removed not in plans.prefill.distilled
    }


def inherited(trained: Mapping[str, Tensor], plans: Plans) -> dict[str, Tensor]:
    """Of prefill's trained tensors, those from which decode goes on: none where they learned to make keys and values
    for decode as it is.
    """
    return {
        name: tensor
        for name, tensor in trained.items()
        if block_of(name) in plans.decode.kept and not plans.prefill_is_read_alone
    }


def loss_weights(spec: DistillationSpec) -> LossWeights:
    """What healing minimises, as the job has it."""
    return LossWeights(**spec.losses.model_dump())


def own_weights(losses: LossWeights) -> LossWeights:
    """What a prefill half that is read minimises of its own predictions besides."""
    return LossWeights(kl=losses.kl, label=losses.label, hidden=0.0)


def trained_blocks(spec: DistillationSpec, plan: BlockPlan) -> list[int]:
    """The blocks, in the dense model's numbering, whose weights or adapters are trained."""
    if spec.trainable == "distilled":
        return sorted({*plan.distilled.values(), *plan.parts})
    return list(plan.kept)


def verdict(before: float, after: float) -> Kept:
    """Which weights are kept, by their held-out loss without and with distillation."""
    return "distilled" if after < before else "undistilled"
