"""What can be checked about a job before it is accepted: its sources, and its model's configuration. No weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pdtrim.contract.architectures import (
    ARCHITECTURES,
    BLOCK_COUNT_KEYS,
    CONTEXT_KEYS,
    ENCODERS,
    EXPERT_KEYS,
    KNOWN,
    LAST_STAYS,
    OWN_DISTANCES,
    VISION_LANGUAGE,
    architecture,
    block_count,
    is_tested,
    keeps_states,
    protected_for_vision,
    text_part,
    unprunable,
)
from pdtrim.contract.blocks import check_blocks
from pdtrim.contract.errors import (
    DependencyUnavailable,
    InvalidRequest,
    ModelUnsupported,
    NoSuchQueue,
    PDTrimError,
    SourceNotAllowed,
    raise_all,
)
from pdtrim.contract.evaluation_tasks import InlineTask
from pdtrim.contract.spec import MAX_BLOCKS, HalfTarget, JobSpec, ModelSpec
from pdtrim.contract.windows import least_windows
from service.checking.targets import check_push
from service.settings import Settings
from service.sources import (
    Chosen,
    ForbiddenSource,
    ModelDescription,
    SourceError,
    check_allowed,
    check_links,
    check_text,
    describe_model,
    parse_model_source,
    parse_text_source,
)
from service.storage import StoreUnavailable

DTYPES = (None, "bfloat16", "float16", "float32", "float64")
COMPOSITE_KEYS = ("text_config", "vision_config", "audio_config", "thinker_config", "llm_config", "language_config")
"""Keys of configurations that are made of several."""
ANSWER_SECONDS = 4.0
"""How long S3 is waited for, while somebody waits for us."""

LONGEST_OPENING = 8
"""Tokens, at most, that a tokenizer puts before each window."""


def check(spec: JobSpec, settings: Settings) -> ModelDescription:
    """The job's model, if the job can be run; its `revision` is the commit that a hub model's revision names now.

    Raises: NoSuchQueue, PushNotAllowed, InvalidRequest, SourceNotAllowed, SourceUnreadable, ModelTooLarge,
    ModelUnsupported, TooManyBlocks, which name the field at fault, and have all that is wrong besides as `others`;
    DependencyUnavailable when the hub or S3 does not answer, as the job's model could not be pinned then.
    """
    found: list[PDTrimError] = []
    model: ModelDescription | None = None
    with _noted(found):
        _check_queue(spec, settings)
    with _noted(found):
        check_push(spec, settings)
    with _noted(found):
        model = _describe(spec.model, settings)
    with _noted(found):
        _check_text(spec, settings)
    with _noted(found):
        _check_tasks(spec, settings)
    if model is not None:
        with _noted(found):
            check_config(spec, model.config)
    raise_all(found)
    assert model is not None
    text = text_part(model.config)
    return model if text is None else replace(model, config=dict(text))


@contextmanager
def _noted(found: list[PDTrimError]) -> Iterator[None]:
    """Look on after what is wrong. Whoever does not answer is asked nothing more: that may take as long again."""
    try:
        yield
    except DependencyUnavailable:
        raise_all(found)
        raise
    except PDTrimError as error:
        found += [error, *error.others]


def _check_queue(spec: JobSpec, settings: Settings) -> None:
    if spec.queue is not None and spec.queue not in settings.queues:
        raise NoSuchQueue(
            f"There is no queue {spec.queue!r}; the service has {', '.join(settings.queues)}.", param="queue"
        )


def check_config(spec: JobSpec, config: Mapping[str, Any]) -> None:
    """Hold a job against its model's `config.json`. Raises: ModelUnsupported, TooManyBlocks, InvalidRequest."""
    if (text := text_part(config)) is not None:
        _check_vision(spec, config, text)
        config = text
    kind = config.get("model_type")
    if (reason := _alien(config)) is not None:
        raise ModelUnsupported(
            f"The model's architecture is {repr(kind)[:80]}{reason}; this service prunes {', '.join(ARCHITECTURES)}, "
            "and tries other decoder-only language models (`…ForCausalLM`) that need no code of their own.",
            param="model.source",
        )
    if (dtype := config.get("dtype", config.get("torch_dtype"))) not in DTYPES:
        raise ModelUnsupported(
            f"The model's config.json has dtype = {repr(dtype)[:80]}; it has to be one of bfloat16, float16, float32.",
            param="model.source",
        )
    if config.get("quantization_config") is not None:
        raise ModelUnsupported(
            "The model's weights are quantised; give the model in bfloat16, float16 or float32.", param="model.source"
        )
    blocks = num_blocks(config)
    found: list[PDTrimError] = []
    with _noted(found):
        check_blocks(spec, blocks)
    for stage, target in (("prefill", spec.prefill), ("decode", spec.decode)):
        with _noted(found):
            _check_mlp_width(stage, target, config)
    with _noted(found):
        _check_pair(spec, config)
    with _noted(found):
        _check_last(spec, kind, blocks)
    with _noted(found):
        _check_kv_tokens(spec, kind)
    with _noted(found):
        _check_adapters(spec, kind)
    with _noted(found):
        _check_window(spec, config)
    with _noted(found):
        _check_answers(spec, config)
    raise_all(found)


