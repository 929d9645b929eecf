"""Pairs served by two engines and the router: every answer is the reference's, token by token."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from vllm_tests.checkpoints import JOB, Case, Checkpoints, Pairs
from vllm_tests.running import (
    BLOCK_SIZE,
    NO_PLUGIN,
    PLUGIN,
    Answer,
    ServedPair,
    complete,
    greedy,
    hand_over,
    metric,
    post,
    served,
    wait_for,
)

CHUNKED = ("--max-num-batched-tokens", "64")
"""Prompts of more tokens are read in parts."""
WINDOWED = ("--disable-hybrid-kv-cache-manager",)
SERVED = {
    "job-decode": (JOB, "decode", CHUNKED, PLUGIN),
    "job-prefill": (JOB, "prefill", CHUNKED, PLUGIN),
    "qwen3-prefill": ("qwen3", "prefill", (), PLUGIN),
    "gemma3-decode": ("gemma3", "decode", WINDOWED, PLUGIN),
    "unified-decode": ("unified", "decode", (), PLUGIN),
    "parts-decode": ("parts", "decode", CHUNKED, PLUGIN),
    "parts-decode-stock": ("parts", "decode", CHUNKED, NO_PLUGIN),
    "gemma3_parts-prefill": ("gemma3_parts", "prefill", WINDOWED, PLUGIN),
}
"""Pair, who says the first token, options and variables of both engines. Prefix caching is on, as by default."""
FLOAT32_BYTES = 4
of_the_job = pytest.mark.parametrize("at_work", ["job-decode", "job-prefill"], indirect=True, scope="module")
"""What depends on neither the model's family nor its depth."""


@dataclass(frozen=True)
class Running:
    """A pair at work, and what it has to answer."""

    name: str
    pair: ServedPair
    checkpoints: Checkpoints
    first_token: str

    @property
    def cases(self) -> list[Case]:
        return self.checkpoints.cases

    def equal(self, cases: list[Case], answers: list[Answer], how: str) -> int:
        """The number of answers that are the reference's; it is printed."""
        same = sum(a.tokens == c.expected(self.first_token) for a, c in zip(answers, cases, strict=True))
        print(f"\n{self.name}, {how}: {same} of {len(cases)} equal")
        for answer, case in zip(answers, cases, strict=True):
            expected = case.expected(self.first_token)
            if answer.tokens != expected:
                alike = next((n for n, token in enumerate(answer.tokens or []) if token != expected[n]), 0)
                print(f"prompt of {len(case.prompt)} tokens: {answer.error or f'alike for {alike} tokens'}")
        return same


def block_bytes(checkpoint: Path) -> int:
    """Keys and values of one layer for a block of tokens."""
    config = json.loads((checkpoint / "config.json").read_text())
    return 2 * int(config["num_key_value_heads"]) * int(config["head_dim"]) * BLOCK_SIZE * FLOAT32_BYTES


