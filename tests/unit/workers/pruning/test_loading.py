"""Loads that ask while they load, side by side in several threads."""

from __future__ import annotations

from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch

from tests.tiny_job import write_tiny_model
from workers.pruning.checkpoint import load_checkpoint

CPU = torch.device("cpu")


class Stopped(Exception):
    """What a check raises."""


def stop() -> None:
    raise Stopped


def test_a_check_is_asked_by_its_own_load_alone_and_forgotten_with_it(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", blocks=2)
    together, asked, ended = Barrier(2), {"a": 0, "b": 0}, []

    def load(name: str) -> None:
        first = True

        def check() -> None:
            nonlocal first
            asked[name] += 1
            if first:
                first = False
                together.wait(60)  # Both have begun, and neither has ended.

        load_checkpoint(folder, dtype=torch.float32, device=CPU, check=check)
        ended.append(name)

    threads = [Thread(target=load, args=(name,)) for name in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    counted = dict(asked)
    load_checkpoint(folder, dtype=torch.float32, device=CPU)

    assert sorted(ended) == ["a", "b"]
    assert counted["a"] == counted["b"] > 2
    assert asked == counted
    with pytest.raises(Stopped):
        load_checkpoint(folder, dtype=torch.float32, device=CPU, check=stop)
    load_checkpoint(folder, dtype=torch.float32, device=CPU)
