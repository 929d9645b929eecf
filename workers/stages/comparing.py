"""What evaluation compares, and how it holds the models: all in memory, or read block by block in one walk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from workers.inputs.models import (
    compute_dtype,
    device,
    fits_whole,
    load_model,
    load_streamed_model,
    walk_windows,
)
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.cache import cache_bytes
from workers.pruning.model.checkpoint import SourceTensors, check_complete, empty_model, stored_dtype
from workers.pruning.model.comparison import Asked, Compared, Comparison, Course, Pair, PairLosses, compare
from workers.pruning.model.measure import Perplexity, perplexity, quality
from workers.pruning.model.pair import FirstToken, first_token_losses, pd_loss
from workers.pruning.model.parts import pruned, zeroed_tensors
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.model.streaming import BlockRoom, Cut, parameter_bytes
from workers.pruning.model.width import Channels
from workers.stages.context import StageContext
from workers.stages.width import narrowed

BATCH_WINDOWS = 8
BATCH_TOKENS_ON_CPU = 2048
"""Tokens that a block computes at a time where the memory is the machine's own."""


@dataclass(frozen=True)
class Exported:
    """The dense model, or a checkpoint that was made of it."""

    folder: Path
    decoder: Path
    """The model's folder, or that of its text decoder alone."""
    plan: BlockPlan
    channels: Channels | None = None
    trained: Path | None = None
    """The file with the tensors that distillation changed."""

    @property
    def gave_up(self) -> bool:
        return bool(self.plan.removed or self.plan.parts) or self.channels is not None


@dataclass(frozen=True)
class Windows:
    """Token windows (windows, time), and others whose continuation is the prompt said again."""

    text: Tensor
    copying: Tensor
    prompt_tokens: int
    first_token: FirstToken
    cached_tokens: Sequence[int]
    """After which caches are measured."""


@dataclass(frozen=True)
class Halves:
    """The names of the checkpoints that serve as either half."""

    prefill: str
    decode: str


def fit_together(context: StageContext, exported: Mapping[str, Exported]) -> bool:
    """Whether all models can be held at once, or some have to be because they cannot be read block by block."""
    sizes = [parameter_bytes(one.decoder, compute_dtype(), context.check) for one in exported.values()]
    return fits_whole(sum(sizes), context.memory_bytes) or not all(
        check_complete(one.decoder, context.check).one_to_one for one in exported.values()
    )


def load_all(context: StageContext, exported: Mapping[str, Exported]) -> dict[str, PreTrainedModel]:
    """Every model, as a server would load it."""
    return {name: load_model(one.decoder, context.check) for name, one in exported.items()}


def compare_whole(
    context: StageContext,
    exported: Mapping[str, Exported],
    models: Mapping[str, PreTrainedModel],
    halves: Halves,
    windows: Windows,
) -> Comparison:
    """The figures of models that are held, each by its own forward."""
    dense = models["dense"]

    def before(name: str) -> PreTrainedModel:
        return pruned(narrowed(dense, exported[name].channels), exported[name].plan)

    def undistilled(name: str) -> Perplexity:
        context.check()
        return perplexity(before(name), windows.text, batch=BATCH_WINDOWS)

    def losses(prefill: PreTrainedModel, decode: PreTrainedModel, layer_map: Sequence[int]) -> PairLosses:
        context.check()

        def loss(ids: Tensor) -> float:
            return pd_loss(
                prefill,
                decode,
                layer_map,
                ids,
                prompt_tokens=windows.prompt_tokens,
                first_token=windows.first_token,
                batch=BATCH_WINDOWS,
            )

        first = first_token_losses(
            prefill, decode, layer_map, windows.text, prompt_tokens=windows.prompt_tokens, batch=BATCH_WINDOWS
        )
        return PairLosses(loss(windows.text), loss(windows.copying), first)

    served_in = stored_dtype(context.model_dir)
    layer_map = kv_layer_map(exported[halves.prefill].plan, exported[halves.decode].plan)
    return Comparison(
        models={name: quality(model, dense, windows.text, batch=BATCH_WINDOWS) for name, model in models.items()},
        undistilled={name: undistilled(name) for name, one in exported.items() if one.gave_up},
        pairs={
            "dense": losses(dense, dense, range(len(block_stack(dense).blocks))),
            "pruned": losses(before(halves.prefill), before(halves.decode), layer_map),
            "distilled": losses(models[halves.prefill], models[halves.decode], layer_map),
        },
        cached={
            name: [cache_bytes(models[name], tokens, served_in) for tokens in windows.cached_tokens]
            for name in ("dense", halves.decode)
        },
    )


def compare_streamed(
    context: StageContext,
    exported: Mapping[str, Exported],
    halves: Halves,
    windows: Windows,
    say: Callable[[float], None],
) -> Comparison:
    """The same figures, of models that do not fit: one walk over the blocks of all of them, each weight read once.

    A checkpoint's weights that distillation did not change are the dense model's, as export has written them.
    """
    room = BlockRoom(compute_dtype(), device())
    dense, of_dense = load_streamed_model(context.model_dir, context.check, room=room)
    silent = block_stack(empty_model(context.model_dir, context.check))
    courses = {"dense": Course.of_dense(dense, exported["dense"].plan)}
    before = {}
    for name, one in exported.items():
        if one.trained is None:
            continue
        base, reader = dense, of_dense
        if one.channels is not None:
            cut = Cut(channels=one.channels)
            base, reader = load_streamed_model(context.model_dir, context.check, room=room, cut=cut, beside=dense)
        before[name] = Course.of_dense(base, one.plan)
        changed = SourceTensors.in_file(one.trained).files.keys() | zeroed_tensors(silent, one.plan.parts)
        alike = reader.alike(one.plan.kept, changed)
        model, _ = load_streamed_model(one.decoder, context.check, room=room, alike=alike, beside=dense)
        courses[name] = Course.of_checkpoint(model, one.plan)
    compared = Compared(
        dense=courses["dense"],
        models={name: course for name, course in courses.items() if name != "dense"},
        undistilled={name: course for name, course in before.items() if exported[name].gave_up},
        pairs={
            "dense": Pair(courses["dense"], courses["dense"]),
            "pruned": Pair(before[halves.prefill], before[halves.decode]),
            "distilled": Pair(courses[halves.prefill], courses[halves.decode]),
        },
        cached={name: courses[name] for name in ("dense", halves.decode)},
    )
    tokens = windows.text.shape[1]
    on_cpu = max(1, min(BATCH_WINDOWS, BATCH_TOKENS_ON_CPU // tokens))
    asked = Asked(
        prompt_tokens=windows.prompt_tokens,
        first_token=windows.first_token,
        cached_tokens=windows.cached_tokens,
        served_in=stored_dtype(context.model_dir),
        batch=on_cpu if device().type == "cpu" else BATCH_WINDOWS,
        windows_at_once=walk_windows(dense, tokens, streams=compared.streams),
    )
    return compare(compared, windows.text, windows.copying, asked, say=say)
