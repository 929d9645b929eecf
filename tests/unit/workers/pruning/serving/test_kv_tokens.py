from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests.unit.workers.pruning.models import (
    EXPERTS,
    FAMILIES,
    OTHERS,
    TOLERANCE,
    random_ids,
    reference_model,
    reference_windows,
    tiny_model,
)
from workers.pruning.model.blocks import UnsupportedArchitecture, block_stack, drop_blocks
from workers.pruning.model.pair import FirstToken, handed_tokens, handover, pd_loss
from workers.pruning.serving.handover import EVERY_TOKEN, KvTokenRule
from workers.pruning.serving.kv_tokens import (
    edge_mass,
    pd_loss_with_rule,
    prompt_attention,
    received_attention,
    rule_by_loss,
    rule_by_ratio,
    rule_by_threshold,
    sent_bytes,
    sent_tokens,
)
from workers.pruning.serving.pair_server import DecodeHalf, PrefillHalf, Window, continue_logits, continued_kv, visible

ALL = [0, 1, 2, 3, 4]
LAYER_MAP = [0, 1, 3, 4]
PROMPT = 11


def full_attention(model: PreTrainedModel, ids: Tensor, prompt_tokens: int) -> Tensor:
    """(layers, prompt tokens): means over batch, heads and fed continuation tokens of whole attention matrices."""
    model.set_attn_implementation("eager")
    attentions = model(input_ids=ids[:, :-1], output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    return torch.stack([layer[:, :, prompt_tokens:, :prompt_tokens].mean((0, 1, 2)) for layer in attentions]).double()


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3", "granite", "mixtral", "olmo2", "qwen3-moe"])
def test_the_attention_measured_block_by_block_is_that_of_the_full_matrices(family: str) -> None:
    model, ids = tiny_model(family), random_ids(3, 24)
    found = prompt_attention(model, model, ALL, ids, prompt_tokens=PROMPT, first_token="prefill", batch=2)
    assert (found - full_attention(model, ids, PROMPT)).abs().max() <= TOLERANCE


def test_the_attention_to_a_prompt_of_several_blocks_is_that_of_the_full_matrices() -> None:
    model, ids = reference_model(), reference_windows("validation", 1, 560)
    found = prompt_attention(model, model, range(12), ids, prompt_tokens=530, first_token="prefill", batch=1)
    assert (found - full_attention(model, ids, 530)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("block", [1, 4, 7, 100])
@pytest.mark.parametrize("window", [None, Window(5), Window(5, chunked=True)])
def test_no_block_size_changes_the_attention(block: int, window: Window | None) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 6, 9, 8, generator=generator), torch.randn(2, 2, 21, 8, generator=generator)
    at, held = torch.arange(14, 23), torch.tensor([0, 1, *range(4, 23)])  # tokens 2 and 3 were not sent
    scores = queries @ keys.repeat_interleave(3, dim=1).mT * 0.3
    expected = scores.masked_fill(~visible(at, held, window), -torch.inf).softmax(-1).sum((0, 1, 2)).double()
    found = received_attention(queries, keys, at, held, scaling=0.3, window=window, block=block)
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", ["gemma2", "gpt-neox", "gpt2", "opt", "phi3"])
def test_attention_of_another_kind_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match="q_proj and k_proj"):
        prompt_attention(
            tiny_model(family),
            tiny_model(family),
            ALL,
            random_ids(1, 24),
            prompt_tokens=PROMPT,
            first_token="decode",
            batch=1,
        )


@pytest.mark.parametrize("family", FAMILIES + OTHERS + EXPERTS)
@pytest.mark.parametrize("rule", [EVERY_TOKEN, KvTokenRule(6, PROMPT - 6, frozenset({0, 1, 2, 3}))])
@pytest.mark.parametrize("half", ["decode", "prefill"])
def test_with_every_token_sent_the_loss_is_the_plain_one(family: str, rule: KvTokenRule, half: FirstToken) -> None:
    model, ids = tiny_model(family), random_ids(3, 24)
    decode = drop_blocks(model, {2})
    found = pd_loss_with_rule(model, decode, LAYER_MAP, rule, ids, prompt_tokens=PROMPT, first_token=half, batch=2)
    plain = pd_loss(model, decode, LAYER_MAP, ids, prompt_tokens=PROMPT, first_token=half, batch=2)
    assert found == pytest.approx(plain, abs=TOLERANCE)


