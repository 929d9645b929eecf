"""Export: cut the checkpoints out of the source's shards, then prove that they load and compute what they should."""

from __future__ import annotations

import shutil
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import CheckpointProof, ExportResult
from service.stopping import interruptible
from workers.inputs.models import device, give_back_memory
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.checkpoint import SourceTensors, empty_model, write_checkpoint
from workers.pruning.model.configuration import read_config
from workers.pruning.model.parts import zeroed_tensors
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.model.speculation import left_behind
from workers.pruning.serving.handover import KvTokenRule
from workers.reporting.card import inherited_metadata, model_card
from workers.stages.checkpoint_proof import Healed, healed_model, prove_resident, prove_streamed, two_fit
from workers.stages.context import StageContext
from workers.stages.halves import DECODE, PREFILL
from workers.stages.kv_tokens import choose_rule, recorded
from workers.stages.removal import Plans, read_plans
from workers.stages.scoring import WINDOWS, read_opening
from workers.stages.width import HalfChannels, read_channels

PROOF_TOKENS = 32
SHARDS_IN_MEMORY = 8
"""So many files of a checkpoint a worker could hold in what it may take; it holds one while it writes."""


def roles(plans: Plans) -> dict[str, tuple[BlockPlan, str]]:
    """Role of each checkpoint → its plan and the distillation artifact with its trained tensors."""
    if plans.unified:
        return {"unified": (plans.prefill, PREFILL)}
    return {"prefill": (plans.prefill, PREFILL), "decode": (plans.decode, DECODE)}


def run(context: StageContext) -> ExportResult:
    """Writes one folder a checkpoint. Raises: BrokenCheckpoint, ExportMismatch."""
    plans, channels = read_plans(context), read_channels(context)
    windows = load_file(context.input(StageName.SCORING, WINDOWS))["calibration"].to(device())
    proof = windows[:1, :PROOF_TOKENS]
    notes = left_behind(context.model_dir, SourceTensors.of(context.source_dir).files)
    rule = _choose_rule(context, plans, channels, windows)
    in_memory = two_fit(context, torch.float32)
    prove = prove_resident if in_memory else prove_streamed
    proofs = {}
    for number, (role, (plan, trained)) in enumerate(roles(plans).items()):
        start = 0.4 + 0.3 * number
        context.say(start, f"Writing the {role} checkpoint.")
        overrides = context.input(StageName.DISTILLATION, trained)
        target = context.out / role
        pdtrim = pdtrim_json(context, role, plan, plans, rule) | ({"notes": notes} if notes else {})
        written = target if context.composite is None else context.workdir / "pruned" / role
        write = partial(
            write_checkpoint,
            context.model_dir,
            written,
            kept=plan.kept,
            overrides=SourceTensors.in_file(overrides),
            pdtrim=pdtrim,
            model_card=model_card(pdtrim, inherited_metadata(context.source_dir)),
            zeroed=_zeroed(context, plan),
            kept_channels=channels.of(role),
            max_shard_bytes=None if context.memory_bytes is None else 1 + context.memory_bytes // SHARDS_IN_MEMORY,
            check=context.check,
        )
        interruptible(context.check, write)
        if context.composite is not None:
            put_back = partial(context.composite.write_whole, written, target, plan.kept, context.check)
            interruptible(context.check, put_back)
            shutil.rmtree(written)
        context.say(start + 0.15, f"Proving the {role} checkpoint.")
        give_back_memory()  # of the last proof, and of writing
        healed = Healed(plan, channels.of(role), overrides)
        difference = prove(context, role, healed, target, proof)
        files = [path for path in target.iterdir() if path.is_file()]
        proofs[role] = CheckpointProof(
            files=len(files),
            bytes=sum(path.stat().st_size for path in files),
            max_logit_difference=difference,
        )
    return ExportResult(
        way="resident" if in_memory else "streamed",
        checkpoints=proofs,
        kv_tokens=None if rule is None else recorded(rule),
        notes=notes,
    )


def _zeroed(context: StageContext, plan: BlockPlan) -> set[str]:
    """What is zero in a checkpoint whose kept blocks give up parts."""
    if not plan.parts:
        return set()
    return zeroed_tensors(block_stack(empty_model(context.model_dir, context.check)), plan.parts)


def _choose_rule(context: StageContext, plans: Plans, channels: HalfChannels, windows: Tensor) -> KvTokenRule | None:
    """The KV token rule, when the job asks for one. A unified checkpoint hands its cache to another copy of itself."""
    asked = context.spec.kv_tokens
    if asked is None:
        return None
    context.say(0.0, "Choosing the KV tokens that decode is sent.")
    models = [
        healed_model(context, Healed(plan, channels.of(role), context.input(StageName.DISTILLATION, trained)))
        for role, (plan, trained) in roles(plans).items()
    ]
    dense = read_config(context.model_dir)
    layer_map = kv_layer_map(plans.prefill, plans.decode)
    return choose_rule(context, asked, dense, (models[0], models[-1]), layer_map, windows)


def pdtrim_json(
    context: StageContext, role: str, plan: BlockPlan, plans: Plans, rule: KvTokenRule | None
) -> dict[str, Any]:
    """What a serving stack has to know about a checkpoint; docs/reference/checkpoint.md describes it."""
    share = (context.spec.decode if role == "decode" else context.spec.prefill).mlp_width
    return {
        "format_version": 1,
        "role": role,
        "source": {"uri": context.spec.model.source, "revision": context.model_revision},
        "num_source_blocks": plan.num_blocks,
        "kept_blocks": list(plan.kept),
        "distilled_blocks": {str(removed): absorber for removed, absorber in sorted(plan.distilled.items())},
        "kv_layer_map": kv_layer_map(plans.prefill, plans.decode),
        **({"dead_units": {str(block): part for block, part in sorted(plan.parts.items())}} if plan.parts else {}),
        **({} if share == 1 else {"mlp_width": share}),
        **({} if context.composite is None else {"vision_language": True}),
        **({} if rule is None else {"kv_tokens": rule.to_json()}),
        **({"opening": opening} if (opening := read_opening(context)) else {}),
        "serving": {"first_token": context.spec.serving.first_token},
        "job": context.job_id,
        "seed": context.spec.seed,
        "versions": {name: version(name) for name in ("pdtrim", "torch", "transformers", "safetensors")},
    }
