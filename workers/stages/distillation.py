"""Distillation: heal the prefill model, then the decode model on its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pdtrim.contract.healing_memory import HealingSize, healing_devices, healing_way, keeps_targets
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import DistillationResult, Folding, Half, Healing, OwnAnswers
from pdtrim.contract.windows import Split
from workers.inputs.models import (
    accelerators,
    device,
    fits_whole,
    free_memory_bytes,
    load_for_walks,
    load_model,
    tensor_float_32,
)
from workers.inputs.windows import ANSWERS
from workers.pruning.model.blocks import BlockStack, block_stack
from workers.pruning.model.calibration import mixed
from workers.pruning.model.checkpoint import stored_dtype
from workers.pruning.model.parts import idle_tensors, pruned
from workers.pruning.model.plan import BlockPlan
from workers.pruning.model.sharing import share
from workers.pruning.model.streaming import parameter_bytes
from workers.pruning.model.width import Channels, change_width
from workers.pruning.repair.answers import marked, unmarked
from workers.pruning.repair.distill import (
    Teacher,
    kv_tensor_names,
    load_tensors,
    mean_loss,
    train_on,
    trainable,
)
from workers.pruning.repair.lora import linear_weights, lora_adapters
from workers.pruning.repair.recompute import recomputed_blocks
from workers.pruning.repair.targets import token_bytes
from workers.stages.answering import answered_windows
from workers.stages.context import StageContext
from workers.stages.folding import (
    TOO_LARGE,
    HalfFold,
    copied,
    fold_windows,
    folded_half,
    folds,
    folds_of,
    judged,
    left_unfolded,
    none_folded,
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
from workers.stages.healing_size import HealingSizes, healing_sizes, recorded
from workers.stages.precision import DTYPES, read_precision
from workers.stages.ranks import heal_on
from workers.stages.removal import Plans, read_plans
from workers.stages.saving import Saver, Tensors, saving
from workers.stages.scoring import WINDOWS
from workers.stages.streamed_healing import has_to_be_streamed, heal_streamed
from workers.stages.targets import Blocks, compared_blocks, decided, fit_on_disk, kept_targets
from workers.stages.training import HELD_OUT_WINDOWS, asked_way, journal, kept_state, kept_way, steps
from workers.stages.training import settings as training_settings
from workers.stages.width import HalfChannels, narrowed, read_channels


@dataclass(frozen=True)
class Work:
    """What both halves are healed by."""

    context: StageContext
    plans: Plans
    channels: HalfChannels
    data: TrainingWindows
    to_fold: Tensor
    """Token ids (windows, tokens) that folds are made from."""
    dtype: torch.dtype
    """Of the dense model."""
    free_bytes: int
    """On the device, before anything was there."""
    sizes: Mapping[Half, HealingSize]
    teacher: Teacher
    target_bytes: int
    """Of the targets that stand for the dense model; 0 where it is at hand."""
    saver: Saver

    @property
    def lessons(self) -> Lessons:
        return Lessons(self.context.spec, self.plans, self.teacher, self.data.prompt_tokens)


@dataclass(frozen=True)
class HealedHalf:
    """A half's weights as its checkpoint will hold them, in the dense model's precision, which they partly share."""

    weights: PreTrainedModel
    """Blocks that it gives up are empty."""
    trained: Tensors = field(default_factory=dict)
    """What differs from the dense model, in the stored dtype, on the host."""
    found: Healing | None = None
    folding: Folding | None = None


@tensor_float_32()
def run(context: StageContext) -> DistillationResult:
    """Writes the trained tensors of each serving stage, called as in the dense model, in its stored dtype."""
    spec = context.spec.distillation
    windows = load_file(context.input(StageName.SCORING, WINDOWS))
    trains = bool(steps(spec, windows["train"].shape[1]))
    if not spec.enabled or not (trains or folds(context.spec, windows["train"].shape[1])):
        return _nothing(context, DistillationResult(enabled=spec.enabled))
    if trains and (devices := healing_devices(spec, len(accelerators()))) > 1:
        return _heal_on_several(context, devices, windows)
    free_bytes = free_memory_bytes(device(), context.memory_bytes)
    plans, channels = read_plans(context), read_channels(context)
    dtype = read_precision(context)
    if not trains and not fits_whole(2 * parameter_bytes(context.model_dir, dtype, context.check), free_bytes):
        return _nothing(context, DistillationResult(enabled=True, folds=none_folded(plans, TOO_LARGE)))
    sizes = _sizes(context, plans, channels, windows["train"], number_bytes=dtype.itemsize)
    if trains and has_to_be_streamed(context, [_least(plans, both) for both in sizes.values()], free_bytes):
        with saving(context) as saver:
            answered = partial(training_windows, context, windows)
            return heal_streamed(context, plans, channels, answered, windows["calibration"], free_bytes, saver)
    dense = partial(load_model, context.model_dir, context.check, dtype=dtype)
    data, answers = training_windows(context, windows, dense) if trains else (_held_out_alone(context, windows), None)
    with saving(context) as saver, ExitStack() as opened:
        kept_of = partial(_kept_of, context, plans, channels, sizes, data, free_bytes)
        compared = decided(context, kept_of) if trains else None
        teacher: Teacher
        if compared is None:
            teacher, size = dense(), 0
        else:
            hidden = sizes["prefill"].ahead.hidden
            teacher = opened.enter_context(kept_targets(context, data.all, compared, hidden, dtype, saver))
            size = token_bytes(compared, hidden) * data.all.numel()
        taken = {half: both.beside if compared is None else both.ahead for half, both in sizes.items()}
        to_fold = fold_windows(data.training, windows["calibration"], len(data.held_out))
        work = Work(context, plans, channels, data, to_fold, dtype, free_bytes, taken, teacher, size, saver)
        prefill = _heal_prefill(work)
        context.write_tensors(context.out / PREFILL, prefill.trained)
        decode = prefill if plans.unified else _heal_decode(work, prefill)
        context.write_tensors(context.out / DECODE, decode.trained)
    return DistillationResult(
        enabled=True,
        prefill=prefill.found,
        decode=decode.found,
        folds=folds_of(prefill.folding, decode.folding),
        answers=answers,
    )


def _nothing(context: StageContext, result: DistillationResult) -> DistillationResult:
    """Leave both halves as they are."""
    for name in (PREFILL, DECODE):
        save_file({}, context.out / name)
    return result


def _held_out_alone(context: StageContext, windows: Tensors) -> TrainingWindows:
    """Where nothing is trained: no more than half of the calibration windows, the rest being what folds are made of."""
    calibration = _of_use(windows, "calibration")
    return _judged_by(context, calibration[:0], calibration[: min(HELD_OUT_WINDOWS, len(calibration) // 2)])


def _judged_by(context: StageContext, training: Tensor, held_out: Tensor) -> TrainingWindows:
    """With copies for what folds."""
    again = copied(context, unmarked(held_out)[0]) if folds(context.spec, held_out.shape[1]) else held_out[:0]
    return TrainingWindows(training, held_out, again)


def _heal_on_several(context: StageContext, devices: int, windows: Tensors) -> DistillationResult:
    """By processes of their own; what the dense model has to answer, this one has it answer before."""
    dense = partial(load_for_walks, context.model_dir, context.check, dtype=read_precision(context))
    data, answers = training_windows(context, windows, dense)
    to_fold = fold_windows(data.training, windows["calibration"], len(data.held_out))
    return heal_on(devices, context, data, to_fold).model_copy(update={"answers": answers})


def training_windows(
    context: StageContext, windows: Tensors, dense: Callable[[], PreTrainedModel]
) -> tuple[TrainingWindows, OwnAnswers | None]:
    """Those of the data, or of the dense model's answers to its prompts, of which the first are held out."""
    if context.spec.distillation.data == "given":
        held_out = _of_use(windows, "calibration")[:HELD_OUT_WINDOWS]
        return _judged_by(context, _of_use(windows, "train"), held_out), None
    spec, tokens = context.spec.distillation, windows["train"].shape[1]
    count = HELD_OUT_WINDOWS + max(spec.batch_windows, spec.heal_tokens // tokens)
    made, found = answered_windows(context, dense(), count)
    made = mixed(made, context.spec.seed).to(device())
    return _judged_by(context, made[HELD_OUT_WINDOWS:], made[:HELD_OUT_WINDOWS]), found


def _of_use(windows: Tensors, split: Split) -> Tensor:
    """The windows of one use on this worker's device, as healing reads them."""
    ids, answers = windows[split], windows.get(f"{ANSWERS}{split}")
    return (ids if answers is None else marked(ids, answers)).to(device())


def _sizes(
    context: StageContext, plans: Plans, channels: HalfChannels, windows: Tensor, *, number_bytes: int
) -> dict[Half, HealingSizes]:
    """Of each half that there is, trained on `windows` (windows, tokens)."""

    def size(plan: BlockPlan, kept: Channels | None, beside: HealingSizes | None) -> HealingSizes:
        return healing_sizes(
            context,
            plan,
            kept,
            trained_blocks(context.spec.distillation, plan),
            windows,
            number_bytes=number_bytes,
            beside=beside,
        )

    prefill = size(plans.prefill, channels.prefill, None)
    if plans.unified:
        return {"prefill": prefill}
    return {"prefill": prefill, "decode": size(plans.decode, channels.decode, prefill)}


def _kept_of(
    context: StageContext,
    plans: Plans,
    channels: HalfChannels,
    sizes: Mapping[Half, HealingSizes],
    data: TrainingWindows,
    free_bytes: int,
) -> Blocks | None:
    """The blocks whose states to keep of the dense model, where that does not fit beside both halves; None to have it.

    Where prefill is healed for what decode reads as it was, there is no healing without the dense model's blocks.
    """
    spec = context.spec.distillation
    if plans.prefill_is_read_alone:
        return None
    halves = {"prefill": (plans.prefill, channels.prefill), "decode": (plans.decode, channels.decode)}
    healed = [size for half, size in sizes.items() if _gives_up(*halves[half])]
    if not any(keeps_targets(size.beside, size.ahead, asked_way(spec), free_bytes) for size in healed):
        return None
    hidden = sizes["prefill"].ahead.hidden
    blocks = compared_blocks(plans, spec)
    return blocks if fit_on_disk(context, token_bytes(blocks, hidden) * data.all.numel()) else None


def _gives_up(plan: BlockPlan, channels: Channels | None) -> bool:
    """Whether a half is not the dense model."""
    return bool(plan.removed or plan.parts) or channels is not None


def _least(plans: Plans, both: HealingSizes) -> HealingSize:
    """What a half can do with: without the dense model, where it may be without."""
    return both.beside if plans.prefill_is_read_alone else both.ahead


def _healed_weights(
    context: StageContext, weights: PreTrainedModel, blocks: list[int], frozen: set[str]
) -> dict[str, nn.Parameter]:
    """The parameters that healing changes, by name."""
    if context.spec.distillation.trainable == "lora":
        return linear_weights(weights, blocks, frozen=frozen)
    return trainable(weights, blocks, frozen=frozen)


def _trained(
    context: StageContext, student: PreTrainedModel, healed: Mapping[str, nn.Parameter]
) -> AbstractContextManager[Mapping[str, nn.Parameter]]:
    """The parameters to optimise while this lasts, after which `healed` hold what they learned."""
    spec = context.spec.distillation
    if spec.trainable == "lora":
        return lora_adapters(student, healed, rank=spec.lora.rank, alpha=spec.lora.alpha, seed=context.spec.seed)
    return nullcontext(healed)


def _heal_prefill(work: Work) -> HealedHalf:
    """It becomes what the exported prefill checkpoint will hold, rounded as it is: decode reads its cache."""

    def unhealed_decode() -> PreTrainedModel:
        assert isinstance(work.teacher, PreTrainedModel)  # as `_kept_of` has it
        return pruned(narrowed(work.teacher, work.channels.decode), work.plans.decode)

    return _heal(
        work,
        "prefill",
        work.plans.prefill,
        work.channels.prefill,
        progress_range=(0.0, 0.5),
        beside=None,
        inherits=lambda dense: {},
        frozen=lambda stack: set(),
        learning=lambda student: work.lessons.of_prefill(student, unhealed_decode),
    )


def _heal_decode(work: Work, prefill: HealedHalf) -> HealedHalf:
    """It starts from what it inherits of prefill's weights, which is also what it falls back to."""
    plans, channels = work.plans, work.channels
    only_decode = only_in_decode(plans).values()
    kept = inherited(prefill.trained, plans)
    return _heal(
        work,
        "decode",
        plans.decode,
        channels.decode,
        progress_range=(0.5, 1.0),
        beside=prefill,
        inherits=lambda dense: change_width(kept, channels.prefill, channels.decode, dict(dense.named_parameters())),
        frozen=lambda stack: {name for absorber in only_decode for name in kv_tensor_names(stack, absorber)},
        learning=lambda student: work.lessons.of_decode(student, pruned(prefill.weights, plans.prefill)),
    )


def _heal(
    work: Work,
    half: Half,
    plan: BlockPlan,
    channels: Channels | None,
    *,
    progress_range: tuple[float, float],
    beside: HealedHalf | None,
    inherits: Callable[[PreTrainedModel], Tensors],
    frozen: Callable[[BlockStack], set[str]],
    learning: Callable[[PreTrainedModel], Learning],
) -> HealedHalf:
    """Heal a half, in the way that fits, from what it inherits of the other beside the dense model's weights, and from
    what can be folded into these.

    Its result has the held-out loss of the weights given and of those trained. Where training did no better, the
    weights given are put back.
    """
    context, data, spec = work.context, work.data, work.context.spec.distillation
    blocks = trained_blocks(spec, plan)
    trains = _gives_up(plan, channels) and len(data.training) > 0
    size = work.sizes[half]
    resume = kept_state(context, half)
    way = kept_way(resume, spec) if resume else healing_way(size, asked_way(spec), work.free_bytes)

    # The student: its own are what is trained and what it inherits.
    dense = load_model(context.model_dir, context.check, dtype=DTYPES[way.precision] if trains else work.dtype)
    start = inherits(dense)
    folding_of = _folding_of(work, half, plan, dense, progress_range[0])
    weights = narrowed(dense, channels)
    del dense
    stack = block_stack(weights)
    healed: dict[str, nn.Parameter] = {}
    if trains:
        still = frozen(stack) | idle_tensors(stack, plan.parts)
        healed = _healed_weights(context, weights, blocks, still)
    load_tensors(weights, start)
    fold = folding_of(stack)
    own = {*healed, *start, *fold.tensors}
    _share(weights, work.teacher, beside, own=own)
    for block in plan.removed:
        stack.blocks[block].to_empty(device="meta")  # which nobody runs
    if not healed and not fold.tensors:
        return HealedHalf(weights.requires_grad_(False), start, folding=fold.found)
    student = pruned(weights, plan)

    settings = training_settings(context, way, data.training.shape[1])
    learned = learning(student)
    named = dict(weights.named_parameters())
    folding = fold.found
    if fold.found is not None and fold.tensors:
        without = {name: named[name].detach().clone() for name in fold.tensors}
        unfolded = mean_loss(learned.loss, data.judging, settings.held_out_batch)
        load_tensors(weights, fold.tensors)
        folded = mean_loss(learned.loss, data.judging, settings.held_out_batch)
        folding = judged(fold.found, unfolded, folded)
        if folding.kept == "folded":
            start = start | dict(fold.tensors)
        else:
            load_tensors(weights, without)
    if not healed:
        return HealedHalf(weights.requires_grad_(False), start, folding=folding)
    dtype = stored_dtype(context.model_dir)
    given = {name: as_stored(named[name].detach(), dtype) for name in healed}
    context.say(progress_range[0], f"Measuring the {half} model before it is healed.", half=half)
    before = mean_loss(learned.loss, data.held_out, settings.held_out_batch)
    diary = journal(context, half, progress_range, way, resume, work.saver)
    recomputed = recomputed_blocks(*learned.models) if way.recomputed else nullcontext()
    with recomputed, _trained(context, student, healed) as parameters:
        taken = train_on(learned.loss, parameters, data.training, data.held_out, settings, diary).steps
    weights.requires_grad_(False)
    trained = {name: named[name].detach().to(dtype).to("cpu", copy=True).contiguous() for name in given}
    load_tensors(weights, trained)
    after = mean_loss(learned.loss, data.held_out, settings.held_out_batch)
    kept = verdict(before, after)
    if kept == "undistilled":
        load_tensors(weights, given)
        trained = {}

    if DTYPES[way.precision].itemsize > work.dtype.itemsize:
        nn.Module.to(weights, work.dtype)
        _share(weights, work.teacher, beside, own=own)
    how = recorded(size, way, target_bytes=work.target_bytes)
    found = Healing(before=before, after=after, steps=taken, kept=kept, how=how)
    return HealedHalf(weights, start | trained, found, folding)


def as_stored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the host, in the stored dtype where that loses nothing: some models store a few weights wider."""
    exact = weight.to("cpu", copy=True)
    stored = exact.to(dtype)
    return stored if torch.equal(stored.to(exact.dtype), exact) else exact


def _folding_of(
    work: Work, half: Half, plan: BlockPlan, dense: PreTrainedModel, progress: float
) -> Callable[[BlockStack], HalfFold]:
    """What folds all blocks of a half, after the dense model's own are no longer there."""
    context = work.context
    nothing = left_unfolded(context.spec, plan, work.to_fold)
    if nothing is not None:
        return lambda own: nothing
    context.say(progress, f"Folding what the {half} model gives up into what stays.", half=half)
    wanted = wanted_of(context, block_stack(dense), plan, work.to_fold)
    return lambda own: folded_half(context, own, plan, wanted, stored_dtype(context.model_dir))


def _share(weights: PreTrainedModel, teacher: Teacher, beside: HealedHalf | None, *, own: Collection[str]) -> None:
    """Hold what is not a half's own once: with the dense model, or else with the half beside it."""
    if isinstance(teacher, PreTrainedModel):
        share(weights, teacher, own=own)
    elif beside is not None:
        share(weights, beside.weights, own={*own, *beside.trained})
