"""What charts and tables say, from what the stages found."""

from __future__ import annotations

import pytest

from pdtrim.contract.frontier import Frontier
from pdtrim.contract.results import HalfPlan, Halves
from service.ui import charts, figures
from service.ui.charts import Axis, Point, Series
from service.ui.views import export_link
from tests.unit.service.ui.found import COSINE, PLAN, REMOVAL, SEARCH

JOB = "job_" + "0" * 32


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (-0.3, 12.3, ["0", "5", "10"]),
        (0.919, 0.971, ["0.92", "0.93", "0.94", "0.95", "0.96", "0.97"]),
    ],
)
def test_ticks_are_round_and_within_the_axis(low: float, high: float, labels: list[str]) -> None:
    assert [tick.label for tick in Axis(low, high, 0, 100).ticks] == labels


def test_an_axis_of_values_that_are_far_apart_is_logarithmic() -> None:
    drawn = charts.chart("c", [Series("s", "k", [Point(1, 0.01), Point(2, 1), Point(3, 0.1)])], x_name="x", y_name="y")
    first, second, third = (mark.y for mark in drawn.drawn[0].marks)
    assert third == pytest.approx((first + second) / 2, abs=0.2)
    assert "(log)" in drawn.y_name


@pytest.mark.parametrize("points", [[Point(0, 0.0)], [Point(3, 5.0)], [Point(0, 2.0), Point(1, 2.0)], [Point(0, -1.0)]])
def test_few_or_equal_values_are_drawn_inside_the_plot(points: list[Point]) -> None:
    drawn = charts.chart("c", [Series("s", "k", points)], x_name="x", y_name="y")
    assert all(drawn.left <= mark.x <= drawn.right for mark in drawn.drawn[0].marks)
    assert all(drawn.top < mark.y < drawn.bottom for mark in drawn.drawn[0].marks)


def test_the_block_map_says_what_becomes_of_each_block_and_whose_cache_decode_reads() -> None:
    (row,) = figures.block_map(REMOVAL).rows
    assert [cell.action for cell in row.halves["prefill"]] == ["kept", "kept", "deleted", "kept", "kept", "kept"]
    assert [cell.meaning for cell in row.halves["decode"]][1:4] == [
        "block 1 is kept and stands for block 3 too",
        "block 2 is deleted",
        "block 3 is distilled into block 1",
    ]
    # Prefill keeps 0, 1, 3, 4, 5 as its layers 0 to 4; decode keeps 0, 1, 5.
    assert row.kv_from == ["0", "1", "", "", "", "4"]


def test_a_deep_model_has_its_block_map_in_rows() -> None:
    plan = HalfPlan(num_blocks=50, deleted=[49], distilled={})
    rows = figures.block_map(Halves(prefill=plan, decode=plan)).rows
    assert [len(row.blocks) for row in rows] == [24, 24, 2]
    assert rows[2].halves["decode"][1].action == "deleted"
    assert rows[2].kv_from == ["48", ""]


def test_scores_far_below_the_others_do_not_squeeze_them() -> None:
    figure = figures.scores(COSINE, 0.95, REMOVAL)
    assert figure.chart is not None
    marks = {mark.point.x: mark for drawn in figure.chart.drawn for mark in drawn.marks}
    assert [block for block, mark in marks.items() if mark.below] == [0]
    assert marks[5].y - marks[2].y > 100
    assert figure.tables[0].rows[0] == ("0", "-0.0500", "kept by both")
    given_up = [row[2].removeprefix("given up by ") for row in figure.tables[0].rows]
    assert given_up == ["kept by both", "kept by both", "both", "decode", "decode", "kept by both"]


def test_every_point_of_the_frontier_leads_to_the_export_that_can_be_cut_there() -> None:
    frontier = Frontier.from_plan(JOB, PLAN)
    figure = figures.frontier(frontier, export_link(JOB, frontier))
    assert figure.chart is not None
    links = [mark.point.href for drawn in figure.chart.drawn for mark in drawn.marks]
    counts = [tuple(int(part.split("=")[1]) for part in str(link).split("?")[1].split("&")) for link in links]
    assert counts == [(0, 0), (1, 3), (1, 1), (1, 2), (1, 3)]
    for prefill, decode in counts:
        frontier.cut(prefill=prefill, decode=decode)
    chosen = [mark.point.label for drawn in figure.chart.drawn for mark in drawn.marks if mark.point.chosen]
    assert chosen == [
        "prefill without 1 block: loss 0.1000; this job's export",
        "decode without 3 blocks: loss 0.4000; this job's export",
    ]


def test_a_trajectory_shows_the_best_so_far() -> None:
    prefill, decode = figures.trajectory(SEARCH, REMOVAL)
    assert [row[:2] for row in prefill.tables[0].rows] == [("1", "5.0000"), ("2", "0.4000"), ("3", "0.1000")]
    assert decode.tables[0].rows == [("1", "0.4000", "2, 3, 4")]
    assert prefill.chart is not None
    assert len(prefill.chart.drawn[0].marks) == 4
