"""The loss of many candidate sets of units in one pass over the weights.

Two candidates have the same hidden states up to the first block at which their ways through the model differ. So a pass
goes through the blocks in order and carries one hidden state for each distinct way *so far*: where five candidates
begin alike, their common blocks run once. Candidates that are near a set which was walked before, the anchor, begin
where they first differ from it, from hidden states that were held on its way.

An engine belongs to one model, one set of windows and one objective. `WholeEngine` takes one model's whole windows, or
what follows their prompts; `PairEngine` the continuations of prompts that a prefill half processed, which is what a
decode half is compared by.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, LinearAttentionCacheLayerMixin

from workers.pruning.model.blocks import BlockCalls, BlockStack, capture_calls, capture_continuation_calls, run_block
from workers.pruning.model.cache import held_tensors
from workers.pruning.model.pair import FirstToken, check_prompt, copied_layer
from workers.pruning.model.parts import run_without
from workers.pruning.model.units import NOTHING, Step, Units, Way, blocks_of, check_nested, parts_of, way_through
from workers.pruning.search.anchor import Anchor, Trail

Objective = Literal["kl", "cross_entropy", "hidden"]
WindowLosses = Callable[[Sequence[Units], range], dict[Units, list[float]]]
"""Mean loss a token of each candidate set on each window of a range: what engines offer and searches use."""
HEAD_ELEMENTS = 2**24
"""Logits computed at a time; bounds the memory of a large vocabulary (64 MiB in float32)."""
HEAD_TOKENS_ON_CPU = 256
"""Tokens whose logits are computed at a time at most where caches are small."""
CACHED_LOGITS = 2**17
"""Logits of a CPU that are read again and again while they are in its cache: 512 KiB in float32."""


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
    tokens: int
    """Of the prompt; the keys may be those of a window alone."""

    @classmethod
    def of(cls, cache: DynamicCache, layer: int) -> Prefix:
        """What a real cache holds for one layer."""
        held: Any = cache.layers[layer]
        return cls(held.keys, held.values, held.get_seq_length())

    @property
    def held(self) -> list[Tensor]:
        """All that this keeps."""
        return [self.keys, self.values]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As a real cache says it."""
        return self.tokens

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Prompt and continuation side by side along time, as a real cache returns them."""
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)


@dataclass(frozen=True)
class StatePrefix:
    """What a layer keeps of the prompt that is not keys and values alone: each block call gets a cache of its own."""

    cache: DynamicCache
    layer: int

    @property
    def held(self) -> list[Tensor]:
        """All that this keeps."""
        return held_tensors(self.cache.layers[self.layer])

    def opened(self) -> DynamicCache:
        """A cache that may be written into."""
        opened = copy.copy(self.cache)
        opened.layers = list(self.cache.layers)
        opened.layers[self.layer] = copied_layer(self.cache.layers[self.layer])
        return opened


def prefix_of(cache: DynamicCache, layer: int) -> Prefix | StatePrefix:
    """What a real cache holds for one layer."""
    held: Any = cache.layers[layer]
    plain = isinstance(held, DynamicLayer) and not isinstance(
        held, DynamicIndexedLayer | LinearAttentionCacheLayerMixin
    )
    return Prefix.of(cache, layer) if plain else StatePrefix(cache, layer)


def walk(
    stack: BlockStack,
    calls: BlockCalls,
    trail: Trail,
    candidates: Sequence[Units],
    caches: Mapping[int, Any],
    on_block: Callable[[int], None] = lambda block: None,
) -> tuple[dict[Units, Tensor], int]:
    """The last hidden states h_L (batch, time, hidden) of every candidate, and how many block-forwards that took.

    `trail` has hidden states on one way through the blocks. A candidate begins at the last of them that lies on its own
    way, too; states that the walk passes on that way are left in the trail. `caches` are the KV caches to
    read, by block. `on_block` hears of each block that all candidates are past.
    """
    # Where each candidate begins.
    ways = {candidate: way_through(candidate, len(stack.blocks)) for candidate in candidates}
    begins = {way: trail.begin(way) for way in ways.values()}

    # Before a block, `states` has the hidden state that enters it for each distinct way so far.
    states: dict[Way, Tensor] = {}
    forwards = 0
    for block in range(min(begins.values(), default=len(stack.blocks)), len(stack.blocks)):
        # Candidates that begin here share the trail's state; else the trail takes what the walk found on its way.
        passed = trail.way[:block]
        if block in begins.values():
            states[passed] = trail.states[block]
        elif passed in states:
            trail.keep(block, states[passed])

        # One step for each distinct way up to and with this block, in the order of the candidates.
        following: dict[Way, Tensor] = {}
        for way in {way[: block + 1]: None for way, begin in begins.items() if begin <= block}:
            before, step = states[way[:block]], way[block]
            following[way] = take_step(stack, calls, block, step, before, caches.get(block))
            forwards += step != "skip"
        states = following
        on_block(block)
    return {candidate: states[way] for candidate, way in ways.items()}, forwards


def take_step(stack: BlockStack, calls: BlockCalls, block: int, step: Step, h: Tensor, cache: Any = None) -> Tensor:
    """What h_i (batch, time, hidden) becomes at a block, given what happens there, same shape."""
    if step == "skip":
        return h
    if isinstance(cache, StatePrefix):
        cache = cache.opened()
    if step == "run":
        return run_block(stack.blocks[block], h, calls.kwargs[block], cache)
    return run_without(stack.blocks[block], step, h, calls.kwargs[block], cache)


def mean_losses(
    stack: BlockStack, objective: Objective, h: Mapping[Units, Tensor], dense: Tensor | None, targets: Tensor
) -> dict[Units, list[float]]:
    """Mean loss a token in nats, of each window of each candidate's last hidden states (batch, time, hidden).

    `kl` is KL(dense ‖ candidate) of the next-token distributions, `cross_entropy` is −log p(target), and `hidden` is
    ‖h − h_dense‖² / ‖h_dense‖² after the final norm, which has no unit. `dense` holds the dense model's last hidden
    states, which cross-entropy does not need; `targets` is (batch, time).
    """
    by_token: dict[Units, list[Tensor]] = {candidate: [] for candidate in h}
    flat_targets = targets.flatten()
    rows = max(1, HEAD_ELEMENTS // stack.model.config.vocab_size)
    if targets.device.type == "cpu":
        rows = min(rows, HEAD_TOKENS_ON_CPU)
    for start in range(0, len(flat_targets), rows):
        part = slice(start, start + rows)
        measure = _measure(stack, objective, None if dense is None else dense.flatten(0, 1)[part], flat_targets[part])
        for candidate, states in h.items():
            by_token[candidate].append(measure(stack.norm(states.flatten(0, 1)[part])))
    return {
        candidate: torch.cat(parts).view_as(targets).mean(1, dtype=torch.float64).tolist()
        for candidate, parts in by_token.items()
    }


def _measure(
    stack: BlockStack, objective: Objective, dense: Tensor | None, targets: Tensor
) -> Callable[[Tensor], Tensor]:
    """From hidden states (tokens, hidden) after the final norm to the loss of each token (tokens,)."""
    if objective == "cross_entropy":
        return lambda normed: torch.cat(
            [_cross_entropy(logits.float(), wanted) for logits, wanted in _by_cache(stack.head(normed), targets)]
        )
    if dense is None:
        raise ValueError(f"{objective} needs the dense model's hidden states")
    reference = stack.norm(dense)
    if objective == "hidden":
        size = reference.float().pow(2).sum(-1)
        return lambda normed: (normed - reference).float().pow(2).sum(-1) / size
    dense_logits = stack.head(reference).float()  # (tokens, vocabulary)
    dense_p, dense_lse = F.softmax(dense_logits, dim=-1), torch.logsumexp(dense_logits, dim=-1)

    def kl(normed: Tensor) -> Tensor:
        # Σ p (log p − log q) by differences of logits: fewer passes over the vocabulary than by log-softmax, and small
        # numbers, so that nothing cancels.
        parts = []
        for found, of_dense, p in _by_cache(stack.head(normed), dense_logits, dense_p):
            logits = found.float()
            expected: Tensor = torch.linalg.vecdot(p, logits - of_dense)
            parts.append(torch.logsumexp(logits, dim=-1) - expected)
        return torch.cat(parts) - dense_lse

    return kl


def _by_cache(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Logits (tokens, vocabulary), and what belongs to the same tokens, in parts that a CPU's cache holds."""
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(1, CACHED_LOGITS // logits.shape[-1])
    return zip(logits.split(rows), *(other.split(rows) for other in others), strict=True)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets.to(logits.device), reduction="none")


