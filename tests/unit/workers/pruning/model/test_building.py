"""Models built in several threads of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny_job import write_tiny_model
from workers.pruning.model.checkpoint import load_checkpoint

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
