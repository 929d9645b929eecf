"""JobSpec: what a user asks for. Every field is bounded, unknown fields are refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from pdtrim.contract.base import NO_NUL, SpecModel, WrittenAsItIs, named_freely, storable
from pdtrim.contract.evaluation_tasks import InlineTask, parse_tasks
from pdtrim.contract.queues import Priority, QueueName

MAX_BLOCKS = 1024
Part = Literal["attention", "kv_only", "mlp"]
"""What a block that stays may give up: its attention, its MLP, or, in prefill, all but its keys and values."""
PART_NAMES: Mapping[Part, str] = MappingProxyType(
    {"attention": "attentions", "kv_only": "kept for keys and values alone", "mlp": "MLPs"}
)
"""How several of each are called after their number."""
Cost = Literal["flops", "kv_bytes", "weight_bytes"]
"""What a budget is of: the operations of a prompt, the bytes of a request's KV cache, or those of the weights."""
COST_NAMES: Mapping[Cost, str] = MappingProxyType(
    {"flops": "FLOPs of a prompt", "kv_bytes": "KV cache bytes", "weight_bytes": "weight bytes"}
)
BUDGET_PARTS: Mapping[Cost, tuple[Part, ...]] = MappingProxyType(
    {"flops": ("kv_only", "mlp"), "kv_bytes": ("attention",), "weight_bytes": ("attention", "mlp")}
)
"""The parts that may go for a budget, besides whole blocks."""

SourceString = Annotated[str, Field(min_length=1, max_length=1024, json_schema_extra=NO_NUL), AfterValidator(storable)]


class ModelSpec(SpecModel):
    """The dense model to prune."""

    source: SourceString = Field(
        description="`reference` (the small model shipped with the service), `file:///folder`, `s3://bucket/prefix` "
        "or `hf://organisation/name`.",
        examples=["reference", "hf://Qwen/Qwen3-8B"],
    )
    revision: str | None = Field(
        default=None,
        max_length=128,
        pattern=r"^[A-Za-z0-9._/-]+$",
        description="Hub branch, tag or commit; resolved to a commit and recorded. Hub sources only.",
    )


