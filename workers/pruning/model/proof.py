"""Shown before any work: pruned models of this architecture are what they should be, whatever blocks a search chooses.

The truth is the dense model with hooks that put a block's input in place of its output, its configuration, layer
numbers and caches untouched. Against it are held the walk over the blocks, the model that a pruned configuration
builds from the real weights, generation with a cache, and both halves of a pair. What the configurations of other sets
would build is compared without weights: every block that stays has to be built as it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from pdtrim.contract.architectures import BLOCK_COUNT_KEYS
from workers.pruning.model.blocks import (
    LAYER_NUMBERS,
    PROOF_TOKENS,
    PROOF_TOLERANCE,
    BlockStack,
    UnsupportedArchitecture,
    block_stack,
    drop_blocks,
)
from workers.pruning.model.building import FAULTS, ImpossibleModel, building
from workers.pruning.model.configuration import config_of, pruned_json
from workers.pruning.model.plan import Blocks

RANDOM_SETS = 4
"""Sets of blocks beside the single ones whose configurations are tried."""
Plain = bool | int | float | str | tuple[Any, ...] | None


@dataclass(frozen=True)
class Built:
    """What of a block its configuration decides: its tensors' shapes, its buffers, and its modules' plain attributes.

    The attributes that are the number of its layer are left out.
    """

    shapes: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, Tensor]
    attributes: Mapping[str, Plain]
    classes: Mapping[str, str]

    @classmethod
    def of(cls, block: nn.Module, layer: int, stored: Collection[str] = ()) -> Built:
        """A block that stands in the layer with that number; of its buffers those that no checkpoint has `stored`."""
        attributes: dict[str, Plain] = {}
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                numbers_layer = name in LAYER_NUMBERS and value == layer
                if not name.startswith("_") and name != "training" and not numbers_layer and _is_plain(value):
                    attributes[f"{path}.{name}".lstrip(".")] = _plain(value)
        return cls(
            {name: tuple(parameter.shape) for name, parameter in block.named_parameters()},
            {name: buffer for name, buffer in block.named_buffers() if name not in stored},
            attributes,
            {path: type(module).__name__ for path, module in block.named_modules()},
        )

    def difference(self, other: Built, kept: Sequence[int] = (), num_blocks: int = 0) -> str | None:
        """The first thing that another block has otherwise, in words; None where there is none.

        What a block says of the number of blocks, or of each of them, may follow those `kept` of `num_blocks`.
        """
        for what, ours, theirs in (
            ("the class of ", self.classes, other.classes),
            ("the shape of ", self.shapes, other.shapes),
            ("", self.attributes, other.attributes),
        ):
            for name in sorted(ours.keys() | theirs.keys()):
                if not (
                    _same(ours.get(name), theirs.get(name))
                    or _follows(name, ours.get(name), theirs.get(name), kept, num_blocks)
                ):
                    return f"{what}{name or 'the block'} {_shown(ours.get(name))} becomes {_shown(theirs.get(name))}"
        for name in sorted(self.buffers.keys() | other.buffers.keys()):
            one, two = self.buffers.get(name), other.buffers.get(name)
            if one is None or two is None or one.shape != two.shape or not (one.is_meta or torch.equal(one, two)):
                return f"the values of {name} change"
        return None


def _follows(name: str, dense: Any, pruned: Any, kept: Sequence[int], num_blocks: int) -> bool:
    if isinstance(dense, tuple):
        return len(dense) == num_blocks and pruned == tuple(dense[block] for block in kept)
    return name.rpartition(".")[2] in BLOCK_COUNT_KEYS and (dense, pruned) == (num_blocks, len(kept))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Plain:
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, float) and isinstance(two, float):
        return one == two or abs(one - two) <= 1e-9 * max(abs(one), abs(two))
    return bool(one == two)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def prove_configurations(
    given: Mapping[str, Any],
    *,
    stored: Collection[str],
    protected: Blocks = frozenset(),
    check: Callable[[], None] = lambda: None,
) -> None:
    """Build, without weights, what pruned configurations of `config.json` describe, and compare the blocks that stay.

    `stored` are the names of the checkpoint's tensors: buffers among them are copied, not built. Every single block
    but those `protected` is removed once, then the first and the last together, then some random sets. Calls `check`
    before every part.
    Raises: UnsupportedArchitecture naming the block and what becomes different, and what to protect where that would
    help; ImpossibleModel.
    """
    dense = _empty(given, stored, check)
    stack = block_stack(dense)
    blocks = stack.blocks
    copied = [
        {name for name, _ in block.named_buffers() if f"{stack.prefix}{number}.{name}" in stored}
        for number, block in enumerate(blocks)
    ]
    built = [Built.of(block, number, copied[number]) for number, block in enumerate(blocks)]
    free = [block for block in range(len(blocks)) if block not in protected]
    reasons: dict[int, str] = {}
    for removed in _sets(free):
        if len(removed) > 1 and reasons:
            break
        kept = [block for block in range(len(blocks)) if block not in removed]
        try:
            pruned = list(block_stack(_empty(pruned_json(given, kept), stored, check)).blocks)
        except (ImpossibleModel, UnsupportedArchitecture):
            pruned = []
        if (reason := _otherwise(built, pruned, kept, copied)) is not None:
            reasons[min(removed)] = f"without {_named(removed)} {reason}"
    if reasons:
        few = len(reasons) <= len(free) // 4
        remedy = f"; keep what cannot go with search.protect: {sorted({*reasons, *protected})}" if few else ""
        raise _refused(dense, f"{next(iter(reasons.values()))}{remedy}")


def _otherwise(
    built: Sequence[Built], pruned: Sequence[nn.Module], kept: Sequence[int], copied: Sequence[Collection[str]]
) -> str | None:
    """What of the blocks that stay a pruned configuration builds otherwise, in words; None where it is nothing."""
    if len(pruned) != len(kept):
        return f"no configuration describes it: its class takes none of {len(kept)} such blocks"
    for layer, block in enumerate(kept):
        if difference := built[block].difference(Built.of(pruned[layer], layer, copied[block]), kept, len(built)):
            return f"its configuration would build block {block} otherwise: {difference}"
    return None


def _empty(given: Mapping[str, Any], stored: Collection[str], check: Callable[[], None]) -> PreTrainedModel:
    """A model without weights, but with its buffers."""
    with building(check, tensors=len(stored)), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(given), trust_remote_code=False)
    return model


def _sets(free: Sequence[int]) -> Iterator[Blocks]:
    """What is removed in turn of the blocks that may be."""
    if len(free) < 2:
        return
    yield from (frozenset({block}) for block in free)
    if len(free) > 2:
        yield frozenset({free[0], free[-1]})
    chosen = random.Random(0)
    for _ in range(RANDOM_SETS):
        yield frozenset(chosen.sample(free, chosen.randint(1, max(1, len(free) // 4))))


def _named(removed: Blocks) -> str:
    return f"block {min(removed)}" if len(removed) == 1 else f"blocks {', '.join(map(str, sorted(removed)))}"


def _refused(model: PreTrainedModel, reason: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(f"model_type {model.config.model_type!r} is not supported: {reason}")


@contextmanager
def without(stack: BlockStack, removed: Blocks) -> Iterator[None]:
    """Until the end the blocks `removed` run, but change nothing."""

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        h = args[0] if args else kwargs["hidden_states"]
        return (h, *output[1:]) if isinstance(output, tuple | list) else h

    handles = [stack.blocks[block].register_forward_hook(hook, with_kwargs=True) for block in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_whole(model: PreTrainedModel) -> bool:
    """Whether all weights are on one device."""
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and not any(device.type == "meta" for device in devices)


def attention_blocks(model: PreTrainedModel) -> list[int] | None:
    """The blocks with keys and values, of a model that has others too; None where all have them.

    transformers counts tokens by the first of them, and cannot go on from a cache where there is none.
    """
    layers = DynamicCache(config=model.config).layers
    found = [number for number, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)]
    return None if len(found) == len(layers) else found


def one_of_each_kind(stack: BlockStack) -> list[int]:
    """The first block, the last, and one of each kind: alike are blocks of the same shapes and attributes."""
    kinds: list[Built] = []
    chosen: list[int] = []
    for number, block in enumerate(stack.blocks):
        built = Built.of(block, number)
        if not any(built.difference(kind) is None for kind in kinds):
            kinds.append(built)
            chosen.append(number)
    return sorted({*chosen, len(stack.blocks) - 1})


@torch.no_grad()
def prove_pruned(
    stack: BlockStack, given: Mapping[str, Any], *, stored: Collection[str], protected: Blocks = frozenset()
) -> None:
    """Hold pruned models of the real weights against the truth: in memory, as configured, and with a cache.

    Of a model that is sharded or streamed nothing is run: its copies would have no weights.
    Raises: UnsupportedArchitecture.
    """
    if len(stack.blocks) < 2 or not is_whole(stack.model):
        return
    ids = proof_ids(stack)
    own, in_parts = stack.model(input_ids=ids, use_cache=False).logits, _in_two_parts(stack.model, ids)
    compare(stack, "as transformers itself runs it, with a cache and without,", in_parts, own)
    for block in set(one_of_each_kind(stack)) - protected:
        with without(stack, frozenset({block})):
            truth = stack.model(input_ids=ids, use_cache=False).logits
        with in_our_words(stack, f"without block {block} it cannot be run"):
            in_memory, configured = drop_blocks(stack.model, {block}), _configured(stack, given, block, stored)
            for how, model in (("in memory", in_memory), ("as its configuration says", configured)):
                compare(stack, f"without block {block}, {how},", model(input_ids=ids, use_cache=False).logits, truth)
            compare(stack, f"without block {block}, with a cache,", _in_two_parts(in_memory, ids), truth)


def _configured(stack: BlockStack, given: Mapping[str, Any], removed: int, stored: Collection[str]) -> PreTrainedModel:
    """The model that the pruned configuration builds, with the weights of the dense one, which it shares."""
    kept = [block for block in range(len(stack.blocks)) if block != removed]
    model = _empty(pruned_json(given, kept), stored, lambda: None)
    ours = block_stack(model)
    held = stack.model.state_dict(keep_vars=True)
    state = {}
    for name in model.state_dict():
        source = name
        if name.startswith(ours.prefix):
            number, _, rest = name.removeprefix(ours.prefix).partition(".")
            source = f"{stack.prefix}{kept[int(number)]}.{rest}"
        state[name] = held[source]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer.to(stack.device)
    model.set_attn_implementation(stack.model.config._attn_implementation)
    model.eval()
    return model


def _in_two_parts(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (batch, time, vocabulary), the later ones computed on the cache of the earlier."""
    cache = DynamicCache(config=model.config)
    half = ids.shape[1] // 2
    parts = [ids[:, :half], *(ids[:, at : at + 1] for at in range(half, ids.shape[1]))]
    return torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)


def proof_ids(stack: BlockStack) -> Tensor:
    """Random tokens (2, time)."""
    vocabulary = stack.model.config.vocab_size
    ids = torch.randint(1, vocabulary, (2, PROOF_TOKENS), generator=torch.Generator().manual_seed(0))
    return ids.to(stack.device)


def compare(stack: BlockStack, what: str, found: Tensor, truth: Tensor) -> None:
    """Raises: UnsupportedArchitecture."""
    one, two = found.float().cpu(), truth.float().cpu()
    difference = float((one - two).abs().max() / two.abs().max().clamp(min=1e-30))
    tolerance = PROOF_TOLERANCE if stack.model.dtype == torch.float32 else 100 * PROOF_TOLERANCE
    if not difference <= tolerance:
        raise _refused(stack.model, f"{what} its logits differ by {difference:.1e} of the largest")


@contextmanager
def in_our_words(stack: BlockStack, reason: str) -> Iterator[None]:
    try:
        yield
    except (UnsupportedArchitecture, torch.OutOfMemoryError):
        raise
    except (*FAULTS, RuntimeError, ImpossibleModel) as error:
        raise _refused(stack.model, reason) from error
