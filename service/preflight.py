"""What can be checked about a job before it is accepted: its sources, and its model's configuration. No weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from service.contract.blocks import check_blocks
from service.contract.errors import DependencyUnavailable, InvalidRequest, ModelUnsupported
from service.contract.spec import DataSpec, JobSpec, ModelSpec
from service.settings import Settings
from service.sources import (
    ModelDescription,
    SourceError,
    check_allowed,
    check_text,
    describe_model,
    parse_model_source,
    parse_text_source,
)
from service.storage import StoreUnavailable

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def check(spec: JobSpec, settings: Settings) -> str | None:
    """The commit that a hub model's revision names now, None for other models, if the job can be run.

    Raises: InvalidRequest, SourceNotAllowed, SourceUnreadable, ModelUnsupported, TooManyBlocks, which name the field
    at fault; DependencyUnavailable when the hub or S3 does not answer, as the job's model could not be pinned then.
    """
    model = _describe(spec.model, settings)
    _check_text(spec.data, settings)
    check_config(spec, model.config)
    return model.revision


def check_config(spec: JobSpec, config: Mapping[str, Any]) -> None:
    """Hold a job against its model's `config.json`. Raises: ModelUnsupported, TooManyBlocks, InvalidRequest."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelUnsupported(
            f"The model's architecture is {repr(kind)[:80]}; this service prunes {', '.join(ARCHITECTURES)}.",
            param="model.source",
        )
    if config.get("quantization_config") is not None:
        raise ModelUnsupported(
            "The model's weights are quantised; give the model in bfloat16, float16 or float32.", param="model.source"
        )
    blocks = config.get("num_hidden_layers")
    if type(blocks) is not int or blocks < 1:
        raise ModelUnsupported(
            f"The model's config.json has num_hidden_layers = {repr(blocks)[:80]}.", param="model.source"
        )
    check_blocks(spec, blocks)
    context = config.get("max_position_embeddings")
    if type(context) is int and spec.calibration.window_tokens > context:
        raise InvalidRequest(
            f"calibration.window_tokens is {spec.calibration.window_tokens}, but the model reads at most {context} "
            "tokens.",
            param="calibration.window_tokens",
        )


def _describe(model: ModelSpec, settings: Settings) -> ModelDescription:
    with _blamed_on("model.source"):
        check_allowed(parse_model_source(model.source), settings.allowed_sources)
        return describe_model(
            model.source, model.revision, endpoint_url=settings.s3_endpoint_url, region=settings.s3_region
        )


def _check_text(data: DataSpec, settings: Settings) -> None:
    if data.text is not None:
        return
    with _blamed_on("data.source"):
        check_allowed(parse_text_source(data.origin), settings.allowed_sources)
        check_text(data.origin, endpoint_url=settings.s3_endpoint_url, region=settings.s3_region)


@contextmanager
def _blamed_on(param: str) -> Iterator[None]:
    try:
        yield
    except SourceError as error:
        error.param = error.param or param
        raise
    except StoreUnavailable as error:
        raise DependencyUnavailable(str(error), param=param) from error
