"""Where a model's transformer blocks are, how to run one of them, and how to take some away.

Nothing here is written for one architecture: the blocks are found by structure, and each is called with the arguments
(mask, positions, rotary embeddings) that the model itself passes to it, so that walking the blocks one by one gives
the model's own logits bit for bit. `prove` shows it for a model whose architecture was never tried.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from workers.pruning.model.building import FAULTS, ImpossibleModel, said
from workers.pruning.model.configuration import pruned_values

CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")
"""What blocks call the KV cache among their arguments."""
LAYER_NUMBERS = ("layer_idx", "layer_id", "layer_number")
"""What modules of a block call the number of its layer."""
PROOF_TOKENS = 12
PROOF_TOLERANCE = 1e-4


class UnsupportedArchitecture(ValueError):
    """The model's blocks cannot be found, or running them one by one does not give what the model gives."""


@dataclass(frozen=True)
class BlockStack:
    """A causal language model seen as embedding, blocks, final norm and head."""

    model: PreTrainedModel
    path: str
    """Where the list of blocks is, as in `model.layers`."""
    blocks: nn.ModuleList
    final: tuple[nn.Module, ...]
    """What the model runs between the last block and the head."""

    @property
    def prefix(self) -> str:
        """What the names of all blocks' tensors begin with, as in `model.layers.`."""
        return f"{self.path}."

    @property
    def body(self) -> nn.Module:
        """The model without its head."""
        base: nn.Module = self.model.base_model
        # Llama 4 alone calls itself its own base.
        return self.model.get_submodule(self.path.rpartition(".")[0]) if base is self.model else base

    @property
    def device(self) -> torch.device:
        embedding: Any = self.model.get_input_embeddings()
        device: torch.device = embedding.weight.device
        return device

    def embed(self, ids: Tensor, *, start: int = 0) -> Tensor:
        """Token ids (batch, time) → h_0 (batch, time, hidden), the first of them at the position `start`."""
        return self.enter(ids, start=start)[0]

    def enter(self, ids: Tensor, *, start: int = 0) -> tuple[Tensor, BlockCalls]:
        """h_0 of token ids (batch, time) from the position `start` on, and what each block is called with."""
        return _entered(self, ids, start=start)

    def norm(self, h: Tensor) -> Tensor:
        """h_L (…, hidden) → what the head reads, same shape but where the model projects it."""
        for module in self.final:
            h = module(h)
        return h

    def head(self, normed: Tensor) -> Tensor:
        """(…, hidden) after the final norm → logits (…, vocabulary), scaled and capped as the configuration says."""
        return head(self.model, normed)


def head(model: PreTrainedModel, normed: Tensor) -> Tensor:
    """Last hidden states after the final norm (…, hidden) → logits (…, vocabulary) of a causal language model."""
    output: Any = model.get_output_embeddings()
    logits: Tensor = output(normed)
    for key in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon H1
        if factor := getattr(model.config, key, None):
            logits = logits * factor
    for key in ("logits_scaling", "logits_mup_width_multiplier"):  # Granite, Inkling
        if divisor := getattr(model.config, key, None):
            logits = logits / divisor
    for key in ("final_logit_softcapping", "logits_soft_cap"):  # Gemma 2 and 3, Recurrent Gemma
        if cap := getattr(model.config, key, None):
            logits = torch.tanh(logits / cap) * cap
    return logits


def block_stack(model: PreTrainedModel) -> BlockStack:
    """The parts of a decoder-only model, found by structure: the one list of equal blocks, as long as its config says.

    Raises: UnsupportedArchitecture saying what is missing.
    """
    config = model.config
    kind = f"model_type {config.model_type!r} is not supported"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitecture(f"{kind}: it has an encoder")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedArchitecture(f"{kind} with scale_attn_by_inverse_layer_idx: a block depends on its number")
    count = getattr(config, "num_hidden_layers", None)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and _are_blocks(module)
    }
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        places = ", ".join(outermost) or "none"
        raise UnsupportedArchitecture(f"{kind}: it should have one list of {count} equal blocks, and has {places}")
    if model.get_output_embeddings() is None:
        raise UnsupportedArchitecture(f"{kind}: it has no language modelling head")
    (path,) = outermost
    body = model.get_submodule(path.rpartition(".")[0])
    children = list(body.named_children())
    norms = {name: module for name, module in children if "Norm" in type(module).__name__}
    names = [name for name, _ in children]
    # Bloom has a norm of its embeddings beside the final one; OPT alone has the final one before its blocks.
    after = {name for name in norms if names.index(name) > names.index(path.rpartition(".")[2])}
    final = [module for name, module in norms.items() if name in after or not after]
    # OPT may project after its norm, or instead of one.
    final += [module for name, module in children if name == "project_out" and module is not None]
    return BlockStack(model, path, found[path], tuple(final))


