"""A model larger than the memory: its blocks come one at a time from the checkpoint's safetensors.

Everything outside the blocks stays resident. A block is read when it is first called and gives way when another one
is, so a walk that runs all its streams through one block before the next (`engine.walk`) reads every weight once.
Several models may take turns in one room; what two of them have alike is then read once, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from workers.pruning.model.blocks import block_stack
from workers.pruning.model.building import building
from workers.pruning.model.checkpoint import SourceTensors, check_complete, empty_model
from workers.pruning.model.configuration import config_of, pruned_json
from workers.pruning.model.parts import zeroed_tensors
from workers.pruning.model.plan import BlockPlan
from workers.pruning.model.width import Channels, check_channels, has_channels, intermediate_size, narrow_tensors

AS_STORED = SourceTensors({})
"""Replaces no tensor."""


@dataclass(frozen=True)
class Cut:
    """What a streamed model takes from a dense model's checkpoint, and what is put in its place."""

    plan: BlockPlan | None = None
    """The blocks, and parts of blocks, that it goes without; None where it has all."""
    channels: Channels | None = None
    """Of each dense block's MLP, those that stay; None for all."""
    overrides: SourceTensors = AS_STORED
    """Tensors that replace others, called as in the dense model and already as narrow."""


WHOLE = Cut()


@dataclass(frozen=True)
class Weights:
    """A streamed model's tensors by its own names for them, read when they are asked for."""

    prefix: str
    """What the names of all blocks' tensors begin with."""
    kept: Sequence[int] | None
    """For each layer the block of the checkpoint; None where they have the same numbers."""
    tensors: SourceTensors
    cut: Cut = WHOLE
    zeroed: Collection[str] = frozenset()
    """Called as in the dense model."""
    alike: Mapping[str, Hashable] = field(default_factory=dict)
    """Own name → the origin of another model's tensor that has the same values."""

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, as stored. Raises: BrokenCheckpoint."""
        source = self.in_source(name)
        if source in self.cut.overrides.files:
            return self.cut.overrides.read(source)
        tensor = narrow_tensors({source: self.tensors.read(source)}, self.cut.channels)[source]
        return torch.zeros_like(tensor) if source in self.zeroed else tensor

    def origin(self, name: str) -> Hashable:
        """What decides a tensor's values: equal for two tensors only if their values are."""
        if name in self.alike:
            return self.alike[name]
        source = self.in_source(name)
        if source in self.cut.overrides.files:
            return self.cut.overrides.files[source], source
        (stored,) = self.tensors.stored(source)
        narrowed = id(self.cut.channels) if has_channels(source) else None
        return self.tensors.files.get(stored), stored, source in self.zeroed, narrowed

    def in_source(self, name: str) -> str:
        """What the dense model calls a tensor."""
        if self.kept is None or not name.startswith(self.prefix):
            return name
        layer, _, rest = name.removeprefix(self.prefix).partition(".")
        return f"{self.prefix}{self.kept[int(layer)]}.{rest}"


class BlockRoom:
    """Memory for the weights of one block, in which streamed models take turns.

    `blocks_read` counts how often any of a block's weights came from disk; whoever `hears` is told of every block that
    took its place here.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.blocks_read = 0
        self.hears: Callable[[], None] = lambda: None
        # Reused: where every block is allocated anew, the heap grows to several blocks.
        self._buffers: dict[tuple[str, torch.Size], Tensor] = {}
        self._origins: dict[tuple[str, torch.Size], Hashable] = {}
        self._holder: tuple[BlockReader, int] | None = None

    def take(self, reader: BlockReader, index: int) -> None:
        """Put the weights of a reader's block here, in place of those that were."""
        if self._holder == (reader, index):
            return
        self.empty()
        self.blocks_read += reader.fill(index, self._filled)
        self._holder = (reader, index)
        self.hears()

    def empty(self) -> None:
        """Take the block that is here away."""
        if self._holder is not None:
            holder, held = self._holder
            self._holder = None
            holder.release(held)

    def _filled(
        self, name: str, shape: torch.Size, origin: Hashable, read: Callable[[], Tensor]
    ) -> tuple[Tensor, bool]:
        """The buffer of a block's tensor, holding what `read` gives, and whether that had to be read."""
        key = (name, shape)
        if key in self._buffers and self._origins.get(key) == origin:
            return self._buffers[key], False
        if key not in self._buffers:
            self._buffers[key] = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._origins.pop(key, None)
        self._buffers[key].copy_(read())
        self._origins[key] = origin
        return self._buffers[key], True


Filled = Callable[[str, torch.Size, Hashable, Callable[[], Tensor]], tuple[Tensor, bool]]


@dataclass(frozen=True)
class Place:
    """Where a tensor of a block is, whatever is wrapped around its module."""

    module: nn.Module
    attribute: str
    name: str
    """Within the block."""


