"""What evaluation finds: what the checkpoints are worth and what they cost, beside the dense model."""

from __future__ import annotations

from pydantic import Field

from pdtrim.contract.results.base import Half, Halves, Result, Way
from pdtrim.contract.results.export import TokenRule
from pdtrim.contract.spec import Part

REPORT = "report.json"
"""The evaluation stage's artifact that holds the `EvaluationResult`."""


class Perplexity(Result):
    """Perplexity on validation windows, with its standard error over windows."""

    value: float
    standard_error: float | None = Field(description="Null of a single window, which has none.")

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.standard_error is None else f" ± {self.standard_error:.2f}")


class Spread(Result):
    """The least and the greatest of repeated measurements."""

    low: float
    high: float

    def meets(self, other: Spread) -> bool:
        """Whether some value lies in both."""
        return self.low <= other.high and other.low <= self.high


class ModelFigures(Result):
    """A checkpoint, or the dense model: what it gave up, what it is worth and what it costs."""

    blocks: int
    kept_blocks: list[int]
    deleted_blocks: list[int]
    distilled_blocks: dict[int, int] = Field(description="Block that went → the kept block that stands for both.")
    parts: dict[int, Part] = Field(default_factory=dict, description="Kept block → what of it is given up.")
    mlp_channels: int | None = Field(default=None, description="Null where they differ between blocks.")
    parameters: int
    bytes: int = Field(description="Of its weights.")
    perplexity: Perplexity
    kl_to_dense: float = Field(description="KL(dense ‖ model) in nats a token.")
    top1_agreement: float = Field(
        description="Share of tokens for which the dense model finds the same next token most likely."
    )
    undistilled_perplexity: Perplexity | None = Field(description="Before distillation; null where nothing went.")
    prefill_tokens_per_second: float | None = Field(
        default=None, description="Null, as are all speeds, where the model does not fit the worker's device."
    )
    decode_tokens_per_second: float | None = None
    time_to_first_token_ms: float | None = None
    inter_token_latency_ms: float | None = None
    speed_repeats: int | None = Field(
        default=None, description="Of how many timed repeats the speeds are medians. Null in jobs of earlier versions."
    )
    time_to_first_token_spread_ms: Spread | None = Field(
        default=None, description="Over the repeats; null as they are."
    )
    inter_token_latency_spread_ms: Spread | None = Field(
        default=None, description="Over the repeats; null as they are."
    )
    peak_memory_bytes: int | None = Field(default=None, description="Null where the device does not count it.")


class KvBytes(Result):
    """Bytes of keys and values of one request."""

    tokens: int = Field(description="Of the request.")
    dense: int
    pruned: int
    dense_sent: int = Field(description="What prefill would send to decode for the prompt, dense.")
    sent: int = Field(description="What it sends.")


class TokenRuleFigures(Result):
    """What a token rule costs and saves."""

    rule: TokenRule
    loss: float = Field(description="The PD loss with it.")
    bytes_sent: int
    ratio: float = Field(description="Tokens that the dense model would send for one that is sent.")
    ratio_asked: float | None = None
    ratio_reached: bool | None = Field(default=None, description="Null where the job asked for no ratio.")


class FirstTokenLoss(Halves[float]):
    """The loss of the token after the prompt, in nats, by each half that may say it."""


class FirstTokenLosses(Result):
    """The loss of the token after the prompt, whichever half says it."""

    dense: FirstTokenLoss
    pruned: FirstTokenLoss = Field(description="Before distillation.")
    distilled: FirstTokenLoss


class CopyingLosses(Result):
    """The PD loss where the continuation is the prompt said again, which a model that finds it there predicts well."""

    dense: float
    pruned: float = Field(description="Before distillation.")
    distilled: float


class PairFigures(Result):
    """What the two halves make of a request together. Losses are in nats a token of the continuation."""

    prompt_tokens: int
    continuation_tokens: int
    dense_loss: float
    pruned_loss: float = Field(description="Before distillation.")
    distilled_loss: float
    first_token: Half = Field(
        default="prefill", description="The half that says the first token as the pair is served, and in the losses."
    )
    first_token_losses: FirstTokenLosses | None = Field(
        default=None, description="Null in jobs of versions that measured none."
    )
    copying: CopyingLosses | None = Field(default=None, description="Null in jobs of versions that measured none.")
    kv_layer_map: list[int] = Field(
        description="For each layer of decode, the layer of prefill whose KV cache it reads."
    )
    kv_tokens: TokenRuleFigures | None = Field(default=None, description="Null where the job asked for none.")
    kv_bytes_per_request: KvBytes


class TaskMetric(Result):
    """A metric of an evaluation task, and its standard error over questions; null where unknown or not finite."""

    value: float | None
    stderr: float | None


TaskResult = dict[str, TaskMetric]
"""By the metric's name."""


class Sample(Result):
    """A prompt, and how models go on from it, greedily. Control characters are replaced by `�`."""

    prompt: str
    continuations: dict[str, str] = Field(
        description="By `dense` and by `pair`, or by `unified` where one checkpoint serves both halves."
    )


class EvaluationResult(Result):
    """What the evaluation stage found; also the content of `report.json`."""

    way: Way = Field(
        default="resident",
        description="How quality was measured: of models that are `resident`, all in the device's memory at once, or "
        "`streamed`, their blocks read from disk one at a time.",
    )

    models: dict[str, ModelFigures] = Field(
        description="`dense`, and each checkpoint by role: `unified`, or `prefill` and `decode`."
    )
    pair: PairFigures
    tasks: dict[str, dict[str, TaskResult]] = Field(
        default_factory=dict,
        description="Task → model → metric, where the job names tasks. The model is one of `models`, or `pair`: the "
        "two halves as they are served, where they are two checkpoints or a token rule lies between them.",
    )
    samples: list[Sample] = Field(
        default_factory=list, description="Texts to read: none in jobs of versions that made none."
    )
