"""What the DAG asks of PDTrim Service, with nothing but the standard library. Lies beside the DAG."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any
from urllib.request import Request, urlopen

FINAL = ("succeeded", "failed", "cancelled")
SECONDS = 30


def submit(spec: dict[str, Any], key: str) -> str:
    """Create a job; asked again with the same key, any text, within a day, it is the same job. Raises: HTTPError."""
    name = hashlib.sha256(key.encode()).hexdigest()
    return str(_ask("POST", "/v1/jobs", json.dumps(spec).encode(), {"Idempotency-Key": f'"{name}"'})["id"])


def finished(job_id: str) -> dict[str, Any] | None:
    """The job once it has succeeded, None until then. Raises: RuntimeError when it failed or was cancelled."""
    job = _ask("GET", f"/v1/jobs/{job_id}")
    if job["status"] not in FINAL:
        return None
    if job["status"] != "succeeded":
        raise RuntimeError(f"{job_id} {job['status']}: {(job['error'] or {}).get('message', 'nobody said why')}")
    return job


def _ask(method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> dict[str, Any]:
    given = {"Content-Type": "application/json", **(headers or {})}
    if key := os.environ.get("PDTRIM_API_KEY"):
        given["Authorization"] = f"Bearer {key}"
    url = os.environ.get("PDTRIM_URL", "http://127.0.0.1:8000")
    with urlopen(Request(url + path, body, given, method=method), timeout=SECONDS) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
