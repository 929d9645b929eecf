"""What is kept of the dense model stands for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.unit.workers.pruning.models import random_ids, tiny_model
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.repair.distill import Loss, Teacher, continuation_loss, sequence_loss, trainable
from workers.pruning.repair.losses import LossWeights
from workers.pruning.repair.targets import Targets, computed, token_bytes

KEPT = [0, 1, 3, 4]
WORDS_ALONE = LossWeights(kl=1.0, label=0.0, hidden=0.0)


@contextmanager
def targets(windows: Tensor, folder: Path) -> Iterator[Targets]:
    """Of the dense model, three windows a file."""
    files: list[Path] = []
    for part in windows.split(3):
        files.append(folder / f"{len(files)}.safetensors")
        save_file(computed(tiny_model("llama"), part, KEPT[1:], batch=2), files[-1])
    with closing(Targets(windows, files)) as opened:
        yield opened


def losses(teacher: Teacher, weights: LossWeights) -> dict[str, Loss]:
    prefill, decode = drop_blocks(tiny_model("llama"), {1}), drop_blocks(tiny_model("llama"), {2})
    return {
        "whole": sequence_loss(decode, teacher, KEPT, weights),
        "continuation": continuation_loss(
            prefill, decode, [0, 1, 2, 3], teacher, KEPT, weights, prompt_tokens=5, first_token="decode"
        ),
    }


@pytest.mark.parametrize("kind", ["whole", "continuation"])
def test_kept_states_give_the_losses_that_the_dense_model_gives(kind: str, tmp_path: Path) -> None:
    windows = random_ids(5, 12)
    batch = windows[[4, 1]]
    for weights in (LossWeights(), LossWeights(kl=0.5, label=1.0, hidden=3.0), WORDS_ALONE):
        expected = float(losses(tiny_model("llama"), weights)[kind](batch))
        with targets(windows, tmp_path) as kept:
            assert float(losses(kept, weights)[kind](batch)) == pytest.approx(expected, rel=2e-3)


def test_kept_states_give_the_gradients_that_the_dense_model_gives(tmp_path: Path) -> None:
    windows = random_ids(3, 12)
    student = drop_blocks(tiny_model("llama"), {2})
    parameters = list(trainable(student, [0, 1, 2, 3], frozen=set()).values())

    def gradients(teacher: Teacher) -> Tensor:
        found = torch.autograd.grad(sequence_loss(student, teacher, KEPT, LossWeights())(windows), parameters)
        return torch.cat([gradient.flatten() for gradient in found])

    with targets(windows, tmp_path) as kept:
        expected, found = gradients(tiny_model("llama")), gradients(kept)
    assert torch.linalg.norm(found - expected) < 0.02 * torch.linalg.norm(expected)


def test_there_are_no_targets_of_other_windows(tmp_path: Path) -> None:
    windows = random_ids(5, 12)
    with targets(windows, tmp_path) as kept, pytest.raises(KeyError):
        losses(kept, WORDS_ALONE)["whole"](windows.flip(1))


def test_files_have_as_many_bytes_as_was_said(tmp_path: Path) -> None:
    windows = random_ids(3, 12)
    hidden = tiny_model("llama").config.hidden_size
    for blocks in ((1, 3, 4), ()):
        kept = computed(tiny_model("llama"), windows, blocks, batch=2)
        assert sum(tensor.nbytes for tensor in kept.values()) == token_bytes(blocks, hidden) * windows.numel()