def check_finite(losses: Mapping[Units, Sequence[float]], first_window: int) -> None:
    """Raises: NonFiniteLoss naming candidate and window."""
    for candidate, by_window in losses.items():
        for window, loss in enumerate(by_window, start=first_window):
            if not math.isfinite(loss):
                parts = f" and parts {parts_of(candidate)}" if parts_of(candidate) else ""
                removed = f"removing blocks {sorted(blocks_of(candidate))}{parts}"
                raise NonFiniteLoss(f"{removed} gives the loss {loss} on window {window}")


def _tell(walked: Walked, chunk: range, windows: range, num_blocks: int, block: int) -> None:
    """Which share of `windows` is done when `block` is passed with `chunk` of them."""
    walked((chunk.start - windows.start + len(chunk) * (block + 1) / num_blocks) / len(windows))


def mean(losses: Mapping[Units, Sequence[float]]) -> dict[Units, float]:
    """Mean over windows, which are all of one length."""
    return {candidate: math.fsum(by_window) / len(by_window) for candidate, by_window in losses.items()}


Walked = Callable[[float], None]
"""Told again and again which share of the work is done."""


def unheard(share: float) -> None:
    """Whoever does not ask how far work has come."""


class LossEngine(Protocol):
    """What searches need of an engine."""

    windows: int

    def window_losses(
        self,
        candidates: Sequence[Units],
        windows: range,
        objective: Objective | None = None,
        *,
        walked: Walked = unheard,
    ) -> dict[Units, list[float]]:
        """Mean loss a token of each candidate on each of `windows`."""

    def losses(self, candidates: Sequence[Units], objective: Objective | None = None) -> dict[Units, float]:
        """Mean loss a token of each candidate on all windows."""

    def anchor(self, units: Units) -> None:
        """Say that coming candidates are near `units`."""


