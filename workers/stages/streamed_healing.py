"""Healing by adapters of a model that does not fit: its blocks are read from disk, forward and again backward.

Dense model, student and the prefill half whose cache decode reads take turns in the room of one block. A block keeps
its input alone and is computed again for its gradients (`recomputed_blocks`), which is when its weights are read once
more. Held besides are what is outside of the blocks, the adapters with their moments, and hidden states. What was
learned is added to the weights one at a time, on their way into the stage's file.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pdtrim.contract.healing_memory import USABLE, HealingSize, HealingWay, healing_way, needed_bytes
from pdtrim.contract.results import DistillationResult, Folding, Half, Healing, OwnAnswers
from workers.inputs.models import device, load_streamed_model
from workers.pruning.model.blocks import block_stack, capture_calls
from workers.pruning.model.checkpoint import SourceTensors, check_complete, empty_model, stored_dtype
from workers.pruning.model.measure import parameters
from workers.pruning.model.parts import idle_tensors
from workers.pruning.model.plan import BlockPlan
from workers.pruning.model.streaming import BlockReader, BlockRoom, Cut
from workers.pruning.model.tensor_file import write_tensors
from workers.pruning.model.width import Channels, change_width
from workers.pruning.repair.distill import (
    kv_tensor_names,
    mean_loss,
    train_on,
)
from workers.pruning.repair.lora import apart_adapters, linear_weights
from workers.pruning.repair.recompute import recomputed_blocks
from workers.pruning.repair.training import TrainingSettings
from workers.stages.context import StageContext
from workers.stages.folding import (
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
    block_of,
    only_in_decode,
    trained_blocks,
    verdict,
)
from workers.stages.healing_size import healing_sizes, recorded
from workers.stages.precision import DTYPES, read_precision
from workers.stages.reading import Expected, Reading
from workers.stages.removal import Plans
from workers.stages.saving import Saver
from workers.stages.training import asked_way, journal, kept_state, kept_way, step_of
from workers.stages.training import settings as training_settings
from workers.stages.width import HalfChannels, narrowed

NOTHING = SourceTensors({})


@dataclass(frozen=True)
class Work:
    """What both halves are healed by."""

    context: StageContext
    plans: Plans
    channels: HalfChannels
    data: TrainingWindows
    to_fold: Tensor
    """Token ids (windows, tokens) that folds are made from."""
    free_bytes: int
    """On the device, before anything was there."""
    saver: Saver
    room: BlockRoom
    teacher: PreTrainedModel
    reader: BlockReader
    """The teacher's."""

    @property
    def lessons(self) -> Lessons:
        return Lessons(self.context.spec, self.plans, self.teacher, self.data.prompt_tokens)

    def model(self, cut: Cut) -> tuple[PreTrainedModel, BlockReader]:
        """The dense model, cut."""
        return load_streamed_model(
            self.context.model_dir,
            self.context.check,
            dtype=self.room.dtype,
            cut=cut,
            room=self.room,
            beside=self.teacher,
        )


def _reads(work: Work, learned: Learning, settings: TrainingSettings) -> Expected:
    """Blocks, about: some losses take a model twice."""
    back = _blocks(learned.models)
    forward = back + _blocks([work.teacher, *learned.beside])
    judged = math.ceil(len(work.data.held_out) / settings.held_out_batch)
    return Expected(forward * judged, (forward + back) * settings.parts)


def _blocks(models: Sequence[PreTrainedModel]) -> int:
    return sum(len(block_stack(model).blocks) for model in models)


@dataclass(frozen=True)
class HealedHalf:
    """What healing a half comes to, None where there was nothing to do."""

    found: Healing | None = None
    folding: Folding | None = None


def has_to_be_streamed(context: StageContext, sizes: Sequence[HealingSize], free_bytes: int) -> bool:
    """Whether a half that is healed by adapters fits in no other way, and can be healed in this one."""
    spec = context.spec.distillation
    if spec.trainable != "lora" or not check_complete(context.model_dir, context.check).one_to_one:
        return False
    ways = ((size, healing_way(size, asked_way(spec), free_bytes)) for size in sizes)
    return any(needed_bytes(size, way) > USABLE * free_bytes for size, way in ways)


