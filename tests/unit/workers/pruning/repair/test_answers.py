"""The healing loss of windows in which only answers count, computed a second time from logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tests.unit.workers.pruning.models import random_ids, tiny_model
from workers.pruning.model.blocks import drop_blocks
from workers.pruning.repair.answers import marked, unmarked
from workers.pruning.repair.distill import Loss, continuation_loss, sequence_loss
from workers.pruning.repair.losses import LossWeights

KEPT = [0, 2, 3, 4]
TEACHER, STUDENT, PREFILL = tiny_model("llama"), *(drop_blocks(tiny_model("llama"), {1}) for _ in range(2))
IDS = random_ids(4, 12)
COUNTED = torch.zeros(4, 12, dtype=torch.bool)
COUNTED[0, 3:5] = COUNTED[0, 8:] = COUNTED[1, 7] = COUNTED[2, 1:6] = True  # The last window has no answer.


def whole(weights: LossWeights) -> Loss:
    return sequence_loss(STUDENT, TEACHER, KEPT, weights)


def continued(weights: LossWeights) -> Loss:
    return continuation_loss(
        PREFILL, STUDENT, [0, 1, 2, 3], TEACHER, KEPT, weights, prompt_tokens=6, first_token="decode"
    )


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found[:, :-1]


def by_hand(of_token: Tensor, first: int) -> float:
    """`of_token` (windows, tokens − 1), of the token after each, where that counts: the windows' means, averaged."""
    counted = COUNTED[:, 1:].clone()
    counted[:, :first] = False
    return sum(float(row[chosen].mean()) for row, chosen in zip(of_token, counted, strict=True) if chosen.any()) / 4


@pytest.mark.parametrize(("loss_of", "first"), [(whole, 0), (continued, 5)])
@torch.no_grad()
def test_the_loss_is_that_of_answers(loss_of: Callable[[LossWeights], Loss], first: int) -> None:
    wanted, given = logits(TEACHER).log_softmax(-1), logits(STUDENT).log_softmax(-1)
    windows = marked(IDS, COUNTED)
    kl = F.kl_div(given, wanted, reduction="none", log_target=True).sum(-1)
    nll = F.nll_loss(given.mT, IDS[:, 1:], reduction="none")

    found = [float(loss_of(LossWeights(kl=kl, label=label, hidden=0))(windows)) for kl, label in ((1, 0), (0, 1))]

    assert found == pytest.approx([by_hand(kl, first), by_hand(nll, first)], rel=1e-4)


@pytest.mark.parametrize("loss_of", [whole, continued])
def test_a_batch_is_worth_the_mean_of_its_windows(loss_of: Callable[[LossWeights], Loss]) -> None:
    windows = marked(IDS, COUNTED)
    loss = loss_of(LossWeights())
    assert float(loss(windows)) == pytest.approx(sum(float(loss(one)) for one in windows.split(1)) / 4, rel=1e-4)


@pytest.mark.parametrize("loss_of", [whole, continued])
def test_windows_in_which_all_counts_are_as_others(loss_of: Callable[[LossWeights], Loss]) -> None:
    loss = loss_of(LossWeights())
    assert torch.equal(loss(marked(IDS, torch.ones_like(COUNTED))), loss(IDS))


def test_windows_without_an_answer_teach_nothing_and_can_be_trained_on() -> None:
    for parameter in STUDENT.parameters():
        parameter.requires_grad_(True)
    loss = whole(LossWeights())(marked(IDS, torch.zeros_like(COUNTED)))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in STUDENT.parameters())
    STUDENT.requires_grad_(False)


def test_the_marks_of_windows_can_be_read_again() -> None:
    ids, counted = unmarked(marked(IDS, COUNTED))
    assert torch.equal(ids, IDS)
    assert counted is not None
    assert torch.equal(counted, COUNTED)
    assert unmarked(IDS) == (IDS, None)