class Repaired(Protocol):
    """Walks of sets as they are after a repair that needs no training (`repair/folded_sets.py`)."""

    def walk(
        self,
        calls: BlockCalls,
        h: Tensor,
        candidates: Sequence[Units],
        caches: Mapping[int, Any],
        on_block: Callable[[int], None],
    ) -> tuple[dict[Units, Tensor], int]:
        """As `walk`, from h_0 (batch, time, hidden)."""

    def applied(self, units: Units) -> AbstractContextManager[None]:
        """While this lasts, the model's blocks do what those of a repaired set do."""

    def forget(self) -> None:
        """Let go of what is held for the sets that came so far."""


class ChunkedEngine(ABC):
    """Losses of candidate sets on windows (windows, tokens), walked in chunks, smaller ones when memory runs out.

    Once told an anchor, it holds hidden states of that set in at most `anchor_bytes`. That changes no loss. With
    `repaired` the losses are those of sets after repair; then nothing is held.
    """

    def __init__(
        self,
        stack: BlockStack,
        windows: Tensor,
        objective: Objective,
        chunk_windows: int,
        *,
        walked_tokens: int,
        anchor_bytes: int,
        repaired: Repaired | None = None,
    ) -> None:
        self.block_forwards = 0
        self._repaired = repaired
        self._passed: Callable[[int], None] = lambda block: None
        self.windows = len(windows)
        self.num_blocks = len(stack.blocks)
        self._stack = stack
        self._ids = windows
        self._objective = objective
        self._chunk_windows = chunk_windows
        numbers = len(windows) * walked_tokens * stack.model.config.hidden_size
        self._anchor = Anchor(len(stack.blocks), anchor_bytes, numbers * stack.model.dtype.itemsize)

    def anchor(self, units: Units) -> None:
        """Say that coming candidates are near `units`: their walks begin where they first differ from that set."""
        if self._repaired is not None:
            self._repaired.forget()
        else:
            self._anchor.move(way_through(units, self.num_blocks))

    def losses(self, candidates: Sequence[Units], objective: Objective | None = None) -> dict[Units, float]:
        """Mean loss a token of each candidate on all windows, by the engine's objective unless another is given.

        Raises: what `window_losses` raises.
        """
        return mean(self.window_losses(candidates, range(self.windows), objective))

    @torch.no_grad()
    def window_losses(
        self,
        candidates: Sequence[Units],
        windows: range,
        objective: Objective | None = None,
        *,
        walked: Walked = unheard,
    ) -> dict[Units, list[float]]:
        """Mean loss a token of each candidate on each of `windows`; `walked` hears of every block.

        Raises: NonFiniteLoss; OutOfMemoryError when one window does not fit; what `walked` raises.
        """
        losses: dict[Units, list[float]] = {candidate: [] for candidate in candidates}
        start = windows.start
        while start < windows.stop:
            chunk = range(start, min(start + self._chunk_windows, windows.stop))
            self._passed = partial(_tell, walked, chunk, windows, self.num_blocks)
            try:
                found = self._chunk_losses(candidates, chunk, objective or self._objective)
            except torch.OutOfMemoryError as error:
                if not self._anchor.give_up():
                    self._shrink(halved(self._chunk_windows, len(candidates) + 1, error))
                continue
            check_finite(found, start)
            for candidate, by_window in found.items():
                losses[candidate] += by_window
            start = chunk.stop
            walked((start - windows.start) / len(windows))
        return losses

    def _shrink(self, chunk_windows: int) -> None:
        self._chunk_windows = chunk_windows

    def _walk(
        self, calls: BlockCalls, chunk: range, h: Tensor, candidates: Sequence[Units], caches: Mapping[int, Any]
    ) -> dict[Units, Tensor]:
        """h_0 (batch, time, hidden) of a chunk of windows → h_L of every candidate."""
        if self._repaired is not None:
            last, forwards = self._repaired.walk(calls, h, candidates, caches, self._passed)
            self.block_forwards += forwards
            return last
        trail = self._anchor.trail(chunk, h)
        last, forwards = walk(self._stack, calls, trail, candidates, caches, self._passed)
        self._anchor.hold(chunk, trail)
        self.block_forwards += forwards
        return last

    @abstractmethod
    def _chunk_losses(
        self, candidates: Sequence[Units], chunk: range, objective: Objective
    ) -> dict[Units, list[float]]: ...


