from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from tests.unit.workers.pruning.models import reference_model, reference_windows
from workers.pruning.blocks import block_stack
from workers.pruning.engine import Engine
from workers.pruning.plan import Blocks
from workers.pruning.search import Algorithm, Memo, SearchResult, search

NUM_BLOCKS = 9


def rugged(candidates: Sequence[Blocks]) -> dict[Blocks, float]:
    """Losses without structure but for a cost that grows with the number removed."""
    return {c: len(c) + random.Random(str(sorted(c))).random() for c in candidates}


def run(
    memo: Memo,
    algorithm: Algorithm = "annealing",
    *,
    remove: int = 4,
    base: Blocks = frozenset(),
    evaluations: int = 80,
    seed: int = 0,
) -> SearchResult:
    return search(
        memo,
        algorithm=algorithm,
        num_blocks=NUM_BLOCKS,
        remove=remove,
        base=base,
        scores=[0.1 * block for block in range(NUM_BLOCKS)],
        evaluations=evaluations,
        seed=seed,
        on_progress=lambda done, best: None,
    )


def test_exhaustive_visits_every_set_and_finds_the_best_of_every_count() -> None:
    result = run(Memo(rugged), "exhaustive")
    for count, found in result.frontier.items():
        sets = [frozenset(c) for c in itertools.combinations(range(NUM_BLOCKS), count)]
        assert found.loss == min(rugged(sets).values())
    assert len(result.trajectory) == 1 + 9 + 36 + 84 + 126


@pytest.mark.parametrize("seed", range(10))
def test_annealing_is_never_above_greedy_at_any_count(seed: int) -> None:
    greedy = run(Memo(rugged), "greedy").frontier
    annealed = run(Memo(rugged), seed=seed).frontier
    assert all(annealed[count].loss <= greedy[count].loss for count in greedy)


def test_annealing_finds_what_greedy_misses() -> None:
    greedy = run(Memo(rugged), "greedy").frontier[4]
    annealed = run(Memo(rugged), evaluations=200).frontier[4]
    assert annealed.loss < greedy.loss


def test_annealing_keeps_to_its_evaluations() -> None:
    assert len(run(Memo(rugged), evaluations=120).trajectory) <= 120


def test_one_seed_gives_one_trajectory_and_another_seed_another() -> None:
    first, second, other = (run(Memo(rugged), seed=seed).trajectory for seed in (3, 3, 4))
    assert first == second
    assert first != other


def test_no_set_is_evaluated_twice() -> None:
    asked: list[Blocks] = []

    def counting(candidates: Sequence[Blocks]) -> dict[Blocks, float]:
        asked.extend(candidates)
        return rugged(candidates)

    run(Memo(counting))
    assert len(asked) == len(set(asked))


def test_a_search_resumed_at_any_point_arrives_at_the_same_result() -> None:
    saved: list[dict[Blocks, float]] = []
    memo = Memo(rugged)
    memo.on_new = lambda new: saved.append(dict(memo.known))
    unbroken = run(memo)
    for known in saved[::5]:
        assert run(Memo(rugged, dict(known))) == unbroken


def test_the_base_is_part_of_every_set() -> None:
    base = frozenset({3, 5})
    result = run(Memo(rugged), base=base, remove=5)
    assert all(base <= found.removed for found in result.trajectory)
    assert sorted(result.frontier) == [2, 3, 4, 5]


def test_removing_no_block_is_a_search_of_one_set() -> None:
    result = run(Memo(rugged), remove=0)
    assert [found.removed for found in result.trajectory] == [frozenset()]


@pytest.mark.parametrize(("remove", "base"), [(9, frozenset()), (1, frozenset({1, 2}))])
def test_an_impossible_count_is_refused(remove: int, base: Blocks) -> None:
    with pytest.raises(ValueError, match=f"cannot remove {remove} of 9 blocks"):
        run(Memo(rugged), remove=remove, base=base)


def test_on_the_reference_model_annealing_is_at_most_greedy_and_at_least_the_optimum(
    record_property: Callable[[str, object], None],
) -> None:
    model = reference_model()
    engine = Engine(block_stack(model), reference_windows("calibration", 4, 64), "kl", chunk_windows=4)
    known: dict[Blocks, float] = {}  # every algorithm asks the same engine; nothing is computed twice

    def frontier(algorithm: Algorithm) -> SearchResult:
        return search(
            Memo(engine.losses, known),
            algorithm=algorithm,
            num_blocks=12,
            remove=4,
            base=frozenset(),
            scores=[0.0] * 12,
            evaluations=150,
            seed=0,
            on_progress=lambda done, best: None,
        )

    found = {algorithm: frontier(algorithm).frontier for algorithm in ("greedy", "annealing", "exhaustive")}
    for count in range(1, 5):
        losses = ", ".join(
            f"{name} {best[count].loss:.4f} {sorted(best[count].removed)}" for name, best in found.items()
        )
        record_property(f"KL to the dense reference model without {count} blocks", losses)
    for count in range(1, 5):
        assert found["exhaustive"][count].loss <= found["annealing"][count].loss <= found["greedy"][count].loss
