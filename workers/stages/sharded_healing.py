"""What a rank does of distillation: as on one device, with models of which it holds a share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pdtrim.contract.healing_memory import HealingSize, HealingWay, healing_way, sharded_size
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import DistillationResult, Folding, Half, Healing
from workers.inputs.models import (
    device,
    free_memory_bytes,
    give_back_memory,
    load_streamed_model,
    tensor_float_32,
)
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.checkpoint import SourceTensors, load_checkpoint, stored_dtype
from workers.pruning.model.measure import parameters as count_parameters
from workers.pruning.model.parts import idle_tensors, pruned, zeroed_tensors
from workers.pruning.model.plan import BlockPlan
from workers.pruning.model.sharing import share
from workers.pruning.model.streaming import BlockRoom, Cut, load_frame
from workers.pruning.model.width import Channels, change_width, narrow_tensors
from workers.pruning.repair.distill import (
    kv_tensor_names,
    mean_loss,
    train_on,
    trainable,
)
from workers.pruning.repair.lora import adapted, linear_weights
from workers.pruning.repair.recompute import recomputed_blocks
from workers.pruning.repair.sharded import (
    Ranks,
    block_parameters,
    hollow,
    merge_adapters,
    shard,
    shared_loss,
    whole,
)
from workers.pruning.repair.sharded_state import load_shards, load_tensor, save_shards
from workers.pruning.repair.training import Journal
from workers.stages import training
from workers.stages.context import StageContext
from workers.stages.distillation import training_windows
from workers.stages.folding import (
    STACKED,
    HalfFold,
    fold_windows,
    folded_half,
    folds_of,
    judged,
    left_unfolded,
    wanted_of,
)
from workers.stages.halves import (
    DECODE,
    PREFILL,
    Learning,
    Lessons,
    TrainingWindows,
    inherited,
    only_in_decode,
    trained_blocks,
    verdict,
)
from workers.stages.healing_folder import POLL_S, HealingFolder, read, write
from workers.stages.healing_size import healing_sizes, recorded
from workers.stages.precision import DTYPES, read_precision
from workers.stages.removal import Plans, read_plans
from workers.stages.saving import Pace, Saver, Tensors
from workers.stages.scoring import WINDOWS
from workers.stages.training import WAY, asked_way, kept_way, telling, way_tensor
from workers.stages.training import settings as training_settings
from workers.stages.width import HalfChannels, narrowed, read_channels

Adapters = Callable[[PreTrainedModel], object]
"""Puts adapters on a half before it is sharded."""


def _none(model: PreTrainedModel) -> None:
    """No adapters."""


@dataclass(frozen=True)
class Work:
    """What both halves are healed by, on one rank."""

    context: StageContext
    folder: HealingFolder
    ranks: Ranks
    plans: Plans
    channels: HalfChannels
    data: TrainingWindows
    to_fold: Tensor
    """Token ids (windows, tokens) that folds are made from."""
    free_bytes: int
    """On the fullest device, before anything was there."""
    saver: Saver
    dense: DenseTensors
    teacher: PreTrainedModel

    @property
    def lessons(self) -> Lessons:
        return Lessons(self.context.spec, self.plans, self.teacher, self.data.prompt_tokens)


@dataclass(frozen=True)
class Sharded:
    """A model, sharded, and the parameters of its blocks, called as in the dense model."""

    model: PreTrainedModel
    named: Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class HealedHalf:
    """What healing a half comes to."""

    trained: Tensors
    """What differs from the dense model, in the stored dtype, on the host; of rank 0 alone."""
    found: Healing | None = None
    folding: Folding | None = None


class DenseTensors(Mapping[str, Tensor]):
    """The weights of the dense model's blocks, read from disk one at a time; all at once where experts are stacked."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self.dtype = read_precision(context)
        """In which models are that are not trained."""
        self.frame, weights = load_frame(context.model_dir, dtype=self.dtype, device=device(), check=context.check)
        """The dense model, whose blocks are empty."""
        self._stored = weights.tensors

    @property
    def one_to_one(self) -> bool:
        """Whether each lies in the checkpoint by itself, so that a model can be read block by block."""
        return self._stored.one_to_one

    @property
    def outside(self) -> int:
        """Numbers of what is in no block."""
        return count_parameters(self.frame) - sum(map(_numbers, block_stack(self.frame).blocks))

    @property
    def largest_block(self) -> int:
        """Its numbers."""
        return max(map(_numbers, block_stack(self.frame).blocks))

    @cached_property
    def _stacked(self) -> dict[str, nn.Parameter]:
        folder, check = self._context.model_dir, self._context.check
        return dict(load_checkpoint(folder, dtype=None, device=torch.device("cpu"), check=check).named_parameters())

    def __getitem__(self, name: str) -> Tensor:
        return self._stored.read(name) if self._stored.one_to_one else self._stacked[name].detach()

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.frame.named_parameters())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def emptied(self, dtype: torch.dtype) -> PreTrainedModel:
        """Another such model, of another precision, which has in common with `frame` what it can."""
        model, _ = load_frame(self._context.model_dir, dtype=dtype, device=device(), check=self._context.check)
        share(model, self.frame, own={name for name in self if name.startswith(block_stack(self.frame).prefix)})
        return model


