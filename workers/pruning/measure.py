"""What a model is worth and what it costs: perplexity, size, speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood a token), with its standard error over windows (delta method)."""

    value: float
    standard_error: float


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor, *, batch: int) -> Perplexity:
    """Perplexity of the tokens of windows (windows, time) after each window's first."""
    losses: list[float] = []
    for ids in windows.split(batch):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # (batch, time − 1, vocabulary)
        nll = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        losses += nll.view(len(ids), -1).mean(1).tolist()
    value = math.exp(statistics.fmean(losses))
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    return Perplexity(value, value * error)


def parameters(model: PreTrainedModel) -> int:
    """Number of weights; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Speed:
    """Median throughput of one sequence."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@torch.no_grad()
def speeds(models: Mapping[str, PreTrainedModel], prompt: Tensor, *, new_tokens: int, repeats: int) -> dict[str, Speed]:
    """Time prefill of `prompt` (1, time) and decoding of `new_tokens` one by one; medians after one warm-up.

    The models take turns within every repeat, so that a machine that slows down slows all of them alike.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            measured = _time_once(model, prompt, new_tokens)
            if repeat > 0:
                times[name].append(measured)
    return {
        name: Speed(
            prompt.shape[1] / statistics.median(prefill for prefill, _ in pairs),
            new_tokens / statistics.median(decode for _, decode in pairs),
        )
        for name, pairs in times.items()
    }


def _time_once(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of decoding."""
    cache = DynamicCache(config=model.config)
    start = _now(prompt.device)
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1].argmax(-1, keepdim=True)
    middle = _now(prompt.device)
    for _ in range(new_tokens):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    return middle - start, _now(prompt.device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