def _model_from_string(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _distinct(value: tuple[int, ...]) -> tuple[int, ...]:
    if repeated := {block for block in value if value.count(block) > 1}:
        raise ValueError(f"block {min(repeated)} is listed twice; list every block once")
    return value


BlockList = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=MAX_BLOCKS)], ...], Field(max_length=MAX_BLOCKS), AfterValidator(_distinct)
]
CHANNEL_MULTIPLE = 8
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class HalfTarget(SpecModel):
    """What one serving stage gives up: blocks (a count, as many as a bound on perplexity allows, or the lower), parts
    of blocks that stay, and channels of the MLP of every block that stays."""

    remove_blocks: int | None = Field(
        default=None,
        ge=0,
        le=MAX_BLOCKS,
        description="Transformer blocks to remove; with `max_perplexity_increase`, at most.",
        examples=[2],
    )
    max_perplexity_increase: float | None = Field(
        default=None,
        ge=0.0,
        le=1e6,
        description="Remove as many blocks as keep the perplexity on the calibration windows, before distillation, "
        "within this fraction above the dense model's: 0.05 is 5 %. For decode it is the perplexity of continuations "
        "by the prefill/decode pair. Parts of other blocks go besides, by their counts.",
        examples=[0.05],
    )
    kv_only_blocks: int = Field(
        default=0,
        ge=0,
        le=MAX_BLOCKS,
        description="Prefill only: blocks of which nothing runs but what makes their keys and values, besides those "
        "removed. Decode keeps these blocks if it will. Searched last, by the loss of the pair.",
        examples=[4],
    )
    remove_attentions: int = Field(
        default=0,
        ge=0,
        le=MAX_BLOCKS,
        description="Decode only: blocks that give up their attention and keep their MLP, besides those removed. Their "
        "keys and values are neither sent nor read by a runtime that knows of it.",
        examples=[2],
    )
    remove_mlps: int = Field(
        default=0,
        ge=0,
        le=MAX_BLOCKS,
        description="Blocks that give up their MLP and keep their attention, besides those removed.",
    )
    flops: Share | None = Field(
        default=None,
        description="Prefill only, in place of counts: give up MLPs, or all but keys and values, whatever costs "
        "least, and blocks where decode does, until a prompt of half a calibration window takes at most this share of "
        "the dense model's operations.",
        examples=[0.75],
    )
    kv_bytes: Share | None = Field(
        default=None,
        description="Decode only, in place of counts: give up blocks or attentions, whatever costs least, until a "
        "request's keys and values take at most this share of the dense model's.",
        examples=[0.75],
    )
    weight_bytes: Share | None = Field(
        default=None,
        description="Decode only, in place of counts: give up blocks, attentions or MLPs, whatever costs least, until "
        "the weights at work take at most this share of the dense model's, embeddings among them.",
        examples=[0.75],
    )
    mlp_width: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Share of MLP channels that every block keeps, rounded to a multiple of 8 channels; the "
        "checkpoint's `intermediate_size`. Keys and values stay as they are, so prefill and decode may differ.",
        examples=[0.75],
    )

    @model_validator(mode="before")
    @classmethod
    def _parts_and_budgets_need_no_count(cls, value: Any) -> Any:
        counts = ("kv_only_blocks", "remove_attentions", "remove_mlps")
        given = isinstance(value, Mapping) and (
            any(value.get(cost) is not None for cost in COST_NAMES) or any(value.get(count) for count in counts)
        )
        if given and value.get("remove_blocks") is None and value.get("max_perplexity_increase") is None:
            return {**value, "remove_blocks": 0}
        return value

    @model_validator(mode="after")
    def _some_target(self) -> Self:
        if self.remove_blocks is None and self.max_perplexity_increase is None:
            raise ValueError("give `remove_blocks`, `max_perplexity_increase` or both, parts of blocks, or a budget")
        if len(budgets := [f"`{cost}`" for cost in COST_NAMES if getattr(self, cost) is not None]) > 1:
            raise ValueError(f"give one of {' and '.join(budgets)}")
        if budgets and (self.parts or self.max_perplexity_increase is not None):
            raise ValueError(f"{budgets[0]} chooses what goes: give no counts of parts and no bound beside it")
        return self

    @property
    def budget(self) -> tuple[Cost, float] | None:
        """The cost that is bounded, and the share of the dense model's that may be left; None without a budget."""
        shares: dict[Cost, float | None] = {
            "flops": self.flops,
            "kv_bytes": self.kv_bytes,
            "weight_bytes": self.weight_bytes,
        }
        return next(((cost, share) for cost, share in shares.items() if share is not None), None)

    @property
    def parts(self) -> dict[Part, int]:
        """How many blocks give up which part, in the order in which they are searched."""
        asked: dict[Part, int] = {
            "attention": self.remove_attentions,
            "kv_only": self.kv_only_blocks,
            "mlp": self.remove_mlps,
        }
        return {part: count for part, count in asked.items() if count}

    @property
    def possible_parts(self) -> set[Part]:
        """What blocks may be without, by counts or for a budget."""
        return {*self.parts, *(() if self.budget is None else BUDGET_PARTS[self.budget[0]])}

    def mlp_channels(self, available: int) -> int:
        """How many of `available` MLP channels every block keeps: a multiple of 8, as tensor cores want it, or all."""
        if self.mlp_width == 1.0:
            return available
        wanted = round(self.mlp_width * available / CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
        return min(max(wanted, CHANNEL_MULTIPLE), available)

    def __str__(self) -> str:
        bound = "" if self.max_perplexity_increase is None else f"within +{self.max_perplexity_increase:.3g} perplexity"
        count = "" if self.remove_blocks is None else str(self.remove_blocks)
        parts = [f"{count} {PART_NAMES[part]}" for part, count in self.parts.items()]
        least = [] if self.budget is None else [f"{self.budget[1]:.0%} of the {COST_NAMES[self.budget[0]]}"]
        return ", ".join([" ".join(said for said in (count, bound) if said), *parts, *least])


FieldName = Annotated[str, Field(min_length=1, max_length=256, json_schema_extra=NO_NUL), AfterValidator(storable)]


class DataSpec(SpecModel):
    """Text, conversations or prompts with completions, for calibration, distillation and validation; they are split so
    that the three never overlap."""

    source: SourceString | None = Field(
        default=None,
        description="`builtin:stdlib` (the Python standard library's source, works offline), `file:///folder/file`, "
        "`s3://bucket/key`, `hf://datasets/organisation/name` or, of a data set with subsets, "
        "`hf://datasets/organisation/name/subset`. A file is `.txt`, `.jsonl`, `.json`, each also with `.gz` or `.zst` "
        "behind it, or `.parquet`.",
        examples=["builtin:stdlib", "hf://datasets/Salesforce/wikitext/wikitext-2-raw-v1"],
    )
    split: str | None = Field(
        default=None,
        max_length=128,
        pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$",
        description="Split of a data set on the hub; `train` by default.",
    )
    field: FieldName | None = Field(
        default=None,
        description="Field of each row that is read, a text or a list of messages. By default `messages`, or `prompt` "
        "with `completion`, or `text`, the first that a row has.",
    )
    text: Annotated[str, Field(json_schema_extra=NO_NUL), AfterValidator(storable)] | None = Field(
        default=None, min_length=1, max_length=1_000_000, description="Inline text instead."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.source is not None and self.text is not None:
            raise ValueError("give either `source` or `text`, not both")
        if self.text is not None and (self.split is not None or self.field is not None):
            raise ValueError("inline `text` has neither splits nor fields; leave `split` and `field` out")
        return self

    @property
    def origin(self) -> str:
        """The source string, `inline` for inline text."""
        return "inline" if self.text is not None else self.source or "builtin:stdlib"


class CalibrationSpec(SpecModel):
    """The token windows on which blocks are scored and removals are compared."""

    windows: int = Field(default=64, ge=1, le=4096, description="Number of calibration windows.")
    window_tokens: int = Field(default=256, ge=8, le=32768, description="Tokens in a window.")
    copying: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Share of the windows that count a second time in the search, with the prompt said again in place "
        "of its continuation. Running text hardly shows what a model without some blocks no longer finds in its "
        "prompt; 0 compares removals on running text alone. Null for 0.25, and for 1 with `search.folded`.",
    )


SETS_A_BLOCK = 6
"""Annealing's budget where a job sets none: on the reference model it takes so many to always find the best sets."""


class SearchSpec(SpecModel):
    """The search over sets of removed blocks."""

    algorithm: Literal["annealing", "greedy", "exhaustive"] = Field(
        default="annealing",
        description="`annealing` starts from greedy's result, so it is never worse than greedy.",
    )
    objective: Literal["kl", "cross_entropy", "hidden"] = Field(
        default="kl",
        description="Calibration loss: KL divergence to the dense model's next-token distribution, next-token "
        "cross-entropy, or the distance of the last hidden state to the dense model's.",
    )
    evaluations: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Sets that annealing may evaluate besides greedy's, for each of prefill and decode. "
        f"By default {SETS_A_BLOCK} for every block of the model.",
    )
    racing: bool = Field(
        default=True,
        description="Let greedy's steps drop a set as soon as a paired test on the first windows says that it cannot "
        "win. Reported losses are on all windows in any case. Without effect where weights are read from disk block "
        "by block.",
    )
    folded: bool = Field(
        default=False,
        description="Compare sets of whole blocks as they are once folded: with what their gaps did made up for by a "
        "linear map in the block before, as far as one can; they then are folded (see `distillation.fold`). Such sets "
        "keep more of what stands in the prompt, and the search takes two to five times as long. Losses are "
        "reported without folds. Parts of blocks and budgets are compared without them. Without effect where weights "
        "are read from disk block by block.",
    )
    seconds: float | None = Field(
        default=None,
        gt=0.0,
        le=1e7,
        description="Seconds after which annealing stops with the best sets so far, for each of prefill and "
        "decode; greedy's steps are taken in any case. The plan then depends on the machine, not on the seed alone.",
    )
    protect: BlockList = Field(
        default=(), description="Blocks that neither prefill nor decode may give up.", examples=[[0, 31]]
    )
    force: BlockList = Field(
        default=(),
        description="Blocks that both prefill and decode give up in any case; they count as removed blocks.",
        examples=[[24]],
    )

    def annealing_budget(self, num_blocks: int) -> int:
        """How many sets annealing may evaluate in a search of a model."""
        return SETS_A_BLOCK * num_blocks if self.evaluations is None else self.evaluations

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if both := set(self.protect) & set(self.force):
            raise PydanticCustomError(
                "protected_and_forced",
                "block {block} is in both search.protect and search.force; leave it in one of them",
                {"block": min(both), "param": "search.force"},
            )
        return self


