"""Scoring: cut the text into fixed token windows and measure each block's redundancy on them."""

from __future__ import annotations

from functools import partial

from safetensors.torch import save_file
from torch import Tensor

from pdtrim.contract.architectures import is_tested
from pdtrim.contract.blocks import check_blocks
from pdtrim.contract.errors import ModelUnsupported
from pdtrim.contract.results import SCORES, BlockScores, ScoringResult, WindowCounts
from service.stopping import interruptible
from workers.inputs.models import device, load_for_walks, load_tokenizer, windows_at_once
from workers.inputs.windows import token_windows
from workers.pruning.model.blocks import UnsupportedArchitecture, block_stack, prove
from workers.pruning.search.scores import block_scores
from workers.stages.context import StageContext
from workers.stages.evaluation_tasks import load_tasks
from workers.stages.width import choose_channels

WINDOWS = "windows.safetensors"


def run(context: StageContext) -> ScoringResult:
    """Writes the windows that every later stage reads, each block's scores, and the MLP channels that stay.

    Raises: ModelUnsupported, TooManyBlocks, InvalidRequest (too little text), SourceUnreadable; as `load_tasks`.
    """
    context.say(0.0, "Loading the evaluation tasks.")
    # What they lack should show now, not after hours of work.
    interruptible(context.check, partial(load_tasks, context.spec.evaluation.tasks))
    context.say(0.05, "Cutting the text into windows.")
    windows = interruptible(context.check, partial(_windows, context))
    save_file(windows, context.out / WINDOWS)

    context.say(0.4, "Scoring blocks.")
    try:
        stack = block_stack(load_for_walks(context.model_dir, context.check))
        if not is_tested(stack.model.config.model_type):
            prove(stack)
    except UnsupportedArchitecture as error:
        raise ModelUnsupported(str(error), param="model.source") from error
    num_blocks = len(stack.blocks)
    check_blocks(context.spec, num_blocks)
    calibration = windows["calibration"].to(device())
    chunk_windows = windows_at_once(stack.model, calibration.shape[1])
    scores = block_scores(stack, calibration, chunk_windows=chunk_windows)
    context.write_json(SCORES, BlockScores.model_validate(scores.to_json()))
    context.say(0.9, "Scoring MLP channels.")
    choose_channels(context, stack, calibration, chunk_windows=chunk_windows)
    return ScoringResult(
        blocks=num_blocks,
        cosine=[round(value, 6) for value in scores.cosine],
        windows=WindowCounts(**{split: len(part) for split, part in windows.items()}),
    )


def _windows(context: StageContext) -> dict[str, Tensor]:
    return token_windows(context.spec, context.documents(), load_tokenizer(context.model_dir), context.check)
