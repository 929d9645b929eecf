"""A dozen architectures of the sweep, which together have every mechanism that it is about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.architectures import OUTCOMES, ROW, Outcome, examine, rows_of
from benchmarks.tiny_architectures import causal_types

pytestmark = pytest.mark.training

CHOSEN: dict[str, Outcome] = {
    "cohere2": "works",  # scaled logits, windows
    "deepseek_v3": "works",  # leading dense blocks, latent attention, layers that predict further tokens
    "diffllama": "refused",  # a constant by the block's number
    "ernie4_5_moe": "works",  # experts between a first and a last block, parameters without gradient
    "falcon": "works",  # blocks that return tuples
    "gemma3": "works",  # a text decoder in a model that sees
    "gemma4_text": "works",  # a class that overrules its configuration, settings of single layers
    "gpt_neo": "works",  # kinds of blocks as runs
    "granitemoehybrid": "unified only",  # states, and numbers that JSON lacks
    "lfm2": "unified only",  # convolutions
    "llama4_text": "works",  # numbers of blocks in lists, chunked attention, a base that is the whole model
    "minicpm3": "works",  # a scale by depth
    "nemotron_h": "unified only",  # a count by a list, blocks without attention
    "smollm3": "works",  # what is derived becomes explicit
}


PAGE = Path("docs/reference/architectures.md")


def test_the_page_has_every_type_and_none_that_fails() -> None:
    rows = rows_of(PAGE)
    outcomes = {found[1]: found[2] for row in rows.values() if (found := ROW.match(row)) is not None}
    assert list(rows) == causal_types()
    assert set(outcomes.values()) <= set(OUTCOMES) - {"foreign words", "late failure", "silently wrong"}
    assert {kind: outcomes[kind] for kind in CHOSEN} == CHOSEN


@pytest.mark.parametrize(("model_type", "outcome"), CHOSEN.items())
def test_the_chosen_architectures_do_what_the_table_says(model_type: str, outcome: Outcome, tmp_path: Path) -> None:
    with torch.no_grad():
        found = examine(model_type, tmp_path)
    assert (found.outcome, found.notes) == (outcome, []), found.said