def _check_vision(spec: JobSpec, config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    if block_count(text) is None:
        raise ModelUnsupported(
            f"text_config in config.json of this {config.get('model_type')} model leaves the number of blocks to its "
            "class: write it there, as num_hidden_layers.",
            param="model.source",
        )
    kept = range(protected_for_vision(config))
    if set(kept) - set(spec.search.protect):
        raise ModelUnsupported(
            f"This {config.get('model_type')} model adds what it sees to what its first {len(kept)} blocks give, so "
            f"they have to stay: keep them with search.protect: {list(kept)}.",
            param="search.protect",
        )


def _check_pair(spec: JobSpec, config: Mapping[str, Any]) -> None:
    if spec.prefill == spec.decode:
        return
    kind, remedy = config.get("model_type"), "Let both halves give up the same: one checkpoint then serves both."
    if keeps_states(config):
        raise ModelUnsupported(
            f"Some layers of this {kind} model keep a state that is not keys and values, which prefill does not hand "
            f"over to decode. {remedy}",
            param="decode",
        )
    if kind in OWN_DISTANCES:
        raise ModelUnsupported(
            f"The attention of this {kind} model has a bias by distance, which decode would work out for its own "
            f"tokens alone. {remedy}",
            param="decode",
        )


def _check_last(spec: JobSpec, kind: Any, blocks: int) -> None:
    if kind in LAST_STAYS and blocks - 1 not in spec.search.protect:
        raise ModelUnsupported(
            f"The last block of every {kind} model is unlike the others, whatever its config.json says, so it has to "
            f"stay: keep it with search.protect: {sorted({*spec.search.protect, blocks - 1})}.",
            param="search.protect",
        )


def _check_kv_tokens(spec: JobSpec, kind: Any) -> None:
    if spec.kv_tokens is not None and not architecture(kind).attention_measurable:
        raise ModelUnsupported(
            f"kv_tokens measures attention, which is not possible for {kind}. Leave kv_tokens out.", param="kv_tokens"
        )


def _check_adapters(spec: JobSpec, kind: Any) -> None:
    if spec.distillation.trainable == "lora" and not architecture(kind).linear_layers:
        raise ModelUnsupported(
            f"{kind} has no linear layers that adapters fit; train `all` or `distilled`.",
            param="distillation.trainable",
        )


def _check_window(spec: JobSpec, config: Mapping[str, Any]) -> None:
    context = next((config[key] for key in CONTEXT_KEYS if key in config), None)
    if type(context) is int and spec.calibration.window_tokens > context:
        raise InvalidRequest(
            f"calibration.window_tokens is {spec.calibration.window_tokens}, but the model reads at most {context} "
            "tokens.",
            param="calibration.window_tokens",
        )
    measured = spec.calibration.window_tokens // 2 + spec.evaluation.speed_tokens
    if type(context) is int and measured > context:
        raise InvalidRequest(
            f"evaluation.speed_tokens is {spec.evaluation.speed_tokens}, generated after a prompt of half a window, "
            f"{spec.calibration.window_tokens // 2} tokens, but the model reads at most {context}.",
            param="evaluation.speed_tokens",
        )


def _check_answers(spec: JobSpec, config: Mapping[str, Any]) -> None:
    """Whether there is room for answers at all; how long questions are, the first stage finds, by the tokenizer."""
    context = next((config[key] for key in CONTEXT_KEYS if key in config), None)
    if type(context) is not int:
        return
    asked = [
        (task.generation.max_gen_toks, f"evaluation.tasks[{number}].generation_kwargs.max_gen_toks")
        for number, task in enumerate(spec.evaluation.tasks)
        if isinstance(task, InlineTask) and task.generation is not None
    ]
    if spec.evaluation.prompts:
        asked.append((spec.evaluation.sample_tokens, "evaluation.sample_tokens"))
    for tokens, param in asked:
        if tokens > context:
            raise InvalidRequest(
                f"{param} is {tokens}, generated after a prompt, but the model reads at most {context} tokens.",
                param=param,
            )


def num_blocks(config: Mapping[str, Any]) -> int:
    """How many blocks a model has by its `config.json`. Raises: ModelUnsupported."""
    count = next((key for key in BLOCK_COUNT_KEYS if key in config), BLOCK_COUNT_KEYS[0])
    blocks = block_count(config)
    if type(blocks) is not int or blocks < 1:
        raise ModelUnsupported(f"The model's config.json has {count} = {repr(blocks)[:80]}.", param="model.source")
    if blocks > MAX_BLOCKS:
        raise ModelUnsupported(
            f"The model's config.json has {count} = {repr(blocks)[:80]}; models of at most {MAX_BLOCKS} blocks are "
            "pruned.",
            param="model.source",
        )
    return blocks


def _alien(config: Mapping[str, Any]) -> str | None:
    """Why a configuration is not that of a causal language model that transformers knows by itself; None if it is."""
    kind, names = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str):
        return ""
    parts = [part for key in COMPOSITE_KEYS if isinstance(part := config.get(key), dict)]
    if (reason := next(filter(None, map(unprunable, (config, *parts))), None)) is not None:
        return f", {reason}"
    if parts:
        return (
            f", a multimodal model; the service prunes the text decoder of {', '.join(sorted(VISION_LANGUAGE))}, and "
            "of others the language model alone, given as a model of its own"
        )
    if config.get("is_encoder_decoder"):
        return ", which has an encoder"
    if kind in ENCODERS:
        return ", an encoder"
    if kind not in KNOWN and not is_tested(kind):
        return ", which needs code of its own" if config.get("auto_map") else ", which transformers does not know"
    return f", as {repr(names)[:80]}, which is no language model" if _other_head(names) else None


