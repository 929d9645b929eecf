"""What scoring shows of an architecture that was never tried, before any work: `model/proof`, and of pairs more."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from service.stopping import Check
from workers.pruning.model.blocks import BlockStack, UnsupportedArchitecture, block_stack, drop_blocks, prove
from workers.pruning.model.checkpoint import SourceTensors
from workers.pruning.model.pair import FirstToken, handed_tokens
from workers.pruning.model.plan import BlockPlan, Blocks, kv_layer_map
from workers.pruning.model.proof import (
    attention_blocks,
    compare,
    in_our_words,
    is_whole,
    proof_ids,
    prove_configurations,
    prove_pruned,
    without,
)
from workers.pruning.model.units import deleting
from workers.pruning.search.engine import PairEngine
from workers.pruning.serving.handover import EVERY_TOKEN
from workers.pruning.serving.pair_server import DecodeHalf, PrefillHalf, continue_logits, continued_kv

NOT_AS_PAIR = "prefill and decode cannot give up different blocks, so let both remove the same number"


def prove_architecture(stack: BlockStack, folder: Path, *, removable: int, protected: Blocks, check: Check) -> None:
    """Show that whatever blocks but those `protected` both halves give up, the checkpoint is what the search saw.

    No half gives up more than `removable` blocks.

    Raises: UnsupportedArchitecture, ImpossibleModel; what `check` raises.
    """
    prove(stack)
    attention = attention_blocks(stack.model)
    if attention and len(attention) <= removable and not protected.intersection(attention):
        raise UnsupportedArchitecture(
            f"only the blocks {', '.join(map(str, attention))} have attention, and {removable} blocks may be removed, "
            f"which could take all of them; keep one with search.protect: [{attention[-1]}]"
        )
    given, stored = json.loads((folder / "config.json").read_text()), SourceTensors.of(folder).files.keys()
    prove_configurations(given, stored=stored, protected=protected, check=check)
    with in_our_words(stack, "without a block it cannot be run, with a cache of keys and values and without one"):
        prove_pruned(stack, given, stored=stored, protected=protected)


@torch.no_grad()
def prove_decoder(stack: BlockStack, whole: PreTrainedModel) -> None:
    """Show that a text decoder alone says of a text what the vision-language model says, which it was taken out of.

    Raises: UnsupportedArchitecture.
    """
    named = whole.config.to_dict()
    stand_for_images = {value for key, value in named.items() if key.endswith(("token_id", "token_index"))}
    ids = proof_ids(stack)
    plain = next(token for token in range(1, stack.model.config.vocab_size) if token not in stand_for_images)
    ids[torch.isin(ids, torch.tensor([token for token in stand_for_images if isinstance(token, int)]))] = plain
    with in_our_words(stack, "the vision-language model, whose decoder it is, cannot be run"):
        found, truth = (model(input_ids=ids, use_cache=False).logits for model in (stack.model, whole))
        compare(stack, "beside the vision-language model, whose decoder it is,", found, truth)


@dataclass(frozen=True)
class _Pair:
    """Prefill without one block, decode without another too, and the truth of what they say."""

    ids: Tensor  # (2, time)
    prompt_tokens: int
    handed: int
    plans: tuple[BlockPlan, BlockPlan]
    first: Tensor  # logits at the prompt's last token, where prefill says the first one
    others: Tensor  # logits by decode from the first token that it runs on


def _pair(stack: BlockStack, first_token: FirstToken, protected: Blocks) -> _Pair | None:
    """Prefill gives up the first block that it may, decode that and the last; None where nothing is left for both."""
    free = [block for block in range(len(stack.blocks)) if block not in protected]
    if len(free) < 2 or len(stack.blocks) < 3 or not is_whole(stack.model):
        return None
    ids = proof_ids(stack)
    prompt_tokens = ids.shape[1] // 2 + 1
    handed = handed_tokens(prompt_tokens, first_token)
    prefill, decode = (BlockPlan(len(stack.blocks), frozenset(gone)) for gone in ({free[0]}, {free[0], free[-1]}))
    cache = DynamicCache(config=stack.model.config)
    with without(stack, prefill.removed):
        read = stack.model(input_ids=ids[:, :handed], past_key_values=cache, use_cache=True).logits
    with without(stack, decode.removed):
        parts = [
            stack.model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
            for at in range(handed, ids.shape[1])
        ]
    return _Pair(ids, prompt_tokens, handed, (prefill, decode), read[:, prompt_tokens - 1 :], torch.cat(parts, dim=1))


@torch.no_grad()
def prove_continuation(stack: BlockStack, first_token: FirstToken, protected: Blocks = frozenset()) -> None:
    """Show that the search can go on from what a prompt leaves behind, which it does whatever both halves give up.

    Raises: UnsupportedArchitecture.
    """
    with in_our_words(stack, "its blocks cannot be run one by one on the cache of a prompt"):
        if (pair := _pair(stack, first_token, protected)) is None:
            return
        engine = PairEngine(
            stack,
            pair.ids,
            "cross_entropy",
            prefill=deleting(pair.plans[0].removed),
            prompt_tokens=pair.prompt_tokens,
            first_token=first_token,
            chunk_windows=len(pair.ids),
        )
        units = deleting(pair.plans[1].removed)
        logits = torch.cat([pair.first, pair.others[:, :-1]], dim=1).float()
        truth = F.cross_entropy(logits.flatten(0, 1), pair.ids[:, pair.prompt_tokens :].flatten())
        for _ in range(2):  # Whoever writes into what it is given shows the second time.
            compare(stack, "on the cache of a prompt", torch.tensor(engine.losses([units])[units]), truth)


@torch.no_grad()
def prove_halves(stack: BlockStack, first_token: FirstToken, protected: Blocks = frozenset()) -> None:
    """Show that decode can go on from what prefill hands over, where decode gives up a block more.

    Raises: UnsupportedArchitecture.
    """
    if attention_blocks(stack.model) is not None:
        raise UnsupportedArchitecture(f"some of its blocks keep a state that is not handed over; {NOT_AS_PAIR}")
    if (pair := _pair(stack, first_token, protected)) is None:
        return
    with in_our_words(stack, f"its blocks keep more than keys and values of what they read; {NOT_AS_PAIR}"):
        layer_map = tuple(kv_layer_map(*pair.plans))
        prefill, decode = (drop_blocks(stack.model, plan.removed) for plan in pair.plans)
        sent = PrefillHalf(prefill, layer_map, EVERY_TOKEN, first_token).prefill(pair.ids[:, : pair.prompt_tokens])
        served = block_stack(DecodeHalf(decode, layer_map).model)
        caches = continued_kv(served, sent)
        steps = range(pair.handed, pair.ids.shape[1])
        found = [continue_logits(served, caches, pair.ids[:, at : at + 1]) for at in steps]
        compare(stack, f"{NOT_AS_PAIR}: served by two halves,", torch.cat(found, dim=1), pair.others)
