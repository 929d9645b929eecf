"""Prefill's token is the only one left to sample, once, in both of vLLM's kinds of logits processors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

from pdtrim_vllm import first_token, first_token_v2
from pdtrim_vllm.handover import Handover, digest
from pdtrim_vllm.sampling import handover
from vllm_tests.checkpoints import Pairs

PROMPT = [5, 6, 7]
VOCABULARY = 10


def params(*, stop: list[int] | None = None, min_tokens: int = 0, **changes: Any) -> SamplingParams:
    """Of a request whose prompt prefill has read and gone on from with token 4."""
    handed = {
        "do_remote_prefill": True,
        "remote_block_ids": [[1]],
        "remote_engine_id": "engine",
        "remote_request_id": "request",
        "remote_host": "127.0.0.1",
        "remote_port": 5600,
        **Handover(digest(PROMPT), len(PROMPT), 4).to_params(),
        **changes,
    }
    return SamplingParams(stop_token_ids=stop, min_tokens=min_tokens, extra_args={"kv_transfer_params": handed})


def config(pairs: Pairs, tmp_path: Path, first: str) -> Any:
    """Of vLLM, as far as it is read."""
    checkpoints = pairs.copy("reference", tmp_path, serving={"first_token": first})
    return SimpleNamespace(model_config=SimpleNamespace(model=str(checkpoints.decode), revision=None))


def sampled(logits: torch.Tensor) -> list[int]:
    return [int(token) for token in logits.argmax(-1)]


@pytest.mark.parametrize(("first", "expected"), [("prefill", [4, 9]), ("decode", [9, 9])])
def test_the_v1_processor_leaves_prefills_token_alone(
    first: str, expected: list[int], pairs: Pairs, tmp_path: Path
) -> None:
    processor = first_token.FirstToken(config(pairs, tmp_path, first), torch.device("cpu"), False)
    output: list[int] = []
    processor.update_state(BatchUpdate(1, [], [(0, params(), PROMPT, output)], []))

    tokens = []
    for _ in expected:
        logits = torch.arange(VOCABULARY, dtype=torch.float32)[None]
        tokens += sampled(processor.apply(logits))
        output.append(tokens[-1])

    assert tokens == expected


def test_an_answer_that_is_to_be_longer_does_not_begin_with_a_token_that_ends_it() -> None:
    assert handover(params(stop=[4])) is not None
    assert handover(params(stop=[5], min_tokens=2)) is not None
    assert handover(params(stop=[4], min_tokens=2)) is None


@pytest.mark.parametrize(("first", "expected"), [("prefill", [9, 4]), ("decode", [9, 9])])
def test_the_v2_processor_leaves_prefills_token_alone_where_the_prompt_ends(
    first: str, expected: list[int], pairs: Pairs, tmp_path: Path
) -> None:
    nothing: Any = None
    processor = first_token_v2.FirstToken(config(pairs, tmp_path, first), nothing)
    assert processor.add_request(3, params()) == (first == "prefill")
    assert not processor.add_request(1, SamplingParams())

    def step(slots: list[int], lengths: list[int]) -> list[int]:
        context = LogitsContext(*[nothing] * 2, np.array(slots), *[nothing] * 3, np.array(lengths))
        return sampled(processor.apply(torch.arange(VOCABULARY, dtype=torch.float32).repeat(len(slots), 1), context))

    assert step([1, 3], [len(PROMPT), len(PROMPT)]) == expected
    assert step([3], [len(PROMPT) + 1]) == [9]
    processor.add_request(3, SamplingParams())
    assert step([3], [len(PROMPT)]) == [9]


@pytest.mark.parametrize("kind", [first_token, first_token_v2])
def test_a_request_that_decode_cannot_answer_is_refused_where_the_client_sees_why(kind: Any) -> None:
    kind.FirstToken.validate_params(params())
    with pytest.raises(ValueError, match="reads no prompts"):
        kind.FirstToken.validate_params(SamplingParams())
    with pytest.raises(ValueError, match="served with PDTrimConnector too"):
        kind.FirstToken.validate_params(params(pdtrim=None))
