from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor

from tests.unit.workers.pruning.devices import FIRST, SECOND, accelerators
from tests.unit.workers.pruning.models import EXPERTS, FAMILIES, OTHERS, TOLERANCE, random_ids, tiny_model
from workers.pruning.model.blocks import BlockStack, block_stack, prove
from workers.pruning.model.sharding import Placement, load_placed, placement
from workers.pruning.model.units import deleting, kept_for_cache
from workers.pruning.model.width import channel_scores
from workers.pruning.search.engine import Objective, PairEngine, WholeEngine
from workers.pruning.search.scores import block_scores

FLOAT = torch.float32
SETS = [deleting(s) for s in ((1, 3), (1, 4), (2, 3, 4))]


@pytest.fixture
def simulated() -> Iterator[None]:
    with accelerators():
        yield


def placed(family: str, folder: Path, *, share: float = 0.75) -> Placement | None:
    """Where a tiny model goes when each of two accelerators may take this share of its weights."""
    model = tiny_model(family)
    model.save_pretrained(folder)
    each = int(share * sum(parameter.nbytes for parameter in model.parameters()))
    return placement(folder, dtype=FLOAT, memory={0: each, 1: each})


def sharded(family: str, folder: Path, *devices: torch.device) -> BlockStack:
    """A tiny model on one or two simulated accelerators."""
    found = placed(family, folder)
    assert found is not None
    model = tiny_model(family)
    by_number: dict[object, torch.device] = {0: devices[0], 1: devices[-1]}
    on = {name: by_number[number] for name, number in found.items()}
    skipped = model._skip_keys_device_placement
    return block_stack(dispatch_model(model, on, main_device=FIRST, skip_keys=skipped, force_hooks=True))


def losses(stack: BlockStack, ids: Tensor) -> dict[str, Any]:
    """What the engines find on each way that they have."""
    objectives: tuple[Objective, ...] = ("kl", "cross_entropy", "hidden")
    whole = WholeEngine(stack, ids, "kl", chunk_windows=2, anchor_bytes=2**20)
    found: dict[str, Any] = {objective: whole.losses(SETS, objective) for objective in objectives}
    whole.anchor(SETS[0])
    found["anchored"] = [whole.losses(SETS), whole.losses(SETS)]
    pair = PairEngine(
        stack,
        ids,
        "kl",
        prefill=kept_for_cache({4}),
        prompt_tokens=5,
        first_token="prefill",
        chunk_windows=2,
    )
    # The first keeps block 4, the second gives up all of the other device but one: their last states lie apart.
    found["pair"] = [pair.losses([deleting({1}), deleting({2, 3, 4})], objective) for objective in objectives]
    return found


@pytest.mark.usefixtures("simulated")
def test_simulated_accelerators_refuse_to_mix_as_real_ones_do() -> None:
    one, other = torch.ones(2).to(FIRST), torch.ones(2).to(SECOND)
    with pytest.raises(RuntimeError, match="all tensors have to be on one device"):
        one + other
    with pytest.raises(RuntimeError, match="all tensors have to be on one device"):
        one + torch.ones(2)
    assert (one + other.to(FIRST)).tolist() == [2.0, 2.0]


@pytest.mark.training
@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt-projected"])
def test_blocks_on_two_devices_give_what_they_give_on_one_bit_for_bit(family: str, tmp_path: Path) -> None:
    ids = random_ids(2, 9)
    two, one = sharded(family, tmp_path / "two", FIRST, SECOND), sharded(family, tmp_path / "one", FIRST)
    assert {parameter.device for parameter in two.blocks.parameters()} == {FIRST, SECOND}
    found = losses(two, ids.to(FIRST))
    assert found == losses(one, ids.to(FIRST))
    assert block_scores(two, ids.to(FIRST), chunk_windows=2) == block_scores(one, ids.to(FIRST), chunk_windows=2)
    prove(two)
    on_the_cpu = WholeEngine(block_stack(tiny_model(family)), ids, "kl", chunk_windows=2).losses(SETS)
    assert found["kl"] == pytest.approx(on_the_cpu, abs=TOLERANCE)


@pytest.mark.usefixtures("simulated")
def test_channels_of_blocks_on_two_devices_are_scored_as_on_one(tmp_path: Path) -> None:
    two, one = sharded("llama", tmp_path / "two", FIRST, SECOND), sharded("llama", tmp_path / "one", FIRST)
    scores = [channel_scores(stack, random_ids(2, 9).to(FIRST), chunk_windows=2) for stack in (two, one)]
    assert all(map(torch.equal, *scores))


@pytest.mark.parametrize("family", FAMILIES + OTHERS + EXPERTS)
def test_no_block_is_split_and_both_devices_are_used(family: str, tmp_path: Path) -> None:
    found = placed(family, tmp_path)
    assert found is not None
    prefix = block_stack(tiny_model(family)).prefix
    assert [found[f"{prefix}{block}"] for block in range(5)] == [0, 0, 1, 1, 1]


def test_a_model_that_several_devices_do_not_hold_together_is_not_placed(tmp_path: Path) -> None:
    assert placed("llama", tmp_path, share=0.45) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_checkpoint_is_loaded_and_walked_like_a_resident_one(family: str, tmp_path: Path) -> None:
    found, model, ids = placed(family, tmp_path), tiny_model(family), random_ids(2, 9)
    assert found is not None
    # Accelerate's own stand-ins for two accelerators here: weights in memory, and weights brought for each call.
    stand_ins: dict[object, str] = {0: "cpu", 1: "disk"}
    on = {name: stand_ins[number] for name, number in found.items()}
    stack = block_stack(load_placed(tmp_path, on, dtype=FLOAT))
    assert [next(block.parameters()).is_meta for block in stack.blocks] == [False, False, True, True, True]
    assert torch.equal(stack.model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert losses(stack, ids) == losses(block_stack(model), ids)