Weight = Annotated[float, Field(ge=0.0, le=1e6)]


class LossesSpec(SpecModel):
    """Weights of the parts of the healing loss; at least one is positive."""

    kl: Weight = Field(default=1.0, description="KL divergence to the dense model's next-token distribution.")
    label: Weight = Field(default=0.0, description="Cross-entropy on the text's own next token.")
    hidden: Weight = Field(
        default=20.0,
        description="Relative distance of the hidden states between the kept blocks to the dense model's; small beside "
        "the others, hence the large weight.",
    )

    @model_validator(mode="after")
    def _something_to_minimise(self) -> Self:
        if not (self.kl or self.label or self.hidden):
            raise ValueError("give at least one of `kl`, `label` and `hidden` a positive weight")
        return self


class LoraSpec(SpecModel):
    """Low-rank adapters, merged into the weights at the end; read with `trainable` = `lora`."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank of each adapter.")
    alpha: float = Field(
        default=32.0, gt=0.0, le=1e6, description="An adapter's product counts alpha / rank times what it is."
    )
    target: Literal["all-linear"] = Field(
        default="all-linear", description="Layers with an adapter: every linear layer of every kept block."
    )


class DistillationSpec(SpecModel):
    """Repair of the pruned model: healing on the dense model's predictions."""

    enabled: bool = Field(default=True, description="False exports the pruned weights as they are.")
    data: Literal["given", "self"] = Field(
        default="given",
        description="What healing trains on: `given`, the job's data as it is; `self`, the dense model's own answers "
        "to the prompts of the data, which need no answers then. Of texts, runs of half a window are the prompts.",
    )
    threshold: float = Field(
        default=0.95,
        ge=-1.0,
        le=1.0,
        description="A removed block whose cosine score reaches this is deleted; below it, it may be distilled into a "
        "neighbour.",
    )
    heal_tokens: int = Field(
        default=131_072, ge=0, le=10**12, description="Training tokens for healing, for each of prefill and decode."
    )
    fold: bool | None = Field(
        default=None,
        description="Whether linear maps, fitted to the dense model's hidden states without training, are multiplied "
        "into the MLPs before removed blocks, where that lowers the held-out loss. Healing then starts from there. "
        "Null for where nothing is trained, as with `heal_tokens: 0`, or `search.folded` chose what to fold.",
    )
    trainable: Literal["all", "distilled", "lora"] = Field(
        default="all",
        description="What healing trains: every kept block, only those that absorbed another, or low-rank adapters of "
        "every kept block, which take a fraction of the optimiser's memory.",
    )
    lora: LoraSpec = LoraSpec()
    losses: LossesSpec = LossesSpec()
    learning_rate: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="Peak learning rate of AdamW. Null for 2e-4, and for 2e-3 where adapters are trained.",
    )
    batch_windows: int = Field(default=8, ge=1, le=4096, description="Windows in a training batch.")
    gradient_accumulation: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Parts in which a training batch is computed, one after the other; the result is the same, the "
        "memory less. At most `batch_windows`.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute each block again in the backward pass of healing: less memory, a third more time.",
    )
    devices: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Devices of the worker over which healing shards models, gradients and moments, at most: no more "
        "than it has GPUs, nor than a batch has windows. Null for all; 1 trains in the worker's own process. On a "
        "worker without GPUs, processes, and null for one.",
    )
    patience: int | None = Field(
        default=3,
        ge=1,
        le=1000,
        description="Checks of the held-out loss in a row, of ten in a full run, without a new best after which "
        "training stops early; null never stops. The best weights are kept in any case.",
    )

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate, or what fits what is trained."""
        return self.learning_rate or (2e-3 if self.trainable == "lora" else 2e-4)

    @model_validator(mode="after")
    def _no_empty_parts(self) -> Self:
        if self.gradient_accumulation > self.batch_windows:
            raise PydanticCustomError(
                "accumulation_exceeds_batch",
                "gradient_accumulation ({parts}) may not exceed batch_windows ({windows})",
                {
                    "parts": self.gradient_accumulation,
                    "windows": self.batch_windows,
                    "param": "distillation.gradient_accumulation",
                },
            )
        return self


class EdgeAttentionSpec(SpecModel):
    """Restrict the decode layers that attend mostly to the prompt's first and last tokens."""

    threshold: float = Field(
        gt=0.0,
        le=1.0,
        description="Least share of a layer's attention to the prompt that these tokens must get.",
        examples=[0.7],
    )
    first: int = Field(default=4, ge=0, le=32768, description="First prompt tokens that a restricted layer is sent.")
    last: int = Field(default=28, ge=0, le=32768, description="Last prompt tokens that a restricted layer is sent.")

    @model_validator(mode="after")
    def _some_token(self) -> Self:
        if self.first + self.last == 0:
            raise ValueError("`first` and `last` may not both be 0: a layer needs a token")
        return self


