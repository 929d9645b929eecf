"""A model larger than the memory: its blocks come one at a time from the checkpoint's safetensors.

Everything outside the blocks stays resident. A block is read when it is first called and gives way when another one
is, so a walk that runs all its streams through one block before the next (`engine.walk`) reads every weight once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from workers.pruning.model.blocks import block_stack
from workers.pruning.model.building import building
from workers.pruning.model.checkpoint import SourceTensors, check_complete, empty_model
from workers.pruning.model.configuration import read_config


class BlockReader:
    """Keeps the one block that is being called in memory. `blocks_read` counts how often a block came from disk."""

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: SourceTensors,
        dtype: torch.dtype,
        device: torch.device,
        check: Callable[[], None],
    ) -> None:
        self.blocks_read = 0
        self._check = check
        self._tensors = tensors
        self._dtype = dtype
        self._device = device
        stack = block_stack(model)
        self._blocks, self._prefix = stack.blocks, stack.prefix
        self._held: int | None = None
        # Reused: where every block is allocated anew, the heap grows to several blocks.
        self._buffers: dict[tuple[str, torch.Size], torch.Tensor] = {}
        for index, block in enumerate(self._blocks):
            block.register_forward_pre_hook(self._on_call(index))

    def _on_call(self, index: int) -> Any:
        def read(block: nn.Module, args: tuple[Any, ...]) -> None:
            if self._held != index:
                self._release()
                self._read(index)

        return read

    def _read(self, index: int) -> None:
        for name, _ in self._blocks[index].named_parameters():
            self._check()
            value = self._tensors.read(f"{self._prefix}{index}.{name}")
            key = (name, value.shape)
            if key not in self._buffers:
                self._buffers[key] = torch.empty(value.shape, dtype=self._dtype, device=self._device)
            set_module_tensor_to_device(
                self._blocks[index], name, self._device, self._buffers[key].copy_(value), clear_cache=False
            )
        self._held = index
        self.blocks_read += 1

    def _release(self) -> None:
        if self._held is not None:
            for name, _ in self._blocks[self._held].named_parameters():
                set_module_tensor_to_device(self._blocks[self._held], name, "meta")
            self._held = None


def parameter_bytes(folder: Path, dtype: torch.dtype, check: Callable[[], None] = lambda: None) -> int:
    """What the weights of a checkpoint folder take in memory as `dtype`. Calls `check` as `empty_model` does."""
    elements: int = sum(parameter.numel() for parameter in empty_model(folder, check).parameters())
    return elements * dtype.itemsize


def load_streamed(
    folder: Path, *, dtype: torch.dtype, device: torch.device, check: Callable[[], None] = lambda: None
) -> tuple[PreTrainedModel, BlockReader]:
    """A causal language model in evaluation mode that holds one block at a time; for walks, not for training.

    Before every part, and every tensor that it reads, now or later, `check` is called, which may raise.
    Raises: BrokenCheckpoint, UnsupportedArchitecture.
    """
    tensors = check_complete(folder, check)
    with building(check, tensors=len(tensors.files)), init_empty_weights(include_buffers=False):
        config = read_config(folder)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    prefix = block_stack(model).prefix
    for name, _ in list(model.named_parameters()):  # of tied weights, the embedding alone
        if not name.startswith(prefix):
            check()
            set_module_tensor_to_device(model, name, device, tensors.read(name), dtype=dtype)
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):
        set_module_tensor_to_device(model, name, device, buffer)
    model.eval().requires_grad_(False)
    return model, BlockReader(model, tensors, dtype, device, check)
