"""The report's figures, drawn with matplotlib from what the stages recorded.

Each is drawn once, in the light palette: as it is for the PNG, and for the page as SVG whose colours follow the
reader's preference. Colour never says alone what marks or letters do not say too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from pdtrim.contract.results import HalfPlan, ModelFigures, Perplexity
from pdtrim.contract.spec import Part
from pdtrim.display import captions
from pdtrim.display.captions import Caption, objective_name
from pdtrim.display.quantities import listed, size
from pdtrim.display.series import FATES, Fate, best_so_far, controls, fates, kv_amounts
from workers.reporting.findings import HALVES, Findings

WIDTH_IN = 8.0
PNG_DPI = 150
ROW_BLOCKS = 32
"""Blocks in a line of the block map."""
COSINE_TICKS = (-1.0, 0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)
MOST_ALIKE = 1e-5
"""What a block that changes nothing is drawn at, on a scale that has no end."""


@dataclass(frozen=True)
class Palette:
    """The light palette's colours; no two are the same, since the dark ones are put in their places."""

    paper: str = "#ffffff"
    ink: str = "#1f2328"
    muted: str = "#59636e"
    line: str = "#d1d9e0"
    dense: str = "#6e7781"
    prefill: str = "#0969da"
    decode: str = "#bc4c00"
    distilled: str = "#8250df"
    gone: str = "#eaeef2"


INK = Palette()
DARK = Palette(
    paper="#0d1117",
    ink="#f0f6fc",
    muted="#9198a1",
    line="#3d444d",
    dense="#8b949e",
    prefill="#4493f8",
    decode="#f0883e",
    distilled="#ab7df8",
    gone="#21262d",
)
HALF_COLOURS = {"prefill": INK.prefill, "decode": INK.decode, "unified": INK.prefill, "dense": INK.dense}
RC: Any = {
    "axes.edgecolor": INK.line,
    "axes.labelcolor": INK.ink,
    "axes.titlecolor": INK.ink,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": INK.paper,
    "axes.facecolor": INK.paper,
    "savefig.facecolor": INK.paper,
    "font.size": 9,
    "grid.color": INK.line,
    "grid.linewidth": 0.6,
    "hatch.color": INK.muted,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": INK.ink,
    "xtick.color": INK.muted,
    "ytick.color": INK.muted,
    "svg.hashsalt": "pdtrim",
}


@dataclass(frozen=True)
class Drawing:
    """A figure as files hold it. `caption` says how to read it, `alt` what it shows to whoever does not see it."""

    name: str
    title: str
    caption: str
    alt: str
    png: bytes
    svg: str


@dataclass(frozen=True)
class _Plot:
    name: str
    caption: Caption
    draw: Callable[[Findings], tuple[Figure, str]]
    drawn: str = ""
    """What the caption needs besides, since it is drawn so."""


def draw_all(findings: Findings) -> Iterator[Drawing]:
    """Every figure of a job, in the page's order."""
    for plot in PLOTS:
        with matplotlib.rc_context(RC):
            figure, alt = plot.draw(findings)
            # Drawing the one file finds where everything goes; there it stays for the other.
            png = _png(figure)
            figure.set_layout_engine("none")
            text = f"{plot.caption.text} {plot.drawn}".strip()
            yield Drawing(plot.name, plot.caption.title, text, alt, png, _svg(figure))


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


def _svg(figure: Figure) -> str:
    """The figure with CSS variables for its colours, transparent, without what would name the machine or the day."""
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    for name, colour in vars(INK).items():
        text = text.replace(colour, f"var(--{name})")
    schemes = (f":root{{color-scheme:light dark;{_variables(INK)}}}", f":root{{{_variables(DARK)}}}")
    style = f"{schemes[0]}@media(prefers-color-scheme:dark){{{schemes[1]}}}"
    head, tag, body = text.partition("<defs>")
    return f"{head[head.index('<svg') :]}<style>{style}</style>{tag}{body}"


def _variables(palette: Palette) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in vars(palette).items())


def _figure(height_in: float) -> Figure:
    return Figure(figsize=(WIDTH_IN, height_in), dpi=PNG_DPI, layout="constrained")


