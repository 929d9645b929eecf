"""A job's manifests for one runtime, as YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import yaml

from pdtrim.contract.manifests import Runtime
from pdtrim.serving import compose, dynamo, kserve, kubernetes, llm_d
from pdtrim.serving.deployment import Deployment, Manifest


@dataclass(frozen=True)
class Form:
    """What a runtime is given, and what is said of it."""

    documents: Callable[[Deployment], list[Manifest]]
    notes: Callable[[Deployment], list[str]]


FORMS: Mapping[Runtime, Form] = {
    Runtime.COMPOSE: Form(compose.documents, compose.notes),
    Runtime.VLLM: Form(kubernetes.documents, kubernetes.notes),
    Runtime.LLM_D: Form(llm_d.documents, llm_d.notes),
    Runtime.DYNAMO: Form(dynamo.documents, dynamo.notes),
    Runtime.KSERVE: Form(kserve.documents, kserve.notes),
}


class _Dumper(yaml.SafeDumper):
    """What stands twice is written twice: readers of manifests need no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def manifests(runtime: Runtime, deployment: Deployment) -> str:
    """What a platform team applies, below a few lines that say how."""
    form, serving = FORMS[runtime], deployment.serving
    gib = {half: serving.device_bytes(half) / (1 << 30) for half in ("prefill", "decode")}
    lines = [
        f"{serving.name}: the checkpoints of {deployment.job}, served by vLLM with pdtrim-vllm.",
        *form.notes(deployment),
        f"Memory of the devices for weights and KV cache ({serving.sizes.sequences} sequences of "
        f"{serving.sizes.tokens} tokens): prefill {gib['prefill']:.2f} GiB, decode {gib['decode']:.2f} GiB.",
    ]
    text = yaml.dump_all(form.documents(deployment), Dumper=_Dumper, sort_keys=False, width=2**16)
    return "".join(f"# {line}\n" for line in lines) + text
