"""Request and response examples of the OpenAPI document. Tests hold them against the contract models."""

from __future__ import annotations

import json
from typing import Any

JOB_ID = "job_0198a3f25e0e7c52b3a0d1f3b6a4c7de"

REQUESTS: dict[str, Any] = {
    "pair": {
        "summary": "Two checkpoints: prefill gives up 2 blocks, decode 4",
        "value": {
            "model": "reference",
            "prefill": {"remove_blocks": 2},
            "decode": {"remove_blocks": 4},
            "metadata": {"team": "serving"},
        },
    },
    "unified": {
        "summary": "One checkpoint for both stages, from the hub, with your own calibration text",
        "value": {
            "model": {"source": "hf://Qwen/Qwen3-8B", "revision": "main"},
            "prefill": {"remove_blocks": 6},
            "decode": {"remove_blocks": 6},
            "data": {"source": "hf://datasets/Salesforce/wikitext"},
            "calibration": {"windows": 64, "window_tokens": 1024},
            "seed": 7,
        },
    },
    "quick": {
        "summary": "No training: greedy search, the pruned weights exported as they are",
        "value": {
            "model": "reference",
            "prefill": {"remove_blocks": 1},
            "decode": {"remove_blocks": 1},
            "search": {"algorithm": "greedy", "objective": "kl"},
            "distillation": {"enabled": False},
        },
    },
    "bounded": {
        "summary": "As many blocks as keep perplexity within 2 % in prefill and 5 % in decode, but not the outermost",
        "value": {
            "model": "reference",
            "prefill": {"max_perplexity_increase": 0.02},
            "decode": {"max_perplexity_increase": 0.05, "remove_blocks": 6},
            "search": {"protect": [0, 11]},
        },
    },
}

SCORING: dict[str, Any] = {
    "name": "scoring",
    "status": "succeeded",
    "progress": 1.0,
    "message": "",
    "attempt": 1,
    "worker": "gpu-1",
    "metrics": {
        "blocks": 12,
        "cosine": [0.61, 0.88, 0.93, 0.95, 0.96, 0.97, 0.97, 0.96, 0.95, 0.93, 0.9, 0.72],
        "windows": {"train": 641, "calibration": 24, "validation": 32},
        "opening": [],
        "warnings": [],
        "precision": {"used": "bfloat16", "windows": 0, "float32_loss": None, "bfloat16_loss": None},
    },
    "error": None,
    "started_at": "2026-01-05T10:00:01Z",
    "finished_at": "2026-01-05T10:00:09Z",
}
REMOVAL: dict[str, Any] = {
    **SCORING,
    "name": "removal",
    "status": "running",
    "progress": 0.25,
    "message": "Searching what prefill gives up.",
    "metrics": None,
    "started_at": "2026-01-05T10:00:10Z",
    "finished_at": None,
}
WAITING: dict[str, Any] = {
    **REMOVAL,
    "status": "pending",
    "progress": 0.0,
    "message": "",
    "attempt": 0,
    "worker": None,
    "started_at": None,
}

JOB: dict[str, Any] = {
    "object": "job",
    "id": JOB_ID,
    "status": "running",
    "spec": REQUESTS["pair"]["value"],
    "queue": "default",
    "metadata": {"team": "serving"},
    "cut_from": None,
    "stages": [SCORING, REMOVAL, *({**WAITING, "name": name} for name in ("distillation", "export", "evaluation"))],
    "error": None,
    "model_revision": None,
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "created_at": "2026-01-05T10:00:00Z",
    "started_at": "2026-01-05T10:00:01Z",
    "finished_at": None,
    "estimated_finish": "2026-01-05T10:01:40Z",
}
CUT_JOB: dict[str, Any] = {
    **JOB,
    "id": "job_0198a41b7c3f7d90a1b2c3d4e5f60718",
    "status": "queued",
    "spec": {**REQUESTS["pair"]["value"], "prefill": {"remove_blocks": 2}, "decode": {"remove_blocks": 3}},
    "cut_from": JOB_ID,
    "stages": [
        {**WAITING, "name": "scoring", "status": "queued"},
        *({**WAITING, "name": name} for name in ("removal", "distillation", "export", "evaluation")),
    ],
    "versions": {},
    "created_at": "2026-01-05T11:00:00Z",
    "started_at": None,
    "estimated_finish": None,
}
JOBS: dict[str, Any] = {"object": "list", "data": [JOB], "has_more": False, "first_id": JOB_ID, "last_id": JOB_ID}

