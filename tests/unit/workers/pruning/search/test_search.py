from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from tests.unit.workers.pruning.models import reference_model, reference_windows
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.plan import Blocks
from workers.pruning.model.units import NOTHING, Units, blocks_of, deleting, units_json
from workers.pruning.search.engine import WholeEngine
from workers.pruning.search.memo import MeasuredSet, Memo
from workers.pruning.search.search import Algorithm, SearchResult, search

NUM_BLOCKS, WINDOWS = 9, 16
ALGORITHMS: tuple[Algorithm, ...] = ("annealing", "greedy", "exhaustive")


def rugged(candidates: Sequence[Units]) -> dict[Units, float]:
    """Losses without structure but for a cost that grows with the number removed."""
    return {c: len(c) + random.Random(str(sorted(blocks_of(c)))).random() for c in candidates}


def noisy(candidates: Sequence[Units], windows: range) -> dict[Units, list[float]]:
    """The rugged losses on windows that differ by themselves, and a little by set."""
    return {
        units: [
            loss + random.Random(window).random() + 0.1 * random.Random(f"{window} {units_json(units)}").random()
            for window in windows
        ]
        for units, loss in rugged(candidates).items()
    }


def memo_of(
    losses: Callable[[Sequence[Units]], dict[Units, float]], known: dict[Units, list[float]] | None = None
) -> Memo:
    """What is known of losses on a single window."""
    return Memo(
        lambda sets, windows: {s: [loss] for s, loss in losses(sets).items()}, 1, {} if known is None else known
    )


def run(
    memo: Memo,
    algorithm: Algorithm = "annealing",
    *,
    remove: int = 4,
    base: Units = NOTHING,
    protect: Blocks = frozenset(),
    evaluations: int = 80,
    seed: int = 0,
    out_of_time: Callable[[], bool] = lambda: False,
    acceptable: Callable[[MeasuredSet], bool] | None = None,
    on_progress: Callable[[float, MeasuredSet | None], None] = lambda done, best: None,
) -> SearchResult:
    return search(
        memo,
        algorithm=algorithm,
        num_blocks=NUM_BLOCKS,
        remove=remove,
        base=base,
        protect=protect,
        scores=[0.1 * block for block in range(NUM_BLOCKS)],
        evaluations=evaluations,
        seed=seed,
        out_of_time=out_of_time,
        acceptable=acceptable,
        on_progress=on_progress,
    )


def test_exhaustive_visits_every_set_and_finds_the_best_of_every_count() -> None:
    result = run(memo_of(rugged), "exhaustive")
    for count, found in result.frontier.items():
        sets = [deleting(c) for c in itertools.combinations(range(NUM_BLOCKS), count)]
        assert found.loss == min(rugged(sets).values())
    assert len(result.trajectory) == 1 + 9 + 36 + 84 + 126


@pytest.mark.parametrize("seed", range(10))
def test_annealing_is_never_above_greedy_at_any_count(seed: int) -> None:
    greedy = run(memo_of(rugged), "greedy").frontier
    annealed = run(memo_of(rugged), seed=seed).frontier
    assert all(annealed[count].loss <= greedy[count].loss for count in greedy)


def test_annealing_finds_what_greedy_misses() -> None:
    greedy = run(memo_of(rugged), "greedy").frontier[4]
    annealed = run(memo_of(rugged), evaluations=200).frontier[4]
    assert annealed.loss < greedy.loss


@pytest.mark.parametrize("evaluations", [1, 10, 60, 120])
def test_annealing_s_sets_come_on_top_of_greedy_s_and_keep_to_their_budget(evaluations: int) -> None:
    greedy = run(memo_of(rugged), "greedy")
    annealed = run(memo_of(rugged), evaluations=evaluations)
    assert annealed.efforts["greedy"] == greedy.efforts["greedy"]
    assert 0 < annealed.efforts["annealing"].sets <= evaluations
    assert annealed.efforts["annealing"].sets > 0.9 * evaluations or annealed.ended_by == "neighbourhood"
    assert len(annealed.trajectory) == sum(effort.sets for effort in annealed.efforts.values())


def test_a_search_says_what_ended_annealing() -> None:
    assert run(memo_of(rugged), evaluations=10).ended_by == "budget"
    assert run(memo_of(rugged), evaluations=10_000).ended_by == "neighbourhood"
    assert run(memo_of(rugged), evaluations=10_000, out_of_time=lambda: True).ended_by == "time"
    assert run(memo_of(rugged), "greedy").ended_by is None
    assert run(memo_of(rugged), "exhaustive").ended_by is None
    assert run(memo_of(rugged), remove=0).ended_by is None


def test_where_the_neighbourhood_ended_annealing_no_swap_of_the_best_set_lowers_the_loss() -> None:
    result = run(memo_of(rugged), evaluations=10_000)
    for count, found in result.frontier.items():
        swaps = [
            (found.blocks - {out}) | {into}
            for out in found.blocks
            for into in range(NUM_BLOCKS)
            if into not in found.blocks
        ]
        assert all(rugged([deleting(swap)])[deleting(swap)] >= found.loss for swap in swaps), count


