"""The windows of a whole job, by tokenizers that put special tokens around a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pdtrim.contract.errors import InvalidRequest
from pdtrim.contract.spec import JobSpec
from tests.tiny_job import tiny_spec
from tests.unit.workers.pruning.models import framed_tokenizer, reference_tokenizer
from workers.inputs.windows import token_windows
from workers.pruning.model.calibration import token_stream

DOCUMENTS = ["".join(f"a_{i} = {i}\n" for i in range(start, start + 300)) for start in (0, 1000, 5000)]
BEGIN, END = 5, 6
"""Characters that none of the documents has."""


def spec(**calibration: Any) -> JobSpec:
    found = tiny_spec(Path("/nowhere"), calibration={"windows": 9, "window_tokens": 32, **calibration})
    return JobSpec.model_validate({**found, "distillation": {"heal_tokens": 8192}})


def test_windows_of_every_use_begin_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = framed_tokenizer((BEGIN,), (END,))
    found = token_windows(spec(), DOCUMENTS, tokenizer)
    stream = token_stream(DOCUMENTS, reference_tokenizer())
    assert BEGIN not in stream
    text = " ".join(map(str, stream.tolist()))
    for windows in found.values():
        assert windows.shape[1] == 32
        assert (windows[:, 0] == BEGIN).all()
        for window in windows[:, 1:].tolist():
            assert " ".join(map(str, window)) in text


@pytest.mark.parametrize("documents", [DOCUMENTS, None], ids=["given", "the standard library"])
def test_what_a_tokenizer_puts_behind_a_text_is_in_no_window(documents: list[str] | None) -> None:
    tokenizers = (reference_tokenizer(), framed_tokenizer((), (END,)))
    plain, closed = (token_windows(spec(), documents, tokenizer) for tokenizer in tokenizers)
    assert all(torch.equal(closed[split], windows) for split, windows in plain.items())


def test_windows_that_hold_little_but_special_tokens_are_refused() -> None:
    with pytest.raises(
        InvalidRequest, match="begins every text with 4 special tokens, which leaves no prompt"
    ) as error:
        token_windows(spec(window_tokens=8), DOCUMENTS, framed_tokenizer((1, 2, 3, BEGIN)))
    assert error.value.param == "calibration.window_tokens"
