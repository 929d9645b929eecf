"""What a model costs to run, and what each unit saves of it: operations of a prompt, bytes of weights or of cache.

Operations are those of PyTorch's own counter: two for a multiplication and addition, matrices and attention alone, the
causal mask not taken off. The head is left out: prefill needs one row of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from workers.pruning.model.blocks import BlockStack, capture_calls, run_block
from workers.pruning.model.cache import held_tensors
from workers.pruning.model.parts import block_part, run_without
from workers.pruning.model.units import Kind, Unit

Cost = Literal["flops", "kv_bytes", "weight_bytes"]


@dataclass(frozen=True)
class Costs:
    """One cost of the dense model, and what each unit saves of it, both in the cost's own unit."""

    cost: Cost
    blocks: int
    """How many the model has."""
    dense: int
    saves: Mapping[Unit, int]

    def share(self, units: Iterable[Unit]) -> float:
        """What is left of the dense model's cost without the units, 1 being all of it."""
        return 1 - sum(self.saves[unit] for unit in units) / self.dense


@torch.no_grad()
def costs_of(stack: BlockStack, cost: Cost, prompt: Tensor) -> Costs:
    """What a request with a prompt (1, tokens) costs, and every unit of it.

    Raises: UnsupportedArchitecture when a block's attention or MLP is not known.
    """
    count = {"flops": _flops, "kv_bytes": _kv_bytes, "weight_bytes": _weight_bytes}[cost]
    saves: dict[Unit, int] = {}
    calls, h = capture_calls(stack, prompt), stack.embed(prompt)
    for number in range(len(stack.blocks)):
        h, of_block = count(stack, number, h, calls.kwargs[number])
        saves |= {Unit(number, kind): saved for kind, saved in of_block.items()}
    dense = sum(saves[Unit(number)] for number in range(len(stack.blocks)))
    if cost == "weight_bytes":
        dense = sum(tensor.numel() * tensor.element_size() for tensor in stack.model.parameters())
    return Costs(cost, len(stack.blocks), dense, saves)


SavedByKind = dict[Kind, int]


def _flops(stack: BlockStack, number: int, h: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, SavedByKind]:
    block = stack.blocks[number]
    with counting() as whole:
        after, kept = _run(stack, number, h, kwargs)
    saved: SavedByKind = {"block": whole.get_total_flops()}
    for half in ("attention", "mlp"):
        with counting() as without:
            run_without(block, half, h, kwargs)
        saved[half] = saved["block"] - without.get_total_flops()
    # A product with the hidden state for every number that is kept.
    saved["kv_only"] = saved["block"] - 2 * h.shape[-1] * sum(tensor.numel() for tensor in kept)
    return after, saved


def _kv_bytes(stack: BlockStack, number: int, h: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, SavedByKind]:
    after, kept = _run(stack, number, h, kwargs)
    held = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    return after, {"block": held, "attention": held, "mlp": 0}


def _weight_bytes(stack: BlockStack, number: int, h: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, SavedByKind]:
    block = stack.blocks[number]
    modules: dict[Kind, nn.Module] = {"block": block}
    modules |= {half: block_part(block, half).module for half in ("attention", "mlp")}
    return h, {
        kind: sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())
        for kind, module in modules.items()
    }


def _run(stack: BlockStack, number: int, h: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """h_{i+1} (1, tokens, hidden), and what the cache holds of the block then: keys and values."""
    cache = DynamicCache(config=stack.model.config)
    after = run_block(stack.blocks[number], h, kwargs, cache)
    return after, held_tensors(cache.layers[number])


def counting() -> FlopCounterMode:
    """A context that counts the operations of what runs in it."""
    # The counter knows the attention of GPUs alone, and that only with as many heads of keys as of queries.
    attention = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention,
        torch.ops.aten._scaled_dot_product_efficient_attention,
        torch.ops.aten._scaled_dot_product_cudnn_attention,
    )
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(attention, _attention_flops))


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    """By shapes (batch, heads, tokens, head dimension): a product with every key, and one with every value."""
    batch, heads, tokens, dim = query
    return 2 * batch * heads * tokens * key[-2] * (dim + value[-1])
