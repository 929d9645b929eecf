from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread

import pytest
from filelock import FileLock

from pdtrim.contract.jobs import StageName
from service.db.stages import Claim
from workers.running.scratch import attempt_folder


def claim(attempt: int) -> Claim:
    return Claim("job_1", StageName.SCORING, attempt)


def fill_and_wait(scratch: Path, attempt: int, told: Connection) -> None:
    with attempt_folder(scratch, claim(attempt)) as folder:
        (folder / "weights").write_bytes(b"x")
        told.send("filled")
        signal.pause()


def test_what_a_killed_process_left_is_deleted_by_the_next_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    killed, stopped = (spawn.Process(target=fill_and_wait, args=(tmp_path, n, there)) for n in (1, 2))
    for process in (killed, stopped):
        process.start()
        assert here.recv() == "filled"
    assert killed.pid is not None
    assert stopped.pid is not None
    killed.kill()
    killed.join()
    os.kill(stopped.pid, signal.SIGSTOP)

    with attempt_folder(tmp_path, claim(3)) as folder:
        left = {path.name for path in (tmp_path / "jobs").iterdir() if path.is_dir()}
        assert left == {"job_1-scoring-2", folder.name}

    stopped.kill()
    stopped.join()
    with attempt_folder(tmp_path, claim(4)):
        pass
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_lock_that_another_process_sweeps_up_when_it_is_new_is_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "jobs" / "job_1-scoring-1.lock"
    lock.parent.mkdir()
    taken = Event()

    def sweep() -> None:
        with FileLock(lock):
            taken.set()
            time.sleep(0.3)
            lock.unlink()

    sweeper = Thread(target=sweep)
    sweeper.start()
    assert taken.wait(10)
    with attempt_folder(tmp_path, claim(1)) as folder:
        assert (folder.is_dir(), lock.exists()) == (True, True)
    sweeper.join()


def test_a_folder_goes_when_its_stage_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with attempt_folder(tmp_path, claim(1)) as folder:
            (folder / "weights").write_bytes(b"x")
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        fail()
    assert list((tmp_path / "jobs").iterdir()) == []
