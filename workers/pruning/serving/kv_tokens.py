"""Which prompt tokens' keys and values decode needs: chosen by attention, weighed in bytes, judged by the PD loss.

Prefill keeps all that it computed. Decode layers that attend mostly to the prompt's first and last tokens are sent
only those, at their original positions (PDTrim, Zhang et al., ACL 2026, arXiv 2509.04467, token-aware cache pruning).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from workers.pruning.model.blocks import BlockStack, UnsupportedArchitecture, block_stack
from workers.pruning.model.measure import token_losses
from workers.pruning.model.pair import FirstToken, handed_tokens
from workers.pruning.serving.handover import EVERY_TOKEN, KvTokenRule
from workers.pruning.serving.pair_server import (
    ContinuedKV,
    Window,
    continue_hidden,
    continued_kv,
    layer_windows,
    process_prompt,
    visible,
)

ATTENTION_TILE = 256
"""Queries, and keys, whose attention is computed at a time."""


def sent_tokens(config: PretrainedConfig, rule: KvTokenRule, handed: int) -> int:
    """Of `handed` prompt tokens, those that a decode model of this configuration receives, summed over its layers."""
    total = 0
    for layer, window in enumerate(layer_windows(config)):
        held = handed if window is None else min(handed, window.tokens - 1)
        total += sum(stop - start for start, stop in rule.ranges(layer, handed, held))
    return total


def sent_bytes(config: PretrainedConfig, rule: KvTokenRule, handed: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values sent for one request: 2 · KV heads · head dimension · bytes a number · tokens sent.

    For architectures whose attention can be measured: their layers have keys and values of one shape.
    """
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return sent_tokens(config, rule, handed) * 2 * heads * head_dim * dtype.itemsize


def received_attention(
    queries: Tensor,
    keys: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    scaling: float,
    window: Window | None,
    block: int = ATTENTION_TILE,
) -> Tensor:
    """The attention each key gets, (keys,) in float64: softmax probabilities summed over batch, heads and queries.

    `queries` are (batch, heads, queries, head dimension), `keys` (batch, kv heads, keys, head dimension). Memory holds
    `block` · `block` scores of each head: a first pass over the keys finds each query's normaliser, a second sums.
    """
    grouped = queries.unflatten(1, (keys.shape[1], -1))  # (batch, kv heads, group, queries, head dimension)
    key_parts = list(torch.arange(keys.shape[2]).split(block))
    received = torch.zeros(keys.shape[2], dtype=torch.float64)

    def scores(rows: Tensor, columns: Tensor) -> Tensor:
        """(batch, kv heads, group, rows, columns)"""
        product = torch.einsum("bhgqd,bhkd->bhgqk", grouped[..., rows, :].float(), keys[..., columns, :].float())
        seen = visible(query_positions[rows], key_positions[columns], window).to(product.device)
        return (product * scaling).masked_fill(~seen, -torch.inf)

    for rows in torch.arange(queries.shape[2]).split(block):
        normaliser = torch.full(grouped.shape[:3] + rows.shape, -torch.inf, device=queries.device)
        for columns in key_parts:
            normaliser = torch.logaddexp(normaliser, scores(rows, columns).logsumexp(-1))
        for columns in key_parts:
            probability = (scores(rows, columns) - normaliser[..., None]).exp()
            received[columns] += probability.sum((0, 1, 2, 3), dtype=torch.float64).cpu()
    return received


@torch.no_grad()
def prompt_attention(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    layer_map: Sequence[int],
    windows: Tensor,
    *,
    prompt_tokens: int,
    first_token: FirstToken,
    batch: int,
) -> Tensor:
    """Mean attention probability that each decode layer's queries put on each prompt token that is handed over.

    (decode layers, tokens handed over), float64, from windows (windows, time) with none of those tokens left out; what
    is missing to a sum of 1 over a layer went to the tokens that decode runs.
    """
    stack = block_stack(decode)
    # Blocks of a class that none has entered yet are run once to see what they give, which may not be measured.
    stack.embed(windows[:1, :1])
    handed = handed_tokens(prompt_tokens, first_token)
    total = torch.zeros(len(layer_map), handed, dtype=torch.float64)
    for ids in windows.split(batch):
        _, handover = process_prompt(prefill, ids[:, :prompt_tokens], layer_map, EVERY_TOKEN, first_token)
        total += _attention_to_prompt(stack, continued_kv(stack, handover), ids[:, handed:-1])
    return total / len(windows)