def _other_head(names: object) -> bool:
    """Whether `architectures` names something that is no causal language model, such as a classifier."""
    if not isinstance(names, list) or not names:
        return False
    return not any(str(name).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names)


def _check_mlp_width(stage: str, target: HalfTarget, config: Mapping[str, Any]) -> None:
    """Only one gated MLP a block can be narrowed, as wide in every block as `intermediate_size` says."""
    if target.mlp_width == 1:
        return
    param = f"{stage}.mlp_width"
    kind, size = config["model_type"], config.get("intermediate_size")
    if not architecture(kind).gated_mlp or any(config.get(key) is not None for key in EXPERT_KEYS):
        raise ModelUnsupported(
            f"{param} narrows gated MLPs (gate, up and down projection), and no experts; this {kind} model has another "
            f"kind. Leave {param} out.",
            param=param,
        )
    if type(size) is not int or size < 1:
        raise ModelUnsupported(
            f"{param} needs one MLP width for all blocks, but the model's config.json has intermediate_size = "
            f"{repr(size)[:80]}.",
            param=param,
        )


def _describe(model: ModelSpec, settings: Settings) -> ModelDescription:
    with _blamed_on("model.source"):
        source = parse_model_source(model.source)
        check_allowed(source, settings.allowed_sources, settings.own_places)
        check_links(source, settings.allowed_sources, settings.own_places)
        return describe_model(
            model.source,
            model.revision,
            max_bytes=settings.max_model_bytes,
            permit=settings.permit,
            endpoint_url=settings.s3_endpoint_url,
            region=settings.s3_region,
            answer_seconds=ANSWER_SECONDS,
        )


def _check_text(spec: JobSpec, settings: Settings) -> None:
    data = spec.data
    if data.text is not None:
        _check_amount(spec, len(data.text.encode()), "data.text")
        return
    with _blamed_on("data.source"):
        try:
            check_allowed(parse_text_source(data.origin), settings.allowed_sources, settings.own_places)
        except ForbiddenSource as error:
            if data.source is not None:
                raise
            raise ForbiddenSource(
                f"The job gives no text, which means {data.origin}, and that is not among PDTRIM_ALLOWED_SOURCES. Give "
                "`data.source` or `data.text`, or have the operator add builtin: to the setting."
            ) from error
        most = check_text(
            data.origin,
            Chosen(data.field, data.split),
            answered=spec.distillation.data == "given",
            endpoint_url=settings.s3_endpoint_url,
            region=settings.s3_region,
            answer_seconds=ANSWER_SECONDS,
        )
    if most is not None:
        _check_amount(spec, most, "data.source")


def _check_amount(spec: JobSpec, most_bytes: int, param: str) -> None:
    """Hold the bytes of a text against the least windows: no token is of less than a byte. Raises: InvalidRequest."""
    windows, tokens = sum(least_windows(spec).values()), spec.calibration.window_tokens
    if most_bytes < windows * (tokens - LONGEST_OPENING):
        raise InvalidRequest(
            f"The text has {most_bytes} bytes, which are no {windows} windows of {tokens} tokens, the least that a job "
            "needs for training, calibration and validation. Give more text, or a smaller calibration.window_tokens.",
            param=param,
        )


def _check_tasks(spec: JobSpec, settings: Settings) -> None:
    """Tasks given by name read whatever data set on the hub the harness says, so the whole hub must be allowed."""
    named = [number for number, task in enumerate(spec.evaluation.tasks) if isinstance(task, str)]
    if named and not {prefix.rstrip("/") for prefix in settings.allowed_sources} & {"hf:", "hf://datasets"}:
        raise SourceNotAllowed(
            "A task given by name reads a data set on the hub, and PDTRIM_ALLOWED_SOURCES has neither hf:// nor "
            "hf://datasets/. Give the task's questions in the job instead.",
            param=f"evaluation.tasks[{named[0]}]",
        )


@contextmanager
def _blamed_on(param: str) -> Iterator[None]:
    try:
        yield
    except SourceError as error:
        error.param = error.param or param
        raise
    except StoreUnavailable as error:
        raise DependencyUnavailable(str(error), param=param) from error
