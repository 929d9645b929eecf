"""Healing in one process beside healing sharded over several: its losses, its time and its memory, on the CPU.

    python -m benchmarks.sharded losses --steps 50
    python -m benchmarks.sharded memory

`losses` heals the reference model, prefill and decode, in this process and in two. `memory` heals a random Llama of
--blocks blocks of 12.6 million parameters for a few steps, in processes of its own, and asks for the most memory that
any of them had for itself, mapped files left out, above what the imports take.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, LlamaConfig

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import PLAN, SCORES, DistillationResult
from pdtrim.contract.spec import JobSpec
from service.stopping import go_on
from service.storage import open_store
from tests.tiny_job import REFERENCE
from workers.stages import distillation, ranks, removal, scoring
from workers.stages.context import StageContext, StoredInput

POLL_S = 0.05
MEMORY_STEPS = 3
WINDOW_TOKENS = 64


Stored = dict[tuple[StageName, str], StoredInput]
INPUTS = TypeAdapter(list[tuple[StageName, str, StoredInput]])


def surroundings_of(folder: Path, model: Path, spec: JobSpec, inputs: Stored) -> StageContext:
    """The surroundings of a stage whose inputs lie in the store of a folder."""
    return StageContext(
        job_id="",
        spec=spec,
        source_dir=model,
        model_revision=None,
        workdir=folder / "work",
        inputs=inputs,
        store=open_store((folder / "store").as_uri()),
        state_prefix="state",
        rows=lambda: None,
        check=go_on,
        publish=lambda progress, message, figures: None,
    )


def searched(folder: Path, model: Path, changes: dict[str, Any]) -> StageContext:
    """The surroundings of a distillation whose scoring and removal are done."""
    spec = JobSpec.model_validate(
        {
            "model": model.as_uri(),
            "prefill": {"remove_blocks": 2},
            "decode": {"remove_blocks": 4},
            "calibration": {"windows": 8, "window_tokens": WINDOW_TOKENS},
            "search": {"algorithm": "greedy"},
            **changes,
        }
    )
    surroundings = surroundings_of(folder, model, spec, {})
    for stage, run, names in (
        (StageName.SCORING, scoring.run, (scoring.WINDOWS, SCORES)),
        (StageName.REMOVAL, removal.run, (PLAN,)),
    ):
        run(surroundings)
        for name in names:
            put = surroundings.store.put_file(f"{stage}/{name}", surroundings.out / name)
            surroundings.inputs[stage, name] = StoredInput(f"{stage}/{name}", put.sha256)
    return surroundings


def healed(surroundings: StageContext, devices: int) -> DistillationResult:
    """What healing finds on so many devices, with a folder and states of its own."""
    spec = surroundings.spec.model_copy(
        update={"distillation": surroundings.spec.distillation.model_copy(update={"devices": devices})}
    )
    workdir = surroundings.workdir.parent / f"on-{devices}"
    return distillation.run(replace(surroundings, spec=spec, workdir=workdir, state_prefix=f"on-{devices}"))


def losses(folder: Path, steps: int) -> None:
    """Print the held-out losses after so many steps as a table."""
    healing = {"heal_tokens": steps * 4 * WINDOW_TOKENS, "batch_windows": 4, "learning_rate": 1e-3, "patience": None}
    surroundings = searched(folder, REFERENCE, {"distillation": healing})
    found = {}
    for devices in (1, 2):
        start = time.monotonic()
        found[devices] = healed(surroundings, devices)
        print(f"{devices}: {time.monotonic() - start:.1f} s", flush=True)
    print("\n| half | steps | before | one process | two | apart by |\n|---|---|---|---|---|---|")
    for half in ("prefill", "decode"):
        one, two = (getattr(found[devices], half) for devices in (1, 2))
        apart = abs(two.after / one.after - 1)
        print(f"| {half} | {two.steps} | {one.before:.6f} | {one.after:.6f} | {two.after:.6f} | {apart:.1e} |")


def write_wide(folder: Path, blocks: int) -> Path:
    """A random float32 Llama whose blocks have 12.6 million parameters."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2730,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((REFERENCE / name).read_bytes())
    return folder


def memory(folder: Path, blocks: int) -> None:
    """Print what a process takes at its most, by the number of them, as a table."""
    model = write_wide(folder / "model", blocks)
    healing = {"heal_tokens": MEMORY_STEPS * 6 * WINDOW_TOKENS, "batch_windows": 6, "gradient_checkpointing": True}
    surroundings = searched(
        folder, model, {"distillation": healing, "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 1}}
    )
    (folder / "job.json").write_text(surroundings.spec.model_dump_json())
    stored = [(stage, name, where) for (stage, name), where in surroundings.inputs.items()]
    (folder / "inputs.json").write_bytes(INPUTS.dump_json(stored))
    imports = _peak([sys.executable, "-c", "import workers.stages.healing_rank"], "-c")
    print(f"imports: {imports / 1e6:.0f} MB")
    print("\n| processes | most of one, MB | above the imports | by the arithmetic |\n|---|---|---|---|")
    for devices in (1, 2, 3):
        command = [
            sys.executable,
            "-m",
            "benchmarks.sharded",
            "heal",
            "--folder",
            str(folder),
            "--devices",
            str(devices),
        ]
        most = _peak(command, "heal" if devices == 1 else ranks.PROGRAM)
        found = DistillationResult.model_validate_json((folder / f"found-{devices}.json").read_bytes())
        assert found.prefill is not None
        assert found.prefill.how is not None
        said = found.prefill.how.needed_bytes
        print(f"| {devices} | {most / 1e6:.0f} | {(most - imports) / 1e6:.0f} | {said / 1e6:.0f} |", flush=True)


def _peak(command: list[str], word: str) -> int:
    """Most bytes that one of a command's processes with `word` among its arguments had for itself."""
    process = psutil.Popen(command)
    most = 0
    while process.poll() is None:
        for one in (process, *process.children(recursive=True)):
            try:
                if word in one.cmdline():
                    held = one.memory_info()
                    most = max(most, held.rss - held.shared)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return most


def heal(folder: Path, devices: int) -> None:
    """Of `memory`: heal in this process, or by those that it starts."""
    spec = JobSpec.model_validate_json((folder / "job.json").read_bytes())
    stored = INPUTS.validate_json((folder / "inputs.json").read_bytes())
    inputs = {(stage, name): where for stage, name, where in stored}
    surroundings = surroundings_of(folder, folder / "model", spec, inputs)
    (folder / f"found-{devices}.json").write_text(healed(surroundings, devices).model_dump_json())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["losses", "memory", "heal"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.what == "heal":
        heal(args.folder, args.devices)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "losses":
            losses(Path(folder), args.steps)
        else:
            memory(Path(folder), args.blocks)


if __name__ == "__main__":
    main()