def masked_loss(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    rule: KvTokenRule,
    ids: Tensor,
    layer_map: list[int],
    half: FirstToken,
) -> float:
    """The loss with all keys in plain transformers caches, those not sent masked with −inf in eager attention."""
    decode.set_attn_implementation("eager")
    read = PROMPT - 1 if half == "decode" else PROMPT
    prompt = prefill(input_ids=ids[:, :read], past_key_values=DynamicCache(config=prefill.config), use_cache=True)

    def hide(layer: int) -> Any:
        def change(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            dropped = torch.zeros(ids.shape[1] - 1)
            if layer in rule.layers:
                dropped[rule.first : read - rule.last] = -torch.inf
            mask = kwargs["attention_mask"]
            return args, kwargs | {"attention_mask": mask + dropped[-mask.shape[-1] :]}  # a window holds the latest

        return change

    for layer, block in enumerate(decode.model.layers):
        block.self_attn.register_forward_pre_hook(hide(layer), with_kwargs=True)
    cache = handover(prompt.past_key_values, layer_map, decode.config)
    rest = decode(input_ids=ids[:, read:-1], past_key_values=cache, use_cache=True)
    logits = torch.cat([prompt.logits, rest.logits], dim=1)[:, PROMPT - 1 :]
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT:].flatten()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "rule",
    [
        KvTokenRule(2, 3, frozenset({0, 2})),
        KvTokenRule(2, 3, frozenset({1, 3})),
        KvTokenRule(0, 2, frozenset({0, 1, 2, 3})),
        KvTokenRule(3, 0, frozenset({0, 1, 2, 3})),
    ],
)
@pytest.mark.parametrize("half", ["decode", "prefill"])
def test_tokens_not_sent_are_as_if_masked_in_full_attention(family: str, rule: KvTokenRule, half: FirstToken) -> None:
    model, ids = tiny_model(family), random_ids(3, 24)
    pair = model, drop_blocks(model, {2}), LAYER_MAP
    found = pd_loss_with_rule(*pair, rule, ids, prompt_tokens=PROMPT, first_token=half, batch=2)
    expected = masked_loss(model, drop_blocks(tiny_model(family), {2}), rule, ids, LAYER_MAP, half)
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert found != pytest.approx(pd_loss(*pair, ids, prompt_tokens=PROMPT, first_token=half, batch=3))


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_one_by_one_gives_the_tokens_of_one_forward_with_masks(family: str) -> None:
    model, rule = tiny_model(family), KvTokenRule(2, 3, frozenset({0, 3}))
    decode = drop_blocks(model, {2})
    sent = PrefillHalf(model, tuple(LAYER_MAP), rule).prefill(random_ids(2, PROMPT))
    tokens = DecodeHalf(decode, tuple(LAYER_MAP)).decode(sent, 13)
    stack = block_stack(decode)
    fed = torch.cat([torch.tensor(sent.next_tokens)[:, None], tokens[:, :-1]], dim=1)
    assert torch.equal(continue_logits(stack, continued_kv(stack, sent), fed).argmax(-1), tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", [EVERY_TOKEN, KvTokenRule(2, 3, frozenset({0, 2}))])
@pytest.mark.parametrize(("half", "handed"), [("decode", 11), ("prefill", 12)])
def test_the_bytes_said_to_be_sent_are_those_of_the_handover(
    family: str, rule: KvTokenRule, half: FirstToken, handed: int
) -> None:
    model = tiny_model(family)
    sent = PrefillHalf(model, tuple(LAYER_MAP), rule, half).prefill(random_ids(1, 12))
    assert sent.handed_tokens == handed_tokens(12, half) == handed
    assert sent_bytes(drop_blocks(model, {2}).config, rule, handed, torch.float32) == sent.nbytes


# Four layers and eight prompt tokens; the rest of each layer's attention went to the continuation.
ATTENTION = torch.tensor(
    [
        [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
        [0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0],
        [0.2, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.2],
        [0.0, 0.0, 0.0, 0.3, 0.3, 0.0, 0.0, 0.0],
    ],
    dtype=torch.float64,
)


def test_edge_mass_is_the_share_of_the_attention_to_the_prompt() -> None:
    assert edge_mass(ATTENTION, 1, 2) == pytest.approx([3 / 8, 1.0, 0.8, 0.0])
    assert edge_mass(ATTENTION, 5, 3) == [1.0] * 4


def test_a_threshold_restricts_the_layers_that_reach_it() -> None:
    assert rule_by_threshold(ATTENTION, first=1, last=2, threshold=0.75) == KvTokenRule(1, 2, frozenset({1, 2}))
    assert rule_by_threshold(ATTENTION, first=1, last=2, threshold=1.1).layers == frozenset()


def configs() -> tuple[Any, Any]:
    """Of a model of five layers without windows, and of the same without one."""
    model = tiny_model("llama")
    return model.config, drop_blocks(model, {2}).config


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (1.25, KvTokenRule(1, 2)),  # 32 of 40 tokens without a rule
        (1.3, KvTokenRule(1, 2, frozenset({1}))),
        (1.8, KvTokenRule(1, 2, frozenset({1, 2}))),
        (3.0, KvTokenRule(1, 2, frozenset({0, 1, 2, 3}))),
        (5.0, KvTokenRule(1, 1, frozenset({0, 1, 2, 3}))),
        (10.0, KvTokenRule(1, 0, frozenset({0, 1, 2, 3}))),
    ],
)
def test_a_ratio_restricts_layers_by_mass_and_then_sends_fewer_tokens(ratio: float, expected: KvTokenRule) -> None:
    dense, decode = configs()
    rule = rule_by_ratio(ATTENTION, dense, decode, first=1, last=2, ratio=ratio)
    assert rule == expected
    assert sent_tokens(decode, rule, 8) * ratio <= sent_tokens(dense, EVERY_TOKEN, 8)


def test_a_rule_by_loss_spares_the_layer_that_needs_its_tokens() -> None:
    dense, decode = configs()

    def loss(rule: KvTokenRule) -> float:
        """Layer 1 needs the whole prompt, the others little of it."""
        return 10.0 * (1 in rule.layers) + 1 / (1 + rule.first + rule.last)

    rule = rule_by_loss(loss, ATTENTION, dense, decode, ratio=2.5)
    assert rule.layers == {0, 2, 3}
    assert sent_tokens(decode, rule, 8) == 8 + 3 * 2
    assert rule_by_loss(loss, ATTENTION, dense, decode, ratio=1.25) == EVERY_TOKEN


def test_a_ratio_out_of_reach_sends_one_token_a_layer() -> None:
    dense, decode = configs()
    one = KvTokenRule(1, 0, frozenset({0, 1, 2, 3}))
    assert rule_by_ratio(ATTENTION, dense, decode, first=1, last=2, ratio=11) == one
    assert rule_by_loss(lambda rule: 0.0, ATTENTION, dense, decode, ratio=11) == one
