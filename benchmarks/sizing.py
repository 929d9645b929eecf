"""What estimates say of memory, of models from 1 to 405 billion weights on machines of several kinds.

    python -m benchmarks.sizing

Prints the tables of docs/operations/sizing.md. No model is needed: shapes are those of published Llamas and Qwen3-32B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim.contract.devices import Device
from pdtrim.contract.healing_memory import LOSS_LOGITS
from pdtrim.contract.jobs import StageName
from pdtrim.contract.spec import JobSpec
from service.checking.memory import CONTEXT_BYTES, StageMemory, checkpoints_of, stage_memory
from service.checking.placement import fits
from service.checking.sets import searches
from service.checking.shape import ModelShape, shape_of
from service.checking.storing import disk_bytes, store_bytes
from service.checking.work import WORK_SHARE, stage_work
from service.sources import ModelDescription

GB = 10**9
GPU_FLOPS = 6e14
"""Of a GPU of 80 GB in bfloat16, as a large product gets of its 989 × 10¹²: three fifths."""


@dataclass(frozen=True)
class Published:
    """A model by its configuration, and what its weights come to."""

    name: str
    numbers: int
    config: Mapping[str, Any]


def _llama(blocks: int, hidden: int, heads: int, wide: int, words: int = 128_256, *, tied: bool = False) -> Any:
    return {
        "model_type": "llama",
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": wide,
        "vocab_size": words,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


MODELS = (
    Published("1B", 1_235_814_400, _llama(16, 2048, 32, 8192, tied=True) | {"head_dim": 64}),
    Published("8B", 8_030_261_248, _llama(32, 4096, 32, 14_336)),
    Published("32B", 32_762_123_264, _llama(64, 5120, 64, 25_600, 151_936) | {"model_type": "qwen3", "head_dim": 128}),
    Published("70B", 70_553_706_496, _llama(80, 8192, 64, 28_672)),
    Published("405B", 405_853_388_800, _llama(126, 16_384, 128, 53_248)),
)


def machine(gigabytes: int, count: int, host: int) -> Device:
    """GPUs of a kind in one machine."""
    return Device(
        queue="default",
        kind="cuda",
        name=f"{count} × {gigabytes} GB",
        count=count,
        memory_bytes=gigabytes * GB,
        host_bytes=host * GB,
        disk_bytes=10**14,
        flops=GPU_FLOPS / 2,
        bfloat16_flops=GPU_FLOPS,
        bytes_per_second=2e12,
        call_seconds=5e-6,
    )


SHOWN = (StageName.REMOVAL, StageName.DISTILLATION, StageName.EXPORT, StageName.EVALUATION)
MACHINES = (machine(24, 1, 128), machine(80, 1, 256), machine(80, 8, 2000))


def job(blocks: int, tokens: int = 20_000_000) -> JobSpec:
    """Prefill keeps a quarter of the blocks for keys and values alone, decode goes without an eighth."""
    return JobSpec.model_validate(
        {
            "model": "hf://a/b",
            "prefill": {"kv_only_blocks": blocks // 4},
            "decode": {"remove_blocks": blocks // 8},
            "search": {"algorithm": "greedy"},
            "calibration": {"windows": 16, "window_tokens": 1024},
            "distillation": {"heal_tokens": tokens},
        }
    )


def shape(model: Published) -> ModelShape:
    """As a hub's index of shards of 5 GB says it."""
    size = 2 * model.numbers
    shards = {f"{number}.safetensors": size // -(-size // (5 * GB)) for number in range(-(-size // (5 * GB)))}
    found = shape_of(ModelDescription(dict(model.config), None, shards))
    assert found is not None
    return found


def memory_table(models: tuple[Published, ...] = MODELS[:4]) -> str:
    """By model and machine: how each stage runs, and the most memory of a device."""
    lines = ["| model | devices | scoring, removal | distillation | export | evaluation |", "|---|---|---|---|---|---|"]
    for model in models:
        found = shape(model)
        spec = job(found.blocks)
        for device in MACHINES:
            stages = stage_memory(spec, found, checkpoints_of(spec, found), device)
            cells = [_cell(stages[stage], device) for stage in SHOWN]
            lines.append(f"| {model.name} | {device.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(memory: StageMemory, device: Device) -> str:
    too_much = "" if fits(memory, device) else ", too much"
    return f"{memory.device_bytes / GB:.0f}{too_much}: {memory.way}"


def work_table() -> str:
    """By model: what a job computes, and what it stores."""
    lines = [
        "| model | sets | removal | healing, 20 M tokens a half | evaluation | store | scratch |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        found = shape(model)
        spec = job(found.blocks)
        of_job = searches(spec, found.blocks, found)
        work = stage_work(spec, found, checkpoints_of(spec, found), of_job)
        sets = sum(one.most for one in (of_job.prefill, of_job.decode, of_job.parts))
        flops = [work[stage].flops for stage in (StageName.REMOVAL, StageName.DISTILLATION, StageName.EVALUATION)]
        said = " | ".join(f"{one:.2e}" for one in flops)
        stored = store_bytes(spec, found).kept / GB
        lines.append(f"| {model.name} | {sets} | {said} | {stored:.0f} GB | {disk_bytes(spec, found) / GB:.0f} GB |")
    return "\n".join(lines)


def healing_plan(model: Published, machines: int, *, ahead: int) -> str:
    """The decode half's healing on machines of 8 × 80 GB: what each device holds, row by row, in GB.

    `ahead` blocks are gathered at a time.
    """
    found, count = shape(model), 8 * machines
    spec = job(found.blocks)
    prefill, decode = checkpoints_of(spec, found)
    trained = decode.kept * found.block
    healed = found.blocks * found.block
    healed -= prefill.target.parts["kv_only"] * (found.mlp_at_work + found.hidden * found.attention_width)
    adapters = spec.distillation.lora.rank * found.block_width * decode.kept
    tokens = spec.calibration.window_tokens
    passing = 4 * found.blocks * tokens * found.hidden + 2 * tokens * found.block_width
    passing += 28 * min(tokens * found.vocabulary, LOSS_LOGITS)
    gathered = 4 * ahead * found.largest_block + 2 * found.head
    whole, moments = 2 * found.numbers, 2.03 * trained
    # In the order of the columns: all weights; the same with targets ahead; with moments on the host too; adapters with
    # the dense model beside; with targets ahead.
    rows: dict[str, tuple[float, ...]] = {
        "dense model: 2 n": (whole, 0, 0, whole, 0),
        "prefill half whose cache is read: what it has of its own, or all": (
            2 * healed,
            whole,
            whole,
            2 * healed,
            whole,
        ),
        "student's weights: 2 T, and adapters 6 A": (2 * trained,) * 3 + (2 * trained + 6 * adapters,) * 2,
        "gradients: 2 T, or 4 A": (2 * trained,) * 3 + (4 * adapters,) * 2,
        "moments: 2.03 T, or 8 A": (moments, moments, 0) + (8 * adapters,) * 2,
    }
    ways = ("all weights", "… targets ahead", "… and moments on the host", "adapters", "… targets ahead")
    lines = [f"| {model.name}: GB of each of {count} devices | {' | '.join(ways)} |", f"|---|{'---|' * len(ways)}"]
    for name, values in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{value / count / GB:.1f}' for value in values)} |")
    for name, value in (
        (f"gathered: {ahead} block{'s' * (ahead > 1)} with gradients, and the head", gathered),
        ("a window of 1,024 tokens on its way", passing),
        ("CUDA's own", CONTEXT_BYTES),
    ):
        lines.append(f"| {name} | {' | '.join([f'{value / GB:.1f}'] * len(ways))} |")
    own = gathered + passing + CONTEXT_BYTES
    sums = [(sum(values[way] for values in rows.values()) / count + own) / GB for way in range(len(ways))]
    lines.append(f"| **together** | {' | '.join(f'**{one:.0f}**' for one in sums)} |")
    return "\n".join(lines)


def hours_table() -> str:
    """Hours of the stages that compute, by tokens that heal each half, on machines of 8 GPUs."""
    lines = [
        "| model | machines | removal | healing 5 M | 20 M | 100 M tokens a half | evaluation |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, machines in ((MODELS[3], 1), (MODELS[4], 4)):
        found = shape(model)
        cells = []
        for tokens in (5_000_000, 20_000_000, 100_000_000):
            spec = job(found.blocks, tokens)
            work = stage_work(spec, found, checkpoints_of(spec, found), searches(spec, found.blocks, found))
            together = 8 * machines * WORK_SHARE * GPU_FLOPS
            cells.append(f"{work[StageName.DISTILLATION].flops / together / 3600:.1f}")
        one = WORK_SHARE * GPU_FLOPS * 3600
        removal, evaluation = (work[stage].flops / one for stage in (StageName.REMOVAL, StageName.EVALUATION))
        lines.append(f"| {model.name} | {machines} | {removal:.1f} | {' | '.join(cells)} | {evaluation:.1f} |")
    return "\n".join(lines)


def main() -> None:
    print(memory_table(), "\n")
    print(work_table(), "\n")
    print(healing_plan(MODELS[3], 1, ahead=2), "\n")
    print(healing_plan(MODELS[4], 4, ahead=1), "\n")
    print(hours_table())


if __name__ == "__main__":
    main()
