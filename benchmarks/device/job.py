"""A whole job on a model of Llama-3.1-8B's shape: all stages, one after the other, in one process.

Its checkpoint is random bfloat16 weights. No file is copied from stage to stage, and no state is saved to go on from;
nothing else is left out.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.device.bench import GIGABYTE, REFERENCE, Bench, random_llama
from benchmarks.device.findings import Findings, Table
from benchmarks.device.stand_ins import is_installed, say_installed, stand_in

if TYPE_CHECKING:
    from service.storage import StoredObject

SHARED_MEMORY = Path("/dev/shm")
SHARD_BYTES = 4_000_000_000
DISK_SHARE = 3.5
"""Of the model's bytes: what a job leaves on its way, at most at one time, beside the model."""
KV_ONLY_SHARE, REMOVED_SHARE = 1 / 4, 1 / 8
"""Of the blocks: what prefill keeps for keys and values alone, and what decode goes without."""
WORDS = 4096
"""Of the reference model's tokenizer, which reads the text."""


@dataclass(frozen=True)
class Sizes:
    """Of the job."""

    windows: int
    window_tokens: int
    batch_windows: int
    steps: int


SIZES = {"full": Sizes(2, 1024, 8, 2), "toy": Sizes(2, 32, 4, 2)}


@dataclass
class Told:
    """What the stages say."""

    steps: list[float] = field(default_factory=list)
    """Held-out losses."""

    def publish(self, progress: float, message: str, figures: Any) -> None:
        """As a stage's context calls it."""
        if "held_out" in figures:
            self.steps.append(figures["held_out"])


def job(bench: Bench) -> Findings:
    """Seconds and memory of every stage of a job that heals all weights of a pair."""
    stand_in()
    vars(bench).pop("shaped", None)  # Another part's model would take its memory.
    with tempfile.TemporaryDirectory(prefix="job-") as name, _model_folder(bench, Path(name)) as model:
        say_installed(Path(name) / "about")
        return _run(bench, model, Path(name))


@contextmanager
def _model_folder(bench: Bench, folder: Path) -> Iterator[Path]:
    """A folder with the checkpoint, in memory where that has room, of fewer blocks where the disk has not.

    What it is given lies in `folder`.
    """
    config = deepcopy(bench.size.shape)
    config.vocab_size = max(config.vocab_size, WORDS)
    room = shutil.disk_usage(folder).free
    in_memory = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 1.2 * _bytes(config)
    while config.num_hidden_layers > 6 and (DISK_SHARE + (0 if in_memory else 1)) * _bytes(config) > room:
        config.num_hidden_layers -= 2
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if in_memory else folder, prefix="model-") as name:
        write_checkpoint(bench, config, Path(name))
        yield Path(name)


def _bytes(config: LlamaConfig) -> int:
    with torch.device("meta"):
        weights = sum(int(parameter.numel()) for parameter in AutoModelForCausalLM.from_config(config).parameters())
    return 2 * weights


def write_checkpoint(bench: Bench, config: LlamaConfig, folder: Path) -> None:
    """A checkpoint of random weights, made on the device, in shards, with the reference model's tokenizer."""
    model = random_llama(config, bench.device)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in model.state_dict().items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensor.cpu() for name, tensor in shard.items()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / file, folder / file)


def _spec(bench: Bench, model: Path, blocks: int) -> dict[str, Any]:
    sizes = SIZES["full" if bench.size.shape.hidden_size > 1000 else "toy"]
    return {
        "model": model.as_uri(),
        "prefill": {"kv_only_blocks": max(1, int(KV_ONLY_SHARE * blocks))},
        "decode": {"remove_blocks": max(1, int(REMOVED_SHARE * blocks))},
        "calibration": {"windows": sizes.windows, "window_tokens": sizes.window_tokens},
        "search": {"algorithm": "greedy"},
        "distillation": {
            "heal_tokens": sizes.steps * sizes.batch_windows * sizes.window_tokens,
            "batch_windows": sizes.batch_windows,
            "learning_rate": 1e-5,
        },
        "evaluation": {"windows": sizes.windows, "speed_tokens": 8, "speed_repeats": 1},
    }