def _are_blocks(modules: nn.ModuleList) -> bool:
    """Whether they are of one class, or all take a cache, as the blocks of hybrids do."""
    kinds = {type(module) for module in modules}
    return len(kinds) == 1 or all(_cache_argument(kind) for kind in kinds)


@torch.no_grad()
def try_out(stack: BlockStack, ids: Tensor) -> None:
    """Run the whole model once on `ids` (batch, time): what a configuration spoils shows now, not after hours.

    Raises: ImpossibleModel.
    """
    try:
        logits = stack.model(input_ids=ids.to(stack.device), use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except (*FAULTS, RuntimeError) as error:
        raise ImpossibleModel(f"config.json describes a model that cannot be run: {said(error)}") from error
    if not bool(logits.isfinite().all()):
        raise ImpossibleModel("as config.json describes it, the model's logits are not finite")


@torch.no_grad()
def prove(stack: BlockStack) -> None:
    """Compare a walk over the blocks with the model's own forward, on random tokens, as logits in its dtype.

    Raises: UnsupportedArchitecture with the difference when it is above 1e-4 of the largest logit (1e-2 in 16 bits).
    """
    vocabulary = stack.model.config.vocab_size
    ids = torch.randint(vocabulary, (2, PROOF_TOKENS), generator=torch.Generator().manual_seed(0)).to(stack.device)
    kind = stack.model.config.model_type
    try:
        calls = capture_calls(stack, ids)
        h = stack.embed(ids)
        for block in range(len(stack.blocks)):
            h = calls.run(stack, block, h)
        walked = stack.head(stack.norm(h)).float().cpu()
    except (UnsupportedArchitecture, torch.OutOfMemoryError):
        raise
    except (*FAULTS, RuntimeError) as error:
        raise UnsupportedArchitecture(
            f"model_type {kind!r} is not supported: its blocks cannot be run one by one, with what the model gives each"
        ) from error
    whole = stack.model(input_ids=ids, use_cache=False).logits.float().cpu()
    difference = float((walked - whole).abs().max() / whole.abs().max().clamp(min=1e-30))
    tolerance = PROOF_TOLERANCE if h.dtype == torch.float32 else 100 * PROOF_TOLERANCE
    if not difference <= tolerance:
        raise UnsupportedArchitecture(
            f"model_type {kind!r} is not supported: run block by block, its logits differ by {difference:.1e} of the "
            "largest"
        )


@dataclass(frozen=True)
class BlockCalls:
    """Each block's keyword arguments besides hidden state and cache, from a forward of batch 1; they broadcast."""

    kwargs: Sequence[Mapping[str, Any]]

    def run(self, stack: BlockStack, block: int, h: Tensor, cache: Any = None) -> Tensor:
        """h_i (batch, time, hidden) → h_{i+1}, same shape; `cache` takes and gives the block's keys and values."""
        return run_block(stack.blocks[block], h, self.kwargs[block], cache)


def run_block(block: nn.Module, h: Tensor, kwargs: Mapping[str, Any], cache: Any = None) -> Tensor:
    """One block, or another with its signature, on h_i (batch, time, hidden)."""
    if (alibi := kwargs.get("alibi")) is not None:  # Bloom has batch and heads in one dimension.
        kwargs = {**kwargs, "alibi": alibi.repeat(h.shape[0], *(1 for _ in alibi.shape[1:]))}
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 4 and len(mask) == 1 < len(h):  # XGLM counts its sequences.
        kwargs = {**kwargs, "attention_mask": mask.expand(len(h), -1, -1, -1)}
    out = block(h, **{cache_name(block): cache}, **kwargs)
    after: Tensor = out[0] if isinstance(out, tuple | list) else out
    return after


def cache_name(block: nn.Module) -> str:
    """What a block calls its KV cache. Raises: UnsupportedArchitecture when it takes none."""
    if (name := _cache_argument(type(block))) is not None:
        return name
    raise UnsupportedArchitecture(
        f"its blocks, of the class {type(block).__name__}, take no cache of keys and values among their arguments"
    )


def _cache_argument(kind: type[nn.Module]) -> str | None:
    parameters = inspect.signature(kind.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def capture_calls(stack: BlockStack, ids: Tensor, cache: Cache | None = None) -> BlockCalls:
    """What the model passes to each block for windows like `ids` (batch, time), read from the first of them.

    With `cache`, which must hold one sequence, `ids` continue it.
    """
    return _entered(stack, ids[:1], cache=cache)[1]


@torch.no_grad()
def capture_continuation_calls(stack: BlockStack, ids: Tensor, prompt_tokens: int) -> BlockCalls:
    """What the model passes to each block for tokens after a cached prompt: `ids` (batch, time) cut at the prompt."""
    cache = DynamicCache(config=stack.model.config)
    stack.body(input_ids=ids[:1, :prompt_tokens], past_key_values=cache, use_cache=True)
    return capture_calls(stack, ids[:, prompt_tokens:], cache)


class _Recorder(nn.Module):
    """Stands where a block stands: notes what the block would be called with, and passes the hidden state on.

    It gives what the block gives: the hidden state, or a tuple that begins with it.
    """

    def __init__(self, block: nn.Module, given: int | None) -> None:
        super().__init__()
        self.given = given
        # Not a submodule: a model that looks at its modules must not find the block twice.
        object.__setattr__(self, "block", block)
        self.entered: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block: nn.Module = object.__getattribute__(self, "block")
        signature = inspect.signature(type(block).forward)
        bound = signature.bind(block, *args, **kwargs).arguments
        _, hidden_name, *_ = signature.parameters
        h: Tensor = bound[hidden_name]
        named = {name: value for name, value in bound.items() if name not in ("self", hidden_name, "kwargs")}
        named |= bound.get("kwargs", {})
        self.kwargs = {name: value for name, value in named.items() if name not in (*CACHE_NAMES, "use_cache")}
        self.entered = h
        return h if self.given is None else (h, *(None for _ in range(self.given - 1)))


_GIVEN: dict[type[nn.Module], int | None] = {}
"""Class of a block → how many things it gives in a tuple, None where it gives a tensor; seen when one runs."""


class _Seen(Exception):
    """A block has run; nothing more is wanted of the model."""


def _given(stack: BlockStack) -> list[int | None]:
    """How many things each block gives in a tuple, None where it gives a tensor: one of each class is run to see it."""
    wanted = {type(block) for block in stack.blocks} - _GIVEN.keys()

    def see(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        _GIVEN[type(block)] = len(output) if isinstance(output, tuple | list) else None
        wanted.discard(type(block))
        if not wanted:
            raise _Seen

    if wanted:
        handles = [block.register_forward_hook(see) for block in stack.blocks]
        try:
            with suppress(_Seen), torch.no_grad():
                stack.body(input_ids=torch.zeros((1, 2), dtype=torch.long, device=stack.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    if wanted:
        raise UnsupportedArchitecture("the model runs without its list of blocks")
    return [_GIVEN[type(block)] for block in stack.blocks]


@torch.no_grad()
def _entered(
    stack: BlockStack, ids: Tensor, *, start: int = 0, cache: Cache | None = None
) -> tuple[Tensor, BlockCalls]:
    """h_0 of `ids` (batch, time) and what every block is called with; no block is run, or read from disk."""
    positions = torch.arange(start, start + ids.shape[1], device=stack.device)[None] if start else None
    recorders = [_Recorder(block, given) for block, given in zip(stack.blocks, _given(stack), strict=True)]
    with _blocks_replaced(stack, recorders):
        stack.body(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=cache is not None)
    if recorders[0].entered is None:
        raise UnsupportedArchitecture("the model runs without its list of blocks")
    return recorders[0].entered, BlockCalls([recorder.kwargs for recorder in recorders])


@contextmanager
def _blocks_replaced(stack: BlockStack, modules: Sequence[nn.Module]) -> Iterator[None]:
    parent, _, name = stack.path.rpartition(".")
    body = stack.model.get_submodule(parent)
    setattr(body, name, nn.ModuleList(modules))
    try:
        yield
    finally:
        setattr(body, name, stack.blocks)


def drop_blocks(model: PreTrainedModel, removed: Iterable[int]) -> PreTrainedModel:
    """The model without the blocks `removed`, sharing every parameter and buffer; the original stays as it is."""
    gone = frozenset(removed)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    pruned: PreTrainedModel = copy.deepcopy(model, shared)
    stack = block_stack(pruned)
    kept = [index for index in range(len(stack.blocks)) if index not in gone]
    for layer, index in enumerate(kept):
        for module in stack.blocks[index].modules():
            for name in LAYER_NUMBERS:
                if hasattr(module, name):
                    setattr(module, name, layer)  # torch types attributes as modules
    parent, _, name = stack.path.rpartition(".")
    setattr(pruned.get_submodule(parent), name, nn.ModuleList(stack.blocks[index] for index in kept))
    for key, value in pruned_values(model.config, kept).items():
        setattr(pruned.config, key, value)
    return pruned
