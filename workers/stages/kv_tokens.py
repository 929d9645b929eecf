"""The KV token rule that a job asks for: chosen on the calibration windows, measured on the exported checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pdtrim.contract.results import TokenRule, TokenRuleFigures
from pdtrim.contract.spec import KvTokensSpec
from workers.pruning.model.pair import FirstToken, handed_tokens
from workers.pruning.serving.handover import EVERY_TOKEN, KvTokenRule
from workers.pruning.serving.kv_tokens import (
    pd_loss_with_rule,
    prompt_attention,
    rule_by_loss,
    rule_by_threshold,
    sent_bytes,
    sent_tokens,
)
from workers.stages.context import StageContext

BATCH_WINDOWS = 8
Halves = tuple[PreTrainedModel, PreTrainedModel]
"""The prefill and the decode model; the same one twice when a single checkpoint serves both."""


def choose_rule(
    context: StageContext,
    asked: KvTokensSpec,
    dense: PretrainedConfig,
    halves: Halves,
    layer_map: Sequence[int],
    windows: Tensor,
) -> KvTokenRule:
    """The rule, on windows (windows, time) whose first half is prompt; `dense` is the dense model's configuration."""
    prompt_tokens, first_token = windows.shape[1] // 2, context.spec.serving.first_token
    attention = prompt_attention(
        *halves, layer_map, windows, prompt_tokens=prompt_tokens, first_token=first_token, batch=BATCH_WINDOWS
    )
    if asked.attention is not None:
        edges = asked.attention
        return rule_by_threshold(attention, first=edges.first, last=edges.last, threshold=edges.threshold)
    assert asked.ratio is not None
    tried = 0

    def loss(rule: KvTokenRule) -> float:
        nonlocal tried
        context.say(0.3 * tried / (2 * len(layer_map)), "Choosing the KV tokens that decode is sent.", tried=tried)
        tried += 1
        return pd_loss_with_rule(
            *halves,
            layer_map,
            rule,
            windows,
            prompt_tokens=prompt_tokens,
            first_token=first_token,
            batch=BATCH_WINDOWS,
        )

    return rule_by_loss(loss, attention, dense, halves[1].config, ratio=asked.ratio)


def measure_rule(
    asked: KvTokensSpec,
    rule: KvTokenRule,
    dense: PretrainedConfig,
    halves: Halves,
    layer_map: Sequence[int],
    windows: Tensor,
    dtype: torch.dtype,
    first_token: FirstToken,
) -> TokenRuleFigures:
    """What a rule costs and saves on windows (windows, time) whose first half is prompt, sent in `dtype`."""
    prompt_tokens = windows.shape[1] // 2
    handed = handed_tokens(prompt_tokens, first_token)
    dense_tokens = sent_tokens(dense, EVERY_TOKEN, handed)
    tokens = sent_tokens(halves[1].config, rule, handed)
    loss = pd_loss_with_rule(
        *halves,
        layer_map,
        rule,
        windows,
        prompt_tokens=prompt_tokens,
        first_token=first_token,
        batch=BATCH_WINDOWS,
    )
    return TokenRuleFigures(
        rule=recorded(rule),
        loss=loss,
        bytes_sent=sent_bytes(halves[1].config, rule, handed, dtype),
        ratio=dense_tokens / tokens,
        ratio_asked=asked.ratio,
        ratio_reached=None if asked.ratio is None else tokens <= dense_tokens / asked.ratio,
    )


def recorded(rule: KvTokenRule) -> TokenRule:
    """A rule as results show it."""
    return TokenRule(first=rule.first, last=rule.last, layers=sorted(rule.layers))
