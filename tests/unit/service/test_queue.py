from __future__ import annotations

from pathlib import Path

import pytest
from kombu.transport.filesystem import Transport

from service import queue
from service.contract.jobs import StageName
from service.settings import Settings


@pytest.mark.parametrize("half_written", ["", '[["pdtrim"'])
def test_a_half_written_file_of_the_embedded_broker_counts_as_out_of_reach(tmp_path: Path, half_written: str) -> None:
    Transport.global_state.clear()  # What this process knows of its other brokers keeps it from reading the file.
    settings = Settings(data_dir=tmp_path)
    exchange = tmp_path / "broker" / "control" / f"{queue.QUEUE}.exchange"
    exchange.parent.mkdir(parents=True)

    exchange.write_text(half_written)
    assert not queue.try_to_send(settings, "job_1", StageName.SCORING)

    exchange.write_text('[["pdtrim", "", "pdtrim"]]')
    assert queue.try_to_send(settings, "job_1", StageName.SCORING)
    assert len(list((tmp_path / "broker" / "messages").iterdir())) == 1
