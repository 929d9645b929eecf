"""What healing trains of each half, what that learns, and how it ends: the same in every way to heal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pdtrim.contract.results.distillation import Kept
from pdtrim.contract.spec import DistillationSpec, JobSpec
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.repair.distill import Loss, Teacher, continuation_loss, sequence_loss
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


@dataclass(frozen=True)
class Learning:
    """The healing loss of a student, and the models whose blocks its gradients go back through."""

    loss: Loss
    models: Sequence[PreTrainedModel]
    beside: Sequence[PreTrainedModel] = ()
    """Halves that it reads, and nothing goes back through."""


@dataclass(frozen=True)
class Lessons:
    """What each half learns: to predict what the dense model does, or what was kept of it."""

    spec: JobSpec
    plans: Plans
    teacher: Teacher
    prompt_tokens: int

    def of_prefill(self, student: PreTrainedModel, decode: Callable[[], PreTrainedModel]) -> Learning:
        """By its own predictions; where it is read alone, by those that a `decode` which is not healed yet makes from
        its cache. Where prefill says the first token, its own count then as well.
        """
        losses, kept = self._losses, self.plans.prefill.kept
        if not self.plans.prefill_is_read_alone:
            return Learning(sequence_loss(student, self.teacher, kept, losses), [student])
        reader = decode()
        read = self._read(student, reader)
        if self.spec.serving.first_token == "decode":
            return Learning(read, [student, reader])
        own = sequence_loss(student, self.teacher, kept, LossWeights(kl=losses.kl, label=losses.label, hidden=0.0))
        return Learning(lambda ids: read(ids) + own(ids), [student, reader])

    def of_decode(self, student: PreTrainedModel, prefill: PreTrainedModel) -> Learning:
        """By what it predicts from the cache of `prefill`, as its checkpoint holds it."""
        return Learning(self._read(prefill, student), [student], [prefill])

    @property
    def _losses(self) -> LossWeights:
        return LossWeights(**self.spec.distillation.losses.model_dump())

    def _read(self, prefill: PreTrainedModel, decode: PreTrainedModel) -> Loss:
        """The loss of decode on what it reads of prefill, for whichever of the two learns."""
        return continuation_loss(
            prefill,
            decode,
            kv_layer_map(self.plans.prefill, self.plans.decode),
            self.teacher,
            self.plans.decode.kept,
            self._losses,
            prompt_tokens=self.prompt_tokens,
            first_token=self.spec.serving.first_token,
        )


def trained_blocks(spec: DistillationSpec, plan: BlockPlan) -> list[int]:
    """The blocks, in the dense model's numbering, whose weights or adapters are trained."""
    if spec.trainable == "distilled":
        return sorted({*plan.distilled.values(), *plan.parts})
    return list(plan.kept)


def verdict(before: float, after: float) -> Kept:
    """Which weights are kept, by their held-out loss without and with distillation."""
    return "distilled" if after < before else "undistilled"