class KvTokensSpec(SpecModel):
    """Which prompt tokens' keys and values prefill sends to decode: chosen by how little is sent, or by attention."""

    ratio: float | None = Field(
        default=None,
        ge=1.0,
        le=1e6,
        description="Send at most 1/ratio of the bytes that the dense model would send for a prompt of half a "
        "calibration window, at the least PD loss found. Every layer is sent a token, which bounds the ratio.",
        examples=[4.95],
    )
    attention: EdgeAttentionSpec | None = Field(
        default=None, description="Instead: send first and last tokens to the layers that attend mostly to them."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.ratio is None) == (self.attention is None):
            raise ValueError("give either `ratio` or `attention`")
        return self


FirstToken = Literal["decode", "prefill"]
Precision = Literal["auto", "bfloat16", "float32"]


class ServingSpec(SpecModel):
    """How the pair will be served. Search, healing and evaluation of the pair follow it."""

    first_token: FirstToken = Field(
        default="decode",
        description="Which half says the first token of an answer. `decode`, as vLLM does behind its usual routers: "
        "decode runs the prompt's last token itself, on the cache of those before; what prefill predicts is thrown "
        "away. `prefill`, as SGLang does: prefill says it, and decode goes on from the cache of the whole prompt.",
    )


Prompt = Annotated[str, Field(min_length=1, max_length=4_000, json_schema_extra=NO_NUL), AfterValidator(storable)]


