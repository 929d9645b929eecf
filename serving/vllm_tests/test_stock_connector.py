"""A job's pair whose halves have equally many KV caches, over vLLM's own NixlConnector, with the plugin and without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vllm_tests.checkpoints import JOB_PARTS, Case, Pairs
from vllm_tests.running import (
    NIXL,
    NO_PLUGIN,
    PLUGIN,
    ServedPair,
    complete,
    greedy,
    post,
    served,
    wait_for,
)

PLUGINS = {"with the plugin": PLUGIN, "without the plugin": NO_PLUGIN}


@dataclass(frozen=True)
class Running:
    name: str
    pair: ServedPair
    cases: list[Case]


@pytest.fixture(scope="module", params=PLUGINS)
def at_work(
    request: pytest.FixtureRequest, pairs: Pairs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    checkpoints = pairs.get(JOB_PARTS)
    folder = tmp_path_factory.mktemp("stock")
    with served(folder, checkpoints.both, connector=NIXL, environment=PLUGINS[request.param]) as pair:
        # The first handshake may fail while prefill reads its first batch.
        wait_for(lambda: post(pair.router.url, greedy([7, 8, 9], 2)).tokens is not None, what="the first answer")
        yield Running(request.param, pair, checkpoints.cases)


def test_a_pair_that_keeps_all_its_caches_needs_no_connector_of_its_own(at_work: Running) -> None:
    skips = "PDTrim skips kv_only" in at_work.pair.prefill.log.read_text()
    assert skips == (at_work.name == "with the plugin")
    for at_once in (1, 8):
        prompts = [case.prompt for case in at_work.cases]
        answers = complete(at_work.pair.router.url, prompts, len(at_work.cases[0].decode), at_once=at_once)
        same = sum(answer.tokens == case.decode for answer, case in zip(answers, at_work.cases, strict=True))
        alone = sum(case.decode == case.alone["decode"] for case in at_work.cases)
        print(f"\n{at_work.name}, {at_once} at a time: {same} of {len(answers)} equal; decode alone: {alone}")
        assert same == len(answers), [answer.error for answer in answers]
        assert alone < len(answers)