class BlockReader:
    """Has the room hold the block that is being called. `blocks_read` counts how often it came from disk."""

    def __init__(self, model: PreTrainedModel, weights: Weights, room: BlockRoom, check: Callable[[], None]) -> None:
        self.blocks_read = 0
        self.weights = weights
        self._room = room
        self._check = check
        blocks = block_stack(model).blocks
        self._places = [_places(block) for block in blocks]
        for index, block in enumerate(blocks):
            # Not a hook: what computes a block again for its gradients calls `forward` itself.
            block.forward = self._reading(index, block.forward)

    def alike(self, kept: Sequence[int], changed: Collection[str]) -> dict[str, Hashable]:
        """For a checkpoint of the blocks `kept`: its name of each block's tensor that no training changed → its origin.

        `changed` has the names of those that are not as here, called as here.
        """
        prefix = self.weights.prefix
        return {
            f"{prefix}{layer}.{place.name}": self.weights.origin(f"{prefix}{block}.{place.name}")
            for layer, block in enumerate(kept)
            for place in self._places[block]
            if f"{prefix}{block}.{place.name}" not in changed
        }

    def hold(self, index: int) -> None:
        """Have the room hold a block until another one is called."""
        self._room.take(self, index)

    def fill(self, index: int, filled: Filled) -> bool:
        """Give a block its weights in the buffers of the room; says whether any was read."""
        read = False
        for place in self._places[index]:
            self._check()
            name = f"{self.weights.prefix}{index}.{place.name}"
            shape = getattr(place.module, place.attribute).shape
            buffer, was_read = filled(place.name, shape, self.weights.origin(name), partial(self.weights.read, name))
            set_module_tensor_to_device(place.module, place.attribute, buffer.device, buffer, clear_cache=False)
            read = read or was_read
        self.blocks_read += read
        return read

    def release(self, index: int) -> None:
        """Take a block's weights away."""
        for place in self._places[index]:
            set_module_tensor_to_device(place.module, place.attribute, "meta")

    def _reading(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def read_and_run(*args: Any, **kwargs: Any) -> Any:
            self.hold(index)
            return forward(*args, **kwargs)

        return read_and_run


def _places(block: nn.Module) -> list[Place]:
    places = []
    for name, _ in block.named_parameters():
        owner, _, attribute = name.rpartition(".")
        places.append(Place(block.get_submodule(owner), attribute, name))
    return places


def parameter_bytes(folder: Path, dtype: torch.dtype, check: Callable[[], None] = lambda: None) -> int:
    """What the weights of a checkpoint folder take in memory as `dtype`. Calls `check` as `empty_model` does."""
    elements: int = sum(parameter.numel() for parameter in empty_model(folder, check).parameters())
    return elements * dtype.itemsize


def load_frame(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
    cut: Cut = WHOLE,
    alike: Mapping[str, Hashable] | None = None,
    beside: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, Weights]:
    """A causal language model in evaluation mode whose blocks lie on `meta`, and the tensors that belong into them.

    It is the checkpoint's model, or what `cut` leaves of it. What is outside of its blocks it shares with the model
    `beside` it, where that is equal. Before every part and every tensor that it reads `check` is called, which may
    raise. Raises: BrokenCheckpoint, ImpossibleModel, UnsupportedArchitecture.
    """
    tensors = check_complete(folder, check)
    kept = None if cut.plan is None else cut.plan.kept
    zeroed: set[str] = set()
    if cut.plan is not None and cut.plan.parts:
        zeroed = zeroed_tensors(block_stack(empty_model(folder, check)), cut.plan.parts)
    given = json.loads((folder / "config.json").read_text())
    config = config_of(given if kept is None else pruned_json(given, kept))
    if cut.channels is not None:
        blocks = range(config.num_hidden_layers) if kept is None else kept
        config.intermediate_size = check_channels(cut.channels, blocks, intermediate_size(config))
    with building(check, tensors=len(tensors.files)), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    prefix = block_stack(model).prefix
    weights = Weights(prefix, kept, tensors, cut, zeroed, alike or {})
    theirs = {} if beside is None else dict(beside.named_parameters())
    for name, _ in list(model.named_parameters()):  # of tied weights, the embedding alone
        if not name.startswith(prefix):
            check()
            value = _shared(weights.read(name), theirs.get(name), dtype)
            set_module_tensor_to_device(model, name, device, value, dtype=dtype)
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):
        set_module_tensor_to_device(model, name, device, buffer)
    model.eval().requires_grad_(False)
    return model, weights


def load_streamed(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
    cut: Cut = WHOLE,
    room: BlockRoom | None = None,
    alike: Mapping[str, Hashable] | None = None,
    beside: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, BlockReader]:
    """A causal language model in evaluation mode that holds one block at a time, as `load_frame` has it otherwise.

    It may share a `room` with others, `alike` saying which of its tensors are those of another (`BlockReader.alike`).
    Before every tensor that it reads, now or later, `check` is called, which may raise. Raises: as `load_frame`.
    """
    model, weights = load_frame(folder, dtype=dtype, device=device, check=check, cut=cut, alike=alike, beside=beside)
    return model, BlockReader(model, weights, room or BlockRoom(dtype, device), check)


def _shared(own: Tensor, other: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The other's tensor if it has the same values."""
    if other is None or other.shape != own.shape or other.dtype != dtype:
        return own
    return other if torch.equal(own.to(other.device, dtype), other) else own
