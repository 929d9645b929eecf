"""What a model is worth and what it costs: perplexity, likeness to the dense model, size, speed, memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from workers.pruning.model.blocks import block_stack, head

LOGITS_BYTES = 64 << 20
"""Float32 logits of one model that are held at a time."""


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood a token), with its standard error over windows (delta method)."""

    value: float
    standard_error: float | None
    """None of a single window."""

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.standard_error is None else f" ± {self.standard_error:.2f}")


@dataclass(frozen=True)
class Quality:
    """A model's perplexity, and how close its next-token distributions come to the dense model's."""

    perplexity: Perplexity
    kl_to_dense: float
    """KL(dense ‖ model) in nats a token."""
    top1_agreement: float
    """Share of tokens for which both models find the same next token most likely."""


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor, *, batch: int) -> Perplexity:
    """Perplexity of the tokens of windows (windows, time) after each window's first."""
    losses: list[float] = []
    for ids in windows.split(batch):
        nll = [F.cross_entropy(logits, targets, reduction="none") for logits, targets in _parts(ids, model)]
        losses += torch.cat(nll).view(len(ids), -1).mean(1).tolist()
    return perplexity_of(losses)


@torch.no_grad()
def quality(model: PreTrainedModel, dense: PreTrainedModel, windows: Tensor, *, batch: int) -> Quality:
    """Perplexity and likeness to `dense` on the tokens of windows (windows, time) after each window's first, at once.

    Beside hidden states, memory holds `LOGITS_BYTES` of logits of each model, and as much again while they compare.
    """
    losses: list[float] = []
    kl = same = 0.0
    for ids in windows.split(batch):
        nll: list[Tensor] = []
        for logits, dense_logits, targets in _parts(ids, model, dense):
            found = likeness(logits, dense_logits, targets)
            nll.append(found.losses)
            kl += float(found.kl.sum())
            same += int(found.same.sum())
        losses += torch.cat(nll).view(len(ids), -1).mean(1).tolist()
    tokens = windows[:, 1:].numel()
    return Quality(perplexity_of(losses), kl / tokens, same / tokens)


@dataclass(frozen=True)
class Likeness:
    """What a model makes of some tokens beside the dense model, each (tokens,)."""

    losses: Tensor
    """Negative log-likelihoods in nats."""
    kl: Tensor
    """KL(dense ‖ model) in nats."""
    same: Tensor
    """Whether both find the same next token most likely."""


def likeness(logits: Tensor, dense_logits: Tensor, targets: Tensor) -> Likeness:
    """Of float32 logits (tokens, vocabulary) of a model and the dense one, and the tokens (tokens,) that followed."""
    kl = F.kl_div(logits.log_softmax(-1), dense_logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    same = logits.argmax(-1) == dense_logits.argmax(-1)
    return Likeness(F.cross_entropy(logits, targets, reduction="none"), kl, same)


def logits_at_once(model: PreTrainedModel) -> int:
    """For how many tokens a model's logits are computed at a time: `LOGITS_BYTES` of them."""
    return max(1, LOGITS_BYTES // (4 * int(model.config.vocab_size)))


def token_losses(model: PreTrainedModel, normed: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, (tokens,), of the tokens `targets` (tokens,) that followed.

    `normed` are last hidden states (tokens, hidden) after the final norm. Logits are held for a part at a time.
    """
    tokens = logits_at_once(model)
    return torch.cat(
        [
            F.cross_entropy(head(model, h).float(), followed.to(h.device), reduction="none")
            for h, followed in zip(normed.split(tokens), targets.split(tokens), strict=True)
        ]
    )


def _parts(ids: Tensor, *models: PreTrainedModel) -> Iterator[tuple[Tensor, ...]]:
    """Parts of `ids` (batch, time): each model's float32 logits (tokens, vocabulary), and the tokens that followed."""
    stacks = [block_stack(model) for model in models]
    hidden = [
        stack.body(input_ids=ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1) for stack in stacks
    ]  # (batch · (time − 1), hidden)
    tokens = logits_at_once(models[0])
    for *parts, targets in zip(*(h.split(tokens) for h in hidden), ids[:, 1:].flatten().split(tokens), strict=True):
        yield *(stack.head(h).float() for stack, h in zip(stacks, parts, strict=True)), targets


def perplexity_of(losses: Sequence[float]) -> Perplexity:
    """From each window's mean negative log-likelihood in nats."""
    value = math.exp(statistics.fmean(losses))
    error = value * statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
    return Perplexity(value, error)


def parameters(model: PreTrainedModel) -> int:
    """Number of weights; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Spread:
    """The least and the greatest of repeated timings."""

    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """Medians for one sequence."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_ms: float
    """From the prompt to the token after it."""
    inter_token_latency_ms: float
    """From one decoded token to the next."""
    speed_repeats: int
    """Timings that these are medians of."""
    time_to_first_token_spread_ms: Spread
    inter_token_latency_spread_ms: Spread
    peak_memory_bytes: int | None
    """Weights, KV cache and everything between, as if the model were alone on the device; None on a CPU."""


@dataclass(frozen=True)
class Timing:
    """One prefill and decoding, in seconds."""

    prefill: float
    decode: float
    peak_memory_bytes: int | None


@torch.no_grad()
def speeds(models: Mapping[str, PreTrainedModel], prompt: Tensor, *, new_tokens: int, repeats: int) -> dict[str, Speed]:
    """Time prefill of `prompt` (1, time) and decoding of `new_tokens` one by one; medians after one warm-up.

    The models take turns within every repeat, so that a machine that slows down slows all of them alike.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            measured = _time_once(model, prompt, new_tokens)
            if repeat > 0:
                timings[name].append(measured)
    return {name: _speed(measured, prompt.shape[1], new_tokens) for name, measured in timings.items()}


def _speed(timings: Sequence[Timing], prompt_tokens: int, new_tokens: int) -> Speed:
    first_ms = [1000 * timing.prefill for timing in timings]
    next_ms = [1000 * timing.decode / new_tokens for timing in timings]
    to_first, to_next = statistics.median(first_ms), statistics.median(next_ms)
    peaks = [timing.peak_memory_bytes for timing in timings if timing.peak_memory_bytes is not None]
    return Speed(
        prefill_tokens_per_second=1000 * prompt_tokens / to_first,
        decode_tokens_per_second=1000 / to_next,
        time_to_first_token_ms=to_first,
        inter_token_latency_ms=to_next,
        speed_repeats=len(timings),
        time_to_first_token_spread_ms=Spread(min(first_ms), max(first_ms)),
        inter_token_latency_spread_ms=Spread(min(next_ms), max(next_ms)),
        peak_memory_bytes=max(peaks, default=None),
    )


def _time_once(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> Timing:
    device = prompt.device
    others = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        others = torch.cuda.memory_allocated(device) - weights
    cache = DynamicCache(config=model.config)
    start = _now(device)
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1].argmax(-1, keepdim=True)
    middle = _now(device)
    for _ in range(new_tokens):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    end = _now(device)
    peak = torch.cuda.max_memory_allocated(device) - others if device.type == "cuda" else None
    return Timing(middle - start, end - middle, peak)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
