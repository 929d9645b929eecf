"""Estimates of a job from its specification and its model's configuration: sizes, memory, sets to evaluate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from pdtrim.contract.architectures import architecture, is_tested
from pdtrim.contract.blocks import limits
from pdtrim.contract.estimate import (
    CheckpointEstimate,
    EarlierJob,
    Estimate,
    EstimateWarning,
    MemoryEstimate,
    SearchEstimate,
)
from pdtrim.contract.jobs import AnyStage, StageName
from pdtrim.contract.results import DistillationResult
from pdtrim.contract.spec import BUDGET_PARTS, HalfTarget, JobSpec
from service.checking.preflight import num_blocks
from service.sources import ModelDescription
from service.sources.safetensors_header import DTYPE_BITS

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
"""What configurations call the types that safetensors names."""
LARGEST = 2**53
"""The largest integer that every JSON reader keeps exactly."""
MANY_SETS = 100_000
HALF_PRECISION = 2
OPTIMISER = 2 + 2 * (1 + 4 / 256)
"""Bytes for each trained parameter besides its weight: the gradient, and AdamW's two moments in 8 bits with scales."""
STAGE: TypeAdapter[AnyStage] = TypeAdapter(AnyStage)
Role = Literal["dense", "unified", "prefill", "decode"]


@dataclass(frozen=True)
class _Shape:
    """A dense model in parameters; None for what its configuration does not tell."""

    blocks: int
    item_bytes: int | None
    total: int | None
    block: int | None
    mlp: int | None
    kv_width: int | None
    """Keys and values of one token in one block, in numbers."""

    def checkpoint(self, role: Role, removed: int, target: HalfTarget | None) -> CheckpointEstimate:
        kept = self.blocks - removed
        parameters = None
        if self.total is not None and self.block is not None:
            narrowed = 0
            if target is not None and target.mlp_width < 1 and self.mlp is not None:
                narrowed = round((1 - target.mlp_width) * self.mlp)
            parameters = self.total - removed * self.block - kept * narrowed
        size = self.item_bytes
        return CheckpointEstimate(
            role=role,
            blocks=kept,
            parameters=parameters,
            bytes=None if parameters is None or size is None else parameters * size,
            kv_bytes_per_token=None if self.kv_width is None or size is None else kept * self.kv_width * size,
        )


def estimate(spec: JobSpec, model: ModelDescription, earlier: tuple[str, Sequence[Any]] | None) -> Estimate:
    """What a job that passed its checks would make and take; `earlier` is a job on the same model, and its stages."""
    shape = _shape(model)
    prefill, decode = limits(spec, shape.blocks)
    unified = (
        prefill == decode
        and spec.prefill.mlp_width == spec.decode.mlp_width
        and not (spec.prefill.parts or spec.decode.parts or spec.prefill.budget or spec.decode.budget)
    )
    halves: list[tuple[Role, int, HalfTarget]] = (
        [("unified", prefill, spec.prefill)]
        if unified
        else [("prefill", prefill, spec.prefill), ("decode", decode, spec.decode)]
    )
    checkpoints = [shape.checkpoint(*half) for half in halves]
    evaluations = _evaluations(spec, shape.blocks, prefill, decode)
    return Estimate(
        architecture=model.config["model_type"],
        model_revision=model.revision,
        dense=shape.checkpoint("dense", 0, None),
        checkpoints=checkpoints,
        evaluations=evaluations,
        memory_bytes=_memory(spec, shape, checkpoints),
        earlier=None if earlier is None else _earlier(spec, *earlier),
        warnings=list(_warnings(spec, model, shape, evaluations, prefill, decode)),
    )


