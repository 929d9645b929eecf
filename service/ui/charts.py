"""Charts as geometry: numbers in, pixels out; `templates/charts.html` draws them as SVG.

Our own, because a strict Content-Security-Policy has no room for the style and script that charting libraries write
into their SVG (pygal does), and because a point that is a link needs a name that a screen reader says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 40
"""Pixels around the plot: room for the ticks' labels and the axes' names."""
LOGARITHMIC_FROM = 20.0
"""Ratio of the largest to the smallest value from which a logarithmic axis shows more."""


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in pixels."""

    at: float
    label: str


@dataclass(frozen=True)
class Point:
    """A value to draw. `label` is its whole meaning in words; `href` leads on from it; `chosen` ones are ringed."""

    x: float
    y: float
    label: str = ""
    href: str | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Mark:
    """A point's place in pixels; `below` says that its value lies under the axis's end."""

    x: float
    y: float
    point: Point
    below: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one kind. `kind` chooses the colour, `drawn` what joins them: a line, steps, stems, or nothing.

    A curve is a line whose points are too many to be marked.
    """

    name: str
    kind: str
    points: Sequence[Point]
    drawn: Literal["line", "curve", "steps", "stems", "dots"] = "line"


@dataclass(frozen=True)
class Drawn:
    """A series in pixels; `path` is the `d` of an SVG path."""

    series: Series
    path: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Chart:
    """A chart ready to draw. `title` is its accessible name; `rule` a named level across it."""

    title: str
    x_name: str
    y_name: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    drawn: Sequence[Drawn]
    rule: Tick | None = None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM

    @property
    def linked(self) -> bool:
        """Whether a point leads on: then the chart is a group of links, else one image."""
        return any(mark.point.href for one in self.drawn for mark in one.marks)


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = field(default=False)

    def at(self, value: float) -> float:
        """The pixel of a value; of one outside, that of the nearer end."""
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[Tick]:
        values = _decades(self.low, self.high) if self.logarithmic else _steps(self.low, self.high)
        return [Tick(self.at(value), f"{value:.6g}") for value in values]


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    y_low: float | None = None,
    rule: tuple[float, str] | None = None,
) -> Chart:
    """Lay out series of finite values, at least one point in all.

    `y_low` is where the axis begins (values below are drawn at its end, as such); by default it takes in all.
    `rule` is a level and its name. A y axis is logarithmic where all values are positive and far apart.
    """
    points = [point for one in series for point in one.points]
    xs, ys = [p.x for p in points], [p.y for p in points] + ([] if rule is None else [rule[0]])
    logarithmic = y_low is None and min(ys) > 0 and max(ys) / min(ys) > LOGARITHMIC_FROM
    x_axis = Axis(*_padded(min(xs), max(xs), 0.03), LEFT, WIDTH - RIGHT)
    low, high = (min(ys), max(ys)) if y_low is None else (y_low, max(ys))
    span = (low / 1.3, high * 1.3) if logarithmic else _padded(low, high, 0.08)
    y_axis = Axis(*span, HEIGHT - BOTTOM, TOP, logarithmic)
    return Chart(
        title=title,
        x_name=x_name,
        y_name=y_name + (" (log)" if logarithmic else ""),
        x_ticks=[Tick(x_axis.at(x), f"{x:.6g}") for x in _steps(x_axis.low, x_axis.high, 12) if x.is_integer()],
        y_ticks=y_axis.ticks,
        drawn=[_drawn(one, x_axis, y_axis) for one in series if one.points],
        rule=None if rule is None else Tick(y_axis.at(rule[0]), rule[1]),
    )


def without_outliers(values: Sequence[float]) -> float:
    """The lowest value that is not far below the others (Tukey's outer fence: three interquartile ranges)."""
    ordered = sorted(values)
    lower, upper = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return min(value for value in ordered if value >= lower - 3 * (upper - lower))


def _drawn(series: Series, x_axis: Axis, y_axis: Axis) -> Drawn:
    marks = [Mark(x_axis.at(p.x), y_axis.at(p.y), p, below=p.y < y_axis.low) for p in series.points]
    first, *rest = marks
    path = f"M{first.x} {first.y}"
    if series.drawn in ("line", "curve"):
        path += "".join(f"L{mark.x} {mark.y}" for mark in rest)
    elif series.drawn == "steps":
        path += "".join(f"H{mark.x}V{mark.y}" for mark in rest)
    elif series.drawn == "stems":
        path = "".join(f"M{mark.x} {y_axis.start}V{mark.y}" for mark in marks)
    else:
        path = ""
    return Drawn(series, path, marks)


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def _steps(low: float, high: float, most: int = 6) -> list[float]:
    """Round values in a range, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten in a range, with 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [f * 10.0**power for power in powers for f in factors if low <= f * 10.0**power <= high]