EVENT: dict[str, Any] = {
    "object": "event",
    "number": 4,
    "type": "stage.progress",
    "stage": "removal",
    "message": REMOVAL["message"],
    "data": {"progress": 0.25},
    "created_at": "2026-01-05T10:00:32Z",
}
EVENTS: dict[str, Any] = {"object": "list", "data": [EVENT], "has_more": False, "first_id": "4", "last_id": "4"}
STREAM = f"event: {EVENT['type']}\ndata: {json.dumps(EVENT)}\nid: {EVENT['number']}\n\n"

ARTIFACT: dict[str, Any] = {
    "object": "artifact",
    "id": "art_0198a3f2a3b07d61a5e5d0c3f1b2a4c6",
    "stage": "export",
    "name": "decode/model.safetensors",
    "uri": f"s3://models/pdtrim/jobs/{JOB_ID}/export/1/decode/model.safetensors",
    "size": 7834112,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "created_at": "2026-01-05T10:04:00Z",
}
ARTIFACTS: dict[str, Any] = {
    "object": "list",
    "data": [ARTIFACT],
    "has_more": False,
    "first_id": ARTIFACT["id"],
    "last_id": ARTIFACT["id"],
}
EXPORT_REQUESTS: dict[str, Any] = {
    "pair": {
        "summary": "The same prefill half, and a decode half that gives up one block less",
        "value": {"prefill": {"remove_blocks": 2}, "decode": {"remove_blocks": 3}},
    },
    "unified": {
        "summary": "One checkpoint for both halves, with labels of its own",
        "value": {"prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 1}, "metadata": {"tier": "careful"}},
    },
}


def _point(removed: list[int], loss: float) -> dict[str, Any]:
    return {
        "remove_blocks": len(removed),
        "removed": removed,
        "distilled": {},
        "loss": loss,
        "perplexity_increase": None,
    }


POINTS: list[dict[str, Any]] = [_point([], 0.0), _point([5], 0.048), _point([2, 5], 0.121)]
FRONTIER: dict[str, Any] = {
    "object": "frontier",
    "job_id": JOB_ID,
    "objective": "kl",
    "chosen": {"prefill": POINTS[-1], "decode": _point([2, 5, 8, 9], 0.294)},
    "unified": POINTS,
    "prefill": POINTS,
    "decode": [_point([2, 5], 0.118), _point([2, 5, 9], 0.187), _point([2, 5, 8, 9], 0.294)],
}
ESTIMATE: dict[str, Any] = {
    "object": "estimate",
    "architecture": "llama",
    "model_revision": None,
    "dense": {"role": "dense", "blocks": 12, "parameters": 5_509_824, "bytes": 11_019_648, "kv_bytes_per_token": 3_072},
    "checkpoints": [
        {"role": "prefill", "blocks": 10, "parameters": 4_722_624, "bytes": 9_445_248, "kv_bytes_per_token": 2_560},
        {"role": "decode", "blocks": 8, "parameters": 3_935_424, "bytes": 7_870_848, "kv_bytes_per_token": 2_048},
    ],
    "evaluations": {
        "prefill": 79,
        "decode": 56,
        "parts": 0,
        "ranges": {
            "prefill": {"least": 34, "most": 79},
            "decode": {"least": 28, "most": 56},
            "parts": {"least": 0, "most": 0},
        },
    },
    "memory_bytes": {"search": 878_791_808, "distillation": 1_259_499_776},
    "stages": [
        {
            "stage": "scoring",
            "way": "resident",
            "memory_bytes": 878_791_808,
            "host_bytes": 480_000_000,
            "fits": True,
            "flops": 370700000000.0,
            "seconds": 8.1,
        },
        {
            "stage": "removal",
            "way": "resident",
            "memory_bytes": 878_791_808,
            "host_bytes": 480_000_000,
            "fits": True,
            "flops": 24210000000000.0,
            "seconds": 61.3,
        },
        {
            "stage": "distillation",
            "way": "float32",
            "memory_bytes": 1_259_499_776,
            "host_bytes": 542_976_000,
            "fits": True,
            "flops": 11180000000000.0,
            "seconds": 190.4,
        },
        {
            "stage": "export",
            "way": "resident",
            "memory_bytes": 755_110_112,
            "host_bytes": 491_031_520,
            "fits": True,
            "flops": 4676000000.0,
            "seconds": 4.0,
        },
        {
            "stage": "evaluation",
            "way": "resident",
            "memory_bytes": 896_107_904,
            "host_bytes": 630_000_000,
            "fits": True,
            "flops": 1407000000000.0,
            "seconds": 21.7,
        },
    ],
    "device": {
        "queue": "default",
        "kind": "cuda",
        "name": "NVIDIA H100 80GB HBM3",
        "count": 1,
        "memory_bytes": 85_017_493_504,
        "host_bytes": 137_438_953_472,
        "disk_bytes": 536_870_912_000,
        "flops": 52000000000000.0,
        "bfloat16_flops": 610000000000000.0,
        "bytes_per_second": 2400000000000.0,
        "call_seconds": 4.1e-06,
    },
    "disk_bytes": 80_145_600,
    "store_bytes": 41_732_928,
    "store_peak_bytes": 78_392_832,
    "queue": "default",
    "earlier": {
        "job_id": "job_0198a3f25e0e7c52b3a0d1f3b6a4c7de",
        "seconds": {"scoring": 8.1, "removal": 61.3, "distillation": 190.4, "export": 4.0, "evaluation": 21.7},
    },
    "warnings": [
        {
            "message": "Prefill and decode get different depths: vLLM serves such a pair with pdtrim-vllm "
            "(`pdtrim serve`). Equal counts give one checkpoint that every runtime serves.",
            "param": "prefill.remove_blocks",
        }
    ],
}
WEBHOOK_REQUESTS: dict[str, Any] = {
    "ends": {
        "summary": "Hear how every job ended",
        "value": {
            "url": "https://ci.example.com/pdtrim",
            "events": ["job.cancelled", "job.failed", "job.succeeded"],
            "description": "deploys what comes out",
        },
    },
    "cloudevents": {
        "summary": "CloudEvents, for an event broker",
        "value": {
            "url": "https://broker.example.com/ingest",
            "events": ["stage.succeeded", "job.succeeded"],
            "format": "cloudevents",
        },
    },
}
WEBHOOK_CHANGES: dict[str, Any] = {
    "enable": {"summary": "Send again", "value": {"enabled": True}},
    "move": {"summary": "Send elsewhere", "value": {"url": "https://ci.example.com/v2/pdtrim"}},
}
WEBHOOK: dict[str, Any] = {
    "object": "webhook",
    "id": "wh_0198a3f1c2d47a90b1e2f3a4b5c6d7e8",
    **WEBHOOK_REQUESTS["ends"]["value"],
    "format": "standard",
    "enabled": True,
    "disabled_reason": None,
    "failing_since": None,
    "created_at": "2026-01-05T09:00:00Z",
}
NEW_SECRET: dict[str, Any] = {**WEBHOOK, "secret": "whsec_" + "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="}
WEBHOOKS: dict[str, Any] = {
    "object": "list",
    "data": [WEBHOOK],
    "has_more": False,
    "first_id": WEBHOOK["id"],
    "last_id": WEBHOOK["id"],
}
DELIVERY: dict[str, Any] = {
    "object": "webhook.delivery",
    "id": "msg_0198a3f6b7c87d12a3b4c5d6e7f80912",
    "type": "job.succeeded",
    "job_id": JOB_ID,
    "status": "pending",
    "attempts": [
        {
            "number": 1,
            "at": "2026-01-05T10:04:02Z",
            "seconds": 0.21,
            "response_code": 503,
            "error": "answered 503",
            "excerpt": "deploying, come back later",
        }
    ],
    "next_attempt_at": "2026-01-05T10:04:12Z",
    "created_at": "2026-01-05T10:04:00Z",
}
WAITING_DELIVERY: dict[str, Any] = {**DELIVERY, "attempts": [], "next_attempt_at": "2026-01-05T10:04:00Z"}
DELIVERIES: dict[str, Any] = {
    "object": "list",
    "data": [DELIVERY],
    "has_more": False,
    "first_id": DELIVERY["id"],
    "last_id": DELIVERY["id"],
}
PUBLICATION: dict[str, Any] = {
    "object": "publication",
    "target": "mlflow",
    "status": "succeeded",
    "attempt": 1,
    "error": "",
    "urls": ["https://mlflow.example.com/#/experiments/1/runs/9c1c3a2f4f6e4b8c8f0e3b0f6c0f2a11"],
    "next_attempt_at": None,
    "updated_at": "2026-01-05T11:12:13Z",
}
PUBLICATIONS: dict[str, Any] = {
    "object": "list",
    "data": [PUBLICATION],
    "has_more": False,
    "first_id": "mlflow",
    "last_id": "mlflow",
}
READY: dict[str, Any] = {
    "status": "ready",
    "checks": {name: {"ok": True, "detail": ""} for name in ("database", "broker", "store")},
}


def response(example: Any, description: str) -> dict[str, Any]:
    """OpenAPI's response object with one JSON example."""
    return {"description": description, "content": {"application/json": {"example": example}}}