def _shape(model: ModelDescription) -> _Shape:
    config, blocks = model.config, num_blocks(model.config)
    dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))
    item_bytes = None if dtype is None else DTYPE_BITS[dtype] // 8
    hidden, heads = _size(config, "hidden_size", "n_embd"), _size(config, "num_attention_heads", "n_head")
    vocabulary, wide = _size(config, "vocab_size"), _size(config, "intermediate_size")
    total = None if item_bytes is None else model.weight_bytes // item_bytes
    block = kv_width = None
    if total is not None and vocabulary is not None and hidden is not None:
        tables = 1 if config.get("tie_word_embeddings", True) else 2
        block = max(0, total - tables * vocabulary * hidden) // blocks
    if hidden is not None and heads is not None:
        head = _size(config, "head_dim") or hidden // heads
        kv_width = 2 * head * (_size(config, "num_key_value_heads") or heads)
    gated = architecture(config["model_type"]).gated_mlp and wide is not None and hidden is not None
    return _Shape(blocks, item_bytes, total, block, 3 * hidden * wide if gated and hidden and wide else None, kv_width)


def _size(config: Mapping[str, Any], *names: str) -> int | None:
    found = next((config[name] for name in names if name in config), None)
    return found if type(found) is int and found > 0 else None


def _evaluations(spec: JobSpec, blocks: int, prefill: int, decode: int) -> SearchEstimate:
    forced = len(spec.search.force)
    algorithm = spec.search.algorithm
    return SearchEstimate(
        prefill=_sets(spec, blocks, forced, prefill, algorithm),
        decode=_sets(spec, blocks, prefill, decode, algorithm),
        parts=_part_sets(spec, blocks, prefill, spec.prefill)
        + _part_sets(spec, blocks, decode, spec.decode)
        + _budget_sets(spec.prefill, blocks)
        + _budget_sets(spec.decode, blocks),
        control=0
        if prefill == forced
        else _sets(spec, blocks, forced, decode, "annealing" if algorithm == "exhaustive" else algorithm),
    )


def _part_sets(spec: JobSpec, blocks: int, removed: int, target: HalfTarget) -> int:
    """Sets that the searches of the parts of a half's kept blocks compare, at most."""
    sets, given_up = 0, removed
    for count in target.parts.values():
        sets += _sets(spec, blocks, given_up, given_up + count, spec.search.algorithm)
        given_up += count
    return sets


def _budget_sets(target: HalfTarget, blocks: int) -> int:
    """Sets that the search for a budget compares, at most: a walk with all kinds of units, and one with each kind.

    A step takes off a block's cost or a part of it; no more than two parts of every block go.
    """
    if target.budget is None:
        return 0
    kinds = 1 + len(BUDGET_PARTS[target.budget[0]])
    steps = min(2 * blocks, math.ceil(2 * (1 - target.budget[1]) * blocks) + 1)
    return kinds * blocks * (steps + min(steps, blocks))


def _sets(spec: JobSpec, blocks: int, base: int, remove: int, algorithm: str) -> int:
    """Sets that a search from `base` up to `remove` removed blocks compares, at most."""
    free, counts = blocks - len(spec.search.protect) - base, range(remove - base)
    every = 1 + sum(math.comb(free, more + 1) for more in counts)
    if algorithm == "exhaustive":
        return min(LARGEST, every)
    greedy = 1 + sum(free - more for more in counts)
    if algorithm == "annealing":
        # Annealing adds its budget, where there are as many sets.
        return min(greedy + spec.search.annealing_budget(blocks), every)
    return greedy


def _batch_tokens(spec: JobSpec) -> int:
    return spec.distillation.batch_windows * spec.calibration.window_tokens


def _heals(spec: JobSpec) -> bool:
    return spec.distillation.enabled and spec.distillation.heal_tokens >= _batch_tokens(spec)


def _memory(spec: JobSpec, shape: _Shape, checkpoints: Sequence[CheckpointEstimate]) -> MemoryEstimate:
    """As the worker computes on an accelerator, where that has the least memory: in bfloat16.

    The last half is healed while another, which is healed, makes the cache that it reads; what neither trains is the
    dense model's own.
    """
    if shape.total is None or shape.block is None:
        return MemoryEstimate(search=None, distillation=None)
    dense = HALF_PRECISION * shape.total
    if not _heals(spec):
        return MemoryEstimate(search=dense, distillation=None)
    own = sum(HALF_PRECISION * checkpoint.blocks * shape.block for checkpoint in checkpoints)
    trained = checkpoints[-1].blocks * shape.block if spec.distillation.trainable == "all" else 0
    return MemoryEstimate(search=dense, distillation=dense + own + round(OPTIMISER * trained))


