"""Scoring: cut the text into fixed token windows and measure each block's redundancy on them."""

from __future__ import annotations

from typing import Any

from safetensors.torch import save_file

from service.contract.blocks import check_blocks
from service.contract.errors import ModelUnsupported
from workers.context import StageContext
from workers.data import token_windows
from workers.models import device, load_for_walks, load_tokenizer, windows_at_once
from workers.pruning.blocks import UnsupportedArchitecture, block_stack
from workers.pruning.scores import block_scores

WINDOWS = "windows.safetensors"
SCORES = "scores.json"


def run(context: StageContext) -> dict[str, Any]:
    """Writes the windows that every later stage reads, and each block's scores.

    Raises: ModelUnsupported, TooManyBlocks, InvalidRequest (too little text), SourceUnreadable.
    """
    context.report(0.05, "Cutting the text into windows.")
    windows = token_windows(context.spec, context.documents(), load_tokenizer(context.model_dir))
    save_file(windows, context.out / WINDOWS)

    context.report(0.4, "Scoring blocks.")
    try:
        stack = block_stack(load_for_walks(context.model_dir))
    except UnsupportedArchitecture as error:
        raise ModelUnsupported(str(error), param="model.source") from error
    num_blocks = len(stack.blocks)
    check_blocks(context.spec, num_blocks)
    calibration = windows["calibration"].to(device())
    scores = block_scores(stack, calibration, chunk_windows=windows_at_once(stack.model, calibration.shape[1]))
    context.write_json(SCORES, scores.to_json())
    return {
        "blocks": num_blocks,
        "cosine": [round(value, 6) for value in scores.cosine],
        "windows": {split: len(part) for split, part in windows.items()},
    }