def _block_map(findings: Findings) -> tuple[Figure, str]:
    blocks = findings.num_blocks
    lines = -(-blocks // ROW_BLOCKS)
    across = min(blocks, ROW_BLOCKS)
    figure = _figure(1.0 + 0.62 * lines * len(HALVES))
    axes = figure.subplots()
    for place, half in enumerate(HALVES):
        for block in range(blocks):
            line, column = divmod(block, ROW_BLOCKS)
            _block(axes, column, place * (lines + 0.35) + line, block, findings.plan.of(half), HALF_COLOURS[half])
    middles = [place * (lines + 0.35) + lines / 2 for place in range(len(HALVES))]
    axes.set_yticks(middles, HALVES)
    axes.tick_params(axis="y", length=0, labelcolor=INK.ink)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set(xlim=(0, across), ylim=(len(HALVES) * (lines + 0.35), 0))
    legend = [
        Patch(facecolor=INK.prefill, label="kept by prefill"),
        Patch(facecolor=INK.decode, label="kept by decode"),
        Patch(facecolor=INK.gone, edgecolor=INK.muted, hatch="xxxx", label="deleted"),
        Patch(facecolor=INK.distilled, label="distilled into a neighbour"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=4)
    told = (f"{half} gives up {listed(findings.removed(half))} of {blocks} blocks" for half in HALVES)
    return figure, "; ".join(told) + "."


PART_LEFT: Mapping[Part, str] = {"attention": "MLP", "mlp": "attn", "kv_only": "KV"}
"""What is left of a block that gives up a part."""


def _block(axes: Axes, x: float, y: float, block: int, plan: HalfPlan, kept: str) -> None:
    deleted, absorber = block in plan.deleted, plan.distilled.get(block)
    look: dict[str, Any] = {"facecolor": kept}
    text = str(block)
    if deleted:
        look = {"facecolor": INK.gone, "edgecolor": INK.muted, "hatch": "xxxx"}
    elif absorber is not None:
        look = {"facecolor": INK.distilled}
        text = f"{block}→" if absorber > block else f"←{block}"
    elif block in plan.parts:
        text = f"{block}\n{PART_LEFT[plan.parts[block]]}"
    axes.add_patch(Rectangle((x + 0.05, y + 0.08), 0.9, 0.84, linewidth=0.6, **look))
    colour = INK.ink if deleted else INK.paper
    box = {"facecolor": INK.gone, "edgecolor": "none", "pad": 1.0} if deleted else None
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color=colour, bbox=box)


def _scores(findings: Findings) -> tuple[Figure, str]:
    cosine = findings.scores.cosine
    figure = _figure(3.0)
    axes = figure.subplots()
    distances = [max(1.0 - value, MOST_ALIKE) for value in cosine]
    axes.plot(range(len(cosine)), distances, color=INK.line, linewidth=1, zorder=1)
    for label, marker, colour, members in _fates(findings):
        axes.scatter(members, [distances[block] for block in members], 46, colour, marker=marker, label=label, zorder=2)
    axes.set_yscale("log")
    shown = (min(distances) / 1.4, max(distances) * 1.4)
    threshold = findings.plan.distillation_threshold
    place = 1.0 - threshold
    if shown[0] < place < shown[1]:
        axes.axhline(place, color=INK.distilled, linestyle="--", linewidth=1)
        look: dict[str, Any] = {"color": INK.distilled, "fontsize": 8, "ha": "right", "va": "bottom"}
        axes.text(1.0, place, f"threshold {threshold:g} ", transform=axes.get_yaxis_transform(), **look)
    ticks = [tick for tick in COSINE_TICKS if shown[0] <= 1.0 - tick <= shown[1]]
    axes.set_yticks([1.0 - tick for tick in ticks], [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set(ylim=(shown[1], shown[0]), xlabel="block", ylabel="mean cosine of input and output")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="best", ncols=2)
    most, least = max(range(len(cosine)), key=cosine.__getitem__), min(range(len(cosine)), key=cosine.__getitem__)
    return figure, (
        f"Cosine score of each of {len(cosine)} blocks: highest {cosine[most]:.4f} at block {most}, lowest "
        f"{cosine[least]:.4f} at block {least}."
    )


MARKS: dict[Fate, tuple[str, str]] = {
    "kept": ("o", INK.dense),
    "decode": ("v", INK.decode),
    "prefill": ("X", INK.prefill),
}
"""Marker and colour."""


def _fates(findings: Findings) -> Iterator[tuple[str, str, str, list[int]]]:
    """Label, marker, colour and blocks, for what becomes of them in the end."""
    found = fates(findings.num_blocks, findings.plan)
    for fate, (marker, colour) in MARKS.items():
        if members := [block for block, of_block in enumerate(found) if of_block == fate]:
            yield FATES[fate], marker, colour, members


def _trajectory(findings: Findings) -> tuple[Figure, str]:
    figure = _figure(3.0)
    told = []
    for axes, half in zip(figure.subplots(1, 2), HALVES, strict=True):
        found = findings.search.of(half)
        target = len(findings.removed(half))
        shown = [(n, s.loss) for n, s in enumerate(found, 1) if s.loss > 0.0]
        places, losses = [place for place, _ in shown], [loss for _, loss in shown]
        axes.scatter(places, losses, 12, INK.dense, alpha=0.6, linewidths=0, label="a set of blocks")
        best = best_so_far(found, target)
        if best:
            steps, values = zip(*best, (len(found), best[-1][1]), strict=True)
            colour, label = HALF_COLOURS[half], f"best without {target} so far"
            axes.step(steps, values, where="post", color=colour, linewidth=1.8, label=label)
            told.append(f"{half}: {len(found)} sets evaluated, the best without {target} blocks has {best[-1][1]:.4f}")
        else:
            told.append(f"{half}: {len(found)} sets evaluated")
        axes.set(title=half, xlabel="sets evaluated", ylabel=_objective(findings, folded=findings.plan.losses.folded))
        if shown:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.3)
        if best:
            axes.legend(loc="best")
    return figure, "; ".join(told) + "."


def _frontier(findings: Findings) -> tuple[Figure, str]:
    figure = _figure(3.0)
    axes = figure.subplots()
    told = []
    for half, marker in zip(HALVES, "os", strict=True):
        points = [(point.remove_blocks, point.loss) for point in findings.plan.frontier.of(half)]
        counts, losses = [count for count, _ in points], [loss for _, loss in points]
        axes.plot(counts, losses, color=HALF_COLOURS[half], marker=marker, markersize=5, label=half)
        chosen = len(findings.removed(half))
        for count, loss in points:
            if count == chosen:
                axes.scatter([count], [loss], 160, facecolors="none", edgecolors=INK.ink, linewidths=1.4, zorder=3)
        told.append(f"{half}: " + ", ".join(f"{count} blocks {loss:.4f}" for count, loss in points))
    axes.scatter([], [], 160, facecolors="none", edgecolors=INK.ink, linewidths=1.4, label="this job")
    axes.set(xlabel="blocks given up", ylabel=_objective(findings))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left")
    return figure, "; ".join(told) + "."


def _controls(findings: Findings) -> tuple[Figure, str]:
    found = controls(findings.plan)
    labels, losses = [one.label for one in found], [one.loss for one in found]
    figure = _figure(2.2)
    axes = figure.subplots()
    colours = [INK.prefill, *[INK.dense] * (len(found) - 1)]
    _bars(axes, labels, losses, colours, [f"{loss:.4f}" for loss in losses])
    axes.set_xlabel(f"{_objective(findings)}, on continuations, before distillation")
    return figure, "; ".join(f"{one.label}: {one.loss:.4f}" for one in found) + "."


def _bars(
    axes: Axes, labels: Sequence[str], values: Sequence[float], colours: Sequence[str], told: Sequence[str]
) -> None:
    bars = axes.barh(labels, values, color=colours, height=0.62)
    axes.bar_label(bars, told, padding=4, color=INK.ink)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=INK.ink)


