"""What is checked before an engine serves a half: each is something that would give wrong answers later, or none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from pdtrim_vllm.half import Half

SERIES = ("0.32",)
"""Releases of vLLM that this plugin was tested with. Its connector uses parts of vLLM that change between them."""
ROLES = {"prefill": ("kv_producer",), "decode": ("kv_consumer",), "unified": ("kv_producer", "kv_consumer")}
"""Role of a checkpoint → `kv_role` of the engines that may serve it."""
FIRST_TOKEN = ("pdtrim_vllm.first_token:FirstToken", "pdtrim_vllm.first_token_v2:FirstToken")


class NotServed(ValueError):
    """An engine that was started in a way in which a pair cannot be served."""


@dataclass(frozen=True)
class Engine:
    """How an engine was started."""

    vllm: str
    """Its version."""
    kv_role: str
    layers: int
    """Of the model, by its configuration."""
    load_failures: str
    """`kv_load_failure_policy`."""
    handshake_checked: bool
    windowed: bool
    """Whether a layer's KV cache holds less than the sequence, or several kinds of layers have caches of their own."""
    shared_heads: bool
    """Multi-head latent attention, whose cache has no heads."""
    speculative: bool
    adapters: bool
    """Whether LoRA is on."""
    bidirectional: bool
    pipeline: int
    context: int
    """Engines' ranks that share a sequence between them."""
    blocks: int
    """Of the KV cache."""
    block_size: int
    sequences: int
    """`--max-num-seqs`."""
    sequence_tokens: int
    """`--max-model-len`."""
    logits_processors: tuple[str, ...]

    @property
    def decodes(self) -> bool:
        return self.kv_role == "kv_consumer"

    @property
    def blocks_needed(self) -> int:
        """For as many sequences as it announces, at their longest, and the block that vLLM keeps for itself."""
        return self.sequences * ceil(self.sequence_tokens / self.block_size) + 1


def check(half: Half, engine: Engine) -> None:
    """Raises: NotServed with everything that stands against it."""
    if found := list(problems(half, engine)):
        raise NotServed(f"PDTrim does not serve the {half.role} checkpoint of job {half.job} so: {'; '.join(found)}")


def problems(half: Half, engine: Engine) -> Iterator[str]:
    """What stands against serving a half in an engine, each with what to do."""
    if not any(engine.vllm == series or engine.vllm.startswith(f"{series}.") for series in SERIES):
        yield f"this is vLLM {engine.vllm}, and this plugin is made for {', '.join(SERIES)}.x"
    if engine.kv_role not in ROLES[half.role]:
        wanted = " or ".join(ROLES[half.role])
        yield f"kv_role is {engine.kv_role}, and a {half.role} checkpoint is served with {wanted}"
    if engine.layers != len(half.kept_blocks):
        yield f"the model has {engine.layers} layers, and its pdtrim.json names {len(half.kept_blocks)} blocks"
    if engine.load_failures != "fail":
        yield (
            f"kv_load_failure_policy is {engine.load_failures}: decode would compute the prompt with its own layers; "
            "set it to fail"
        )
    if not engine.handshake_checked:
        yield "enforce_handshake_compat is false: the halves would not be compared; leave it out"
    if engine.windowed:
        yield (
            "the model has layers of several kinds, whose KV caches the hybrid manager lays out differently in the two "
            "halves: start both engines with --disable-hybrid-kv-cache-manager"
        )
    if engine.shared_heads:
        yield "models with multi-head latent attention are not supported"
    if engine.speculative:
        yield "speculative decoding is not supported with a pair: leave it out"
    if engine.adapters:
        yield "LoRA adapters were not measured with the pair: leave them out"
    if engine.bidirectional:
        yield "bidirectional_kv_xfer is on: decode's KV cache is not prefill's; leave it out"
    if engine.pipeline > 1:
        yield f"the pipeline has {engine.pipeline} stages, and a pair is served with one: use tensor parallelism"
    if engine.context > 1:
        yield "sequences are shared between ranks (context parallelism), which is not supported with a pair"
    if engine.decodes and engine.blocks < engine.blocks_needed:
        yield (
            f"the KV cache has {engine.blocks} blocks of {engine.block_size} tokens, and {engine.sequences} sequences "
            f"of {engine.sequence_tokens} tokens need {engine.blocks_needed}: vLLM would compute a sequence that has "
            "to give way anew, with decode's layers for the prompt. Lower --max-num-seqs or --max-model-len, or give "
            "the cache more memory"
        )
    if engine.decodes and half.first_token == "prefill" and not set(engine.logits_processors) & set(FIRST_TOKEN):
        yield f"prefill says the first token of this pair: start decode with --logits-processors {FIRST_TOKEN[0]}"