def _run(bench: Bench, model: Path, folder: Path) -> Findings:
    # What is imported here needs what stands in.
    from pdtrim.contract.jobs import StageName
    from pdtrim.contract.results import DistillationResult
    from pdtrim.contract.spec import JobSpec
    from workers.stages import STAGES, evaluation
    from workers.stages.context import StageContext, StoredInput

    class Context(StageContext):
        def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
            """Another 10 GB on the disk."""

    if not is_installed("matplotlib"):
        evaluation.__dict__["_write_report"] = lambda context, report: None
    blocks = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    spec = JobSpec.model_validate(_spec(bench, model, blocks))
    findings, told = Findings(), Told()
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    table = findings.table(
        f"{blocks} blocks, {weights / GIGABYTE:.1f} GB of bfloat16 weights; prefill keeps "
        f"{spec.prefill.kv_only_blocks} blocks for keys and values alone, decode goes without "
        f"{spec.decode.remove_blocks}; healing of all weights, {spec.distillation.heal_tokens} tokens a half, in "
        f"batches of {spec.distillation.batch_windows} windows of {spec.calibration.window_tokens}:",
        {
            "stage": "",
            "seconds": ".1f",
            "peak GB on the device": ".1f",
            "resident GB": ".1f",
            "left on disk, GB": ".1f",
        },
    )
    inputs: dict[tuple[StageName, str], StoredInput] = {}
    for name, stage in STAGES.items():
        context = Context(
            job_id="job",
            spec=spec,
            source_dir=model,
            model_revision=None,
            workdir=folder / "work",
            inputs=inputs,
            store=_KeptHere(folder / "store"),
            state_prefix=str(name),
            rows=lambda: None,
            check=lambda: None,
            publish=told.publish,
        )
        result = _measured(bench, table, name, partial(stage, context), folder)
        # The next stages find the files where they would have fetched them to.
        target = folder / "work" / "in" / name
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        context.out.rename(target)
        for path in (path for path in target.rglob("*") if path.is_file()):
            inputs[name, path.relative_to(target).as_posix()] = StoredInput("", "")
        if isinstance(result, DistillationResult):
            _say_how(findings, result)
    return findings


def _measured(bench: Bench, table: Table, name: str, stage: Callable[[], Any], folder: Path) -> Any:
    gc.collect()
    on_device = bench.device.type == "cuda"
    if on_device:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
    start = bench.now()
    result = stage()
    seconds = bench.now() - start
    peak = torch.cuda.max_memory_allocated(bench.device) / GIGABYTE if on_device else None
    left = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    table.add(name, seconds, peak, psutil.Process().memory_info().rss / GIGABYTE, left / GIGABYTE)
    print(f"{name}: {seconds:.1f} s, {0 if peak is None else peak:.1f} GB", flush=True)
    return result


def _say_how(findings: Findings, result: Any) -> None:
    table = findings.table(
        "How healing went:",
        {
            "half": "",
            "weights": "",
            "moments": "",
            "blocks recomputed": "",
            "parts of a batch": "",
            "GB by the arithmetic": ".1f",
            "held-out loss before": ".4f",
            "after": ".4f",
            "kept": "",
        },
    )
    for half in ("prefill", "decode"):
        healing = getattr(result, half)
        if healing is None or healing.how is None:
            findings.failures.append(f"{half} was not healed")
            continue
        how = healing.how
        table.add(
            half,
            how.precision,
            how.moments,
            str(how.gradient_checkpointing),
            how.gradient_accumulation,
            how.needed_bytes / GIGABYTE,
            healing.before,
            healing.after,
            healing.kept,
        )


@dataclass(frozen=True)
class _KeptHere:
    """What stages use of an artifact store, on the disk that they work on: a file is linked, not copied."""

    folder: Path

    def put_file(self, key: str, path: Path) -> StoredObject:
        target = self._place(key)
        target.unlink(missing_ok=True)
        target.hardlink_to(path)
        return self._stored(target)

    def put_bytes(self, key: str, data: bytes) -> StoredObject:
        target = self._place(key)
        target.write_bytes(data)
        return self._stored(target)

    def get_bytes(self, key: str) -> bytes:
        return self._found(key).read_bytes()

    def download(self, key: str, path: Path) -> None:
        path.hardlink_to(self._found(key))

    def _place(self, key: str) -> Path:
        target = self.folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _stored(self, path: Path) -> StoredObject:
        from service.storage import StoredObject

        return StoredObject(path.as_uri(), path.stat().st_size, "")

    def _found(self, key: str) -> Path:
        from service.storage import ObjectNotFound

        if not (self.folder / key).exists():
            raise ObjectNotFound(key)
        return self.folder / key
