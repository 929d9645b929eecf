"""A prefill and a decode checkpoint at work, in one process or in two that exchange handovers.

Decode layers may hold different prompt tokens (a window, a KV token rule), so the decode model is walked block by
block: each gets the causal mask of the positions that it holds, while queries keep their positions in the sequence.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from workers.pruning.model.blocks import BlockCalls, BlockStack, block_stack, head
from workers.pruning.model.checkpoint import load_checkpoint
from workers.pruning.model.pair import FirstToken, KvShape, handed_tokens, kv_shapes
from workers.pruning.serving.handover import EVERY_TOKEN, BrokenHandover, Handover, KvTokenRule, LayerKV, Ranges

MASKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask for each layer."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Window:
    """What a layer sees of the tokens before one: the last so many, or those since its chunk began."""

    tokens: int
    chunked: bool = False

    def oldest(self, positions: Tensor) -> Tensor:
        """The first position that is seen from each of `positions`, same shape."""
        return positions // self.tokens * self.tokens if self.chunked else positions - self.tokens + 1


def layer_windows(config: PretrainedConfig) -> list[Window | None]:
    """Each layer's window; None where it sees everything."""
    layers = DynamicCache(config=config).layers
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    return [
        None if tokens is None else Window(tokens, chunked=kind == "chunked_attention")
        for tokens, kind in zip(windows, kinds, strict=True)
    ]


def visible(queries: Tensor, keys: Tensor, window: Window | None) -> Tensor:
    """Which key positions (keys,) each query position (queries,) may attend to: (queries, keys), boolean."""
    seen = queries[:, None] >= keys[None, :]
    return seen if window is None else seen & (keys[None, :] >= window.oldest(queries)[:, None])