def heal_streamed(
    context: StageContext,
    plans: Plans,
    channels: HalfChannels,
    training_windows: Callable[[Callable[[], PreTrainedModel]], tuple[TrainingWindows, OwnAnswers | None]],
    calibration: Tensor,
    free_bytes: int,
    saver: Saver,
) -> DistillationResult:
    """Heals both halves and writes their files, as the stage does otherwise.

    `training_windows` says what they are healed on, given the dense model; `calibration` (windows, tokens) is folded on
    as well.
    """
    room = BlockRoom(read_precision(context), device())
    teacher, reader = load_streamed_model(context.model_dir, context.check, dtype=room.dtype, room=room)
    data, answers = training_windows(lambda: teacher)
    to_fold = fold_windows(data.training, calibration, len(data.held_out))
    work = Work(context, plans, channels, data, to_fold, free_bytes, saver, room, teacher, reader)
    prefill = _heal(
        work,
        "prefill",
        plans.prefill,
        channels.prefill,
        start=NOTHING,
        frozen=set(),
        learning=lambda student: work.lessons.of_prefill(
            student, lambda: work.model(Cut(plans.decode, channels.decode))[0]
        ),
        progress_range=(0.0, 0.5),
        out=context.out / PREFILL,
    )
    if plans.unified:
        shutil.copyfile(context.out / PREFILL, context.out / DECODE)
        return _result(prefill, prefill, answers)
    healed = SourceTensors.in_file(context.out / PREFILL)
    decode = _heal(
        work,
        "decode",
        plans.decode,
        channels.decode,
        start=_inherited(work, healed),
        frozen=_made_for_prefill(work),
        learning=lambda student: work.lessons.of_decode(
            student, work.model(Cut(plans.prefill, channels.prefill, healed))[0]
        ),
        progress_range=(0.5, 1.0),
        out=context.out / DECODE,
    )
    return _result(prefill, decode, answers)


def _result(prefill: HealedHalf, decode: HealedHalf, answers: OwnAnswers | None) -> DistillationResult:
    return DistillationResult(
        enabled=True,
        prefill=prefill.found,
        decode=decode.found,
        folds=folds_of(prefill.folding, decode.folding),
        answers=answers,
    )


def _inherited(work: Work, healed: SourceTensors) -> SourceTensors:
    """Of prefill's trained tensors, those from which decode goes on, as wide as decode is."""
    plans, channels, context = work.plans, work.channels, work.context
    files = {
        name: path
        for name, path in healed.files.items()
        if block_of(name) in plans.decode.kept and not plans.prefill_is_read_alone
    }
    kept = SourceTensors(files)
    if channels.prefill == channels.decode or not files:
        return kept

    def as_wide(name: str) -> Tensor:
        wide = {name: work.reader.weights.read(name)}
        return change_width({name: kept.read(name)}, channels.prefill, channels.decode, wide)[name]

    path = context.workdir / "inherited.safetensors"
    shapes = _shapes(work, channels.decode)
    write_tensors(path, {name: shapes[name] for name in files}, stored_dtype(context.model_dir), as_wide)
    return SourceTensors.in_file(path)


def _shapes(work: Work, channels: Channels | None) -> dict[str, torch.Size]:
    """Of the dense model's tensors, narrowed."""
    model = narrowed(empty_model(work.context.model_dir, work.context.check), channels)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _made_for_prefill(work: Work) -> set[str]:
    """What makes keys and values of blocks that only decode distils: prefill's cache has to stay what they were for."""
    names: set[str] = set()
    stack = block_stack(work.teacher)
    capture_calls(stack, torch.zeros((1, 2), dtype=torch.long, device=stack.device))
    for absorber in only_in_decode(work.plans).values():
        work.reader.hold(absorber)
        names |= kv_tensor_names(stack, absorber)
    return names


