"""Jobs of different kinds, for what an estimate says of them to be held against what they take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from service.sources import reference_model

REAL = Path("build/real")
"""Where `benchmarks/real_models.py` puts what it makes of packages."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
REFERENCE: dict[str, Any] = {
    "calibration": {"windows": 4, "window_tokens": 64},
    "evaluation": {"windows": 8, "speed_tokens": 8, "speed_repeats": 1},
}
SMALL: dict[str, Any] = {
    "calibration": {"windows": 2, "window_tokens": 64},
    "evaluation": {"windows": 4, "speed_tokens": 8, "speed_repeats": 1},
}


@dataclass(frozen=True)
class MeasuredJob:
    """A job, and what it is called in a table."""

    title: str
    model: str
    spec: Mapping[str, Any]


JOBS: Mapping[str, MeasuredJob] = {
    "blocks": MeasuredJob(
        "reference, blocks, all weights healed",
        "reference",
        REFERENCE
        | {
            "prefill": {"remove_blocks": 2},
            "decode": {"remove_blocks": 4},
            "search": {"evaluations": 20},
            "distillation": {"heal_tokens": 8_192},
        },
    ),
    "kv_only": MeasuredJob(
        "reference, keys and values alone, adapters",
        "reference",
        REFERENCE
        | {
            "prefill": {"kv_only_blocks": 3},
            "decode": {"remove_blocks": 2},
            "search": {"algorithm": "greedy"},
            "distillation": {"heal_tokens": 8_192, "trainable": "lora"},
        },
    ),
    "budget": MeasuredJob(
        "reference, a budget of FLOPs, nothing healed",
        "reference",
        REFERENCE
        | {
            "prefill": {"flops": 0.75},
            "decode": {"remove_blocks": 1},
            "search": {"evaluations": 20},
            "distillation": {"enabled": False},
        },
    ),
    "real": MeasuredJob(
        "SmolLM2-135M, one checkpoint, all weights healed",
        "smollm2",
        SMALL
        | {
            "prefill": {"remove_blocks": 2},
            "decode": {"remove_blocks": 2},
            "search": {"algorithm": "greedy"},
            "distillation": {"heal_tokens": 4_096, "batch_windows": 4},
        },
    ),
    "billion": MeasuredJob(
        "a billion random weights, one checkpoint, adapters",
        "billion",
        {
            "calibration": {"windows": 2, "window_tokens": 32},
            "prefill": {"remove_blocks": 1},
            "decode": {"remove_blocks": 1},
            "search": {"algorithm": "greedy"},
            "distillation": {"heal_tokens": 128, "batch_windows": 2, "trainable": "lora"},
            "evaluation": {"windows": 2, "speed_tokens": 2, "speed_repeats": 1},
            # Of random weights scoring finds that bfloat16 loses too much.
            "precision": "bfloat16",
        },
    ),
}


def model_of(job: MeasuredJob, folder: Path) -> Path:
    """The folder of a job's model, in `folder` where it has to be made."""
    if job.model == "reference":
        return reference_model()
    if job.model == "smollm2":
        return REAL / "smollm2-135m-instruct"
    made = folder / job.model
    if not (made / "config.json").exists():
        _write_random(made)
    return made


def text_of(job: MeasuredJob) -> dict[str, Any]:
    """What a specification says of that text."""
    return {"data": {"source": f"file://{(REAL / 'brown.jsonl').resolve()}"}} if job.model == "smollm2" else {}


def documents_of(job: MeasuredJob) -> Sequence[str] | None:
    """The text of a job: English where the model is real, else the Python standard library's source."""
    if job.model != "smollm2":
        return None
    lines = (REAL / "brown.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def _write_random(folder: Path) -> None:
    """A Llama of a billion random weights in bfloat16, read by the reference model's tokenizer."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(0.02)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER:
        (folder / name).write_bytes((reference_model() / name).read_bytes())
    config.save_pretrained(folder)
