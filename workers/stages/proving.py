"""What scoring shows of an architecture that was never tried, before any work: `model/proof`, and of pairs more."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

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
    prove_pruned(stack, given, stored=stored, protected=protected)


@torch.no_grad()
def prove_pair(stack: BlockStack, first_token: FirstToken, protected: Blocks = frozenset()) -> None:
    """Show that decode can go on from the cache of a prefill half that kept a block more: in the search, and served.

    Prefill gives up the first block that it may, decode that and the last. Raises: UnsupportedArchitecture.
    """
    free = [block for block in range(len(stack.blocks)) if block not in protected]
    if len(free) < 2 or len(stack.blocks) < 3:
        return
    if not is_whole(stack.model):
        if attention_blocks(stack.model) is not None:
            raise UnsupportedArchitecture(f"some of its blocks keep no keys and values; {NOT_AS_PAIR}")
        return
    first_gone, last_gone = free[0], free[-1]
    ids = proof_ids(stack)
    prompt = ids.shape[1] // 2 + 1
    handed = handed_tokens(prompt, first_token)
    plans = [BlockPlan(len(stack.blocks), frozenset(gone)) for gone in ({first_gone}, {first_gone, last_gone})]
    in_prefill, in_decode = (plan.removed for plan in plans)
    with in_our_words(stack, f"its blocks keep more than keys and values of what they read; {NOT_AS_PAIR}"):
        first, others = _true_logits(stack, ids, prompt, handed, in_prefill, in_decode)
        engine = PairEngine(
            stack,
            ids,
            "cross_entropy",
            prefill=deleting(in_prefill),
            prompt_tokens=prompt,
            first_token=first_token,
            chunk_windows=len(ids),
        )
        units = deleting(in_decode)
        predicted = torch.cat([first, others[:, :-1]], dim=1).float()
        truth = F.cross_entropy(predicted.flatten(0, 1), ids[:, prompt:].flatten())
        compare(stack, f"{NOT_AS_PAIR}: as a pair,", torch.tensor(engine.losses([units])[units]), truth)
        layer_map = tuple(kv_layer_map(*plans))
        prefill = PrefillHalf(drop_blocks(stack.model, in_prefill), layer_map, EVERY_TOKEN, first_token)
        decode = DecodeHalf(drop_blocks(stack.model, in_decode), layer_map)
        served = block_stack(decode.model)
        caches = continued_kv(served, prefill.prefill(ids[:, :prompt]))
        found = torch.cat(
            [continue_logits(served, caches, ids[:, at : at + 1]) for at in range(handed, ids.shape[1])], 1
        )
        compare(stack, f"{NOT_AS_PAIR}: served by two halves,", found, others)


def _true_logits(
    stack: BlockStack, ids: Tensor, prompt: int, handed: int, prefill: Blocks, decode: Blocks
) -> tuple[Tensor, Tensor]:
    """Logits at the prompt's last token where prefill says the first one, and those by decode from there on."""
    cache = DynamicCache(config=stack.model.config)
    with without(stack, prefill):
        read = stack.model(input_ids=ids[:, :handed], past_key_values=cache, use_cache=True).logits
    with without(stack, decode):
        parts = [
            stack.model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
            for at in range(handed, ids.shape[1])
        ]
    return read[:, prompt - 1 :], torch.cat(parts, dim=1)