class EvaluationSpec(SpecModel):
    """What is measured on the exported checkpoints."""

    windows: int = Field(default=32, ge=1, le=65536, description="Validation windows.")
    speed_tokens: int = Field(default=64, ge=1, le=4096, description="Tokens generated when decode speed is timed.")
    speed_repeats: int = Field(default=5, ge=1, le=100, description="Timed repeats after one warm-up; medians count.")
    tasks: Annotated[
        tuple[str | InlineTask, ...],
        WrittenAsItIs(),
        BeforeValidator(parse_tasks, json_schema_input_type=list[str | InlineTask]),
    ] = Field(
        default=(),
        description="Tasks on which the dense model, every checkpoint and the pair as it is served are measured: names "
        "of lm-evaluation-harness's own, whose data comes from the hub, or tasks of the job's own, as objects or as "
        "YAML text.",
        examples=[["arc_easy"]],
    )
    task_limit: int | None = Field(
        default=None, ge=1, le=10**6, description="Questions of each task that are asked, the first ones; null: all."
    )
    prompts: tuple[Prompt, ...] | None = Field(
        default=None,
        max_length=16,
        description="Texts that the dense model and the pair go on from, greedily, to be read beside each other. Null: "
        "the beginnings of two validation windows, where all models fit their worker's device whole; an empty list: "
        "none.",
        examples=[["def read_lines(path):\n"]],
    )
    sample_tokens: int = Field(default=48, ge=1, le=512, description="Tokens that they go on by, at most.")


class PushSpec(SpecModel):
    """Where on the Hugging Face hub the checkpoints go when the job has succeeded."""

    repo: str = Field(
        max_length=84,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Repository of a unified checkpoint; of a pair, with `-prefill` and `-decode` after it. Made if it "
        "does not exist. The service has to be allowed to push into its organisation.",
        examples=["acme/Qwen3-8B-pruned"],
    )
    private: bool = Field(default=True, description="Whether a repository that is made is private.")


MetadataKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
MetadataValue = Annotated[str, Field(max_length=512, json_schema_extra=NO_NUL), AfterValidator(storable)]


Labels = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16, json_schema_extra=named_freely)]


JobName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$"), AfterValidator(storable)]


