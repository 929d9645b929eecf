"""`pdtrim serve` as a new user has it: one command, an endpoint, answers by the official OpenAI client, streamed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import BadRequestError, InternalServerError, NotFoundError, OpenAI

from vllm_tests.checkpoints import WORKER_PYTHON, Checkpoints, Pairs
from vllm_tests.running import wait_for

PORTS = int(os.environ.get("PDTRIM_TEST_PORTS", 23400))
"""The endpoint's, which the others follow."""
PROMPT = "import os\n\n\ndef main("
START_SECONDS = 1200
STOP_SECONDS = 60
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""The reference model knows no turns."""


@dataclass(frozen=True)
class Endpoint:
    """What the command serves, by a client of it."""

    client: OpenAI
    checkpoints: Checkpoints
    said: Path

    @property
    def model(self) -> str:
        """The one that it has."""
        (model,) = self.client.models.list()
        return str(model.id)


@pytest.fixture(scope="module")
def endpoint(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The reference model's pair, served until the tests are done; then Ctrl-C, after which nothing may be left."""
    folder, pair = tmp_path_factory.mktemp("command"), pairs.get("reference")
    template = folder / "chat.jinja"
    template.write_text(CHAT)
    command = [str(WORKER_PYTHON), "-m", "pdtrim.command", "serve", *map(str, pair.both), "--python", sys.executable]
    command += ["--port", str(PORTS), "--tokens", "512", "--dtype", "float32"]
    command += ["--engine-args", f"--chat-template {template}"]
    said = folder / "said"
    begun = time.monotonic()
    with said.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)
    try:

        def served() -> bool:
            assert process.poll() is None, said.read_text()
            return "is served" in said.read_text()

        wait_for(served, seconds=START_SECONDS, what="the endpoint")
        print(f"\npdtrim serve: the first answer after {time.monotonic() - begun:.0f} s")
        yield Endpoint(OpenAI(base_url=f"http://127.0.0.1:{PORTS}/v1", api_key="none"), pair, said)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_SECONDS) == 0, said.read_text()
        assert not psutil.wait_procs(children, timeout=STOP_SECONDS)[1]
    finally:
        process.kill()


def test_it_says_where_it_is_and_how_to_ask(endpoint: Endpoint) -> None:
    text = endpoint.said.read_text()
    assert f"http://127.0.0.1:{PORTS}/v1" in text
    assert f"curl http://127.0.0.1:{PORTS}/v1/completions" in text
    assert endpoint.model.endswith("-pruned")


def test_streamed_completions_are_the_references_tokens(endpoint: Endpoint) -> None:
    cases = endpoint.checkpoints.cases[::4]
    same = 0
    for case in cases:
        expected = case.expected("decode")
        tokens: list[int] = []
        for part in endpoint.client.completions.create(
            model=endpoint.model,
            prompt=case.prompt,
            max_tokens=len(expected),
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        ):
            token_ids: Any = getattr(part.choices[0], "token_ids", None) if part.choices else None
            tokens += token_ids or []
        same += tokens == expected
    print(f"\nby the openai client, streamed: {same} of {len(cases)} equal")
    assert same == len(cases)


def test_a_chat_is_answered_as_the_text_it_is_made_of(endpoint: Endpoint) -> None:
    asked: dict[str, Any] = {"model": endpoint.model, "max_tokens": 12, "temperature": 0}
    plain = endpoint.client.completions.create(prompt=PROMPT, **asked).choices[0].text
    messages: Any = [{"role": "user", "content": PROMPT}]
    whole = endpoint.client.chat.completions.create(messages=messages, **asked).choices[0].message.content
    parts = endpoint.client.chat.completions.create(messages=messages, stream=True, **asked)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert plain
    response = endpoint.client.responses.create(model=endpoint.model, input=PROMPT, max_output_tokens=12, temperature=0)
    assert whole == streamed == response.output_text == plain


def test_what_an_answer_tells_beside_its_text(endpoint: Endpoint) -> None:
    asked: dict[str, Any] = {"model": endpoint.model, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    stopped = endpoint.client.completions.create(stop=[")"], logprobs=2, **asked)
    (choice,) = stopped.choices
    assert (choice.finish_reason, ")" in choice.text) == ("stop", False)
    assert choice.logprobs is not None
    assert choice.logprobs.top_logprobs is not None
    assert all(len(found) >= 2 for found in choice.logprobs.top_logprobs)
    parts = endpoint.client.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
    (usage,) = [part.usage for part in parts if part.usage is not None]
    assert stopped.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (stopped.usage.prompt_tokens, 40)
    twice = [
        endpoint.client.completions.create(seed=7, **{**asked, "temperature": 1}).choices[0].text for _ in range(2)
    ]
    assert twice[0] == twice[1]


def test_a_list_of_prompts_is_an_error_that_the_client_sees(endpoint: Endpoint) -> None:
    # That it is a list only comes out at decode, whose log has the reason.
    client = endpoint.client.with_options(max_retries=0)
    with pytest.raises(InternalServerError):
        client.completions.create(model=endpoint.model, prompt=["import os", "import re"], max_tokens=4)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"n": 2, "temperature": 1}, "ask for one answer a request"),
        ({"extra_body": {"prompt_logprobs": 1}}, "would have decode compute the prompt: leave it out"),
        ({"echo": True, "logprobs": 1}, "would have decode compute the prompt: leave it out"),
        ({"prompt": [7] * 600}, "maximum context length is 512 tokens"),
    ],
    ids=["two answers", "prompt_logprobs", "echo with logprobs", "too long"],
)
def test_what_cannot_be_answered_is_an_error_that_says_why(
    endpoint: Endpoint, asked: dict[str, Any], said: str
) -> None:
    request: dict[str, Any] = {"model": endpoint.model, "prompt": PROMPT, "max_tokens": 4, **asked}
    with pytest.raises(BadRequestError, match=said):
        endpoint.client.completions.create(**request)


def test_a_model_that_is_not_served_is_not_found(endpoint: Endpoint) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        endpoint.client.completions.create(model="other", prompt=PROMPT, max_tokens=4)
