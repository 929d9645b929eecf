"""Healing on several devices: models sharded by PyTorch's FSDP2, and a loss that is that of one device.

Every rank, a process with a device of its own, holds a share of each block's weights, gradients and moments; a block is
gathered when it runs, forwards or backwards. What lies outside the blocks is not trained, and every rank has it whole.
Tests run this in processes on a CPU; it has not been run on several GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils import set_module_tensor_to_device
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from workers.pruning.model.blocks import CACHE_NAMES, block_stack
from workers.pruning.model.cache import held_tensors
from workers.pruning.repair.distill import Loss
from workers.pruning.repair.lora import ADAPTER

ADAPTED = ".base_layer"
"""What peft puts into the name of a weight that has an adapter."""


@dataclass(frozen=True)
class Ranks:
    """The processes that heal together, seen from one of them."""

    mesh: DeviceMesh
    saving: dist.ProcessGroup
    """For threads that save, whose messages must not meet those of training."""

    @property
    def rank(self) -> int:
        return self.mesh.get_rank()

    @property
    def size(self) -> int:
        return self.mesh.size()

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that writes what is there once."""
        return self.rank == 0

    def first_says(self, number: int) -> int:
        """What rank 0 called this with."""
        said = torch.tensor([int(number)])
        dist.broadcast(said, 0)
        return int(said)

    def least(self, number: int) -> int:
        """The least of what the ranks called this with."""
        found = torch.tensor([int(number)])
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun, or who sets the same environment, started; collectives by NCCL on GPUs, else by gloo."""
    accelerated = torch.cuda.is_available()
    if accelerated:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if accelerated else "gloo")
    mesh = init_device_mesh("cuda" if accelerated else "cpu", (dist.get_world_size(),))
    saving = dist.new_group(backend="gloo")
    assert saving is not None
    yield Ranks(mesh, saving)
    # Not after a fault, when the others may never come to this.
    dist.destroy_process_group()


def shard(
    model: PreTrainedModel,
    ranks: Ranks,
    content: Callable[[int, str], Tensor],
    *,
    dtype: torch.dtype,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Put `content(layer, name)` into every parameter of the blocks, as `dtype`, and keep this rank's share of each.

    At no time is more than one block whole. Adapters, which have numbers already, keep them. `check`, which may raise,
    is called before each block.
    """
    stack = block_stack(model)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        # Matrices are multiplied in bfloat16, as with one device; what autocast leaves in float32 stays so.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    outside = {parameter for name, parameter in model.named_parameters() if not name.startswith(stack.prefix)}
    for layer, block in enumerate(stack.blocks):
        check()
        for name, parameter in list(block.named_parameters()):
            if _is_adapter(name):
                set_module_tensor_to_device(block, name, device, parameter.detach())
            else:
                value = content(layer, name.replace(ADAPTED, ""))
                set_module_tensor_to_device(block, name, device, value, dtype=dtype)
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
        block.register_forward_hook(_gathered_by_keys_and_values(layer), with_kwargs=True)
    fully_shard(stack.body, mesh=ranks.mesh, mp_policy=policy, ignored_params=cast(Any, outside))


def _gathered_by_keys_and_values(layer: int) -> Callable[..., None]:
    """A hook after a block: its weights are gathered too when the first gradient comes back through what it left in a
    cache. FSDP waits for one of the block's output, which has none where a decode model reads the cache alone.
    """

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if cache is None or not torch.is_grad_enabled():
            return

        def gather(gradient: Tensor) -> None:
            cast(FSDPModule, block).unshard()

        for tensor in held_tensors(cache.layers[layer]):
            if tensor.requires_grad:
                tensor.register_hook(gather)

    return hook


def hollow(model: PreTrainedModel) -> None:
    """Put zeros that take no memory in place of what is on `meta`: enough to see which layers there are, and what
    depends on what.
    """
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, last = name.rpartition(".")
            zeros = torch.zeros((), dtype=parameter.dtype, device=block_stack(model).device).expand(parameter.shape)
            setattr(model.get_submodule(owner), last, nn.Parameter(zeros, requires_grad=parameter.requires_grad))


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def block_parameters(model: PreTrainedModel) -> dict[tuple[int, str], nn.Parameter]:
    """The parameters of every block, adapters left out, by layer and name within it."""
    return {
        (layer, name.replace(ADAPTED, "")): parameter
        for layer, block in enumerate(block_stack(model).blocks)
        for name, parameter in block.named_parameters()
        if not _is_adapter(name)
    }


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Add every adapter's product to the weight that it adapts, and leave an adapter that adds nothing."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight, up = (cast(Any, part.weight) for part in (module.get_base_layer(), module.lora_B[ADAPTER]))
            down = cast(Any, module.lora_A[ADAPTER].weight).full_tensor()
            # Weight (out, in) and B (out, rank) are cut into the same rows.
            product = up.to_local().float() @ down.float()
            weight.to_local().add_((product * module.scaling[ADAPTER]).to(weight.dtype))
            up.to_local().zero_()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered on the host; every rank has to ask for it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


class _Summed(torch.autograd.Function):
    """The sum over ranks, the same bits on each. FSDP takes the mean of what goes back, which is to be the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, size: int) -> Tensor:
        ctx.size = size
        parts = [torch.empty_like(part) for _ in range(size)]
        dist.all_gather(parts, part)
        return torch.stack(parts).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.size, None


def shared_loss(loss_of: Loss, ranks: Ranks) -> Loss:
    """The mean loss over windows (batch, time), of which every rank computes a share; on every rank the same.

    A rank for which none is left computes one that counts nothing, since all have to gather weights as often.
    """

    def loss(ids: Tensor) -> Tensor:
        mine = ids.tensor_split(ranks.size)[ranks.rank]
        own = loss_of(mine if len(mine) else ids[:1]) * (len(mine) / len(ids))
        summed: Tensor = cast(Any, _Summed).apply(own, ranks.size)
        return summed

    return loss
