"""Models and pairs that are asked, held against plain forward passes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import PreTrainedModel

from tests.unit.workers.pruning.devices import FIRST, SECOND, accelerators
from tests.unit.workers.pruning.models import FAMILIES, OTHERS, continued, continued_by_pair, random_ids, tiny_model
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.model.pair import FirstToken, pair_logits
from workers.pruning.serving.asking import Likelihood, ModelAlone, ServedPair
from workers.pruning.serving.handover import EVERY_TOKEN, KvTokenRule
from workers.pruning.serving.pair_server import DecodeHalf, PrefillDecodePair, PrefillHalf

LAYER_MAP = (0, 1, 3, 4)
HALVES: tuple[FirstToken, ...] = ("decode", "prefill")
RULE = KvTokenRule(1, 2, frozenset({0, 2}))


def tiny_pair(family: str, first_token: FirstToken, rule: KvTokenRule = EVERY_TOKEN) -> ServedPair:
    """A dense model of five blocks, and the same without block 2."""
    model = tiny_model(family)
    return ServedPair(model, drop_blocks(model, {2}), LAYER_MAP, first_token, rule)


def questions() -> list[tuple[list[int], list[int]]]:
    """Prompts of several lengths, some with several answers, of one token and more."""
    prompts = [random_ids(1, tokens, seed=tokens)[0].tolist() for tokens in (1, 4, 9, 9, 17)]
    prompts[3] = [*prompts[3][:-1], (prompts[3][-1] + 1) % 97]
    return [
        (prompt, random_ids(1, tokens, seed=31 * number + tokens)[0].tolist())
        for number, prompt in enumerate(prompts)
        for tokens in (1, 3, 6, 2)
    ]


def scored(logits: Tensor, answer: Sequence[int]) -> tuple[float, bool]:
    """By logits (tokens, vocabulary) for each token of an answer."""
    targets = torch.tensor(answer)
    log = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(log), bool((logits.argmax(-1) == targets).all())


def same(found: Sequence[Likelihood], expected: Sequence[tuple[float, bool]]) -> None:
    assert [one.log for one in found] == pytest.approx([log for log, _ in expected], abs=1e-4)
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_a_model_finds_answers_as_likely_as_in_a_pass_of_their_own(family: str) -> None:
    model = tiny_model(family)
    expected = [
        scored(model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1], answer)
        for prompt, answer in questions()
    ]
    same(ModelAlone(model).likelihoods(questions()), expected)


@torch.no_grad()
@pytest.mark.parametrize("first_token", HALVES)
@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_a_pair_finds_answers_as_likely_as_on_a_cache_that_is_handed_over(family: str, first_token: FirstToken) -> None:
    pair = tiny_pair(family, first_token)
    asked = [(prompt, answer) for prompt, answer in questions() if len(prompt) > 1]
    expected = []
    for prompt, answer in asked:
        ids = torch.tensor([[*prompt, *answer]])
        logits = torch.cat(
            pair_logits(
                pair.prefill, pair.decode, LAYER_MAP, torch.cat([ids, ids[:, :1]], 1), len(prompt), first_token
            ),
            dim=1,
        )
        expected.append(scored(logits[0, : len(answer)], answer))
    same(pair.likelihoods(asked), expected)


def test_what_a_model_says_itself_is_its_likeliest_answer() -> None:
    for asked in (ModelAlone(tiny_model("llama")), tiny_pair("llama", "decode"), tiny_pair("llama", "prefill")):
        prompts = [prompt for prompt, _ in questions()[::4]]
        answers = asked.answers(prompts, most_tokens=5, ended=lambda answer: False)
        own = asked.likelihoods(list(zip(prompts, answers, strict=True)))
        others = asked.likelihoods([(p, [(a[0] + 1) % 97, *a[1:]]) for p, a in zip(prompts, answers, strict=True)])
        assert all(one.greedy for one in own)
        assert not any(one.greedy for one in others)


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_a_model_answers_prompts_of_several_lengths_as_one_by_one(family: str) -> None:
    model = tiny_model(family)
    prompts = [random_ids(1, tokens, seed=tokens)[0].tolist() for tokens in (3, 11, 7, 7, 20, 1, 5, 9, 13)]
    expected = [continued(model, torch.tensor([prompt]), 10)[0, len(prompt) :].tolist() for prompt in prompts]
    answers = ModelAlone(model).answers(prompts, most_tokens=10, ended=lambda answer: answer[-1] == 0)
    assert answers == expected  # Token 0 ends texts.


@pytest.mark.parametrize("first_token", HALVES)
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3"])
def test_a_pair_answers_as_plain_transformers_caches_do(family: str, first_token: FirstToken) -> None:
    pair = tiny_pair(family, first_token)
    prompts = [random_ids(1, tokens, seed=tokens)[0].tolist() for tokens in (5, 12, 5, 9)]
    expected = [
        continued_by_pair(
            pair.prefill, pair.decode, LAYER_MAP, torch.tensor([prompt]), new_tokens=8, first_token=first_token
        )[0].tolist()
        for prompt in prompts
    ]
    assert pair.answers(prompts, most_tokens=8, ended=lambda answer: False) == expected


@pytest.mark.parametrize("first_token", HALVES)
def test_a_pair_with_a_token_rule_answers_and_is_scored_by_it(first_token: FirstToken) -> None:
    pair, ids = tiny_pair("llama", first_token, RULE), random_ids(2, 12)
    served = PrefillDecodePair(
        PrefillHalf(pair.prefill, LAYER_MAP, RULE, first_token), DecodeHalf(pair.decode, LAYER_MAP)
    )
    expected = served.decode(served.prefill(ids), 8)
    answers = pair.answers(ids.tolist(), most_tokens=8, ended=lambda answer: False)
    assert answers == expected.tolist()
    assert answers != tiny_pair("llama", first_token).answers(ids.tolist(), most_tokens=8, ended=lambda answer: False)
    assert all(one.greedy for one in pair.likelihoods(list(zip(ids.tolist(), answers, strict=True))))


@pytest.mark.parametrize("asked", [ModelAlone(tiny_model("llama")), tiny_pair("llama", "decode")])
def test_each_answer_ends_for_itself(asked: ModelAlone | ServedPair) -> None:
    prompts = random_ids(3, 6).tolist()
    whole = asked.answers(prompts, most_tokens=12, ended=lambda answer: False)
    ends = {tuple(answer[:length]) for answer, length in zip(whole, (2, 7, 12), strict=True)}
    ended = asked.answers(prompts, most_tokens=12, ended=lambda answer: tuple(answer) in ends)
    assert ended == [whole[0][:2], whole[1][:7], whole[2]]


def test_an_empty_answer_is_certain() -> None:
    prompt = random_ids(1, 6)[0].tolist()
    for asked in (ModelAlone(tiny_model("llama")), tiny_pair("llama", "decode"), tiny_pair("llama", "prefill")):
        assert asked.likelihoods([(prompt, [])]) == [Likelihood(0.0, True)]


@pytest.mark.slow
def test_models_whose_blocks_lie_on_two_devices_are_asked_as_on_one() -> None:
    asked, prompts = questions()[4:6], [prompt for prompt, _ in questions()[4:10:4]]

    def found(model: PreTrainedModel) -> list[object]:
        pair = ServedPair(model, model, tuple(range(5)), "decode")
        return [
            (one.likelihoods(asked), one.answers(prompts, most_tokens=2, ended=lambda answer: False))
            for one in (ModelAlone(model), pair)
        ]

    def on(*devices: torch.device) -> PreTrainedModel:
        model = tiny_model("llama")
        places = {name: devices[0] for name, _ in model.model.named_children() if name != "layers"}
        layers = {f"layers.{block}": devices[block > 1] for block in range(5)}
        placed = {f"model.{name}": device for name, device in (places | layers).items()} | {"lm_head": devices[0]}
        skipped = model._skip_keys_device_placement
        dispatch_model(model, placed, main_device=FIRST, skip_keys=skipped, force_hooks=True)
        return model

    with accelerators():
        assert found(on(FIRST, SECOND)) == found(on(FIRST, FIRST))
