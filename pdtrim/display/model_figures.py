"""What is shown of every checkpoint and of the dense model, by one name in tables and in comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pdtrim.contract.results import ModelFigures, Perplexity, Spread
from pdtrim.display.quantities import size

NOT_MEASURED = "does not fit"
"""In place of a speed: the model was larger than its worker's memory."""


@dataclass(frozen=True)
class ModelFigure:
    """A number of a model. A bare number needs its `unit` said; a cell, beside the dense model's, has it.

    Where `differs`, it tells something only of models that differ in it. A median has the `spread` of its repeats. A
    speed `may_lack`: it is not measured of a model that does not fit, and then said to be lacking.
    """

    label: str
    value: Callable[[ModelFigures], float | None]
    cell: Callable[[ModelFigures, ModelFigures], str]
    unit: str = ""
    differs: bool = False
    spread: Callable[[ModelFigures], Spread | None] | None = None
    may_lack: bool = False

    @property
    def name(self) -> str:
        """The label of the bare number."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def tells(self, values: Sequence[float | None]) -> bool:
        """Whether these values are worth a line."""
        return len(set(values)) > 1 if self.differs else any(value is not None for value in values)

    def rows(self, models: Mapping[str, ModelFigures]) -> list[list[str]]:
        """Its line in a table of models, one of which is `dense`, and a line for its spread, where it has one."""
        dense, found = models["dense"], list(models.values())
        if not (self.may_lack or self.tells([self.value(model) for model in found])):
            return []
        cells = [self.cell(model, dense) for model in found]
        # A model that did not fit its worker was not timed.
        repeats = next((model.speed_repeats for model in found if model.speed_repeats is not None), None)
        if self.spread is None or repeats is None:
            return [[self.label, *cells]]
        if repeats == 1:
            return [[f"{self.label}, measured once", *cells]]
        return [
            [f"{self.label}, median of {repeats}", *cells],
            [f"{self.label}, least to greatest", *(spread_text(self.spread(model)) for model in found)],
        ]


def spread_text(spread: Spread | None) -> str:
    """The least and the greatest of repeated times."""
    return "" if spread is None else f"{spread.low:.1f} to {spread.high:.1f}"


def _perplexity(found: Perplexity | None) -> str:
    return "" if found is None else str(found)


def _latency(of: Callable[[ModelFigures], float | None]) -> Callable[[ModelFigures, ModelFigures], str]:
    """The cell of a time, with how many times faster than dense it is."""

    def cell(model: ModelFigures, dense: ModelFigures) -> str:
        mine, theirs = of(model), of(dense)
        if mine is None:
            return NOT_MEASURED
        faster = "" if model is dense or theirs is None else f" ({theirs / mine:.2f}×)"
        return f"{mine:.1f}{faster}"

    return cell


FIGURES = (
    ModelFigure("blocks", lambda m: m.blocks, lambda m, _: str(m.blocks)),
    ModelFigure(
        "MLP channels",
        lambda m: m.mlp_channels,
        lambda m, _: "" if m.mlp_channels is None else f"{m.mlp_channels:,}",
        differs=True,
    ),
    ModelFigure(
        "perplexity before distillation",
        lambda m: m.undistilled_perplexity.value if m.undistilled_perplexity else None,
        lambda m, _: _perplexity(m.undistilled_perplexity),
    ),
    ModelFigure("perplexity", lambda m: m.perplexity.value, lambda m, _: _perplexity(m.perplexity)),
    ModelFigure(
        "KL to dense, nats",
        lambda m: m.kl_to_dense,
        lambda m, dense: "" if m is dense else f"{m.kl_to_dense:.4f}",
    ),
    ModelFigure(
        "same top token",
        lambda m: m.top1_agreement,
        lambda m, dense: "" if m is dense else f"{m.top1_agreement:.1%}",
    ),
    ModelFigure(
        "parameters",
        lambda m: m.parameters,
        lambda m, dense: f"{m.parameters:,} ({m.parameters / dense.parameters:.0%})",
    ),
    ModelFigure("weights", lambda m: m.bytes, lambda m, _: size(m.bytes), unit="bytes"),
    ModelFigure(
        "first token, ms",
        lambda m: m.time_to_first_token_ms,
        _latency(lambda m: m.time_to_first_token_ms),
        spread=lambda m: m.time_to_first_token_spread_ms,
        may_lack=True,
    ),
    ModelFigure(
        "each next token, ms",
        lambda m: m.inter_token_latency_ms,
        _latency(lambda m: m.inter_token_latency_ms),
        spread=lambda m: m.inter_token_latency_spread_ms,
        may_lack=True,
    ),
    ModelFigure(
        "decode, tokens/s",
        lambda m: m.decode_tokens_per_second,
        lambda m, _: NOT_MEASURED if m.decode_tokens_per_second is None else f"{m.decode_tokens_per_second:,.0f}",
    ),
    ModelFigure(
        "peak memory",
        lambda m: m.peak_memory_bytes,
        lambda m, _: "" if m.peak_memory_bytes is None else size(m.peak_memory_bytes),
        unit="bytes",
    ),
)