def _attention_to_prompt(stack: BlockStack, caches: Sequence[ContinuedKV], ids: Tensor) -> Tensor:
    """(layers, prompt tokens): means over heads and queries `ids` (batch, time), summed over the batch."""
    prompt_tokens = caches[0].next
    total = torch.zeros(len(caches), prompt_tokens, dtype=torch.float64)

    def hook(layer: int, held: ContinuedKV) -> Any:
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            queries, new_keys = _queries_and_keys(module, kwargs["hidden_states"], kwargs["position_embeddings"])
            query_positions, key_positions = held.incoming(queries.shape[2])
            received = received_attention(
                queries,
                torch.cat([held.keys, new_keys], dim=-2),
                query_positions,
                key_positions,
                scaling=module.scaling,  # type: ignore[arg-type]
                window=held.window,
            )
            prompt = key_positions < prompt_tokens
            total[layer, key_positions[prompt]] = received[prompt] / (queries.shape[1] * queries.shape[2])

        return measure

    handles = [
        _attention_module(block).register_forward_pre_hook(hook(layer, held), with_kwargs=True)
        for layer, (block, held) in enumerate(zip(stack.blocks, caches, strict=True))
    ]
    try:
        continue_hidden(stack, caches, ids)
    finally:
        for handle in handles:
            handle.remove()
    return total


def _attention_module(block: nn.Module) -> nn.Module:
    """Raises: UnsupportedArchitecture when its queries and keys cannot be computed beside it."""
    attention = getattr(block, "self_attn", None)
    parts = ("q_proj", "k_proj", "head_dim", "scaling", "num_key_value_groups")
    if not all(hasattr(attention, part) for part in parts) or getattr(attention, "attn_logit_softcapping", None):
        raise UnsupportedArchitecture(
            "KV tokens can be chosen for rotary attention with q_proj and k_proj and without capped scores only; "
            f"blocks of the class {type(block).__name__} have another kind"
        )
    assert isinstance(attention, nn.Module)
    return attention