def _numbers(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


@tensor_float_32()
def heal(context: StageContext, folder: HealingFolder, ranks: Ranks) -> DistillationResult:
    """Heal both halves; rank 0 leaves the trained tensors of each below `out`, as the stage on one device does."""
    beside = 1 if device().type == "cuda" else int(os.environ["LOCAL_WORLD_SIZE"])
    free_bytes = ranks.least(free_memory_bytes(device(), context.memory_bytes) // beside)
    plans, channels = read_plans(context), read_channels(context)
    dense = DenseTensors(context)
    data, to_fold = _windows(context, folder, dense)
    teacher = _sharded(context, ranks, dense, dense.emptied(dense.dtype), _all_of(plans.prefill), None, {})
    saver = Saver(_save_to(folder, ranks))
    work = Work(context, folder, ranks, plans, channels, data, to_fold, free_bytes, saver, dense, teacher.model)
    prefill = _heal_prefill(work)
    _leave(work, PREFILL, prefill)
    decode = prefill if plans.unified else _heal_decode(work)
    _leave(work, DECODE, decode)
    while saver.is_busy():  # None is left out: a state takes every rank.
        time.sleep(POLL_S)
    saver.close(context.check)
    return DistillationResult(
        enabled=True,
        prefill=prefill.found,
        decode=decode.found,
        folds=folds_of(prefill.folding, decode.folding),
    )


def _windows(context: StageContext, folder: HealingFolder, dense: DenseTensors) -> tuple[TrainingWindows, Tensor]:
    """What is healed on and what is folded on, as the stage has left them; by hand, of the data.

    Raises: ValueError where the dense model is to answer.
    """
    if folder.windows.exists():
        found = {name: windows.to(device()) for name, windows in load_file(folder.windows).items()}
        return TrainingWindows(found["training"], found["held_out"], found["copied"]), found["to_fold"]
    if context.spec.distillation.data != "given":
        raise ValueError(
            "a worker has the dense model answer before it heals; by hand, heal on `distillation.data: given`"
        )
    found = load_file(context.input(StageName.SCORING, WINDOWS))
    data = training_windows(context, found, lambda: dense.frame)[0]
    return data, fold_windows(data.training, found["calibration"], len(data.held_out))


def _all_of(plan: BlockPlan) -> BlockPlan:
    return BlockPlan(plan.num_blocks)


def _leave(work: Work, name: str, half: HealedHalf) -> None:
    if work.ranks.speaks:
        work.context.write_tensors(work.context.out / name, half.trained)
    work.ranks.first_says(0)  # The others read it.


def _save_to(folder: HealingFolder, ranks: Ranks) -> Callable[[str, Tensors], None]:
    def save(name: str, state: Tensors) -> None:
        half, step = cast(Half, name), training.step_of(state)
        save_shards(state, folder.state(half, step), ranks)
        if ranks.speaks:
            folder.commit(half, step)

    return save


def _sharded(
    context: StageContext,
    ranks: Ranks,
    dense: DenseTensors,
    weights: PreTrainedModel,
    plan: BlockPlan,
    channels: Channels | None,
    own: Mapping[str, Tensor],
    adapters: Adapters = _none,
) -> Sharded:
    """The half of the narrowed model `weights`, whose blocks are empty, filled from `dense` and from `own`."""
    stack = block_stack(weights)
    dtype = next(parameter.dtype for parameter in stack.blocks.parameters())
    zeroed = zeroed_tensors(stack, plan.parts)
    model = pruned(weights, plan)
    adapters(model)

    def called(layer: int, name: str) -> str:
        return f"{stack.prefix}{plan.kept[layer]}.{name}"

    def content(layer: int, name: str) -> Tensor:
        dense_name = called(layer, name)
        if dense_name in own:
            return own[dense_name]
        (value,) = narrow_tensors({dense_name: dense[dense_name]}, channels).values()
        return torch.zeros_like(value) if dense_name in zeroed else value

    shard(model, ranks, content, dtype=dtype, check=context.check)
    return Sharded(model, {called(*place): parameter for place, parameter in block_parameters(model).items()})


def _heal_prefill(work: Work) -> HealedHalf:
    plans, channels = work.plans, work.channels
    return _heal(
        work,
        "prefill",
        plans.prefill,
        channels.prefill,
        (0.0, 0.5),
        beside=0,
        start={},
        frozen=(),
        learning=lambda student: work.lessons.of_prefill(
            student, lambda: _frozen(work, plans.decode, channels.decode, {})
        ),
    )


def _heal_decode(work: Work) -> HealedHalf:
    plans, channels = work.plans, work.channels
    trained = load_file(work.context.out / PREFILL)
    start = change_width(inherited(trained, plans), channels.prefill, channels.decode, work.dense)
    absorbers = only_in_decode(plans).values()
    still = work.dense.emptied(work.dense.dtype)
    hollow(still)
    return _heal(
        work,
        "decode",
        plans.decode,
        channels.decode,
        (0.5, 1.0),
        # All of it: sharded models have nothing in common.
        beside=len(plans.prefill.kept) * work.dense.largest_block * work.dense.dtype.itemsize,
        start=start,
        frozen={name for absorber in absorbers for name in kv_tensor_names(block_stack(still), absorber)},
        learning=lambda student: work.lessons.of_decode(
            student, _frozen(work, plans.prefill, channels.prefill, trained)
        ),
    )


def _frozen(work: Work, plan: BlockPlan, channels: Channels | None, own: Mapping[str, Tensor]) -> PreTrainedModel:
    """A half that is not trained, as its checkpoint holds it."""
    weights = narrowed(work.dense.emptied(work.dense.dtype), channels)
    return _sharded(work.context, work.ranks, work.dense, weights, plan, channels, own).model


def _heal(
    work: Work,
    half: Half,
    plan: BlockPlan,
    channels: Channels | None,
    progress_range: tuple[float, float],
    *,
    beside: int,
    start: Tensors,
    frozen: Collection[str],
    learning: Callable[[PreTrainedModel], Learning],
) -> HealedHalf:
    """As the stage on one device does it. Where training did no better, no weights are put back: nobody reads these."""
    context, data, ranks, spec = work.context, work.data, work.ranks, work.context.spec.distillation

    # What fits. Sharded models refer to themselves, so those of the half before are still there.
    give_back_memory()
    blocks = trained_blocks(spec, plan)
    of_one = healing_sizes(
        context, plan, channels, blocks, data.training, number_bytes=work.dense.dtype.itemsize, beside=None
    ).beside
    size = sharded_size(
        replace(of_one, beside=of_one.beside + beside),
        ranks.size,
        outside=work.dense.outside,
        block=work.dense.largest_block,
    )
    kept = work.folder.newest(half)
    way = _way(work, size, kept)
    settings = training_settings(context, way, data.training.shape[1])

    # What it starts from.
    def without_training(own: Tensors) -> float:
        weights = narrowed(work.dense.emptied(work.dense.dtype), channels)
        student = _sharded(context, ranks, work.dense, weights, plan, channels, own).model
        return mean_loss(shared_loss(learning(student).loss, ranks), data.judging, settings.held_out_batch)

    start, folding = _with_folds(work, half, plan, channels, start, progress_range[0], without_training)

    # The student. What is trained of it is chosen while it is empty.
    weights = narrowed(work.dense.emptied(DTYPES[way.precision]), channels)
    names: set[str] = set()
    adapters: Adapters = _none
    if plan.removed or plan.parts or channels is not None:
        still = {*frozen, *idle_tensors(block_stack(weights), plan.parts)}
        if spec.trainable == "lora":
            hollow(weights)
            layers = linear_weights(weights, blocks, frozen=still)
            names = set(layers)

            adapters = partial(
                adapted, weights=layers, rank=spec.lora.rank, alpha=spec.lora.alpha, seed=context.spec.seed
            )
        else:
            names = set(trainable(weights, blocks, frozen=still))
    if not names:
        return HealedHalf(start, folding=folding)
    student = _sharded(context, ranks, work.dense, weights, plan, channels, start, adapters)
    healed = {name: parameter for name, parameter in student.named.items() if name in names}
    parameters = dict(healed)
    if spec.trainable == "lora":
        parameters = {name: one for name, one in student.model.named_parameters() if one.requires_grad}

    # Its training, judged by what its checkpoint will hold.
    learned = learning(student.model)
    loss = shared_loss(learned.loss, ranks)
    before = mean_loss(loss, data.held_out, settings.held_out_batch)
    resume = None if kept is None else load_shards(kept, parameters, ranks)
    diary = _journal(work, half, progress_range, way, resume)
    with recomputed_blocks(*learned.models) if way.recomputed else nullcontext():
        taken = train_on(loss, parameters, data.training, data.held_out, settings, diary).steps
    dtype = stored_dtype(context.model_dir)
    if spec.trainable == "lora":
        merge_adapters(student.model)
    with torch.no_grad():
        for parameter in healed.values():
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))
    after = mean_loss(loss, data.held_out, settings.held_out_batch)
    found = Healing(
        before=before,
        after=after,
        steps=taken,
        kept=verdict(before, after),
        how=recorded(size, way, target_bytes=0, devices=ranks.size),
    )
    trained = _gathered(healed, dtype, ranks) if found.kept == "distilled" else {}
    return HealedHalf(start | trained, found, folding)


