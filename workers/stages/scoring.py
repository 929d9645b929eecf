"""Scoring: cut the text into fixed token windows and measure each block's redundancy on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from pdtrim.contract.architectures import is_tested
from pdtrim.contract.blocks import check_blocks
from pdtrim.contract.errors import ModelUnsupported, SourceUnreadable
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import SCORES, BlockScores, ScoringResult, WindowCounts
from service.sources import SourceError
from service.stopping import interruptible
from workers.inputs.models import (
    device,
    embedded_tokens,
    load_for_walks,
    load_tokenizer,
    load_vision_language,
    windows_at_once,
)
from workers.inputs.prompts import packed
from workers.inputs.windows import Windows, check_tokens, token_windows
from workers.pruning.model.blocks import UnsupportedArchitecture, block_stack, try_out
from workers.pruning.model.building import ImpossibleModel
from workers.pruning.model.calibration import Frame
from workers.pruning.model.checkpoint import BrokenCheckpoint, check_complete, empty_model
from workers.pruning.model.parts import prove_parts
from workers.pruning.model.proof import is_whole
from workers.pruning.search.scores import block_scores
from workers.stages.context import StageContext
from workers.stages.evaluation_tasks import Tasks, check_asked, load_tasks
from workers.stages.precision import choose_precision, scoring_dtype
from workers.stages.proving import prove_architecture, prove_continuation, prove_decoder, prove_halves
from workers.stages.width import choose_channels

WINDOWS = "windows.safetensors"
PROMPTS = "prompts.safetensors"
"""What the dense model is to answer, where healing trains on its answers."""
TRIED_TOKENS = 64


def run(context: StageContext) -> ScoringResult:
    """Writes the windows that every later stage reads, each block's scores, and the MLP channels that stay.

    Raises: ModelUnsupported, TooManyBlocks, InvalidRequest (too little text, a token without an embedding),
    SourceUnreadable; as `load_tasks`.
    """
    context.say(0.0, "Looking at the model.")
    with _blamed_on_the_model(context):
        check_complete(context.model_dir, context.check)
    context.say(0.0, "Loading the evaluation tasks.")
    # What they lack should show now, not after hours of work.
    tasks = interruptible(context.check, partial(load_tasks, context.spec.evaluation.tasks))
    tokenizer = load_tokenizer(context.model_dir)
    _check_asked(context, tasks, tokenizer)
    context.say(0.05, "Cutting the text into windows.")
    windows = interruptible(context.check, partial(_windows, context, tokenizer))
    save_file(windows.tensors, context.out / WINDOWS)
    if context.spec.distillation.data == "self":
        save_file(packed(windows.prompts), context.out / PROMPTS)

    context.say(0.4, "Trying the model out.")
    with _blamed_on_the_model(context):
        model = load_for_walks(
            context.model_dir, context.check, dtype=scoring_dtype(context), memory_bytes=context.memory_bytes
        )
        stack = block_stack(model)
        check_tokens(windows, tokenizer, embeddings=embedded_tokens(stack.model))
        try_out(stack, windows.ids["calibration"][:1, :TRIED_TOKENS])
        if not is_tested(stack.model.config.model_type):
            protected = frozenset(context.spec.search.protect)
            asked = (half.remove_blocks for half in (context.spec.prefill, context.spec.decode))
            removable = max(len(stack.blocks) - 1 if count is None else count for count in asked)
            proving = partial(prove_architecture, removable=removable, protected=protected, check=context.check)
            interruptible(context.check, partial(proving, stack, context.model_dir))
            first_token = context.spec.serving.first_token
            prove_continuation(stack, first_token, protected)
            if context.spec.prefill != context.spec.decode:
                prove_halves(stack, first_token, protected)
        if context.composite is not None and is_whole(stack.model):
            prove_decoder(stack, load_vision_language(context.source_dir, context.check))
        prove_parts(stack, context.spec.prefill.possible_parts | context.spec.decode.possible_parts)
    context.say(0.45, "Scoring blocks.")
    num_blocks = len(stack.blocks)
    check_blocks(context.spec, num_blocks)
    calibration = windows.ids["calibration"].to(device())
    chunk_windows = windows_at_once(stack.model, calibration.shape[1])
    scores = block_scores(
        stack,
        calibration,
        chunk_windows=chunk_windows,
        walked=lambda share: context.say(0.45 + 0.45 * share, "Scoring blocks."),
    )
    context.say(0.9, "Scoring MLP channels.")
    choose_channels(context, stack, calibration, chunk_windows=chunk_windows)
    opening = tokenizer.convert_ids_to_tokens(list(Frame.of(tokenizer).opening))
    precision = choose_precision(context, stack, calibration)
    written = {**scores.to_json(), "opening": opening, "warnings": windows.warnings, "precision": precision}
    context.write_json(SCORES, BlockScores.model_validate(written))
    return ScoringResult(
        blocks=num_blocks,
        cosine=[round(value, 6) for value in scores.cosine],
        windows=WindowCounts(**{split: len(part) for split, part in windows.ids.items()}),
        opening=opening,
        warnings=windows.warnings,
        precision=precision,
    )


def _check_asked(context: StageContext, tasks: Tasks, tokenizer: PreTrainedTokenizerBase) -> None:
    """Hold what evaluation will ask of the model against it. Raises: as `check_asked`."""
    with _blamed_on_the_model(context):
        model = empty_model(context.model_dir, context.check)
    checking = partial(check_asked, context.spec.evaluation, tasks, model, tokenizer, seed=context.spec.seed)
    interruptible(context.check, checking)


def read_opening(context: StageContext) -> list[str]:
    """The special tokens that every window begins with; none in the jobs of versions that did not look for any."""
    return context.read(StageName.SCORING, SCORES, BlockScores).opening


def _windows(context: StageContext, tokenizer: PreTrainedTokenizerBase) -> Windows:
    try:
        return token_windows(context.spec, context.rows(), tokenizer, context.check)
    except SourceError as error:
        error.param = error.param or "data.source"
        raise


@contextmanager
def _blamed_on_the_model(context: StageContext) -> Iterator[None]:
    """Raises: ModelUnsupported, SourceUnreadable."""
    try:
        yield
    except (UnsupportedArchitecture, ImpossibleModel) as error:
        raise ModelUnsupported(f"{error}.", param="model.source") from error
    except BrokenCheckpoint as error:
        message = str(error).replace(str(context.model_dir), context.spec.model.source)
        raise SourceUnreadable(f"{message}.", param="model.source") from error