class ContinuedKV:
    """What one decode layer has received, and what it adds with every token: a cache for its block alone."""

    def __init__(self, received: LayerKV, handed_tokens: int, window: Window | None, device: torch.device) -> None:
        self.keys = received.keys.to(device)  # (batch, kv heads, tokens, head dimension)
        self.values = received.values.to(device)
        parts = [torch.arange(start, stop) for start, stop in received.ranges]
        self.positions = torch.cat([torch.arange(0), *parts])  # (tokens,), on the CPU
        self.next = handed_tokens
        """The position of the next token."""
        self.window = window
        self._leave_window()

    def incoming(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Positions of the next `tokens` queries, and of all keys once theirs have joined."""
        queries = torch.arange(self.next, self.next + tokens)
        return queries, torch.cat([self.positions, queries])

    def mask(self, tokens: int, like: Tensor) -> Tensor | None:
        """What is added to the scores of the next `tokens` queries, (1, 1, queries, keys); None for nothing at all."""
        if tokens == 1:
            return None  # The newest token sees all that `update` has kept.
        hidden = ~visible(*self.incoming(tokens), self.window).to(like.device)
        mask = torch.zeros(1, 1, *hidden.shape, dtype=like.dtype, device=like.device)
        return mask.masked_fill(hidden, -torch.inf)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the sequence so far."""
        return self.next

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new keys and values and return all, as a transformers cache does; then drop what has left the window."""
        _, self.positions = self.incoming(keys.shape[-2])
        self.next += keys.shape[-2]
        # Of a model on several devices, the block's own.
        every = (
            torch.cat([self.keys.to(keys.device), keys], dim=-2),
            torch.cat([self.values.to(values.device), values], dim=-2),
        )
        self.keys, self.values = every
        self._leave_window()
        return every

    def _leave_window(self) -> None:
        """Drop what the next token cannot see."""
        if self.window is not None:
            left = int((self.positions < self.window.oldest(torch.tensor(self.next))).sum())
            self.positions = self.positions[left:]
            self.keys, self.values = self.keys[..., left:, :], self.values[..., left:, :]


def continued_kv(decode: BlockStack, handover: Handover) -> list[ContinuedKV]:
    """One cache a decode layer. The handover itself stays as it is."""
    windows = layer_windows(decode.model.config)
    return [
        ContinuedKV(layer, handover.handed_tokens, window, decode.device)
        for layer, window in zip(handover.layers, windows, strict=True)
    ]


def continue_logits(decode: BlockStack, caches: Sequence[ContinuedKV], ids: Tensor) -> Tensor:
    """Logits (batch, time, vocabulary) after each of the tokens `ids` (batch, time), which the caches then hold too."""
    return decode.head(continue_hidden(decode, caches, ids))


def continue_hidden(decode: BlockStack, caches: Sequence[ContinuedKV], ids: Tensor) -> Tensor:
    """What the head makes these logits of, (batch, time, hidden)."""
    h, given = decode.enter(ids, start=caches[0].next)  # (batch, time, hidden)
    calls = BlockCalls(
        [
            {**kwargs, "attention_mask": cache.mask(ids.shape[1], h)}
            for kwargs, cache in zip(given.kwargs, caches, strict=True)
        ]
    )
    for block, cache in enumerate(caches):
        h = calls.run(decode, block, h, cache)
    return decode.norm(h)


@torch.no_grad()
def process_prompt(
    prefill: PreTrainedModel, ids: Tensor, layer_map: Sequence[int], rule: KvTokenRule, first_token: FirstToken
) -> tuple[Tensor, Handover]:
    """The prefill model's logits after prompts `ids` (batch, time), and what decode is sent.

    The logits are (batch, 1, vocabulary), or (batch, 0, vocabulary) where decode says the first token.
    """
    handed = handed_tokens(ids.shape[1], first_token)
    cache = DynamicCache(config=prefill.config)
    # Of a prompt of one token nothing may be left to hand over; its run then says how keys and values are shaped.
    read = block_stack(prefill).body(input_ids=ids[:, : max(handed, 1)], past_key_values=cache, use_cache=True)
    logits = head(prefill, read.last_hidden_state[:, :handed][:, ids.shape[1] - 1 :])
    layers = []
    for number, source in enumerate(layer_map):
        held: Any = cache.layers[source]
        ranges = rule.ranges(number, handed, held.keys.shape[-2])
        oldest = handed - held.keys.shape[-2]
        layers.append(LayerKV(source, ranges, _cut(held.keys, ranges, oldest), _cut(held.values, ranges, oldest)))
    following = ids[:, -1] if first_token == "decode" else logits[:, -1].argmax(-1)
    return logits, Handover(handed, tuple(following.tolist()), first_token, tuple(layers))


def _cut(tensor: Tensor, ranges: Ranges, oldest: int) -> Tensor:
    """The positions `ranges` of a tensor (batch, kv heads, tokens, head dimension) that begins at `oldest`."""
    if len(ranges) == 1:
        return tensor[..., ranges[0][0] - oldest : ranges[0][1] - oldest, :]
    return torch.cat(
        [tensor[..., :0, :], *(tensor[..., start - oldest : stop - oldest, :] for start, stop in ranges)], -2
    )


@dataclass(frozen=True)
class PrefillHalf:
    """The prefill checkpoint. Raises: ValueError when the layer map names layers that it does not have."""

    model: PreTrainedModel
    layer_map: tuple[int, ...]
    """For each decode layer, the prefill layer whose keys and values it reads."""
    rule: KvTokenRule = EVERY_TOKEN
    first_token: FirstToken = "decode"

    def __post_init__(self) -> None:
        layers = self.model.config.num_hidden_layers
        if any(not 0 <= source < layers for source in self.layer_map) or len(set(self.layer_map)) < len(self.layer_map):
            raise ValueError(
                f"the KV layer map {list(self.layer_map)} does not fit a prefill model of {layers} layers; use the "
                "kv_layer_map of this pair's pdtrim.json"
            )
        if unknown := sorted(layer for layer in self.rule.layers if not 0 <= layer < len(self.layer_map)):
            raise ValueError(f"the KV token rule names decode layer {unknown[0]} of {len(self.layer_map)}")

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype | None = None, device: torch.device = CPU) -> PrefillHalf:
        """From an exported checkpoint, served as its pdtrim.json says; as `load_checkpoint`."""
        layer_map = tuple(read_pdtrim(folder)["kv_layer_map"])
        model = load_checkpoint(folder, dtype=dtype, device=device)
        return cls(model, layer_map, read_rule(folder), first_token_of(read_pdtrim(folder)))

    def prefill(self, ids: Tensor) -> Handover:
        """Process prompts `ids` (batch, time) of one length."""
        ids = ids.to(self.model.device)
        return process_prompt(self.model, ids, self.layer_map, self.rule, self.first_token)[1]


@dataclass(frozen=True)
class DecodeHalf:
    """The decode checkpoint. Raises: ValueError when it does not fit the layer map, or takes no masks."""

    model: PreTrainedModel
    layer_map: tuple[int, ...]
    shapes: tuple[KvShape, ...] = field(init=False)
    """What each layer's keys and values have to be."""

    def __post_init__(self) -> None:
        config = self.model.config
        if len(self.layer_map) != config.num_hidden_layers:
            raise ValueError(
                f"the KV layer map {list(self.layer_map)} does not fit a decode model of {config.num_hidden_layers} "
                "layers; use the kv_layer_map of this pair's pdtrim.json"
            )
        if config._attn_implementation not in MASKED_ATTENTION:
            raise ValueError(
                f"decode layers may hold different tokens; {config._attn_implementation!r} attention takes no mask, so "
                f"load the model with attn_implementation {' or '.join(map(repr, MASKED_ATTENTION))}"
            )
        object.__setattr__(self, "shapes", kv_shapes(self.model))

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype | None = None, device: torch.device = CPU) -> DecodeHalf:
        """From an exported checkpoint; as `load_checkpoint`."""
        layer_map = tuple(read_pdtrim(folder)["kv_layer_map"])
        return cls(load_checkpoint(folder, dtype=dtype, device=device), layer_map)

    @torch.no_grad()
    def decode(self, handover: Handover, max_new_tokens: int, *, stop: Collection[int] = ()) -> Tensor:
        """Greedy continuation (batch, tokens), beginning with the first token, whichever half says it.

        It has `max_new_tokens`, or fewer once every sequence has emitted a token of `stop`; a sequence that ends
        earlier than others of its batch runs on. Raises: BrokenHandover when the handover is not for this model.
        """
        self._check(handover)
        stack = block_stack(self.model)
        caches = continued_kv(stack, handover)
        newest = torch.tensor(handover.next_tokens, device=stack.device)[:, None]
        tokens = [newest] if handover.first_token == "prefill" else []
        ended = [bool(tokens) and token in stop for token in handover.next_tokens]
        while len(tokens) < max_new_tokens and not all(ended):
            newest = continue_logits(stack, caches, newest)[:, -1].argmax(-1, keepdim=True)
            tokens.append(newest)
            ended = [was or token in stop for was, token in zip(ended, newest[:, 0].tolist(), strict=True)]
        return torch.cat(tokens, dim=1)

    def _check(self, handover: Handover) -> None:
        sources = tuple(layer.source for layer in handover.layers)
        if sources != self.layer_map:
            raise BrokenHandover(
                f"the handover holds prefill layers {list(sources)}; this decode model reads {list(self.layer_map)}"
            )
        for number, (layer, shape) in enumerate(zip(handover.layers, self.shapes, strict=True)):
            sent = KvShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
            if sent != shape or layer.keys.dtype != self.model.dtype:
                raise BrokenHandover(
                    f"layer {number} was sent {_said(sent)} in {layer.keys.dtype}; "
                    f"this decode model has {_said(shape)} in {self.model.dtype}"
                )
        vocabulary = self.model.config.vocab_size
        if wrong := [token for token in handover.next_tokens if not 0 <= token < vocabulary]:
            raise BrokenHandover(f"the next token {wrong[0]} is not in a vocabulary of {vocabulary}")