def _with_folds(
    work: Work,
    half: Half,
    plan: BlockPlan,
    channels: Channels | None,
    start: Tensors,
    progress: float,
    loss: Callable[[Tensors], float],
) -> tuple[Tensors, Folding | None]:
    """What a half goes on from: what it was given, with what can be folded into that where it helps.

    Rank 0 makes the folds, from models that it reads block by block, and the others wait for them.
    """
    context, folder = work.context, work.folder
    nothing = left_unfolded(context.spec, plan, work.to_fold, reason=None if work.dense.one_to_one else STACKED)
    if nothing is not None:
        return start, nothing.found
    context.say(progress, f"Folding what the {half} model gives up into what stays.", half=half)
    if work.ranks.speaks:
        made = _folded(work, half, plan, channels, start)
        save_file(dict(made.tensors), folder.folds(half))
        write(folder.folding(half), cast(Folding, made.found))
    work.ranks.first_says(0)
    tensors, found = load_file(folder.folds(half)), read(folder.folding(half), Folding)
    assert found is not None, "rank 0 wrote it"
    if not tensors:
        return start, found
    with_folds = start | tensors
    losses = []
    for own in (start, with_folds):
        losses.append(loss(own))
        give_back_memory()  # Sharded models refer to themselves.
    folding = judged(found, *losses)
    return with_folds if folding.kept == "folded" else start, folding


