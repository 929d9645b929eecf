"""Where and how much the parts measure: devices and their number formats, sizes, models, texts."""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

import workers
from workers.pruning.model.calibration import Split, cut_windows, stdlib_documents, token_stream
from workers.pruning.model.checkpoint import load_checkpoint

REFERENCE = Path(workers.__file__).parent / "reference_model"
BATCH_WINDOWS = 4
GIGABYTE = 1e9
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Where a model computes, in which numbers, and how far that may take a loss from the CPU's."""

    name: str
    device: torch.device
    dtype: torch.dtype
    tolerance: float
    """Nats a token."""
    tf32: bool = False
    """Whether float32 numbers are rounded to TensorFloat-32 before they are multiplied."""

    def load(self) -> PreTrainedModel:
        """The reference model."""
        return load_checkpoint(REFERENCE, dtype=self.dtype, device=self.device)

    @contextmanager
    def numbers(self) -> Iterator[None]:
        """While this lasts, float32 matrices are multiplied as the place says."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


ON_CPU = Place("CPU, float32", CPU, torch.float32, 1e-4)
TF32_TOLERANCE = 5e-3
"""TensorFloat-32 has 11 bits for a number's digits, where float32 has 24."""
BFLOAT16_TOLERANCE = 3e-2
"""bfloat16 has 8."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    calibration_windows: int
    window_tokens: int
    remove: tuple[int, int]
    """Blocks that the searches for prefill and for decode remove."""
    heal_steps: int
    shape: LlamaConfig
    """Of the model of random weights."""
    shape_remove: tuple[int, int]
    """Blocks that its prefill and its decode go without."""
    shape_windows: int
    """In a round of single removals."""
    prompt_tokens: int
    """Of those windows, and of the prompts whose answers are timed."""
    new_tokens: int
    long_prompts: tuple[int, ...]
    """Tokens of the prompts that prefill alone is timed on."""
    repeats: int


SIZES = {
    "full": Size(
        calibration_windows=16,
        window_tokens=256,
        remove=(3, 5),
        heal_steps=16,
        # Llama-3.1-8B.
        shape=LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=131072,
        ),
        shape_remove=(4, 8),
        shape_windows=4,
        prompt_tokens=512,
        new_tokens=32,
        long_prompts=(4096, 16384),
        repeats=10,
    ),
    "toy": Size(
        calibration_windows=2,
        window_tokens=24,
        remove=(1, 2),
        heal_steps=2,
        shape=LlamaConfig(
            hidden_size=32,
            intermediate_size=112,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=1,
            vocab_size=512,
        ),
        shape_remove=(1, 2),
        shape_windows=2,
        prompt_tokens=16,
        new_tokens=4,
        long_prompts=(16, 32),
        repeats=2,
    ),
}


@dataclass(frozen=True)
class Bench:
    """A device, and the models and texts that the parts measure on it."""

    device: torch.device
    size: Size

    @property
    def float32(self) -> Place:
        """The device in the numbers that the CPU is measured in."""
        return Place(f"{self._kind}, float32", self.device, torch.float32, ON_CPU.tolerance)

    @property
    def bfloat16(self) -> Place:
        """The device in half as many bits."""
        return Place(f"{self._kind}, bfloat16", self.device, torch.bfloat16, BFLOAT16_TOLERANCE)

    @property
    def of_jobs(self) -> Place:
        """How a worker computes there."""
        return self.bfloat16 if self.device.type == "cuda" else self.float32

    @property
    def places(self) -> list[Place]:
        """All ways to compute on the device."""
        tf32 = Place(f"{self._kind}, TF32", self.device, torch.float32, TF32_TOLERANCE, tf32=True)
        return [self.float32, *([tf32] if self.device.type == "cuda" else []), self.bfloat16]

    @property
    def _kind(self) -> str:
        return "GPU" if self.device.type == "cuda" else "CPU again"

    @cached_property
    def windows(self) -> dict[Split, Tensor]:
        """Text of the Python standard library, (windows, tokens) by use, on the CPU."""
        trained = BATCH_WINDOWS * self.size.heal_steps
        counts: dict[Split, int] = {"train": trained, "calibration": self.size.calibration_windows}
        return {split: self._cut(split, count) for split, count in counts.items()}

    def _cut(self, split: Split, count: int) -> Tensor:
        documents = list(stdlib_documents(split))
        random.Random(0).shuffle(documents)
        tokens = self.size.window_tokens
        stream = token_stream(documents, AutoTokenizer.from_pretrained(REFERENCE), at_least=count * tokens)
        return cut_windows(stream, count=count, tokens=tokens, seed=0)

    @property
    def prompt_tokens(self) -> int:
        """Of the reference model's windows, where a prefill model reads their beginning."""
        return self.size.window_tokens // 2

    @cached_property
    def shaped(self) -> PreTrainedModel:
        """The model of random weights, which are made on the device."""
        return random_llama(self.size.shape, self.device)

    def now(self) -> float:
        """Seconds on a clock, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def random_llama(config: LlamaConfig, device: torch.device) -> PreTrainedModel:
    """A bfloat16 model of random weights, made where they stay."""
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval().requires_grad_(False)
    return model


def machine(device: torch.device) -> Mapping[str, str | int]:
    """What a reader has to know to read the figures, the device's name first."""
    software: dict[str, str | int] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "CPU cores": len(os.sched_getaffinity(0)),
    }
    if device.type != "cuda":
        return {"device": f"{platform.machine()} CPU", **software}
    gigabytes = round(torch.cuda.get_device_properties(device).total_memory / GIGABYTE)
    return {
        "device": torch.cuda.get_device_name(device),
        "GB": gigabytes,
        "CUDA": str(torch.version.cuda),
        **software,
    }