def _earlier(spec: JobSpec, job_id: str, stages: Sequence[Any]) -> EarlierJob:
    """What an earlier job took; of distillation nothing, where it healed nothing and this job will."""
    found = [
        stage
        for stage in map(STAGE.validate_python, stages)
        if not (_heals(spec) and isinstance(stage.metrics, DistillationResult) and not stage.metrics.healed)
    ]
    return EarlierJob(
        job_id=job_id,
        seconds={
            StageName(stage.name): round((stage.finished_at - stage.started_at).total_seconds(), 1)
            for stage in found
            if stage.started_at is not None and stage.finished_at is not None
        },
    )


def _warnings(
    spec: JobSpec, model: ModelDescription, shape: _Shape, evaluations: SearchEstimate, prefill: int, decode: int
) -> Iterator[EstimateWarning]:
    kind = model.config["model_type"]
    if not is_tested(kind):
        yield EstimateWarning(
            message=f"{kind} is none of the architectures that were tested. The worker compares a walk through its "
            "blocks with the model itself first, and refuses it where they differ.",
            param="model.source",
        )
    if shape.item_bytes is None:
        yield EstimateWarning(
            message="The model's config.json names no type of its weights (`dtype`), so sizes and memory are unknown.",
            param="model.source",
        )
    if model.revision is not None and spec.model.revision is None:
        yield EstimateWarning(
            message=f"No revision is given: the job takes what the hub has when it is submitted, now {model.revision}.",
            param="model.revision",
        )
    if spec.data.origin == "builtin:stdlib" and spec.model.source != "reference":
        yield EstimateWarning(
            message="Blocks are compared on the source of the Python standard library. Give text like what the model "
            "will serve.",
            param="data.source",
        )
    for half, target, most in (("prefill", spec.prefill, prefill), ("decode", spec.decode, decode)):
        if target.max_perplexity_increase is not None:
            yield EstimateWarning(
                message=f"{half} gives up as many blocks as the bound on perplexity allows; sizes and evaluations are "
                f"those of the most, {most}.",
                param=f"{half}.max_perplexity_increase",
            )
    for half, target in (("prefill", spec.prefill), ("decode", spec.decode)):
        if target.budget is not None:
            yield EstimateWarning(
                message=f"What {half} gives up is found by its budget; its size here is that of what goes in any case.",
                param=f"{half}.{target.budget[0]}",
            )
    if spec.prefill.parts or spec.decode.parts or spec.prefill.budget or spec.decode.budget:
        yield EstimateWarning(
            message="Parts of blocks that go are written as zeros, so the checkpoints load everywhere; they take less "
            "time and memory in vLLM with pdtrim-vllm, which skips what `dead_units` of pdtrim.json lists.",
            param="prefill" if spec.prefill.parts or spec.prefill.budget else "decode",
        )
    if 2 * decode > shape.blocks:
        yield EstimateWarning(
            message=f"Up to {decode} of {shape.blocks} blocks go, more than half. Look at the frontier before you "
            "serve the result; fewer can be cut from it.",
            param="decode.remove_blocks",
        )
    if prefill != decode:
        yield EstimateWarning(
            message="Prefill and decode get different depths: vLLM serves such a pair with pdtrim-vllm (`pdtrim "
            "serve`). Equal counts give one checkpoint that every runtime serves.",
            param="prefill.remove_blocks",
        )
    if max(evaluations.prefill, evaluations.decode) > MANY_SETS:
        yield EstimateWarning(
            message=f"The search would evaluate {max(evaluations.prefill, evaluations.decode):,} sets. Take "
            "`annealing`, or give up fewer blocks.",
            param="search.algorithm",
        )
    if not _heals(spec):
        yield EstimateWarning(
            message="Nothing is healed: the checkpoints have the pruned weights as they are. "
            f"`distillation.heal_tokens` of a training batch, {_batch_tokens(spec):,}, or more heals them."
            if spec.distillation.enabled
            else "Nothing is healed: the checkpoints have the pruned weights as they are.",
            param="distillation.heal_tokens" if spec.distillation.enabled else "distillation.enabled",
        )
