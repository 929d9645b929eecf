"""The dense model's targets, computed ahead of healing where that model does not fit beside the student.

They lie on this worker's disk, and in the store for a later attempt until the stage has succeeded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial

import torch
from torch import Tensor

from pdtrim.contract.spec import DistillationSpec
from workers.inputs.models import load_for_walks
from workers.pruning.repair.answers import unmarked
from workers.pruning.repair.targets import Targets, computed, group_windows
from workers.stages.context import StageContext
from workers.stages.removal import Plans
from workers.stages.saving import Saver

DECIDED = "targets.json"
DISK_SHARE = 0.5
"""Of the free disk, that targets may take."""
Blocks = tuple[int, ...]
"""Of the dense model, ascending: the hidden states that enter them are kept."""


def compared_blocks(plans: Plans, spec: DistillationSpec) -> Blocks:
    """The states between blocks that the losses of both halves compare."""
    if not spec.losses.hidden:
        return ()
    return tuple(sorted({*plans.prefill.kept[1:], *plans.decode.kept[1:]}))


def fit_on_disk(context: StageContext, size: int) -> bool:
    """Whether so many bytes of targets may be kept on this worker."""
    return size <= DISK_SHARE * shutil.disk_usage(context.workdir).free


def decided(context: StageContext, decide: Callable[[], Blocks | None]) -> Blocks | None:
    """Of which blocks states are kept, None where no targets are: as an earlier attempt decided, if there was one."""
    if (kept := context.load_state(DECIDED)) is not None:
        found = json.loads(kept)
        return None if found is None else tuple(found)
    blocks = decide()
    context.save_state(DECIDED, json.dumps(blocks).encode())
    return blocks


@contextmanager
def kept_targets(
    context: StageContext, windows: Tensor, blocks: Blocks, hidden: int, dtype: torch.dtype, saver: Saver
) -> Iterator[Targets]:
    """The targets of windows (windows, tokens), `marked` or not: those of an earlier attempt, and computed ones.

    Raises: as `load_for_walks`; StoreUnavailable; what `context.say` raises.
    """
    windows, _ = unmarked(windows)
    (context.workdir / "targets").mkdir()
    model, files = None, []
    groups = windows.split(group_windows(blocks, hidden, windows.shape[1]))
    for number, group in enumerate(groups):
        name = f"targets/{number:05d}.safetensors"
        files.append(context.workdir / name)
        if context.fetch_kept(name, files[-1]):
            continue
        if model is None:
            model = load_for_walks(context.model_dir, context.check, dtype=dtype)
        context.say(0.0, "Computing what the dense model says.", windows=number * len(groups[0]), of=len(windows))
        batch = context.spec.distillation.batch_windows
        context.write_tensors(files[-1], computed(model, group, blocks, batch))
        saver.then(partial(context.keep_file, name, files[-1]))
    del model
    with closing(Targets(windows, files)) as targets:
        yield targets
