"""A job's text as token windows for calibration, training and validation, which never overlap."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pdtrim.contract.errors import InvalidRequest
from pdtrim.contract.spec import JobSpec
from service.stopping import Check, go_on
from workers.pruning.model.calibration import (
    Frame,
    Split,
    TooLittleText,
    cut_windows,
    split_stream,
    stdlib_documents,
    token_stream,
)


def token_windows(
    spec: JobSpec, documents: Iterable[str] | None, tokenizer: PreTrainedTokenizerBase, check: Check = go_on
) -> dict[str, Tensor]:
    """Windows by use, each (windows, tokens). None for `documents` means the Python standard library.

    Each begins as the tokenizer begins a text. There are as many training windows as distillation reads, or all there
    are. Asks `check` all the while.
    Raises: InvalidRequest when there is too little text; what `documents` raise.
    """
    tokens = spec.calibration.window_tokens
    opening = Frame.of(tokenizer).opening
    if 2 * len(opening) >= tokens:
        raise InvalidRequest(
            f"calibration.window_tokens is {tokens}, but the model's tokenizer begins every text with {len(opening)} "
            "special tokens, which leaves no prompt.",
            param="calibration.window_tokens",
        )
    taken = tokens - len(opening)
    wanted: dict[Split, int] = {
        "train": spec.distillation.heal_tokens // tokens + 1,
        "calibration": spec.calibration.windows,
        "validation": spec.evaluation.windows,
    }
    try:
        if documents is None:
            streams = {
                split: _stdlib_stream(split, count * taken, spec.seed, tokenizer, check)
                for split, count in wanted.items()
            }
        else:
            streams = split_stream(token_stream(documents, tokenizer, check=check), tokens=taken)
        return {
            split: cut_windows(streams[split], count=count, tokens=tokens, seed=spec.seed, opening=opening)
            for split, count in wanted.items()
        }
    except TooLittleText as error:
        raise InvalidRequest(f"{error}; give more text or a smaller calibration.window_tokens", param="data") from error


def _stdlib_stream(split: Split, tokens: int, seed: int, tokenizer: PreTrainedTokenizerBase, check: Check) -> Tensor:
    documents = list(stdlib_documents(split))
    random.Random(seed).shuffle(documents)
    return token_stream(documents, tokenizer, at_least=tokens, check=check)


def check_tokens(windows: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, *, embeddings: int) -> None:
    """Hold every token of windows (windows, tokens) against the embeddings there are. Raises: InvalidRequest."""
    for part in windows.values():
        if part.numel() and (highest := int(part.max())) >= embeddings:
            raise InvalidRequest(without_embedding(highest, tokenizer, embeddings), param="model.source")


def without_embedding(token: int, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> str:
    """What is said of a token that the model's embedding has no row for."""
    return (
        f"The text has the token {tokenizer.convert_ids_to_tokens(token)!r}, which is number {token} of the model's "
        f"tokenizer, but the model embeds {embeddings}. Give the model with the tokenizer that belongs to it."
    )
