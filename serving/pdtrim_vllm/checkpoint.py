"""The pdtrim.json of a model that vLLM serves, a folder or a repository of the hub."""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from pdtrim_vllm.half import Half


def read_json(model: ModelConfig) -> dict[str, Any] | None:
    """Its content; None where there is none."""
    content: dict[str, Any] | None = get_hf_file_to_dict("pdtrim.json", model.model, model.revision)
    return content


def read_half(config: VllmConfig) -> Half:
    """The half that an engine was given. Raises: NotAHalf."""
    return Half.from_json(read_json(config.model_config))
