"""What a checkpoint's `pdtrim.json` and `config.json` say that a serving engine has to be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, Field, ValidationError, model_validator

from pdtrim.contract.architectures import text_part
from pdtrim.contract.results import Half
from pdtrim.contract.spec import FirstToken

HALVES: tuple[Half, Half] = ("prefill", "decode")
Role = Literal["prefill", "decode", "unified"]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "float": 4}
"""Bytes of a number by the names that configurations and vLLM's `--dtype` have."""


class NotServable(ValueError):
    """These checkpoints cannot be served together; the message says why."""


class _Source(BaseModel):
    uri: str
    revision: str | None = None


class _Serving(BaseModel):
    first_token: FirstToken


class _Pdtrim(BaseModel):
    """The entries of `pdtrim.json` that matter here."""

    job: str
    role: Role
    source: _Source
    kv_layer_map: list[int]
    serving: _Serving | None = None
    first_token: FirstToken = "decode"
    """Of files written before there was `serving`."""


class _Config(BaseModel):
    """The entries of `config.json` that matter here, by the names that architectures have for them."""

    layers: Count = Field(validation_alias=AliasChoices("num_hidden_layers", "n_layer"))
    hidden: Count = Field(validation_alias=AliasChoices("hidden_size", "n_embd"))
    heads: Count = Field(validation_alias=AliasChoices("num_attention_heads", "n_head"))
    kv_heads: Count | None = Field(default=None, validation_alias="num_key_value_heads")
    head_dim: Count | None = None
    context: Count | None = Field(
        default=None, validation_alias=AliasChoices("max_position_embeddings", "n_positions", "n_ctx")
    )
    dtype: str | None = Field(default=None, validation_alias=AliasChoices("dtype", "torch_dtype"))
    sliding_window: Count | None = None
    use_sliding_window: bool = True
    layer_types: list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_the_decoder(cls, given: Any) -> Any:
        """Of a vision-language model, its text decoder's: keys and values are that one's alone."""
        text = text_part(given) if isinstance(given, dict) else None
        return given if text is None else dict(text)


@dataclass(frozen=True)
class ServedCheckpoint:
    """One checkpoint. `bytes` are those of its files; 0 where nobody counted them."""

    role: Role
    job: str
    source: str
    layers: int
    kv_layer_map: tuple[int, ...]
    kv_numbers: int
    """Numbers that a layer keeps of each token."""
    dtype: str
    context_tokens: int
    """Longest sequence that the model was made for."""
    windowed: bool
    """Some layers see a sliding window of the tokens alone."""
    first_token: FirstToken
    bytes: int

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values that all layers keep of a token in `dtype`; `auto` is the checkpoint's own."""
        return self.layers * self.kv_numbers * ITEM_BYTES.get(self.dtype if dtype == "auto" else dtype, 4)


DEFAULT_CONTEXT = 2048
"""Of a configuration that names no longest sequence."""


def read_checkpoint(pdtrim_json: str | bytes, config_json: str | bytes, *, bytes_: int = 0) -> ServedCheckpoint:
    """A checkpoint, by the contents of its two files. Raises: NotServable for files that are none of this service's."""
    try:
        made, config = _Pdtrim.model_validate_json(pdtrim_json), _Config.model_validate_json(config_json)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise NotServable(f"{error.title.strip('_').lower()}.json: {place}: {first['msg']}") from error
    if config.layer_types is None:
        windowed = config.sliding_window is not None and config.use_sliding_window
    else:
        windowed = "sliding_attention" in config.layer_types
    return ServedCheckpoint(
        role=made.role,
        job=made.job,
        source=made.source.uri,
        layers=config.layers,
        kv_layer_map=tuple(made.kv_layer_map),
        kv_numbers=2 * (config.kv_heads or config.heads) * (config.head_dim or config.hidden // config.heads),
        dtype=config.dtype or "float32",
        context_tokens=config.context or DEFAULT_CONTEXT,
        windowed=windowed,
        first_token=made.serving.first_token if made.serving else made.first_token,
        bytes=bytes_,
    )


@dataclass(frozen=True)
class ServedPair:
    """What prefill serves and what decode does; a unified checkpoint is both."""

    prefill: ServedCheckpoint
    decode: ServedCheckpoint

    def of(self, half: Half) -> ServedCheckpoint:
        return self.prefill if half == "prefill" else self.decode

    @property
    def unified(self) -> bool:
        return self.decode.role == "unified"

    @property
    def windowed(self) -> bool:
        return self.prefill.windowed or self.decode.windowed

    @property
    def name(self) -> str:
        """What clients call the model."""
        return f"{self.decode.source.rstrip('/').rsplit('/', 1)[-1] or 'model'}-pruned"


def paired(prefill: ServedCheckpoint, decode: ServedCheckpoint) -> ServedPair:
    """The two as a pair. Raises: NotServable where they are not the two halves of one."""
    roles = (prefill.role, decode.role)
    if roles == ("decode", "prefill"):
        raise NotServable("the halves are swapped: the first folder has the decode checkpoint, the second prefill's")
    if roles not in (("prefill", "decode"), ("unified", "unified")):
        raise NotServable(f"a {prefill.role} and a {decode.role} checkpoint are no pair")
    if prefill.job != decode.job:
        raise NotServable(f"the halves come from different jobs, {prefill.job} and {decode.job}")
    if prefill.first_token != decode.first_token:
        raise NotServable("the halves name different first tokens: one of them was edited")
    if prefill.kv_layer_map != decode.kv_layer_map:
        raise NotServable("the halves have different KV layer maps: one of them was edited")
    if len(decode.kv_layer_map) != decode.layers or any(
        not 0 <= layer < prefill.layers for layer in decode.kv_layer_map
    ):
        raise NotServable(
            f"the KV layer map {list(decode.kv_layer_map)} does not fit {prefill.layers} layers of prefill and "
            f"{decode.layers} of decode"
        )
    return ServedPair(prefill, decode)


@dataclass(frozen=True)
class Sizes:
    """What an engine is made for: so many sequences at once, of at most so many tokens each."""

    sequences: int
    tokens: int
    block: int = 32
    """Tokens of a block of the KV cache."""

    @property
    def blocks(self) -> int:
        """Blocks with which no sequence ever has to give way to another; vLLM keeps one for itself."""
        return self.sequences * math.ceil(self.tokens / self.block) + 1

    def kv_cache_bytes(self, checkpoint: ServedCheckpoint, dtype: str) -> int:
        """Memory that the KV cache of such an engine takes."""
        return self.blocks * self.block * checkpoint.kv_bytes_per_token(dtype)


DEFAULT_SEQUENCES = 8
LONGEST = 8192
"""Tokens of a sequence, where nobody says otherwise and the model can do more."""


def default_sizes(pair: ServedPair, *, sequences: int | None = None, tokens: int | None = None) -> Sizes:
    """The sizes asked for, and defaults for what was not. Raises: NotServable where the model cannot do so much."""
    able = min(pair.prefill.context_tokens, pair.decode.context_tokens)
    if tokens is not None and tokens > able:
        raise NotServable(f"the model was made for sequences of at most {able} tokens, not {tokens}")
    return Sizes(sequences or DEFAULT_SEQUENCES, tokens or min(able, LONGEST))