def _queries_and_keys(attention: Any, h: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What an attention module computes from normed hidden states (batch, time, hidden), rotated to their positions.

    Shapes (batch, heads, time, head dimension) and (batch, kv heads, time, head dimension).
    """
    shape = (*h.shape[:-1], -1, attention.head_dim)
    queries, keys = attention.q_proj(h), attention.k_proj(h)
    normed = hasattr(attention, "q_norm")
    by_head = normed and attention.q_norm.weight.shape[-1] == attention.head_dim  # OLMo 2 norms all heads together.
    if normed and not by_head:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    queries, keys = queries.view(shape), keys.view(shape)
    if by_head:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb(queries.transpose(1, 2), keys.transpose(1, 2), *rotary)
    return rotated


def edge_mass(attention: Tensor, first: int, last: int) -> list[float]:
    """Each layer's share of its attention to the prompt that the prompt's first and last tokens get.

    `attention` is (layers, prompt tokens), as `prompt_attention` gives it. What goes to the continuation does not
    count, because decode holds that in any case.
    """
    prompt_tokens = attention.shape[1]
    if first + last >= prompt_tokens:
        return [1.0] * len(attention)
    edges = attention[:, :first].sum(1) + attention[:, prompt_tokens - last :].sum(1)
    shares: list[float] = (edges / attention.sum(1)).tolist()
    return shares


def rule_by_threshold(attention: Tensor, *, first: int, last: int, threshold: float) -> KvTokenRule:
    """Layers whose edge mass is at least `threshold` receive only the first and last tokens."""
    mass = edge_mass(attention, first, last)
    return KvTokenRule(first, last, frozenset(layer for layer, share in enumerate(mass) if share >= threshold))


def rule_by_ratio(
    attention: Tensor, dense: PretrainedConfig, decode: PretrainedConfig, *, first: int, last: int, ratio: float
) -> KvTokenRule:
    """Send at most 1/`ratio` of the dense model's bytes: layers of the highest edge mass first, then fewer tokens.

    Once every layer receives only first and last tokens, these become fewer, split as the attention asks: one token a
    layer at the least, even where that is more than asked for.
    """
    prompt_tokens = attention.shape[1]
    budget = sent_tokens(dense, EVERY_TOKEN, prompt_tokens) / ratio
    mass = edge_mass(attention, first, last)
    order = sorted(range(len(mass)), key=lambda layer: (-mass[layer], layer))
    for count in range(len(order) + 1):
        rule = KvTokenRule(first, last, frozenset(order[:count]))
        if sent_tokens(decode, rule, prompt_tokens) <= budget:
            return rule
    return _largest_rule(attention, decode, order, budget, first=first, last=last)


def rule_by_loss(
    loss: Callable[[KvTokenRule], float],
    attention: Tensor,
    dense: PretrainedConfig,
    decode: PretrainedConfig,
    *,
    ratio: float,
) -> KvTokenRule:
    """Send at most 1/`ratio` of the dense model's bytes, to the layers whose own lack of tokens costs most loss.

    Layers are ordered by the loss with each alone restricted to its even share of tokens; for every number of
    restricted layers the most tokens that fit are tried, so a few layers may keep the whole prompt while others get
    little. Every layer gets at least one token, even where that is more than asked for. Calls `loss` at most twice a
    layer.
    """
    prompt_tokens = attention.shape[1]
    layers = list(range(len(attention)))
    budget = sent_tokens(dense, EVERY_TOKEN, prompt_tokens) / ratio
    if sent_tokens(decode, EVERY_TOKEN, prompt_tokens) <= budget:
        return EVERY_TOKEN
    even = _largest_rule(attention, decode, layers, budget, first=prompt_tokens, last=prompt_tokens)
    alone = [loss(KvTokenRule(even.first, even.last, frozenset({layer}))) for layer in layers]
    order = sorted(layers, key=lambda layer: (alone[layer], layer))
    rules = [
        _largest_rule(attention, decode, order[:count], budget, first=prompt_tokens, last=prompt_tokens)
        for count in range(1, len(order))
    ]
    fitting = [rule for rule in rules if sent_tokens(decode, rule, prompt_tokens) <= budget]
    return min([even, *fitting], key=loss)


def _largest_rule(
    attention: Tensor, decode: PretrainedConfig, layers: Sequence[int], budget: float, *, first: int, last: int
) -> KvTokenRule:
    """The most first (up to `first`) and last tokens for `layers`, with which all that is sent fits the budget.

    One token where nothing does.
    """
    prompt_tokens = attention.shape[1]

    def of(tokens: int) -> KvTokenRule:
        return KvTokenRule(*_best_split(attention[list(layers)], tokens, first, last), frozenset(layers))

    fewer = map(of, range(min(first + last, prompt_tokens - 1), 0, -1))
    return next((rule for rule in fewer if sent_tokens(decode, rule, prompt_tokens) <= budget), of(1))


def _best_split(attention: Tensor, tokens: int, first: int, last: int) -> tuple[int, int]:
    """How many first and last tokens, `tokens` together, get the most attention, summed over layers."""
    prompt_tokens = attention.shape[1]
    before = F.pad(attention.sum(0).cumsum(0), (1, 0))  # (prompt tokens + 1,): attention before each position
    splits = torch.arange(max(0, tokens - last), min(first, tokens) + 1)
    mass = before[splits] + before[-1] - before[prompt_tokens - tokens + splits]
    best = int(splits[mass.argmax()])
    return best, tokens - best


@torch.no_grad()
def pd_loss_with_rule(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    layer_map: Sequence[int],
    rule: KvTokenRule,
    windows: Tensor,
    *,
    prompt_tokens: int,
    first_token: FirstToken,
    batch: int,
) -> float:
    """The PD loss in nats a continued token when decode receives only what `rule` sends; see `pair.pd_loss`."""
    stack = block_stack(decode)
    total = 0.0
    for ids in windows.split(batch):
        by_prefill, handover = process_prompt(prefill, ids[:, :prompt_tokens], layer_map, rule, first_token)
        continued = continue_hidden(stack, continued_kv(stack, handover), ids[:, handover.handed_tokens : -1])
        first, others = ids[:, prompt_tokens:].split([by_prefill.shape[1], continued.shape[1]], dim=1)
        total += float(token_losses(decode, continued.flatten(0, 1), others.flatten()).sum())
        total += float(F.cross_entropy(by_prefill.flatten(0, 1).float(), first.flatten(), reduction="sum"))
    return total / windows[:, prompt_tokens:].numel()
