"""A pair's `pdtrim.json` and `config.json`, as an export writes them, for what only reads those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pdtrim.contract.results import Half
from pdtrim.serving.checkpoints import Role, ServedPair, Sizes, paired, read_checkpoint
from pdtrim.serving.deployment import Deployment, Store
from pdtrim.serving.engines import Device, Serving

JOB = "job_0198a3f25e0e7c52b3a0d1f3b6a4c7de"
LAYERS: dict[Role, int] = {"prefill": 10, "decode": 8, "unified": 8}
KV_LAYER_MAP = [0, 2, 3, 4, 5, 6, 8, 9]


def pdtrim_json(role: Role, **changes: Any) -> str:
    """Of the reference model's pair."""
    layer_map = list(range(8)) if role == "unified" else KV_LAYER_MAP
    entries = {
        "format_version": 1,
        "role": role,
        "job": JOB,
        "source": {"uri": "hf://Qwen/Qwen3-8B", "revision": "a" * 40},
        "kv_layer_map": layer_map,
        "serving": {"first_token": "decode"},
    }
    return json.dumps(entries | changes)


def config_json(role: Role, **changes: Any) -> str:
    """A small Llama: 2 heads of 32 numbers, bfloat16."""
    entries = {
        "model_type": "llama",
        "num_hidden_layers": LAYERS[role],
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "dtype": "bfloat16",
    }
    return json.dumps(entries | changes)


def files(role: Role, **config: Any) -> dict[str, bytes]:
    """What the export stage leaves of one checkpoint, by name."""
    return {
        f"{role}/pdtrim.json": pdtrim_json(role).encode(),
        f"{role}/config.json": config_json(role, **config).encode(),
        f"{role}/model.safetensors": b"weights",
    }


def write(folder: Path, role: Role, **changes: Any) -> Path:
    """A checkpoint's folder, as far as it is looked at before an engine is started."""
    (folder / role).mkdir(parents=True, exist_ok=True)
    (folder / role / "pdtrim.json").write_text(pdtrim_json(role, **changes))
    (folder / role / "config.json").write_text(config_json(role))
    return folder / role


def pair(**config: Any) -> ServedPair:
    """The pair of both halves."""
    return paired(*(read_checkpoint(pdtrim_json(role), config_json(role, **config)) for role in ("prefill", "decode")))


def serving(device: Device = "cuda", **config: Any) -> Serving:
    """How it is served."""
    return Serving(pair(**config), "Qwen3-8B-pruned", Sizes(8, 1024), device)


def deployment(
    uri: str = "s3://bucket/artifacts/jobs/1/export/1", device: Device = "cuda", **config: Any
) -> Deployment:
    """Where it is deployed."""
    folders: dict[Half, str] = {"prefill": "prefill", "decode": "decode"}
    store = Store(uri, "https://s3.example.com", "eu-central-1") if uri.startswith("s3://") else Store(uri)
    return Deployment(JOB, serving(device, **config), folders, store)