def _heal(
    work: Work,
    half: Half,
    plan: BlockPlan,
    channels: Channels | None,
    *,
    start: SourceTensors,
    frozen: set[str],
    learning: Callable[[PreTrainedModel], Learning],
    progress_range: tuple[float, float],
    out: Path,
) -> HealedHalf:
    """Heal a half from what it inherits, `start`, and what can be folded into that, and write what differs from the
    dense model to `out`.
    """
    context, data, spec = work.context, work.data, work.context.spec.distillation
    shapes, dtype = _shapes(work, channels), stored_dtype(context.model_dir)
    if not (plan.removed or plan.parts or channels is not None):
        write_tensors(out, {name: shapes[name] for name in start.files}, dtype, start.read)
        return HealedHalf()
    blocks = trained_blocks(spec, plan)
    weights = narrowed(empty_model(context.model_dir, context.check), channels)
    still = frozen | idle_tensors(block_stack(weights), plan.parts)
    adapted = set(linear_weights(weights, blocks, frozen=still))
    size, resume = _size(work, plan, channels, blocks), kept_state(context, half)
    way = kept_way(resume, spec) if resume else _way(work, size)
    settings = training_settings(context, way, data.training.shape[1])

    def loss_on(windows: Tensor, student: PreTrainedModel) -> float:
        return mean_loss(learning(student).loss, windows, settings.held_out_batch)

    start, folding = _with_folds(work, half, plan, channels, start, partial(loss_on, data.judging))
    inherited = {name: shapes[name] for name in start.files}
    student, reader = work.model(Cut(plan, channels, start))
    own = {reader.weights.in_source(name): name for name, _ in student.named_parameters()}
    learned = learning(student)
    reading = Reading(context, half, progress_range, _reads(work, learned, settings), settings)
    if resume is not None:
        reading.goes_on_after(step_of(resume))
    work.room.hears = reading.block_read
    diary = replace(journal(context, half, progress_range, way, resume, work.saver), progress=reading.stepped)
    path = context.workdir / f"healed-{half}.safetensors"
    work.room.empty()
    names = [own[name] for name in shapes if name in adapted]
    with (
        recomputed_blocks(*learned.models),
        apart_adapters(student, names, rank=spec.lora.rank, alpha=spec.lora.alpha, seed=context.spec.seed) as adapters,
    ):
        trained = train_on(learned.loss, adapters.parameters, data.training, data.held_out, settings, diary)
        reading.measures_again()

        def healed(name: str) -> Tensor:
            context.check()
            if name not in adapted:
                return start.read(name)
            delta = adapters.delta(own[name])
            return reader.weights.read(own[name]).to(delta) + delta

        every = inherited | {name: shape for name, shape in shapes.items() if name in adapted}
        write_tensors(path, every, dtype, healed)

    rounded, _ = work.model(Cut(plan, channels, SourceTensors.in_file(path)))
    after = loss_on(data.held_out, rounded)
    kept = verdict(trained.before, after)
    if kept == "distilled":
        path.rename(out)
    else:
        path.unlink()
        write_tensors(out, inherited, dtype, start.read)
    how = recorded(size, way, target_bytes=0).model_copy(update={"way": "streamed"})
    found = Healing(before=trained.before, after=after, steps=trained.steps, kept=kept, how=how)
    return HealedHalf(found, folding)


def _with_folds(
    work: Work,
    half: Half,
    plan: BlockPlan,
    channels: Channels | None,
    start: SourceTensors,
    loss: Callable[[PreTrainedModel], float],
) -> tuple[SourceTensors, Folding | None]:
    """What a half goes on from: what it was given, with what can be folded into that where it helps."""
    context = work.context
    nothing = left_unfolded(context.spec, plan, work.to_fold)
    if nothing is not None:
        return start, nothing.found
    work.room.hears = lambda: None  # of the half before
    wanted = wanted_of(context, block_stack(work.teacher), plan, work.to_fold)
    whole, _ = work.model(Cut(channels=channels, overrides=start))
    made = folded_half(context, block_stack(whole), plan, wanted, stored_dtype(context.model_dir))
    if made.found is None or not made.tensors:
        return start, made.found
    path = context.workdir / f"folded-{half}.safetensors"
    save_file(dict(made.tensors), path)
    with_folds = SourceTensors({**start.files, **SourceTensors.in_file(path).files})
    before, after = (loss(work.model(Cut(plan, channels, one))[0]) for one in (start, with_folds))
    folding = judged(made.found, before, after)
    return with_folds if folding.kept == "folded" else start, folding


def _size(work: Work, plan: BlockPlan, channels: Channels | None, blocks: list[int]) -> HealingSize:
    """What decides the memory: in place of models, what is outside of their blocks and one block."""
    itemsize = work.room.dtype.itemsize
    of_block = [sum(p.numel() for p in block.parameters()) for block in block_stack(work.teacher).blocks]
    outside = parameters(work.teacher) - sum(of_block)
    whole = healing_sizes(work.context, plan, channels, blocks, work.data.training, number_bytes=itemsize, beside=None)
    return replace(whole.beside, beside=itemsize * (outside + max(of_block)), own=0, frozen=0)


def _way(work: Work, size: HealingSize) -> HealingWay:
    """In as many parts as fit; weights are of the precision that search and healing compute in."""
    asked = asked_way(work.context.spec.distillation)
    (precision,) = (name for name, dtype in DTYPES.items() if dtype == work.room.dtype)
    way = healing_way(size, HealingWay(precision, True, asked.parts), work.free_bytes)
    return replace(way, precision=precision)
