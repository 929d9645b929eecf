"""A job's text as token windows for calibration, training and validation, which never overlap."""

from __future__ import annotations

import random
from collections.abc import Iterable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pdtrim.contract.errors import InvalidRequest
from pdtrim.contract.spec import JobSpec
from service.stopping import Check, go_on
from workers.pruning.model.calibration import Split, cut_windows, split_stream, stdlib_documents, token_stream


def token_windows(
    spec: JobSpec, documents: Iterable[str] | None, tokenizer: PreTrainedTokenizerBase, check: Check = go_on
) -> dict[str, Tensor]:
    """Windows by use, each (windows, tokens). None for `documents` means the Python standard library.

    There are as many training windows as distillation reads, or all there are. Asks `check` all the while.
    Raises: InvalidRequest when there is too little text.
    """
    tokens = spec.calibration.window_tokens
    wanted: dict[Split, int] = {
        "train": spec.distillation.heal_tokens // tokens + 1,
        "calibration": spec.calibration.windows,
        "validation": spec.evaluation.windows,
    }
    try:
        if documents is None:
            streams = {
                split: _stdlib_stream(split, count * tokens, spec.seed, tokenizer, check)
                for split, count in wanted.items()
            }
        else:
            streams = split_stream(token_stream(documents, tokenizer, check=check), tokens=tokens)
        return {
            split: cut_windows(streams[split], count=count, tokens=tokens, seed=spec.seed)
            for split, count in wanted.items()
        }
    except ValueError as error:
        raise InvalidRequest(f"{error}; give more text or a smaller calibration.window_tokens", param="data") from error


def _stdlib_stream(split: Split, tokens: int, seed: int, tokenizer: PreTrainedTokenizerBase, check: Check) -> Tensor:
    documents = list(stdlib_documents(split))
    random.Random(seed).shuffle(documents)
    return token_stream(documents, tokenizer, at_least=tokens, check=check)