class WholeEngine(ChunkedEngine):
    """Losses of candidate sets on whole windows. Every token after the first `prompt_tokens` of a window is scored.

    Objectives that look at the dense model keep its last hidden states: windows · tokens · hidden numbers.
    """

    def __init__(
        self,
        stack: BlockStack,
        windows: Tensor,
        objective: Objective,
        *,
        chunk_windows: int,
        anchor_bytes: int = 0,
        prompt_tokens: int = 1,
        repaired: Repaired | None = None,
    ) -> None:
        super().__init__(
            stack,
            windows,
            objective,
            chunk_windows,
            walked_tokens=windows.shape[1] - 1,
            anchor_bytes=anchor_bytes,
            repaired=repaired,
        )
        self._scored = slice(prompt_tokens - 1, None)
        self._calls = capture_calls(stack, windows[:, :-1])
        self._dense: dict[range, Tensor] = {}

    def _shrink(self, chunk_windows: int) -> None:
        super()._shrink(chunk_windows)
        self._dense.clear()

    def _chunk_losses(
        self, candidates: Sequence[Units], chunk: range, objective: Objective
    ) -> dict[Units, list[float]]:
        ids = self._ids[chunk.start : chunk.stop]
        wanted = set(candidates)
        if objective != "cross_entropy":
            wanted.discard(NOTHING)  # At no distance from itself.
            if chunk not in self._dense:
                wanted.add(NOTHING)
        walked = self._walk(self._calls, chunk, self._stack.embed(ids[:, :-1]), sorted(wanted, key=sorted), {})
        h = {candidate: states[:, self._scored] for candidate, states in walked.items()}
        targets = ids[:, 1:][:, self._scored]
        if objective == "cross_entropy":
            return mean_losses(self._stack, objective, h, None, targets)
        if NOTHING in h:
            self._dense[chunk] = h.pop(NOTHING).contiguous()
        losses = mean_losses(self._stack, objective, h, self._dense[chunk], targets)
        return {candidate: losses.get(candidate, [0.0] * len(ids)) for candidate in candidates}


def prefill_step(
    stack: BlockStack, calls: BlockCalls, block: int, step: Step, h: Tensor
) -> tuple[Tensor, Prefix | StatePrefix | None]:
    """What a prompt's h_i (batch, time, hidden) becomes at a block, and the keys and values that are left there."""
    cache = DynamicCache(config=stack.model.config)
    after = take_step(stack, calls, block, step, h, cache)
    return after, None if step in ("skip", "attention") else prefix_of(cache, block)


def dense_hidden(stack: BlockStack, windows: Tensor) -> tuple[Tensor, int]:
    """The dense model's h_L (windows, time - 1, hidden) of windows (windows, time), and the block-forwards it took."""
    whole = windows[:, :-1]
    found, forwards = walk(stack, capture_calls(stack, whole), Trail.starting(stack.embed(whole)), [NOTHING], {})
    return found[NOTHING], forwards


