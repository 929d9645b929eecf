from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny_job import write_tiny_model
from tests.unit.workers.pruning.models import tiny_model
from workers.inputs import models
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.model.sharding import Placement, load_placed

IDS = torch.arange(24).reshape(2, 12)


def test_a_model_that_does_not_fit_has_its_blocks_read_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_model(tmp_path / "model")
    resident = models.load_for_walks(folder)
    monkeypatch.setattr(models, "RESIDENT_SHARE", 0.0)  # stands for a smaller machine
    streamed = models.load_for_walks(folder)
    held = [any(not p.is_meta for p in block.parameters()) for block in streamed.model.layers]
    assert (any(p.is_meta for p in resident.parameters()), any(held)) == (False, False)
    assert torch.equal(resident(input_ids=IDS).logits, streamed(input_ids=IDS).logits)


def test_a_model_that_fits_several_accelerators_together_is_sharded_before_it_is_read_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    resident = models.load_for_walks(tmp_path)
    weights = sum(parameter.nbytes for parameter in resident.parameters())
    free = 0.75 * weights / models.RESIDENT_SHARE
    asked: list[Placement] = []
    stand_ins: dict[object, str] = {0: "cpu", 1: "disk"}

    def load_here(folder: Path, placed: Placement, **options: Any) -> PreTrainedModel:
        """The two accelerators are this machine's memory and disk."""
        asked.append(placed)
        return load_placed(folder, {name: stand_ins[number] for name, number in placed.items()}, **options)

    monkeypatch.setattr(models, "load_placed", load_here)
    monkeypatch.setattr(models, "free_memory_bytes", lambda at, limit=None: int(free))
    monkeypatch.setattr(models, "accelerators", lambda: [torch.device("cuda", 0), torch.device("cuda", 1)])
    sharded = models.load_for_walks(tmp_path)
    assert [set(placed.values()) for placed in asked] == [{0, 1}]
    assert torch.equal(resident(input_ids=IDS).logits, sharded(input_ids=IDS).logits)

    free = 0.4 * weights / models.RESIDENT_SHARE
    streamed = models.load_for_walks(tmp_path)
    assert (len(asked), models.is_streamed(streamed)) == (1, True)


def test_as_many_windows_are_walked_at_once_as_their_hidden_states_fit(tmp_path: Path) -> None:
    model = models.load_for_walks(write_tiny_model(tmp_path / "model"))
    # 5 blocks give 6 streams of hidden size 32 in float32.
    assert models.windows_at_once(model, 64) == models.RESIDENT_WALK_BYTES // (6 * 64 * 32 * 4)
    assert models.windows_at_once(model, 10**9) == 1
    assert models.anchor_bytes(model) == models.ANCHOR_BYTES


@pytest.mark.parametrize("share", [models.RESIDENT_SHARE, 0.0])
def test_a_pass_is_stopped_before_the_next_block_also_of_a_copy(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "RESIDENT_SHARE", share)
    left = math.inf

    def stop_at_the_last() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise InterruptedError

    model = models.load_for_walks(write_tiny_model(tmp_path / "model"), stop_at_the_last)
    left = 5
    with pytest.raises(InterruptedError):
        drop_blocks(model, [])(input_ids=IDS) if share else model(input_ids=IDS)
    assert left == 0


def test_a_worker_takes_no_more_memory_than_it_was_given() -> None:
    taken = psutil.Process().memory_info().rss
    assert models.free_memory_bytes(torch.device("cpu"), taken + 10**9) == pytest.approx(10**9, rel=0.1)
    assert models.free_memory_bytes(torch.device("cpu"), taken // 2) == 0


def test_what_a_containers_bound_leaves_counts_what_files_hold_as_free(tmp_path: Path) -> None:
    assert models.container_memory(tmp_path) is None
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 250\nactive_file 50\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert models.container_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert models.container_memory(tmp_path) == 400


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have their own ways")
def test_memory_that_is_free_between_what_is_held_goes_back_to_the_machine() -> None:
    resident = psutil.Process().memory_info
    large = torch.ones(30 << 18)
    del large  # From now on what takes up to its 30 MiB comes from the heap.
    pieces, held = [], []
    for _ in range(200):
        pieces.append(torch.ones(1 << 18))
        held.append(torch.ones(1 << 15))
    before = resident().rss
    del pieces[:]
    models.give_back_memory()
    assert before - resident().rss > 150 << 20
