"""The figures of several models in one walk over the blocks of the dense one that they were made of.

At each block all that the models compute there is computed, before the next one: the hidden states of whole windows,
and those of prompts and continuations, which read the keys and values that prefill left at this very block. So of
models that are read from disk (`streaming`) every weight is read once, however many figures are wanted, and memory
holds hidden states in place of models. What is computed is what `measure` and `pair` compute with whole models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from workers.pruning.model.blocks import BlockCalls, BlockStack, block_stack, capture_calls
from workers.pruning.model.cache import Served
from workers.pruning.model.measure import Perplexity, Quality, likeness, logits_at_once, perplexity_of, token_losses
from workers.pruning.model.pair import FirstToken, copied_layer, handed_tokens
from workers.pruning.model.parts import run_without
from workers.pruning.model.plan import BlockPlan, Part

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache that hold keys and values and nothing else."""


@dataclass(frozen=True)
class Course:
    """A model's course along the dense model's blocks."""

    stack: BlockStack
    at: Mapping[int, tuple[int, Literal["run"] | Part]]
    """Block of the dense model → the layer that stands there, and what of it runs: all, or all but a part."""

    @classmethod
    def of_checkpoint(cls, model: PreTrainedModel, plan: BlockPlan) -> Course:
        """Of a checkpoint that gave up `plan`: its parts are zeros in it, so that all of its layers run."""
        return cls(block_stack(model), {block: (layer, "run") for layer, block in enumerate(plan.kept)})

    @classmethod
    def of_dense(cls, model: PreTrainedModel, plan: BlockPlan) -> Course:
        """Of the dense model where it gives up `plan`."""
        return cls(block_stack(model), {block: (block, plan.parts.get(block, "run")) for block in plan.kept})

    def run(self, calls: BlockCalls, block: int, h: Tensor, cache: Any = None) -> Tensor:
        """h (batch, time, hidden) through what stands at a block of the dense model, same shape."""
        layer, what = self.at[block]
        if what == "run":
            return calls.run(self.stack, layer, h, cache)
        return run_without(self.stack.blocks[layer], what, h, calls.kwargs[layer], cache)


@dataclass(frozen=True)
class Pair:
    """Two courses, the second of which reads the keys and values that the first leaves."""

    prefill: Course
    decode: Course


@dataclass(frozen=True)
class Compared:
    """Models by name beside the dense one, and pairs by name."""

    dense: Course
    models: Mapping[str, Course]
    undistilled: Mapping[str, Course]
    """What some of the models were before distillation, of which the perplexity is wanted."""
    pairs: Mapping[str, Pair]
    cached: Mapping[str, Course]
    """Models whose caches are measured."""

    @property
    def streams(self) -> int:
        """How many hidden states of every token a walk holds; one more stands for the keys and values at a block."""
        return 2 + len(self.models) + len(self.undistilled) + 2 * len(self.pairs)


@dataclass(frozen=True)
class PairLosses:
    """Losses of a pair in nats a token, as `pair.pd_loss` and `pair.first_token_losses` have them."""

    loss: float
    copying: float
    """Where the continuation is the prompt said again."""
    first_token: Mapping[FirstToken, float]


@dataclass(frozen=True)
class Comparison:
    """The figures, by the names of models and pairs; `dense` is the dense model's name."""

    models: Mapping[str, Quality]
    undistilled: Mapping[str, Perplexity]
    pairs: Mapping[str, PairLosses]
    cached: Mapping[str, Sequence[int]]
    """Bytes that a cache holds after each of the counts of tokens that were asked for."""


class _Stream:
    """Hidden states of tokens on a course, from the embedding on.

    Where it goes on from another stream, `after`, it reads the keys and values that this one left at the same block;
    where it is `kept`, it leaves its own to others.
    """

    def __init__(
        self,
        course: Course,
        ids: Tensor,
        *,
        start: int = 0,
        after: _Stream | None = None,
        kept: bool = False,
        batch: int,
    ) -> None:
        stack = course.stack
        ids = ids.to(stack.device)
        self.course = course
        self.left: list[Any] = []
        self._after, self._kept, self._batch = after, kept, batch
        self._h = stack.embed(ids, start=start)
        self._calls = capture_calls(stack, ids, _passed(stack, start) if start else None)

    def step(self, block: int) -> None:
        """Go past a block."""
        self.left = []
        if block not in self.course.at:
            return
        layer, _ = self.course.at[block]
        following = []
        for number, h in enumerate(self._h.split(self._batch)):
            cache = None
            if self._after is not None or self._kept:
                cache = DynamicCache(config=self.course.stack.model.config)
            if self._after is not None and cache is not None:
                cache.layers[layer] = copied_layer(self._after.left[number])
            following.append(self.course.run(self._calls, block, h, cache))
            if self._kept and cache is not None:
                self.left.append(cache.layers[layer])
        self._h = torch.cat(following)

    @property
    def normed(self) -> Tensor:
        """What the head reads, (windows, time, hidden)."""
        return torch.cat([self.course.stack.norm(h) for h in self._h.split(self._batch)])

    def losses(self, targets: Tensor) -> Tensor:
        """Negative log-likelihoods in nats of `targets` (windows, time), same shape."""
        found = token_losses(self.course.stack.model, self.normed.flatten(0, 1), targets.flatten())
        return found.view(targets.shape)