@dataclass(frozen=True)
class _Prompt:
    """What the prefill model leaves behind for one chunk of windows."""

    caches: Mapping[int, Prefix | StatePrefix]
    # (batch, 1, hidden): h_L at the last prompt token, which predicts the first continued one; (batch, 0, hidden) where
    # decode does.
    last: Tensor
    dense: Tensor  # (batch, continuation, hidden): the dense model's h_L for the same predictions

    @property
    def nbytes(self) -> int:
        held = [self.last, self.dense, *(tensor for cache in self.caches.values() for tensor in cache.held)]
        return sum(tensor.nbytes for tensor in held)


class PairEngine(ChunkedEngine):
    """Losses of what decode removes, on continuations of prompts that a prefill model without `prefill` processed.

    The decode model reads the prompt's keys and values from the prefill model's cache. Where prefill says the first
    token, that one is predicted by the prefill model and the others by the decode model. Where decode does, it runs the
    prompt's last token itself and predicts all, and nothing of prefill counts but the keys and values of the tokens
    before. The tokens that are scored are the same. With `cross_entropy` this is the PD loss.
    """

    def __init__(
        self,
        stack: BlockStack,
        windows: Tensor,
        objective: Objective,
        *,
        prefill: Units,
        prompt_tokens: int,
        first_token: FirstToken,
        chunk_windows: int,
        anchor_bytes: int = 0,
        prompt_bytes: int | None = None,
        repaired: Repaired | None = None,
    ) -> None:
        """Of processed prompts as many are kept as take `prompt_bytes`, None for all; others are processed every time.

        Raises: ValueError when nothing would be handed over, or the windows leave no room for a continuation of at
        least two tokens.
        """
        handed = check_prompt(prompt_tokens, first_token, windows.shape[1])
        super().__init__(
            stack,
            windows,
            objective,
            chunk_windows,
            walked_tokens=windows.shape[1] - 1 - handed,
            anchor_bytes=anchor_bytes,
            repaired=repaired,
        )
        self._prefill = prefill
        self._prompt_tokens = prompt_tokens
        self._handed = handed
        self._calls = capture_continuation_calls(stack, windows[:, :-1], handed)
        self._prompt_bytes = prompt_bytes
        self._prompts: dict[range, _Prompt] = {}

    def _prompt(self, chunk: range) -> _Prompt:
        """What the prefill model leaves behind of a chunk of windows, kept or made."""
        if chunk in self._prompts:
            return self._prompts[chunk]
        made = self._process_prompt(self._ids[chunk.start : chunk.stop])
        kept = sum(prompt.nbytes for prompt in self._prompts.values())
        if self._prompt_bytes is None or kept + made.nbytes <= self._prompt_bytes:
            self._prompts[chunk] = made
        return made

    def _process_prompt(self, chunk: Tensor) -> _Prompt:
        stack, prompt = self._stack, chunk[:, : self._handed]
        calls, h = capture_calls(stack, prompt), stack.embed(prompt)
        caches: dict[int, Prefix | StatePrefix] = {}
        with nullcontext() if self._repaired is None else self._repaired.applied(self._prefill):
            for block, step in enumerate(way_through(self._prefill, self.num_blocks)):
                h, kept = prefill_step(stack, calls, block, step, h)
                caches |= {} if kept is None else {block: kept}
        dense, dense_forwards = dense_hidden(stack, chunk)
        self.block_forwards += len(caches) + dense_forwards
        return _Prompt(caches, h[:, self._prompt_tokens - 1 :], dense[:, self._prompt_tokens - 1 :])

    def window_losses(
        self,
        candidates: Sequence[Units],
        windows: range,
        objective: Objective | None = None,
        *,
        walked: Walked = unheard,
    ) -> dict[Units, list[float]]:
        """Mean loss a continued token of each candidate on each of `windows`.

        Raises: NonFiniteLoss; OutOfMemoryError; ValueError when a candidate does not give up what prefill does.
        """
        for candidate in candidates:
            check_nested(self._prefill, candidate)
        return super().window_losses(candidates, windows, objective, walked=walked)

    def _shrink(self, chunk_windows: int) -> None:
        super()._shrink(chunk_windows)
        self._prompts.clear()

    def _chunk_losses(
        self, candidates: Sequence[Units], chunk: range, objective: Objective
    ) -> dict[Units, list[float]]:
        ids = self._ids[chunk.start : chunk.stop]
        prompt = self._prompt(chunk)
        fed = self._stack.embed(ids[:, self._handed : -1], start=self._handed)
        h = self._walk(self._calls, chunk, fed, candidates, prompt.caches)
        whole = {c: torch.cat([prompt.last.to(h[c].device), h[c]], dim=1) for c in candidates}
        return mean_losses(self._stack, objective, whole, prompt.dense, ids[:, self._prompt_tokens :])