def _kv_bytes(findings: Findings) -> tuple[Figure, str]:
    pair = findings.evaluation.pair
    found = kv_amounts(pair)
    colours = {"dense": INK.dense, "pruned": INK.decode, "rule": INK.distilled}
    figure = _figure(0.9 + 0.34 * len(found))
    axes = figure.subplots()
    labels, sizes = [amount.label for amount in found], [size(amount.bytes) for amount in found]
    _bars(axes, labels, [amount.bytes / 1024 for amount in found], [colours[amount.of] for amount in found], sizes)
    tokens = pair.kv_bytes_per_request.tokens
    axes.set_xlabel(f"KiB of keys and values, request of {tokens} tokens, prompt of {pair.prompt_tokens}")
    return figure, "; ".join(f"{label}: {told}" for label, told in zip(labels, sizes, strict=True)) + "."


def _against_dense(findings: Findings) -> tuple[Figure, str]:
    models = findings.models
    figure = _figure(3.2)
    left, right = figure.subplots(1, 2)
    _perplexities(left, models)
    dense = models["dense"]
    kinds: dict[str, Callable[[ModelFigures], float | None]] = {
        "parameters": lambda model: model.parameters,
        "weights": lambda model: model.bytes,
        "first token": lambda model: model.time_to_first_token_ms,
        "next token": lambda model: model.inter_token_latency_ms,
    }
    height = 0.8 / len(findings.roles)
    for place, role in enumerate(findings.roles):
        shares = [_share(of(models[role]), of(dense)) for of in kinds.values()]
        where = [number + place * height for number in range(len(kinds))]
        bars = right.barh(where, shares, height * 0.9, color=HALF_COLOURS[role], label=role)
        right.bar_label(
            bars,
            ["does not fit" if isnan(share) else f"{share:.0%}" for share in shares],
            padding=3,
            color=INK.ink,
            fontsize=8,
        )
    right.axvline(1.0, color=INK.dense, linestyle="--", linewidth=1)
    right.set_yticks([number + 0.4 - height / 2 for number in range(len(kinds))], kinds)
    right.invert_yaxis()
    right.margins(x=0.16)
    right.grid(visible=False, axis="y")
    right.tick_params(axis="y", length=0, labelcolor=INK.ink)
    right.set(title="of the dense model's", xlabel="share; 1 is the dense model")
    if len(findings.roles) > 1:
        figure.legend(loc="outside lower right", ncols=2)
    told = (
        f"{role}: perplexity {models[role].perplexity.value:.2f} beside {dense.perplexity.value:.2f}, "
        f"{models[role].bytes / dense.bytes:.0%} of the weights' bytes"
        for role in findings.roles
    )
    return figure, "; ".join(told) + "."


