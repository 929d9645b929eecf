"""Estimates of a job from its specification and what is known of its model: sizes, memory, sets, times, bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import TypeAdapter

from pdtrim.contract.architectures import is_tested
from pdtrim.contract.blocks import limits
from pdtrim.contract.estimate import (
    CheckpointEstimate,
    EarlierJob,
    Estimate,
    EstimateWarning,
    MemoryEstimate,
    SearchEstimate,
    SetRange,
    StageEstimate,
)
from pdtrim.contract.jobs import AnyStage, StageName
from pdtrim.contract.results import DistillationResult
from pdtrim.contract.spec import JobSpec
from service.checking.memory import Checkpoint, batch_tokens, checkpoints_of, heals, is_unified, stage_memory
from service.checking.placement import ASSUMED, Placement, fits
from service.checking.preflight import num_blocks
from service.checking.sets import Searches, searches
from service.checking.shape import ModelShape, shape_of
from service.checking.storing import disk_bytes, store_bytes
from service.checking.work import Work, stage_work
from service.sources import ModelDescription

MANY_SETS = 100_000
STAGE: TypeAdapter[AnyStage] = TypeAdapter(AnyStage)
Role = Literal["dense", "unified", "prefill", "decode"]
Earlier = tuple[str, JobSpec, Sequence[Any]]
"""An earlier job on the same model: its id, what was asked, and its stages."""


def estimate(spec: JobSpec, model: ModelDescription, placement: Placement, earlier: Earlier | None) -> Estimate:
    """What a job that passed its checks, and goes to `placement`, would make and take."""
    blocks, shape = num_blocks(model.config), shape_of(model)
    found = searches(spec, blocks, shape)
    evaluations = _evaluations(found)
    stages: list[StageEstimate] = []
    scaled = None
    if shape is not None:
        work = stage_work(spec, shape, checkpoints_of(spec, shape), found)
        if earlier is not None:
            scaled = _scaled(spec, shape, work, earlier, placement)
        stages = list(_stages(placement, work, scaled))
    memory = {one.stage: one.memory_bytes for one in stages}
    stored = None if shape is None else store_bytes(spec, shape)
    return Estimate(
        architecture=model.config["model_type"],
        model_revision=model.revision,
        dense=_checkpoint("dense", blocks, shape, None),
        checkpoints=_checkpoints(spec, blocks, shape),
        evaluations=evaluations,
        memory_bytes=MemoryEstimate(
            search=memory.get(StageName.REMOVAL),
            distillation=memory.get(StageName.DISTILLATION) if heals(spec) else None,
        ),
        stages=stages,
        device=placement.device,
        disk_bytes=None if shape is None else disk_bytes(spec, shape),
        store_bytes=None if stored is None else stored.kept,
        store_peak_bytes=None if stored is None else stored.peak,
        queue=placement.queue,
        earlier=scaled,
        warnings=[
            *_refused(placement),
            *_warnings(spec, model, shape, evaluations, *limits(spec, blocks)),
        ],
    )


def _checkpoints(spec: JobSpec, blocks: int, shape: ModelShape | None) -> list[CheckpointEstimate]:
    counts = limits(spec, blocks)
    roles: list[Role] = ["unified"] if is_unified(spec, blocks) else ["prefill", "decode"]
    made: list[Checkpoint | None] = [None] * len(roles) if shape is None else list(checkpoints_of(spec, shape))
    return [
        _checkpoint(role, blocks - count, shape, one) for role, count, one in zip(roles, counts, made, strict=False)
    ]


def _checkpoint(role: Role, kept: int, shape: ModelShape | None, made: Checkpoint | None) -> CheckpointEstimate:
    if shape is None:
        return CheckpointEstimate(role=role, blocks=kept, parameters=None, bytes=None, kv_bytes_per_token=None)
    numbers = shape.numbers if made is None else made.numbers
    # Which blocks stay is not known: of unlike ones their mean counts.
    kv = None if shape.kv_numbers is None else kept * shape.kv_numbers // shape.blocks
    return CheckpointEstimate(
        role=role,
        blocks=kept,
        parameters=numbers,
        bytes=numbers * shape.item_bytes,
        kv_bytes_per_token=None if kv is None else kv * shape.item_bytes,
    )


def _evaluations(found: Searches) -> SearchEstimate:
    by_name = {"prefill": found.prefill, "decode": found.decode, "parts": found.parts}
    return SearchEstimate(
        **{name: sets.most for name, sets in by_name.items()},
        ranges={name: SetRange(least=sets.least, most=sets.most) for name, sets in by_name.items()},
    )


def _stages(
    placement: Placement, work: Mapping[StageName, Work], earlier: EarlierJob | None
) -> Iterator[StageEstimate]:
    device = placement.device
    times: Mapping[StageName, float] = {}
    if device is not None:
        times = {stage: work[stage].on(device, memory) for stage, memory in placement.stages.items()}
    for stage, memory in placement.stages.items():
        by_earlier = None if earlier is None else earlier.seconds.get(stage)
        known = times.get(stage) if by_earlier is None else by_earlier
        yield StageEstimate(
            stage=stage,
            way=memory.way,
            memory_bytes=memory.device_bytes,
            host_bytes=memory.host_bytes,
            fits=fits(memory, device or ASSUMED),
            flops=float(f"{work[stage].flops:.4g}"),
            seconds=None if known is None else round(known, 1),
        )


def _scaled(
    spec: JobSpec, shape: ModelShape, work: Mapping[StageName, Work], earlier: Earlier, placement: Placement
) -> EarlierJob:
    """What an earlier job's seconds come to for this one; of distillation nothing, where it healed nothing."""
    job_id, asked, rows = earlier
    of_earlier = stage_work(asked, shape, checkpoints_of(asked, shape), searches(asked, shape.blocks, shape))
    found = [
        stage
        for stage in map(STAGE.validate_python, rows)
        if not (heals(spec) and isinstance(stage.metrics, DistillationResult) and not stage.metrics.healed)
    ]
    at = placement.device or ASSUMED
    then = stage_memory(asked, shape, checkpoints_of(asked, shape), at)
    return EarlierJob(
        job_id=job_id,
        seconds={
            name: round(took * work[name].on(at, placement.stages[name]) / of_earlier[name].on(at, then[name]), 1)
            for name, took in (
                (StageName(stage.name), (stage.finished_at - stage.started_at).total_seconds())
                for stage in found
                if stage.started_at is not None and stage.finished_at is not None
            )
        },
    )