def _said(shape: KvShape) -> str:
    values = "" if shape.value_size == shape.key_size else f", their values of {shape.value_size}"
    return f"{shape.heads} KV heads of {shape.key_size}{values}"


@dataclass(frozen=True)
class PrefillDecodePair:
    """Both halves in one process. Raises: ValueError when they belong to different pairs."""

    prefill_half: PrefillHalf
    decode_half: DecodeHalf

    def __post_init__(self) -> None:
        if self.prefill_half.layer_map != self.decode_half.layer_map:
            raise ValueError(
                f"the prefill checkpoint has the KV layer map {list(self.prefill_half.layer_map)}, the decode "
                f"checkpoint {list(self.decode_half.layer_map)}; take both from one export"
            )

    @classmethod
    def load(
        cls, prefill: Path, decode: Path, *, dtype: torch.dtype | None = None, device: torch.device = CPU
    ) -> PrefillDecodePair:
        """From two exported checkpoints, which may be one folder when prefill and decode share a checkpoint."""
        halves = (
            PrefillHalf.load(prefill, dtype=dtype, device=device),
            DecodeHalf.load(decode, dtype=dtype, device=device),
        )
        return cls(*halves)

    def prefill(self, ids: Tensor) -> Handover:
        """Process prompts `ids` (batch, time) of one length."""
        return self.prefill_half.prefill(ids)

    def decode(self, handover: Handover, max_new_tokens: int, *, stop: Collection[int] = ()) -> Tensor:
        """See `DecodeHalf.decode`."""
        return self.decode_half.decode(handover, max_new_tokens, stop=stop)


def read_pdtrim(folder: Path) -> dict[str, Any]:
    """An exported checkpoint's pdtrim.json. Raises: ValueError when it is missing or has no KV layer map."""
    path = folder / "pdtrim.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no pdtrim.json; it is no exported checkpoint")
    content: dict[str, Any] = json.loads(path.read_text())
    if "kv_layer_map" not in content:
        raise ValueError(f"{path} holds no kv_layer_map; export the pair again")
    return content


def read_rule(folder: Path) -> KvTokenRule:
    """The KV token rule of an exported checkpoint; every token when its pdtrim.json holds none."""
    pdtrim = read_pdtrim(folder)
    return KvTokenRule.from_json(pdtrim["kv_tokens"]) if "kv_tokens" in pdtrim else EVERY_TOKEN


def first_token_of(pdtrim: Mapping[str, Any]) -> FirstToken:
    """Which half says the first token of the pair with this pdtrim.json; earlier versions let prefill, and say nothing.

    Raises: ValueError when it is neither half.
    """
    named: FirstToken = pdtrim.get("serving", {}).get("first_token", "prefill")
    if named not in get_args(FirstToken):
        raise ValueError(f"serving.first_token of pdtrim.json is decode or prefill, not {named!r}")
    return named
