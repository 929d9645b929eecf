"""`pdtrim manifests`: what a platform team applies to serve a job's checkpoints."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pdtrim.client.transports import DEFAULT_URL
from pdtrim.command.connection import JobId, Key, Url, connected
from pdtrim.contract.manifests import Runtime


def manifests(
    job: JobId,
    runtime: Annotated[Runtime, typer.Option(help="`vllm` is plain Kubernetes.")],
    device: Annotated[str | None, typer.Option(help="cuda, the default, or cpu.", metavar="DEVICE")] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="Sequences at once; 8 by default.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=16, help="Longest sequence; what the model can do by default, up to 8,192.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Image with vLLM and pdtrim-vllm.")] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Print what serves a job's checkpoints: a compose file, Kubernetes objects, or a chart's values, as YAML.

    The lines above it say how it is applied.

    Example: `pdtrim manifests job_0198a3f25e0e7c52b3a0d1f3b6a4c7de --runtime vllm > pair.yaml`
    """
    with connected(url, api_key) as client:
        text = client.manifests(job, runtime, device=device, sequences=sequences, tokens=tokens, image=image)
    sys.stdout.write(text)
