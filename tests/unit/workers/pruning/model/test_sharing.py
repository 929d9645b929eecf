from __future__ import annotations

import pytest
import torch

from tests.unit.workers.pruning.models import random_ids, tiny_model
from workers.pruning.model.sharing import share


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_what_is_not_a_models_own_is_held_once_and_computes_the_same(family: str) -> None:
    owner, model, ids = tiny_model(family), tiny_model(family), random_ids(2, 8)
    expected = model(input_ids=ids).logits
    own = {name for name, _ in model.named_parameters() if name.startswith("model.layers.2.")}
    share(model, owner, own=own)
    theirs = dict(owner.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter is theirs[name]) == (name not in own)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.get_output_embeddings().weight is owner.get_output_embeddings().weight


def test_weights_of_another_precision_stay_apart() -> None:
    owner, model = tiny_model("llama"), tiny_model("llama").bfloat16()
    share(model, owner, own=())
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