class _Probe(_Stream):
    """A request of one sequence, of whose cache the bytes are counted."""

    def __init__(self, course: Course, tokens: int, served_in: torch.dtype) -> None:
        super().__init__(course, torch.zeros((1, tokens), dtype=torch.long), kept=True, batch=1)
        self.bytes = 0
        self._served = Served(course.stack, served_in)

    def step(self, block: int) -> None:
        """Go past a block, and count what its layer holds."""
        super().step(block)
        for layer in self.left:
            self.bytes += self._served.layer_bytes(self.course.at[block][0], layer)


def _passed(stack: BlockStack, tokens: int) -> DynamicCache:
    """A cache after so many tokens, for what the model calls its blocks with then: their number counts, not they."""
    cache = DynamicCache(config=stack.model.config)
    plain = [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and type(layer) in PLAIN]
    if len(plain) == len(cache.layers):
        nothing = torch.zeros((1, 1, tokens, 1), dtype=stack.model.dtype, device=stack.device)
        for layer in plain:
            layer.update(nothing, nothing)
    else:  # States are known by running the model alone.
        ids = torch.zeros((1, tokens), dtype=torch.long, device=stack.device)
        stack.body(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


class _PairStreams:
    """What a pair makes of windows (windows, time): the prompt but for its last token, that token, what follows."""

    def __init__(self, pair: Pair, ids: Tensor, prompt_tokens: int, first_token: FirstToken, batch: int) -> None:
        self._pair = pair
        self._targets = ids[:, prompt_tokens:]
        before, last = prompt_tokens - 1, ids[:, prompt_tokens - 1 : prompt_tokens]
        self._prompt = _Stream(pair.prefill, ids[:, :before], kept=True, batch=batch)
        self._by_prefill = _Stream(pair.prefill, last, start=before, after=self._prompt, kept=True, batch=batch)
        self._by_decode = _Stream(pair.decode, last, start=before, after=self._prompt, batch=batch)
        handed = handed_tokens(prompt_tokens, first_token)
        source = self._prompt if handed == before else self._by_prefill
        self._rest = _Stream(pair.decode, ids[:, handed:-1], start=handed, after=source, batch=batch)
        self._says_first = first_token

    @property
    def streams(self) -> list[_Stream]:
        return [self._prompt, self._by_prefill, self._by_decode, self._rest]

    def first_token_losses(self) -> dict[FirstToken, list[float]]:
        """Of each window, by each half."""
        first = self._targets[:, :1]
        return {
            "decode": self._by_decode.losses(first).flatten().tolist(),
            "prefill": self._by_prefill.losses(first).flatten().tolist(),
        }

    def losses(self) -> list[float]:
        """Mean over each window's continuation."""
        if self._says_first == "decode":
            return _means(self._rest.losses(self._targets))
        first = self._by_prefill.losses(self._targets[:, :1])
        return _means(torch.cat([first, self._rest.losses(self._targets[:, 1:]).to(first.device)], dim=1))


def _means(of_tokens: Tensor) -> list[float]:
    means: list[float] = of_tokens.mean(1, dtype=torch.float64).tolist()
    return means


@dataclass(frozen=True)
class Asked:
    """How a comparison goes."""

    prompt_tokens: int
    """Of each window, for pairs."""
    first_token: FirstToken
    cached_tokens: Sequence[int]
    """After which caches are measured."""
    served_in: torch.dtype
    """In which keys and values are then held."""
    batch: int
    """Windows that a block computes at a time."""
    windows_at_once: int
    """That a walk carries."""


@torch.no_grad()
def compare(
    compared: Compared,
    windows: Tensor,
    copying: Tensor,
    asked: Asked,
    *,
    say: Callable[[float], None] = lambda done: None,
) -> Comparison:
    """The figures on `windows` (windows, time), and on `copying`, as many whose continuation is the prompt said again.

    `say` hears before every block how much is done, of 1.
    """
    by_window: dict[tuple[str, str], list[float]] = defaultdict(list)
    cached = _cached(compared, asked)
    for start in range(0, len(windows), asked.windows_at_once):
        chunk = slice(start, start + asked.windows_at_once)

        def say_here(done: float, start: int = start, count: int = len(windows[chunk])) -> None:
            say((start + done * count) / len(windows))

        probes = [probe for of_model in cached.values() for probe in of_model] if start == 0 else []
        for key, values in _on_chunk(compared, windows[chunk], copying[chunk], asked, probes, say_here).items():
            by_window[key] += values

    def mean(kind: str, name: str) -> float:
        return fmean(by_window[kind, name])

    return Comparison(
        models={
            name: Quality(perplexity_of(by_window["loss", name]), mean("kl", name), mean("same", name))
            for name in ("dense", *compared.models)
        },
        undistilled={name: perplexity_of(by_window["undistilled", name]) for name in compared.undistilled},
        pairs={
            name: PairLosses(
                loss=mean("pair", name),
                copying=mean("copying", name),
                first_token={"decode": mean("first by decode", name), "prefill": mean("first by prefill", name)},
            )
            for name in compared.pairs
        },
        cached={name: [probe.bytes for probe in of_model] for name, of_model in cached.items()},
    )


def _on_chunk(
    compared: Compared,
    ids: Tensor,
    copying: Tensor,
    asked: Asked,
    probes: Sequence[_Stream],
    say: Callable[[float], None],
) -> dict[tuple[str, str], list[float]]:
    """What is measured of each window, by its kind and the name of a model or pair."""

    def whole(course: Course) -> _Stream:
        return _Stream(course, ids[:, :-1], batch=asked.batch)

    def pair(pair: Pair, windows: Tensor) -> _PairStreams:
        return _PairStreams(pair, windows, asked.prompt_tokens, asked.first_token, asked.batch)

    dense = whole(compared.dense)
    models = {name: whole(course) for name, course in compared.models.items()}
    undistilled = {name: whole(course) for name, course in compared.undistilled.items()}
    pairs = {name: pair(halves, ids) for name, halves in compared.pairs.items()}
    copies = {name: pair(halves, copying) for name, halves in compared.pairs.items()}
    of_pairs = [stream for one in (*pairs.values(), *copies.values()) for stream in one.streams]
    _walk([dense, *models.values(), *undistilled.values(), *of_pairs, *probes], _blocks(compared.dense), say)

    found = _likenesses(dense, models, ids[:, 1:])
    found |= {("undistilled", name): _means(stream.losses(ids[:, 1:])) for name, stream in undistilled.items()}
    for name in compared.pairs:
        found["pair", name], found["copying", name] = pairs[name].losses(), copies[name].losses()
        for half, losses in pairs[name].first_token_losses().items():
            found[f"first by {half}", name] = losses
    return found


def _blocks(dense: Course) -> int:
    return len(dense.stack.blocks)


def _walk(streams: Sequence[_Stream], blocks: int, say: Callable[[float], None]) -> None:
    """Take all streams past all blocks: at each, those of one model after those of another."""
    order = {id(stream.course.stack.model): number for number, stream in reversed(list(enumerate(streams)))}
    by_model = sorted(streams, key=lambda stream: order[id(stream.course.stack.model)])
    for block in range(blocks):
        say(block / blocks)
        for stream in by_model:
            stream.step(block)


def _likenesses(dense: _Stream, models: Mapping[str, _Stream], targets: Tensor) -> dict[tuple[str, str], list[float]]:
    """The loss, the distance from the dense model and the agreement with it of each window, by model."""
    model, shape = dense.course.stack.model, targets.shape
    reference = dense.normed
    given = {"dense": reference} | {name: stream.normed for name, stream in models.items()}
    heads = {"dense": dense.course.stack} | {name: stream.course.stack for name, stream in models.items()}
    parts: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for rows in torch.arange(targets.numel()).split(logits_at_once(model)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        dense_logits = dense.course.stack.head(reference.flatten(0, 1)[part]).float()
        followed = targets.flatten()[part].to(dense_logits.device)
        for name, normed in given.items():
            logits = heads[name].head(normed.flatten(0, 1)[part]).float().to(dense_logits.device)
            found = likeness(logits, dense_logits, followed)
            parts["loss", name].append(found.losses)
            parts["kl", name].append(found.kl)
            parts["same", name].append(found.same.float())
    return {key: _means(torch.cat(of_tokens).view(shape)) for key, of_tokens in parts.items()}


def _cached(compared: Compared, asked: Asked) -> dict[str, list[_Probe]]:
    """For each model whose caches are measured a stream of each length."""
    return {
        name: [_Probe(course, tokens, asked.served_in) for tokens in asked.cached_tokens]
        for name, course in compared.cached.items()
    }
