"""Messages that nobody of ours sent, and a real worker of Celery that takes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from pdtrim.contract.jobs import StageName
from service import brokers, queue
from service.settings import Settings
from tests.odd_messages import odd_messages
from tests.processes import wait_until

WORKER = """
import sys
import uuid
from service.queue import celery_app
app = celery_app(sys.argv[1])
@app.task(name="pdtrim.scoring")
def score(job_id):
    with open(sys.argv[2], "a") as file:
        print(job_id, file=file)
app.worker_main(["worker", "--concurrency=1", "--queues=pdtrim", "--without-gossip", "--without-mingle", "-l", "INFO"])
"""


def wake(settings: Settings, job_id: str) -> None:
    queue.send(settings, queue.WakeUp(job_id, StageName.SCORING))


@pytest.mark.process
@pytest.mark.parametrize("kind", ["valkey", "files"])
def test_odd_messages_stop_no_worker(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    if kind == "valkey":
        settings = Settings(broker_url=request.getfixturevalue("empty_redis_url"))
    brokers.FileTransport.global_state.clear()
    wake(settings, "job_good")
    messages = tmp_path / "data" / "broker" / "messages"
    if kind == "valkey":
        with redis.Redis.from_url(settings.broker_url) as broker:
            raw = broker.lindex(queue.QUEUE, 0)
            assert isinstance(raw, bytes)
            for odd in odd_messages(json.loads(raw)):
                broker.lpush(queue.QUEUE, odd)
    else:
        (file,) = messages.iterdir()
        for number, odd in enumerate(odd_messages(json.loads(file.read_bytes()))):
            (messages / f"9{number:03d}.{queue.QUEUE}.msg").write_bytes(odd)
    wake(settings, "job_last")

    woken, log = tmp_path / "woken", tmp_path / "log"
    woken.touch()
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, settings.broker_url, str(woken)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: "job_last" in woken.read_text() or worker.poll() is not None, seconds=120)
        assert worker.poll() is None, log.read_text()[-3000:]
        wake(settings, "job_after")
        wait_until(lambda: "job_after" in woken.read_text() or worker.poll() is not None, seconds=60)
        assert worker.poll() is None, log.read_text()[-3000:]
    finally:
        worker.terminate()
        worker.wait(60)
