from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_job import write_tiny_model
from workers import models
from workers.pruning.blocks import drop_blocks

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


def test_as_many_windows_are_walked_at_once_as_their_hidden_states_fit(tmp_path: Path) -> None:
    model = models.load_for_walks(write_tiny_model(tmp_path / "model"))
    # 5 blocks give 6 streams of hidden size 32 in float32.
    assert models.windows_at_once(model, 64) == models.RESIDENT_WALK_BYTES // (6 * 64 * 32 * 4)
    assert models.windows_at_once(model, 10**9) == 1


@pytest.mark.parametrize("share", [models.RESIDENT_SHARE, 0.0])
def test_a_pass_is_stopped_before_the_next_block_also_of_a_copy(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "RESIDENT_SHARE", share)
    left = 5

    def stop_at_the_last() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise InterruptedError

    model = models.load_for_walks(write_tiny_model(tmp_path / "model"), stop_at_the_last)
    with pytest.raises(InterruptedError):
        drop_blocks(model, [])(input_ids=IDS) if share else model(input_ids=IDS)
    assert left == 0
