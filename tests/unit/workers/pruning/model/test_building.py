"""Models built in several threads of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny_job import write_tiny_model
from workers.pruning.model.building import NotThatLarge
from workers.pruning.model.checkpoint import check_complete, empty_model, load_checkpoint

CPU = torch.device("cpu")
SECONDS = 60


class Stopped(Exception):
    """What a check raises."""


def stop() -> None:
    raise Stopped


def test_a_second_thread_waits_asking_its_own_check_and_torch_is_left_as_it_was(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", blocks=2)
    unpatched = PreTrainedModel.tie_weights, PreTrainedModel.init_weights, torch.empty, torch.get_default_dtype()
    begun, waited = Event(), Event()
    asked: list[str] = []
    models: dict[str, PreTrainedModel] = {}

    def first() -> None:
        asked.append("first")
        begun.set()
        assert waited.wait(SECONDS)

    def second() -> None:
        asked.append("second")
        waited.set()

    def load(name: str, check: Callable[[], None]) -> None:
        models[name] = load_checkpoint(folder, dtype=torch.float32, device=CPU, check=check)

    threads = [Thread(target=load, args=("first", first)), Thread(target=load, args=("second", second))]
    threads[0].start()
    assert begun.wait(SECONDS)
    threads[1].start()
    for thread in threads:
        thread.join(SECONDS)

    assert set(models) == {"first", "second"}
    assert unpatched == (
        PreTrainedModel.tie_weights,
        PreTrainedModel.init_weights,
        torch.empty,
        torch.get_default_dtype(),
    )
    assert asked[-1] == "second"
    assert asked.index("second") < len(asked) - 1 - asked[::-1].index("first")  # It was asked while it waited.
    for (name, one), other in zip(models["first"].named_parameters(), models["second"].parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_check_is_forgotten_with_its_load(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", blocks=2)
    with pytest.raises(Stopped):
        load_checkpoint(folder, dtype=torch.float32, device=CPU, check=stop)
    load_checkpoint(folder, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("build", [empty_model, check_complete, load_checkpoint])
def test_no_more_of_a_model_is_built_than_its_tensors_could_fill(build: Any, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", blocks=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 100_000, "layer_types": None}))
    options = {"dtype": torch.float32, "device": CPU} if build is load_checkpoint else {}

    with pytest.raises(NotThatLarge, match=r"a model of more than 1\d{3} parts, but there are \d\d tensors"):
        build(folder, **options)


@pytest.mark.parametrize("build", [empty_model, check_complete])
def test_a_model_without_weights_is_built_part_by_part_asking_a_check(build: Any, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", blocks=2)
    asked = 0

    def stop_at_the_tenth() -> None:
        nonlocal asked
        asked += 1
        if asked == 10:
            raise Stopped

    with pytest.raises(Stopped):
        build(folder, stop_at_the_tenth)
    assert len(list(build(folder).parameters() if build is empty_model else build(folder).files)) > 10
    assert asked == 10