def test_what_greedy_s_races_dropped_is_not_measured_again() -> None:
    raced = Memo(noisy, WINDOWS, racing=True)
    greedy = run(raced, "greedy", remove=5)
    annealed = Memo(noisy, WINDOWS, racing=True)
    result = run(annealed, evaluations=60, remove=5)
    dropped = {units: windows for units, windows in raced.asked.items() if windows < WINDOWS}
    assert len(dropped) > 10
    assert {units: annealed.asked[units] for units in dropped} == dropped
    assert result.efforts["greedy"] == greedy.efforts["greedy"]
    # A set of annealing's own takes all windows at most.
    assert 0 < result.efforts["annealing"].whole <= result.efforts["annealing"].sets <= 60


@pytest.mark.parametrize("seed", range(5))
def test_a_search_that_races_is_resumed_where_it_was_though_its_time_is_spent(seed: int) -> None:
    asked = 0

    def after_ten_steps() -> bool:
        nonlocal asked
        asked += 1
        return asked > 10

    first = Memo(noisy, WINDOWS, racing=True)
    stopped = run(first, evaluations=10_000, seed=seed, out_of_time=after_ten_steps)
    resumed = Memo(noisy, WINDOWS, dict(first.known), racing=True)
    assert run(resumed, evaluations=10_000, seed=seed, out_of_time=lambda: True) == stopped
    assert resumed.known == first.known


def test_one_seed_gives_one_trajectory_and_another_seed_another() -> None:
    first, second, other = (run(memo_of(rugged), seed=seed).trajectory for seed in (3, 3, 4))
    assert first == second
    assert first != other


def test_no_set_is_evaluated_twice() -> None:
    asked: list[Units] = []

    def counting(candidates: Sequence[Units]) -> dict[Units, float]:
        asked.extend(candidates)
        return rugged(candidates)

    run(memo_of(counting))
    assert len(asked) == len(set(asked))


def test_a_search_resumed_at_any_point_arrives_at_the_same_result() -> None:
    saved: list[dict[Units, list[float]]] = []
    memo = memo_of(rugged)
    memo.on_new = lambda: saved.append(dict(memo.known))
    unbroken = run(memo)
    for known in saved[::5]:
        assert run(memo_of(rugged, dict(known))) == unbroken


def test_the_base_is_part_of_every_set() -> None:
    base = deleting({3, 5})
    result = run(memo_of(rugged), base=base, remove=5)
    assert all(base <= found.units for found in result.trajectory)
    assert sorted(result.frontier) == [2, 3, 4, 5]


def test_removing_no_block_is_a_search_of_one_set() -> None:
    result = run(memo_of(rugged), remove=0)
    assert [found.units for found in result.trajectory] == [NOTHING]


@pytest.mark.parametrize(("remove", "base"), [(9, NOTHING), (1, deleting({1, 2}))])
def test_an_impossible_count_is_refused(remove: int, base: Units) -> None:
    with pytest.raises(ValueError, match=f"cannot remove {remove} of 9 blocks"):
        run(memo_of(rugged), remove=remove, base=base)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_protected_blocks_are_in_no_set_and_forced_ones_in_every(algorithm: Algorithm) -> None:
    protect, forced = frozenset({0, 8}), deleting({4})
    result = run(memo_of(rugged), algorithm, base=forced, protect=protect, remove=5)
    assert sorted(result.frontier) == [1, 2, 3, 4, 5]
    assert all(forced <= found.units and not found.blocks & protect for found in result.trajectory)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_but_the_protected_blocks_can_be_removed(algorithm: Algorithm) -> None:
    result = run(memo_of(rugged), algorithm, protect=frozenset({2, 5, 7}), remove=6)
    assert result.frontier[6].blocks == {0, 1, 3, 4, 6, 8}