def _refused(placement: Placement) -> Iterator[EstimateWarning]:
    if placement.lack is not None:
        yield EstimateWarning(message=f"It will be refused: {placement.lack}", param=placement.lack.param)


def _warnings(
    spec: JobSpec,
    model: ModelDescription,
    shape: ModelShape | None,
    evaluations: SearchEstimate,
    prefill: int,
    decode: int,
) -> Iterator[EstimateWarning]:
    kind = model.config["model_type"]
    if not is_tested(kind):
        yield EstimateWarning(
            message=f"{kind} is none of the architectures that were tested. The worker compares a walk through its "
            "blocks with the model itself first, and refuses it where they differ.",
            param="model.source",
        )
    if shape is None:
        yield EstimateWarning(
            message="The model's config.json does not say what its weights are made of (`dtype`, `hidden_size`, "
            "`num_attention_heads`, `vocab_size`), so sizes, memory and times are unknown.",
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
    if 2 * decode > (blocks := num_blocks(model.config)):
        yield EstimateWarning(
            message=f"Up to {decode} of {blocks} blocks go, more than half. Look at the frontier before you serve the "
            "result; fewer can be cut from it.",
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
    if not heals(spec):
        yield EstimateWarning(
            message="Nothing is trained: at most, what goes is folded into the weights that stay. "
            f"`distillation.heal_tokens` of a training batch, {batch_tokens(spec):,}, or more heals them."
            if spec.distillation.enabled
            else "Nothing is healed: the checkpoints have the pruned weights as they are.",
            param="distillation.heal_tokens" if spec.distillation.enabled else "distillation.enabled",
        )
