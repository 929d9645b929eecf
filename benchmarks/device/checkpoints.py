"""The part on the reference model that exports a pair, loads it, and lets one half go on where the other stopped."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.device.bench import ON_CPU, REFERENCE, Bench, Place
from benchmarks.device.findings import Findings
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.checkpoint import SourceTensors, load_checkpoint, write_checkpoint
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.repair.distill import load_tensors
from workers.pruning.serving.handover import Handover
from workers.pruning.serving.pair_server import PrefillDecodePair

PLANS = {
    "prefill": BlockPlan(12, deleted=frozenset({4, 9})),
    "decode": BlockPlan(12, deleted=frozenset({4, 5, 9}), distilled={2: 1}),
}
CHANGED_BLOCK = 1
"""Whose tensors the decode checkpoint has anew."""
SAME_LOGITS = 1e-4
"""Largest difference of float32 logits on one device, as the export of a job has it."""
CLOSE_LOGITS = 2e-3
"""The same between devices, which sum in another order."""


@dataclass(frozen=True)
class Exported:
    """The two checkpoints in a folder, and by role what each has anew, called as in the dense model."""

    folder: Path
    changed: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def of(cls, place: Place, folder: Path) -> Exported:
        """The reference model's pair; what decode has anew is computed at `place`."""
        dense = place.load()
        prefix = f"{block_stack(dense).prefix}{CHANGED_BLOCK}."
        changed = {
            name: (1.01 * parameter.detach()).to(torch.bfloat16)
            for name, parameter in dense.named_parameters()
            if name.startswith(prefix)
        }
        save_file({name: tensor.cpu() for name, tensor in changed.items()}, folder / "changed.safetensors")
        overrides = {"prefill": SourceTensors({}), "decode": SourceTensors.in_file(folder / "changed.safetensors")}
        for role, plan in PLANS.items():
            write_checkpoint(
                REFERENCE,
                folder / role,
                kept=plan.kept,
                overrides=overrides[role],
                pdtrim={"kv_layer_map": kv_layer_map(*PLANS.values())},
                model_card="",
            )
        return cls(folder, {"prefill": {}, "decode": changed})

    def in_memory(self, role: str, place: Place) -> PreTrainedModel:
        """What a checkpoint has to compute."""
        dense = place.load()
        load_tensors(dense, self.changed[role])
        return drop_blocks(dense, PLANS[role].removed)

    def loaded(self, role: str, place: Place) -> PreTrainedModel:
        """A checkpoint."""
        return load_checkpoint(self.folder / role, dtype=place.dtype, device=place.device)

    def pair(self, place: Place) -> PrefillDecodePair:
        """Both."""
        folders = (self.folder / role for role in PLANS)
        return PrefillDecodePair.load(*folders, dtype=place.dtype, device=place.device)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of tokens (batch, time), on the CPU: (batch, time, vocabulary)."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.cpu()


def generated(model: PreTrainedModel, ids: Tensor, *, new_tokens: int, use_cache: bool) -> Tensor:
    """Greedy continuations (batch, new_tokens) of prompts (batch, time)."""
    generate: Any = model.generate
    tokens: Tensor = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        use_cache=use_cache,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens[:, ids.shape[1] :]


def export(bench: Bench) -> Findings:
    """Checkpoints of a pair, loaded on the device and on the CPU: logits, generation, handovers between the two."""
    findings = Findings()
    prompts = bench.windows["calibration"][:2, : bench.prompt_tokens]
    places = (ON_CPU, bench.float32)
    with tempfile.TemporaryDirectory() as folder:
        exported = Exported.of(bench.float32, Path(folder))
        _compare_logits(findings, exported, prompts, places, bench.size.new_tokens)
        _compare_answers(findings, exported, prompts, places, bench.size.new_tokens)
    return findings


def _compare_logits(
    findings: Findings, exported: Exported, prompts: Tensor, places: tuple[Place, ...], new_tokens: int
) -> None:
    table = findings.table(
        "Exported checkpoints in float32: largest difference of a logit, and generated tokens that differ:",
        {
            "checkpoint": "",
            "where": "",
            "logits from the model in memory": ".1e",
            "from the CPU": ".1e",
            "tokens with and without a cache": "",
        },
    )
    for role in PLANS:
        on_cpu: Tensor | None = None
        for place in places:
            ids = prompts.to(place.device)
            model = exported.loaded(role, place)
            logits = logits_of(model, ids)
            on_cpu = logits if on_cpu is None else on_cpu
            from_memory = float((logits - logits_of(exported.in_memory(role, place), ids)).abs().max())
            from_cpu = float((logits - on_cpu).abs().max())
            cached, plain = (
                generated(model, ids, new_tokens=new_tokens, use_cache=use_cache) for use_cache in (True, False)
            )
            differing = int((cached != plain).sum())
            table.add(role, place.name, from_memory, from_cpu, differing)
            what = f"{role} checkpoint, {place.name}"
            findings.judge(f"{what}, logits from those in memory", from_memory, SAME_LOGITS)
            findings.judge(f"{what}, logits from the CPU", from_cpu, CLOSE_LOGITS)
            findings.judge(f"{what}, tokens that differ without a cache", differing, 0)


def _compare_answers(
    findings: Findings, exported: Exported, prompts: Tensor, places: tuple[Place, ...], new_tokens: int
) -> None:
    table = findings.table(
        f"Answers of {new_tokens} tokens, handed over as bytes, from each place to each:",
        {"prefill": "", "decode": "", "tokens that differ from the CPU's": ""},
    )
    pairs = {place.name: exported.pair(place) for place in places}
    on_cpu: Tensor | None = None
    for prefill in pairs:
        sent = pairs[prefill].prefill(prompts).to_bytes()
        for decode in pairs:
            answer = pairs[decode].decode(Handover.from_bytes(sent), new_tokens).cpu()
            on_cpu = answer if on_cpu is None else on_cpu
            differing = int((answer != on_cpu).sum())
            table.add(prefill, decode, differing)
            findings.judge(f"prefill on {prefill}, decode on {decode}, tokens that differ", differing, 0)