def _folded(work: Work, half: Half, plan: BlockPlan, channels: Channels | None, start: Tensors) -> HalfFold:
    """What can be folded of the dense model with `start` in its place, made by one process alone."""
    context = work.context
    room = BlockRoom(work.dense.dtype, device())
    read_by_block = partial(
        load_streamed_model, context.model_dir, context.check, dtype=room.dtype, room=room, beside=work.dense.frame
    )
    inherited = context.workdir / f"given-{half}.safetensors"
    save_file(start, inherited)
    dense, _ = read_by_block()
    wanted = wanted_of(context, block_stack(dense), plan, work.to_fold)
    own, _ = read_by_block(cut=Cut(channels=channels, overrides=SourceTensors.in_file(inherited)))
    return folded_half(context, block_stack(own), plan, wanted, stored_dtype(context.model_dir))


def _gathered(healed: Mapping[str, nn.Parameter], dtype: torch.dtype, ranks: Ranks) -> Tensors:
    """The trained weights, whole, on rank 0; one at a time elsewhere."""
    found: Tensors = {}
    for name, parameter in healed.items():
        tensor = whole(parameter.detach().to(dtype))
        if ranks.speaks:
            found[name] = tensor.contiguous()
    return found


def _way(work: Work, size: HealingSize, kept: Path | None) -> HealingWay:
    """As the kept state was trained, or else what fits the fullest device."""
    spec = work.context.spec.distillation
    if kept is not None and (way := load_tensor(kept, WAY)) is not None:
        return kept_way({WAY: way}, spec)
    # Every rank has a window of each part.
    asked = asked_way(spec)
    asked = replace(asked, parts=max(1, min(asked.parts, size.windows)))
    return healing_way(size, asked, work.free_bytes)


def _journal(
    work: Work, half: Half, progress_range: tuple[float, float], way: HealingWay, resume: Mapping[str, Tensor] | None
) -> Journal:
    """As on one device. Rank 0 says when a state is saved; the stage may still be storing the one before."""
    pace, saver, ranks = Pace(training.SAVE_INTERVAL_S), work.saver, work.ranks

    def save_now_and_then(last: bool, state: Callable[[], Tensors]) -> None:
        idle = not saver.is_busy()
        if not ranks.first_says(last or (idle and pace.due and not work.folder.is_storing)):
            return
        while ranks.speaks and work.folder.is_storing:
            time.sleep(POLL_S)
        with pace.paid():
            saver.save(half, state() | {WAY: way_tensor(way)})

    return Journal(telling(work.context, half, progress_range), save_now_and_then, resume)
