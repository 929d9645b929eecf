from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from workers.pruning.model.plan import Blocks
from workers.pruning.model.units import NOTHING, Units, blocks_of, deleting
from workers.pruning.search.memo import Memo, heats, survivors
from workers.pruning.search.search import search

NUM_BLOCKS, WINDOWS = 12, 64
SINGLES = [deleting({block}) for block in range(NUM_BLOCKS)]


class Table:
    """Losses that differ by set, by window, and by both; counts what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Units, int]] = []

    def __call__(self, candidates: Sequence[Units], windows: range) -> dict[Units, list[float]]:
        self.asked += [(candidate, window) for candidate in candidates for window in windows]
        return {candidate: [self.loss(candidate, window) for window in windows] for candidate in candidates}

    @staticmethod
    def loss(units: Units, window: int) -> float:
        removed = blocks_of(units)
        cost = sum(0.02 * (5 * block % NUM_BLOCKS) for block in removed) + 0.1 * len(removed) ** 2
        noise = random.Random(f"{sorted(removed)} {window}").gauss(0.0, 0.02)
        return random.Random(window).gauss(3.0, 1.0) + cost + noise


@pytest.mark.parametrize(
    ("windows", "stops"), [(1, [1]), (4, [4]), (6, [4, 6]), (24, [4, 8, 12, 16, 24]), (40, [4, 8, 12, 16, 24, 36, 40])]
)
def test_heats_grow_up_to_all_windows(windows: int, stops: list[int]) -> None:
    assert heats(windows) == stops


def test_no_window_is_measured_twice_and_exact_losses_are_means_over_all() -> None:
    table = Table()
    memo = Memo(table, WINDOWS, racing=True)
    memo.race(SINGLES)
    raced = len(table.asked)
    assert raced < 0.5 * len(SINGLES) * WINDOWS
    exact = memo(SINGLES)
    assert sorted(table.asked, key=str) == sorted(((s, w) for s in SINGLES for w in range(WINDOWS)), key=str)
    for removed, loss in exact.items():
        assert loss == pytest.approx(sum(Table.loss(removed, w) for w in range(WINDOWS)) / WINDOWS, abs=1e-12)


def test_a_race_ends_on_the_set_that_exact_losses_prefer() -> None:
    for base in SINGLES:
        candidates = [base | other for other in SINGLES if other != base]
        raced, exact = Memo(Table(), WINDOWS, racing=True), Memo(Table(), WINDOWS)
        assert raced.race(candidates).winner == exact.race(candidates).winner


def test_sets_level_with_the_leader_stay() -> None:
    first, second, behind = SINGLES[:3]
    close = [0.1, -0.1, 0.2, -0.15]
    losses = {
        first: [3.0, 2.0, 4.0, 3.0],
        second: [loss + more for loss, more in zip([3.0, 2.0, 4.0, 3.0], close, strict=True)],
        behind: [4.0, 3.0, 5.1, 4.0],
    }
    assert survivors(losses, windows=24) == [first, second]
    assert survivors({removed: by_window[:1] for removed, by_window in losses.items()}, windows=24) == list(losses)
    assert survivors(losses, windows=4) == [first]  # nothing is left that could change the order


def test_what_was_visited_is_exact_though_greedy_raced() -> None:
    def searched(memo: Memo) -> dict[int, Blocks]:
        result = search(
            memo,
            algorithm="greedy",
            num_blocks=NUM_BLOCKS,
            remove=5,
            base=NOTHING,
            scores=[0.0] * NUM_BLOCKS,
            evaluations=1,
            seed=0,
            on_progress=lambda done, best: None,
        )
        return {count: found.blocks for count, found in result.frontier.items()}

    racing, table = Memo(Table(), WINDOWS, racing=True), Table()
    exact = Memo(table, WINDOWS)
    assert searched(racing) == searched(exact)
    assert {removed: exact.visited[removed] for removed in racing.visited} == racing.visited
    assert sum(map(len, racing.known.values())) < 0.5 * len(table.asked)


def test_a_race_tells_how_far_behind_every_set_was_when_it_left() -> None:
    memo = Memo(Table(), WINDOWS, racing=True)
    race = memo.race(SINGLES)
    assert race.behind.keys() == set(SINGLES)
    assert race.behind[race.winner] == 0.0
    for units, behind in race.behind.items():
        seen = range(min(memo.asked[units], memo.asked[race.winner]))
        gaps = [Table.loss(units, window) - Table.loss(race.winner, window) for window in seen]
        assert behind == pytest.approx(sum(gaps) / len(gaps), abs=0.03)  # the leader of a heat need not win
    assert 0.0 < race.typical_gap < max(race.behind.values())


def test_effort_counts_sets_once_and_windows_by_their_share_of_all() -> None:
    memo = Memo(Table(), WINDOWS, racing=True)
    memo.race(SINGLES)
    raced = memo.effort()
    assert raced.sets == NUM_BLOCKS
    assert raced.whole == sum(map(len, memo.known.values())) / WINDOWS < 0.5 * NUM_BLOCKS
    memo(SINGLES[:2])
    memo(SINGLES)
    assert memo.effort().sets == memo.effort().whole == NUM_BLOCKS
    # What an earlier attempt measured is no less asked for.
    resumed = Memo(Table(), WINDOWS, dict(memo.known), racing=True)
    resumed.race(SINGLES)
    assert resumed.effort() == raced


def test_a_race_whose_end_is_known_takes_no_measuring_and_others_do() -> None:
    memo, table = Memo(Table(), WINDOWS, racing=True), Table()
    memo.race(SINGLES)
    resumed = Memo(table, WINDOWS, dict(memo.known), racing=True)
    assert resumed.knows_race(SINGLES)
    resumed.race(SINGLES)
    assert table.asked == []
    assert not resumed.knows(SINGLES)
    assert not resumed.knows_race([SINGLES[0] | SINGLES[1], SINGLES[2]])


def test_a_race_goes_on_from_what_an_earlier_run_measured() -> None:
    saved: list[dict[Units, list[float]]] = []
    memo = Memo(Table(), WINDOWS, racing=True)
    memo.on_new = lambda: saved.append(dict(memo.known))
    race = memo.race(SINGLES)
    for known in saved:
        table = Table()
        resumed = Memo(table, WINDOWS, dict(known), racing=True)
        assert resumed.race(SINGLES) == race
        assert resumed.known == memo.known
        assert resumed.visited == memo.visited
        assert not {(s, w) for s, measured in known.items() for w in range(len(measured))} & set(table.asked)