@pytest.fixture(scope="module", params=SERVED)
def at_work(
    request: pytest.FixtureRequest, pairs: Pairs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    name, first_token, options, plugins = SERVED[request.param]
    folder: Path = tmp_path_factory.mktemp(request.param)
    checkpoints = pairs.copy(name, folder, serving={"first_token": first_token})
    engines: dict[str, Any] = {"prefill_options": options, "decode_options": options, "environment": plugins}
    with served(folder, checkpoints.both, **engines) as pair:
        # The first request of each engine loads what the others find loaded.
        wait_for(lambda: post(pair.router.url, greedy([7, 8, 9], 2)).tokens is not None, what="the first answer")
        yield Running(request.param, pair, checkpoints, first_token)


def test_answers_are_the_references_one_by_one_and_eight_at_a_time(at_work: Running) -> None:
    cases = at_work.cases
    before = [metric(at_work.pair.decode, f"vllm:nixl_bytes_transferred_{kind}") for kind in ("sum", "count")]
    for at_once in (1, 8):
        answers = complete(at_work.pair.router.url, [c.prompt for c in cases], len(cases[0].decode), at_once=at_once)
        assert at_work.equal(cases, answers, f"{at_once} at a time") == len(cases)
    after = [metric(at_work.pair.decode, f"vllm:nixl_bytes_transferred_{kind}") for kind in ("sum", "count")]

    pdtrim = json.loads((at_work.checkpoints.decode / "pdtrim.json").read_text())
    layers, dense = len(pdtrim["kv_layer_map"]), pdtrim["num_source_blocks"]
    if SERVED[at_work.name][-1] == PLUGIN:
        # Attentions that decode gives up have no KV cache.
        layers -= list(pdtrim.get("dead_units", {}).values()).count("attention")
    blocks = 2 * sum(ceil(len(case.prompt) / BLOCK_SIZE) for case in cases)
    block = block_bytes(at_work.checkpoints.decode)
    print(f"{after[0] - before[0]:.0f} bytes pulled for {blocks} blocks of {layers} layers")
    print(f"{blocks * dense * block} bytes for the {dense} layers of the dense model")
    assert after[1] - before[1] == 2 * len(cases)
    assert after[0] - before[0] == blocks * layers * block


@of_the_job
def test_prompts_repeated_in_any_order_read_no_block_that_is_not_prefills(at_work: Running) -> None:
    # Prompts that begin alike share blocks in the caches of both engines.
    cases = at_work.cases[::3] * 3
    random.Random(3).shuffle(cases)
    for case in cases[::4]:
        post(at_work.pair.prefill.url, greedy(case.prompt, 4))  # Prefill alone, which fills its cache.
        post(at_work.pair.decode.url, greedy(case.prompt, 4))  # Refused.

    answers = complete(at_work.pair.router.url, [case.prompt for case in cases], len(cases[0].decode), at_once=4)

    assert at_work.equal(cases, answers, "repeated, 4 at a time") == len(cases)


@of_the_job
def test_an_answer_may_end_with_its_first_token(at_work: Running) -> None:
    # Routers ask prefill for one token and no fewer, and vLLM then bans what would end the answer.
    for case in at_work.cases[::4]:
        first = case.expected(at_work.first_token)[0]
        answer = post(at_work.pair.router.url, greedy(case.prompt, 4, stop_token_ids=[first]))
        assert answer.tokens == [first], answer.error


@of_the_job
def test_requests_that_decode_cannot_answer_rightly_are_refused(at_work: Running) -> None:
    router, decode = at_work.pair.router.url, at_work.pair.decode.url
    prompts = [case.prompt for case in at_work.cases[:2]]
    refused = {
        "straight to decode": post(decode, greedy(prompts[0], 4)),
        "a list of prompts": post(router, greedy(prompts, 4)),
        "the same prompt twice": post(router, greedy(prompts[:1] * 2, 4)),
        "two answers": post(router, greedy(prompts[0], 4, n=2, temperature=1)),
        "prompt_logprobs": post(router, greedy(prompts[0], 4, prompt_logprobs=1)),
        "another prompt than prefill read": hand_over(at_work.pair, prompts[0], 4, decode_prompt=prompts[1]),
    }
    for what, answer in refused.items():
        print(f"{what}: {answer.error}")

    assert [what for what, answer in refused.items() if not answer.error.startswith("HTTP")] == []
    log = at_work.pair.decode.log.read_text()
    assert "one request has one prompt, send a list as several requests" in log
    assert "reads no prompts" in refused["straight to decode"].error
    case = at_work.cases[3]
    answer = post(router, greedy(case.prompt, len(case.decode)))
    assert answer.tokens == case.expected(at_work.first_token)


@of_the_job
def test_a_prefill_engine_that_is_killed_and_started_again_serves_on(at_work: Running) -> None:
    cases = at_work.cases[:8]
    at_work.pair.prefill.kill()
    lost = post(at_work.pair.router.url, greedy(cases[0].prompt, 4))
    at_work.pair.prefill.start()
    at_work.pair.prefill.wait()
    wait_for(lambda: post(at_work.pair.router.url, greedy([7, 8, 9], 2)).tokens is not None, what="an answer again")

    answers = complete(at_work.pair.router.url, [c.prompt for c in cases], len(cases[0].decode), at_once=4)

    assert lost.error
    assert at_work.equal(cases, answers, "after prefill was killed and started again") == len(cases)