class JobSpec(SpecModel):
    """One pruning job. Prefill may not remove more blocks than decode; equal sets and widths give one checkpoint."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "model": "reference",
                    "prefill": {"remove_blocks": 2},
                    "decode": {"remove_blocks": 4},
                    "metadata": {"team": "serving"},
                }
            ]
        },
    )

    name: JobName | None = Field(
        default=None,
        description="What the job is called where jobs are shown; need not be its alone.",
        examples=["Qwen3-8B, nightly"],
    )
    model: Annotated[ModelSpec, BeforeValidator(_model_from_string, json_schema_input_type=ModelSpec | str)]
    prefill: HalfTarget
    decode: HalfTarget
    data: DataSpec = DataSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    search: SearchSpec = SearchSpec()
    distillation: DistillationSpec = DistillationSpec()
    kv_tokens: KvTokensSpec | None = Field(
        default=None, description="Send decode only some prompt tokens' keys and values; by default all are sent."
    )
    serving: ServingSpec = ServingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    precision: Precision = Field(
        default="auto",
        description="What search and healing compute in. `auto` is bfloat16 on an accelerator; on a CPU it is bfloat16 "
        "where the CPU multiplies such numbers by itself, the model is large enough to gain, and its loss on "
        "calibration windows is the same as in float32; else float32.",
    )
    push_to_hub: PushSpec | None = Field(
        default=None, description="Push the checkpoints to the Hugging Face hub; by default they stay in the store."
    )
    queue: QueueName | None = Field(
        default=None,
        description="Which workers take the job: one of the queues that the service has. By default its first.",
        examples=["gpu-80g"],
    )
    priority: Priority = Field(
        default=Priority.NORMAL,
        description="Which of the jobs that wait goes first: a stage waits while there are others of a higher "
        "priority for its workers. What runs is not interrupted.",
    )
    deadline_seconds: float | None = Field(
        default=None,
        gt=0.0,
        le=1e8,
        description="Longest time of each stage, from its first start; pauses do not count, waiting for a worker after "
        "a lost one does. A stage that takes longer fails: `deadline_exceeded`. The service may have its own limit; "
        "the shorter counts.",
        examples=[86400],
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Everything random follows from it.")
    metadata: Labels = Field(default_factory=dict, description="Your own labels; jobs can be listed by them.")

    @model_validator(mode="after")
    def _decode_removes_what_prefill_removes(self) -> Self:
        if (
            self.prefill.remove_blocks is not None
            and self.decode.remove_blocks is not None
            and self.prefill.remove_blocks > self.decode.remove_blocks
        ):
            raise PydanticCustomError(
                "prefill_exceeds_decode",
                "prefill.remove_blocks ({prefill}) may not exceed decode.remove_blocks ({decode}): "
                "every block that decode keeps needs the KV cache that prefill computed",
                {
                    "prefill": self.prefill.remove_blocks,
                    "decode": self.decode.remove_blocks,
                    "param": "prefill.remove_blocks",
                },
            )
        return self

    @model_validator(mode="after")
    def _parts_are_of_halves_that_can_give_them_up(self) -> Self:
        if self.decode.kv_only_blocks:
            raise PydanticCustomError(
                "kv_only_in_decode",
                "decode.kv_only_blocks has to be 0: decode makes no keys and values for others. Give "
                "decode.remove_blocks or decode.remove_attentions",
                {"param": "decode.kv_only_blocks"},
            )
        budgets: list[tuple[Literal["prefill", "decode"], HalfTarget, tuple[Cost, ...]]] = [
            ("prefill", self.prefill, ("kv_bytes", "weight_bytes")),
            ("decode", self.decode, ("flops",)),
        ]
        for half, target, not_its in budgets:
            if target.budget is not None and target.budget[0] in not_its:
                raise PydanticCustomError(
                    "budget_of_the_other_half",
                    "{half}.{cost} is no budget of {half}: prefill is bound by `flops`, decode by `kv_bytes` or "
                    "`weight_bytes`",
                    {"half": half, "cost": target.budget[0], "param": f"{half}.{target.budget[0]}"},
                )
        if self.prefill.remove_attentions:
            raise PydanticCustomError(
                "attentions_in_prefill",
                "prefill.remove_attentions has to be 0: decode reads the keys and values that they make. Give "
                "prefill.kv_only_blocks, or decode.remove_attentions, whose keys and values prefill then need not send",
                {"param": "prefill.remove_attentions"},
            )
        return self

    @model_validator(mode="after")
    def _forced_blocks_are_removed(self) -> Self:
        forced = len(self.search.force)
        for stage, target in (("prefill", self.prefill), ("decode", self.decode)):
            if target.remove_blocks is not None and forced > target.remove_blocks:
                raise PydanticCustomError(
                    "force_exceeds_removal",
                    "search.force lists {forced} blocks, but {stage}.remove_blocks is {removed}: force fewer blocks or "
                    "remove more",
                    {"forced": forced, "stage": stage, "removed": target.remove_blocks, "param": "search.force"},
                )
        return self
