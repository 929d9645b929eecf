"""The two parts of a block, attention and MLP: where they are, how a block runs without one, what is zero then on disk.

A part that is given up adds nothing to the hidden state. On disk its last projection is zeros, so that any program
computes the pruned model from a checkpoint of the block's own form. Here its module does not run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.pruning.model.blocks import (
    BlockStack,
    UnsupportedArchitecture,
    block_stack,
    capture_calls,
    drop_blocks,
    run_block,
)
from workers.pruning.model.plan import BlockPlan, Part

Half = Literal["attention", "mlp"]
"""One of the two parts of a block."""
MODULES: Mapping[Half, tuple[str, ...]] = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe", "ffn"),
}
"""What blocks call the module of each part."""
LAST: Mapping[Half, tuple[str, ...]] = {
    "attention": ("o_proj", "out_proj", "c_proj", "dense", "wo"),
    "mlp": ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "w2"),
}
"""What parts call the projection whose output is added to the hidden state."""
GIVEN_UP: Mapping[Part, tuple[Half, ...]] = {
    "attention": ("attention",),
    "mlp": ("mlp",),
    "kv_only": ("attention", "mlp"),
}
"""The parts that add nothing where this is given up."""


@dataclass(frozen=True)
class BlockPart:
    """Where a part of a block is."""

    module: nn.Module
    """What need not run."""
    last: tuple[str, ...]
    """Names within the block of the parameters of its last projections, which are zero when it is given up."""


def find_part(block: nn.Module, half: Half) -> BlockPart | None:
    """A part of a block, by the names that architectures have; None where there is none, or more than one."""
    children = dict(block.named_children())
    # OPT's blocks have the linear layers of their MLP beside the attention.
    named = [name for name in MODULES[half] if name in children] or [name for name in LAST[half] if name in children]
    if len(named) != 1:
        return None
    last = tuple(name for name, _ in block.named_parameters() if _is_last(name, named[0], half))
    return BlockPart(children[named[0]], last) if last else None


def block_part(block: nn.Module, half: Half) -> BlockPart:
    """The same, which has to be there. Raises: UnsupportedArchitecture."""
    if (found := find_part(block, half)) is None:
        raise UnsupportedArchitecture(
            f"the {half} of the blocks of the class {type(block).__name__} is not known by its name and that of its "
            "last projection, and cannot be given up by itself; remove whole blocks"
        )
    return found


def _is_last(name: str, module: str, half: Half) -> bool:
    first, *inner = name.split(".")
    return first == module and (module in LAST[half] or any(part in LAST[half] for part in inner))


_OUTPUTS: dict[type[nn.Module], int | None] = {}
"""Class of a part's module → how many things it gives in a tuple, None where it gives a tensor; seen when one runs."""


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Until the end of the block `module` does not run, and gives zeros in the form of what it gives when it runs."""
    own = module.__dict__.get("forward")
    runs: Callable[..., Any] = module.forward

    def silent(*args: Any, **kwargs: Any) -> Any:
        if type(module) not in _OUTPUTS:
            given = runs(*args, **kwargs)
            _OUTPUTS[type(module)] = len(given) if isinstance(given, tuple) else None
        h: Tensor = args[0] if args else kwargs["hidden_states"]
        zeros = h.new_zeros(*h.shape[:-1], module.out_features if isinstance(module, nn.Linear) else h.shape[-1])
        count = _OUTPUTS[type(module)]
        return zeros if count is None else (zeros, *(None for _ in range(count - 1)))

    module.forward = silent
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def run_without(block: nn.Module, part: Part, h: Tensor, kwargs: Mapping[str, Any], cache: Any = None) -> Tensor:
    """A block that gives up `part`, on h_i (batch, time, hidden) → h_{i+1}, same shape.

    Without its attention it neither writes nor reads the cache; `kv_only` writes it, and passes the hidden state on.
    Raises: UnsupportedArchitecture.
    """
    if part == "kv_only":
        # What the block gives is not used, so its MLP need not run, if it is known.
        mlp = find_part(block, "mlp")
        with nullcontext() if mlp is None else silenced(mlp.module):
            run_block(block, h, kwargs, cache)
        return h
    with silenced(block_part(block, part).module):
        return run_block(block, h, kwargs, cache)


def zeroed_tensors(stack: BlockStack, parts: Mapping[int, Part]) -> set[str]:
    """Names of the parameters, called as in the dense model, that are zero where `parts` are given up.

    Raises: UnsupportedArchitecture.
    """
    return {
        f"{stack.prefix}{block}.{name}"
        for block, part in parts.items()
        for half in GIVEN_UP[part]
        for name in block_part(stack.blocks[block], half).last
    }


def idle_tensors(stack: BlockStack, parts: Mapping[int, Part]) -> set[str]:
    """Names of the parameters that compute nothing where `parts` are given up, those that are zero among them.

    Of a block that is kept for its keys and values, the whole attention counts as at work but for its last projection.
    Raises: UnsupportedArchitecture.
    """
    idle = zeroed_tensors(stack, parts)
    for block, part in parts.items():
        module = block_part(stack.blocks[block], "attention" if part == "attention" else "mlp").module
        own = {id(parameter) for parameter in module.parameters()}
        for name, parameter in stack.blocks[block].named_parameters():
            if id(parameter) in own:
                idle.add(f"{stack.prefix}{block}.{name}")
    return idle


def give_up_parts(model: PreTrainedModel, parts: Mapping[int, Part]) -> PreTrainedModel:
    """The model with the last projections of `parts` zero, sharing all others; the original stays as it is.

    Raises: UnsupportedArchitecture.
    """
    if not parts:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    silent: PreTrainedModel = copy.deepcopy(model, shared)
    for name in zeroed_tensors(block_stack(silent), parts):
        owner, _, last = name.rpartition(".")
        module = silent.get_submodule(owner)
        zeros = nn.Parameter(torch.zeros_like(getattr(module, last)), requires_grad=False)
        setattr(module, last, zeros)
    return silent


def pruned(model: PreTrainedModel, plan: BlockPlan) -> PreTrainedModel:
    """The model without what `plan` gives up, sharing all parameters that stay; the original stays as it is.

    Raises: UnsupportedArchitecture.
    """
    return drop_blocks(give_up_parts(model, plan.parts), plan.removed)


@torch.no_grad()
def prove_parts(stack: BlockStack, kinds: Iterable[Part]) -> None:
    """Show on random tokens that a block without its attention and its MLP passes the hidden state on, bit for bit.

    Raises: UnsupportedArchitecture saying what cannot be given up.
    """
    halves = sorted({half for kind in kinds for half in GIVEN_UP[kind]})
    if not halves:
        return
    ids = torch.zeros((1, 3), dtype=torch.long, device=stack.device)
    calls, h = capture_calls(stack, ids), stack.embed(ids)
    for number, block in enumerate(stack.blocks):
        parts = [block_part(block, half) for half in ("attention", "mlp")]
        with ExitStack() as stopped:
            for part in parts:
                stopped.enter_context(silenced(part.module))
            after = run_block(block, h, calls.kwargs[number])
        if not torch.equal(after.to(h.device), h):
            raise UnsupportedArchitecture(
                f"block {number} of the class {type(block).__name__} changes the hidden state without its attention "
                "and its MLP, so these cannot be given up by themselves; remove whole blocks"
            )
