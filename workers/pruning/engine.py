"""The loss of many candidate sets of removed blocks in one pass over the weights.

A candidate equals every other one until the first block on which they differ, so the walk carries one hidden state for
each distinct set of blocks removed *so far* (a trie over the sorted sets) and runs each block once for each of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from workers.pruning.blocks import BlockCalls, BlockStack, capture_calls, capture_continuation_calls
from workers.pruning.plan import Blocks, check_nested

Objective = Literal["kl", "cross_entropy", "hidden"]
NOTHING: Blocks = frozenset()
Losses = Callable[[Sequence[Blocks]], dict[Blocks, float]]
"""Mean loss a token of each candidate set: what engines offer and searches use."""
HEAD_ELEMENTS = 2**24
"""Logits computed at a time; bounds the memory of a large vocabulary (64 MiB in float32)."""


class NonFiniteLoss(ValueError):
    """A candidate's loss is not a finite number."""


def windows_in(memory_bytes: int, *, streams: int, tokens: int, hidden: int, itemsize: int) -> int:
    """How many windows of `tokens` a walk may carry at once when the hidden states of all its streams have to fit."""
    return max(1, memory_bytes // (streams * tokens * hidden * itemsize))


def halved(chunk_windows: int, streams: int, error: torch.OutOfMemoryError) -> int:
    """A smaller chunk after `error`. Raises: OutOfMemoryError with the numbers when it was one window already."""
    if chunk_windows == 1:
        raise torch.OutOfMemoryError(
            f"one window in {streams} streams does not fit this device; use shorter windows or a larger device: {error}"
        ) from error
    return chunk_windows // 2


@dataclass(frozen=True)
class Prefix:
    """The keys and values that one layer cached for the prompt: a cache that supplies them and keeps nothing new."""

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, cache: DynamicCache, layer: int) -> Prefix:
        """What a real cache holds for one layer."""
        held: Any = cache.layers[layer]
        return cls(held.keys, held.values)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Prompt and continuation side by side along time, as a real cache returns them."""
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)


def walk(
    stack: BlockStack,
    calls: BlockCalls,
    h: Tensor,
    candidates: Sequence[Blocks],
    caches: Mapping[int, Any],
) -> tuple[dict[Blocks, Tensor], int]:
    """h_0 (batch, time, hidden) → h_L of every candidate, and how many block-forwards that took."""
    streams = {NOTHING: h}
    forwards = 0
    for block in range(len(stack.blocks)):
        following: dict[Blocks, Tensor] = {}
        for removed in {frozenset(r for r in candidate if r <= block): None for candidate in candidates}:
            before = streams[removed - {block}]
            if block in removed:
                following[removed] = before
            else:
                following[removed] = calls.run(stack, block, before, caches.get(block))
                forwards += 1
        streams = following
    return streams, forwards


def summed_loss(
    stack: BlockStack, objective: Objective, h: Mapping[Blocks, Tensor], dense: Tensor | None, targets: Tensor
) -> dict[Blocks, float]:
    """Loss in nats summed over tokens, of each candidate's last hidden states (batch, time, hidden).

    `kl` is KL(dense ‖ candidate) of the next-token distributions, `cross_entropy` is −log p(target), and `hidden` is
    ‖h − h_dense‖² / ‖h_dense‖² after the final norm, which has no unit. `dense` holds the dense model's last hidden
    states, which cross-entropy does not need; `targets` is (batch, time).
    """
    totals = dict.fromkeys(h, 0.0)
    flat_targets = targets.flatten()
    rows = max(1, HEAD_ELEMENTS // stack.model.config.vocab_size)
    for start in range(0, len(flat_targets), rows):
        part = slice(start, start + rows)
        measure = _measure(stack, objective, None if dense is None else dense.flatten(0, 1)[part], flat_targets[part])
        for candidate, states in h.items():
            totals[candidate] += float(measure(stack.norm(states.flatten(0, 1)[part])))
    return totals


def _measure(
    stack: BlockStack, objective: Objective, dense: Tensor | None, targets: Tensor
) -> Callable[[Tensor], Tensor]:
    """From hidden states (tokens, hidden) after the final norm to their loss, summed over tokens."""
    if objective == "cross_entropy":
        return lambda normed: F.cross_entropy(stack.head(normed).float(), targets, reduction="sum")
    if dense is None:
        raise ValueError(f"{objective} needs the dense model's hidden states")
    reference = stack.norm(dense)
    if objective == "hidden":
        size = reference.float().pow(2).sum(-1)
        return lambda normed: ((normed - reference).float().pow(2).sum(-1) / size).sum()
    dense_log_p = F.log_softmax(stack.head(reference).float(), dim=-1)  # (tokens, vocabulary)
    return lambda normed: F.kl_div(
        F.log_softmax(stack.head(normed).float(), dim=-1), dense_log_p, reduction="sum", log_target=True
    )


def mean_losses(totals: Sequence[Mapping[Blocks, float]], tokens: int, chunk_windows: int) -> dict[Blocks, float]:
    """Sums over chunks to means over tokens. Raises: NonFiniteLoss naming candidate and windows."""
    for chunk, losses in enumerate(totals):
        for candidate, loss in losses.items():
            if not math.isfinite(loss):
                first = chunk * chunk_windows
                raise NonFiniteLoss(
                    f"removing blocks {sorted(candidate)} gives the loss {loss} on windows {first} to "
                    f"{first + chunk_windows - 1}"
                )
    return {candidate: math.fsum(losses[candidate] for losses in totals) / tokens for candidate in totals[0]}


class Engine:
    """Losses of candidate sets on whole windows (windows, tokens). Every token but the first of a window is scored."""

    def __init__(self, stack: BlockStack, windows: Tensor, objective: Objective, *, chunk_windows: int) -> None:
        self.block_forwards = 0
        self._stack = stack
        self._windows = windows
        self._objective = objective
        self._chunk_windows = chunk_windows
        self._calls = capture_calls(stack, windows[:, :-1])

    def losses(self, candidates: Sequence[Blocks], objective: Objective | None = None) -> dict[Blocks, float]:
        """Mean loss a token of each candidate, by the engine's objective unless another is given.

        Smaller chunks when memory runs out. Raises: NonFiniteLoss.
        """
        while True:
            try:
                return self._losses(candidates, objective or self._objective)
            except torch.OutOfMemoryError as error:
                self._chunk_windows = halved(self._chunk_windows, len(candidates) + 1, error)

    @torch.no_grad()
    def _losses(self, candidates: Sequence[Blocks], objective: Objective) -> dict[Blocks, float]:
        totals = []
        for chunk in self._windows.split(self._chunk_windows):
            walked = candidates if objective == "cross_entropy" else [NOTHING, *candidates]
            h, forwards = walk(self._stack, self._calls, self._stack.embed(chunk[:, :-1]), walked, {})
            self.block_forwards += forwards
            wanted = {candidate: h[candidate] for candidate in candidates}
            totals.append(summed_loss(self._stack, objective, wanted, h.get(NOTHING), chunk[:, 1:]))
        tokens = self._windows[:, 1:].numel()
        return mean_losses(totals, tokens, self._chunk_windows)


@dataclass(frozen=True)
class _Prompt:
    """What the prefill model leaves behind for one chunk of windows."""

    caches: Mapping[int, Prefix]
    last: Tensor  # (batch, 1, hidden): h_L at the last prompt token, which predicts the first continued one
    dense: Tensor  # (batch, continuation, hidden): the dense model's h_L for the same predictions


class PairEngine:
    """Losses of what decode removes, on continuations of prompts that a prefill model without `prefill` processed.

    The first continued token is predicted by the prefill model, the others by the decode model, which reads the
    prompt's keys and values from the prefill model's cache. With `cross_entropy` this is the PD loss.
    """

    def __init__(
        self,
        stack: BlockStack,
        windows: Tensor,
        objective: Objective,
        *,
        prefill: Blocks,
        prompt_tokens: int,
        chunk_windows: int,
        project_skipped: bool = False,
    ) -> None:
        """With `project_skipped`, prefill projects keys and values also for the blocks that it skips, from the hidden
        state that passes them by (as POP does), and decode may keep them: the bound to what nesting costs.

        Raises: ValueError when the windows leave no room for a continuation of at least two tokens.
        """
        if not 1 <= prompt_tokens <= windows.shape[1] - 2:
            raise ValueError(f"a prompt of {prompt_tokens} tokens does not fit windows of {windows.shape[1]}")
        self.block_forwards = 0
        self._stack = stack
        self._objective = objective
        self._prefill = prefill
        self._prompt_tokens = prompt_tokens
        self._chunk_windows = chunk_windows
        self._project_skipped = project_skipped
        self._windows = windows
        self._calls = capture_continuation_calls(stack, windows[:, :-1], prompt_tokens)
        self._prompts: list[_Prompt] = []

    @torch.no_grad()
    def _process_prompt(self, chunk: Tensor) -> _Prompt:
        stack, prompt = self._stack, chunk[:, : self._prompt_tokens]
        cache = DynamicCache(config=stack.model.config)
        calls, h = capture_calls(stack, prompt), stack.embed(prompt)
        cached = [block for block in range(len(stack.blocks)) if self._project_skipped or block not in self._prefill]
        for block in cached:
            after = calls.run(stack, block, h, cache)
            # A skipped block leaves its keys and values behind; what it gives is not used.
            h = h if block in self._prefill else after
        whole = chunk[:, :-1]
        dense, dense_forwards = walk(stack, capture_calls(stack, whole), stack.embed(whole), [NOTHING], {})
        self.block_forwards += len(cached) + dense_forwards
        caches = {block: Prefix.of(cache, block) for block in cached}
        return _Prompt(caches, h[:, -1:], dense[NOTHING][:, self._prompt_tokens - 1 :])

    def losses(self, candidates: Sequence[Blocks], objective: Objective | None = None) -> dict[Blocks, float]:
        """Mean loss a continued token, by the engine's objective unless another is given.

        Raises: NonFiniteLoss; ValueError when a candidate keeps what prefill removed.
        """
        if not self._project_skipped:
            for candidate in candidates:
                check_nested(self._prefill, candidate)
        while True:
            try:
                return self._losses(candidates, objective or self._objective)
            except torch.OutOfMemoryError as error:
                self._prompts = []
                self._chunk_windows = halved(self._chunk_windows, len(candidates), error)

    @torch.no_grad()
    def _losses(self, candidates: Sequence[Blocks], objective: Objective) -> dict[Blocks, float]:
        if not self._prompts:
            self._prompts = [self._process_prompt(chunk) for chunk in self._windows.split(self._chunk_windows)]
        totals = []
        for chunk, prompt in zip(self._windows.split(self._chunk_windows), self._prompts, strict=True):
            fed = self._stack.embed(chunk[:, self._prompt_tokens : -1], start=self._prompt_tokens)
            h, forwards = walk(self._stack, self._calls, fed, candidates, prompt.caches)
            self.block_forwards += forwards
            whole = {candidate: torch.cat([prompt.last, h[candidate]], dim=1) for candidate in candidates}
            targets = chunk[:, self._prompt_tokens :]
            totals.append(summed_loss(self._stack, objective, whole, prompt.dense, targets))
        tokens = self._windows[:, self._prompt_tokens :].numel()
        return mean_losses(totals, tokens, self._chunk_windows)