@pytest.mark.parametrize(
    ("base", "message"), [({1}, "block 1 is both protected"), ({3}, "cannot remove 7 of 9 blocks, of which 3 are")]
)
def test_constraints_that_contradict_are_refused(base: set[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(memo_of(rugged), base=deleting(base), protect=frozenset({0, 1, 2}), remove=7)


def test_a_search_out_of_time_takes_greedys_steps_and_ends() -> None:
    asked = 0

    def after_ten_steps() -> bool:
        nonlocal asked
        asked += 1
        return asked > 10

    greedy = run(memo_of(rugged), "greedy")
    at_once = run(memo_of(rugged), out_of_time=lambda: True)
    later = run(memo_of(rugged), evaluations=10_000, out_of_time=after_ten_steps)
    assert (at_once.frontier, at_once.trajectory) == (greedy.frontier, greedy.trajectory)
    assert at_once.efforts["annealing"].sets == 0
    assert len(greedy.trajectory) < len(later.trajectory) < len(run(memo_of(rugged), evaluations=10_000).trajectory)
    assert all(later.frontier[count].loss <= greedy.frontier[count].loss for count in greedy.frontier)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_progress_is_told_after_every_batch_and_never_falls(algorithm: Algorithm) -> None:
    batches, told = 0, []

    def counting(candidates: Sequence[Units]) -> dict[Units, float]:
        nonlocal batches
        batches += 1
        return rugged(candidates)

    def note(done: float, best: MeasuredSet | None) -> None:
        told.append((batches, done))

    run(memo_of(counting), algorithm, evaluations=120, on_progress=note)
    assert {after for after, _ in told} == set(range(1, batches + 1))
    shares = [done for _, done in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize("racing", [False, True])
def test_progress_moves_within_a_step_and_shows_no_loss_that_is_not_that_of_its_set(racing: bool) -> None:
    told: list[tuple[float, MeasuredSet | None]] = []
    memo = memo_of(rugged)

    def losses(candidates: Sequence[Units], windows: range) -> dict[Units, list[float]]:
        memo.walked(0.5)
        return measured(candidates, windows)

    measured, memo.losses, memo.racing = memo.losses, losses, racing
    result = run(memo, "greedy", on_progress=lambda done, best: told.append((done, best)))
    within_the_first_step = [done for done, _ in told if 0.03 < done < 0.9 / (len(result.frontier) - 1)]
    assert len(within_the_first_step) >= 1
    shares = [done for done, _ in told]
    assert shares == sorted(shares)
    *going_up, (_, last) = told
    assert {best for _, best in going_up} == {None}
    assert last is not None
    assert last == result.frontier[max(result.frontier)]


def test_what_progress_raises_ends_the_search_within_a_step() -> None:
    class Stop(Exception):
        pass

    memo = memo_of(rugged)

    def stop(done: float, best: MeasuredSet | None) -> None:
        if len(memo.visited) > 60:
            raise Stop

    with pytest.raises(Stop):
        run(memo, evaluations=200, on_progress=stop)
    assert len(memo.visited) <= 60 + NUM_BLOCKS + 1


def test_a_resumed_search_whose_time_is_spent_arrives_where_the_first_stopped() -> None:
    asked = 0

    def after_ten_steps() -> bool:
        nonlocal asked
        asked += 1
        return asked > 10

    first = memo_of(rugged)
    stopped = run(first, evaluations=10_000, out_of_time=after_ten_steps)
    assert run(memo_of(rugged, dict(first.known)), evaluations=10_000, out_of_time=lambda: True) == stopped


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_search_for_acceptable_sets_ends_two_counts_after_the_last(algorithm: Algorithm) -> None:
    shares: list[float] = []
    result = run(
        memo_of(rugged),
        algorithm,
        remove=8,
        acceptable=lambda found: found.loss < 4,  # no set of 4 blocks or more is
        on_progress=lambda done, best: shares.append(done),
    )
    assert sorted(result.frontier) == [0, 1, 2, 3, 4, 5]
    assert shares == sorted(shares)


def test_one_count_without_an_acceptable_set_does_not_end_a_search() -> None:
    result = run(memo_of(rugged), remove=8, acceptable=lambda found: len(found.units) in (1, 3))
    assert sorted(result.frontier) == [0, 1, 2, 3, 4, 5]


def test_annealing_for_acceptable_sets_is_never_above_greedy() -> None:
    def acceptable(found: MeasuredSet) -> bool:
        return found.loss < 4

    greedy = run(memo_of(rugged), "greedy", remove=8, acceptable=acceptable).frontier
    annealed = run(memo_of(rugged), remove=8, acceptable=acceptable, evaluations=200).frontier
    assert sorted(annealed) == sorted(greedy)
    assert all(annealed[count].loss <= greedy[count].loss for count in greedy)


@pytest.mark.training
def test_on_the_reference_model_annealing_is_at_most_greedy_and_at_least_the_optimum(
    record_property: Callable[[str, object], None],
) -> None:
    model = reference_model()
    engine = WholeEngine(block_stack(model), reference_windows("calibration", 4, 64), "kl", chunk_windows=4)
    known: dict[Units, list[float]] = {}  # every algorithm asks the same engine; nothing is computed twice

    def frontier(algorithm: Algorithm) -> SearchResult:
        return search(
            Memo(engine.window_losses, engine.windows, known),
            algorithm=algorithm,
            num_blocks=12,
            remove=3,
            base=NOTHING,
            scores=[0.0] * 12,
            evaluations=150,
            seed=0,
            on_progress=lambda done, best: None,
        )

    found = {algorithm: frontier(algorithm).frontier for algorithm in ("greedy", "annealing", "exhaustive")}
    for count in range(1, 4):
        losses = ", ".join(
            f"{name} {best[count].loss:.4f} {sorted(best[count].blocks)}" for name, best in found.items()
        )
        record_property(f"KL to the dense reference model without {count} blocks", losses)
    for count in range(1, 4):
        assert found["exhaustive"][count].loss <= found["annealing"][count].loss <= found["greedy"][count].loss
