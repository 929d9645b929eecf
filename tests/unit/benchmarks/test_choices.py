"""What the methods of other papers choose, beside plain statements of what they look for."""

from __future__ import annotations

from itertools import combinations

from benchmarks.choices import CHOICES, blockpruner, evopress, late_blocks, with_part
from tests.unit.workers.pruning.models import random_ids, tiny_model
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.costs import costs_of
from workers.pruning.model.units import NOTHING, Unit, deleting
from workers.pruning.search.engine import WholeEngine

BLOCKS = 5
STACK = block_stack(tiny_model("llama", num_blocks=BLOCKS))
WINDOWS = random_ids(4, 12)


def test_late_blocks_keep_their_keys_and_values_in_prefill_alone() -> None:
    assert late_blocks(STACK, WINDOWS, 2) == (frozenset({Unit(3, "kv_only"), Unit(4, "kv_only")}), NOTHING)


def test_evolution_ends_on_the_best_of_few_sets() -> None:
    engine = WholeEngine(STACK, WINDOWS, "kl", chunk_windows=4)
    losses = engine.losses([deleting(blocks) for blocks in combinations(range(BLOCKS), 2)])
    assert evopress(STACK, WINDOWS, 2) == (min(losses, key=lambda units: losses[units]),) * 2


def test_halves_go_one_after_the_other_until_the_weights_are_within_the_share() -> None:
    prefill, decode = blockpruner(STACK, WINDOWS, 0.6)
    costs = costs_of(STACK, "weight_bytes", WINDOWS[:1])
    assert prefill == NOTHING
    assert costs.share(decode) <= 0.6
    assert min(costs.share(decode - {unit}) for unit in decode) > 0.6


def test_a_block_without_both_its_halves_goes_whole() -> None:
    without_mlp = with_part(NOTHING, 1, "mlp")
    assert without_mlp == {Unit(1, "mlp")}
    assert with_part(without_mlp, 1, "attention") == {Unit(1)}
    assert with_part(without_mlp, 1, "mlp") == without_mlp


def test_peers_remove_the_same_blocks_from_both_halves() -> None:
    for name in ("ShortGPT", "angular span", "SLEB", "LLM-Streamline"):
        prefill, decode = CHOICES[name](STACK, WINDOWS, 2)
        assert prefill == decode
        assert len(prefill) == 2