def _error(measured: Perplexity) -> list[float] | None:
    return None if measured.standard_error is None else [measured.standard_error]


def _share(value: float | None, dense: float | None) -> float:
    """Not a number where either was not measured."""
    return nan if value is None or dense is None else value / dense


def _perplexities(axes: Axes, models: Mapping[str, ModelFigures]) -> None:
    for place, (name, model) in enumerate(models.items()):
        measured = model.perplexity
        look: dict[str, Any] = {"fmt": "o", "color": HALF_COLOURS[name], "capsize": 4, "markersize": 7}
        axes.errorbar([place], [measured.value], _error(measured), **look)
        if (before := model.undistilled_perplexity) is not None:
            hollow: dict[str, Any] = {**look, "markerfacecolor": INK.paper, "alpha": 0.75}
            axes.errorbar([place - 0.22], [before.value], _error(before), **hollow)
    axes.set_xticks(range(len(models)), models)
    axes.tick_params(axis="x", length=0, labelcolor=INK.ink)
    axes.grid(visible=False, axis="x")
    axes.margins(x=0.2, y=0.12)
    axes.set(title="perplexity ± standard error; hollow: before distillation")


def _objective(findings: Findings, *, folded: bool = False) -> str:
    return objective_name(findings.plan.losses.objective, folded=folded)


PLOTS = (
    _Plot(
        "block-map",
        captions.BLOCK_MAP,
        _block_map,
        "Hatched ones are deleted; an arrow points to the kept neighbour that was trained to stand for both.",
    ),
    _Plot("scores", captions.SCORES, _scores, "The scale widens towards 1."),
    _Plot("search", captions.SEARCH, _trajectory),
    _Plot("frontier", captions.FRONTIER, _frontier),
    _Plot("controls", captions.CONTROLS, _controls),
    _Plot("kv-bytes", captions.KV_BYTES, _kv_bytes),
    _Plot("dense-pruned", captions.AGAINST_DENSE, _against_dense),
)
