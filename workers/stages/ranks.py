"""Healing on several devices, seen from the stage: it starts a process a device, hears from them, and ends them.

The stage alone speaks to database and store. The ranks know nothing of either: they work in the attempt's own folder,
so that those of an attempt that has lost its lease do no harm until they are ended.
"""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but of a compiled module
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, RunProcsResult, Std, start_processes

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import PLAN, SCORES, DistillationResult, Half
from service.stopping import begun
from workers.inputs.faults import ProcessDied
from workers.stages.context import StageContext
from workers.stages.halves import TrainingWindows
from workers.stages.healing_folder import POLL_S, Failure, HealingFolder, Limits, Progress, read, write
from workers.stages.sharded_states import fetch_state, store_state, stored_state
from workers.stages.training import state_name, step_of
from workers.stages.width import CHANNELS

PROGRAM = "workers.stages.healing_rank"
HERE = "127.0.0.1"
HALVES: tuple[Half, ...] = ("prefill", "decode")
TERMINATED = signal.SIGTERM
"""What ranks are ended by when another failed."""
ENDING_S = 5
"""How long a rank that is told to end is waited for; it has nothing to tidy up."""
SAID_LINES = 20
"""Of what a rank that failed wrote, that are logged."""
log = logging.getLogger(__name__)


def heal_on(devices: int, context: StageContext, data: TrainingWindows, to_fold: Tensor) -> DistillationResult:
    """What the stage leaves and finds on some windows, by so many processes. Folds are made from those `to_fold`.

    Raises: ProcessDied when one was killed; what one raised, as far as the stage tells errors apart.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # The ranks need it.
    folder = HealingFolder(context.workdir)
    for stage, name in _needed(context):
        context.input(stage, name)
    kept = {"training": data.training, "held_out": data.held_out, "copied": data.copied, "to_fold": to_fold}
    save_file({name: windows.to("cpu", copy=True) for name, windows in kept.items()}, folder.windows)
    write(folder.limits, Limits(memory_bytes=context.memory_bytes))
    folder.job.write_text(context.spec.model_dump_json())
    for half in HALVES:
        _put_newest(context, folder, half)
    with _started(devices, folder.path, context.model_dir) as processes:
        ended = _watched(context, folder, processes)
    if ended.is_failed():
        raise _fault(folder, ended)
    found = read(folder.result, DistillationResult)
    assert found is not None, "ranks that ended well leave what they found"
    return found


def _needed(context: StageContext) -> list[tuple[StageName, str]]:
    known = [
        (StageName.SCORING, SCORES),
        (StageName.REMOVAL, PLAN),
        (StageName.SCORING, CHANNELS),
    ]
    return [one for one in known if one in context.inputs]


@contextmanager
def _started(devices: int, folder: Path, model: Path) -> Iterator[PContext]:
    """The ranks, which live as long as this lasts; as torchrun starts them, but that the stage's port is free."""
    # By itself the store would listen on every address of this machine, and anybody may write into it.
    listening = socket.create_server((HERE, 0))
    port = listening.getsockname()[1]
    store = TCPStore(HERE, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    common = {
        "MASTER_ADDR": HERE,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(devices),
        "LOCAL_WORLD_SIZE": str(devices),
        "GLOO_SOCKET_IFNAME": _loopback(),
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // devices)),
    }
    with _handlers_kept():
        processes = start_processes(
            name="healing",
            entrypoint=sys.executable,
            args={rank: ("-m", PROGRAM, str(folder), str(model)) for rank in range(devices)},
            envs={rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(devices)},
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL),
        )
    try:
        yield processes
    finally:
        processes.close(signal.SIGKILL, timeout=ENDING_S)
        del store


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """PyTorch takes over signals, of which the worker has its own mind; from another thread it cannot."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _loopback() -> str:
    """The interface by which processes of one machine talk; no other machine can hear them."""
    return next(name for name, addresses in psutil.net_if_addrs().items() if any(a.address == HERE for a in addresses))


def _watched(context: StageContext, folder: HealingFolder, processes: PContext) -> RunProcsResult:
    """How the ranks ended. Meanwhile the stage says how far they are, and stores their states.

    Raises: what `context.check` raises; what storing a state raised.
    """
    states, said = _States(context, folder), None
    try:
        while (ended := processes.wait(0)) is None:
            context.check()
            heard = read(folder.progress, Progress)
            if heard is not None and heard != said:
                context.say(heard.progress, heard.message, **heard.figures)
                said = heard
            states.store()
            time.sleep(POLL_S)
        if ended.is_failed():
            states.store_all()
    finally:
        states.wait()
    return ended


class _States:
    """Stores whole states, one after the other, in a thread; the ranks save no other meanwhile."""

    def __init__(self, context: StageContext, folder: HealingFolder) -> None:
        self._context = context
        self._folder = folder
        self._stored = {half: stored_state(context, half) for half in HALVES}
        self._known = {half: folder.newest_step(half) for half in HALVES}
        self._under_way: Future[None] | None = None

    def store(self) -> None:
        """Begin with a state, if there is a new one and none under way. Raises: what storing one raised."""
        if self._under_way is not None and self._under_way.done():
            self._under_way.result()
            self._under_way = None
        if self._under_way is None and (half := self._new()) is not None:
            self._under_way = begun(partial(self._store, half), "storing")

    def store_all(self) -> None:
        """What there is, for the next attempt. Raises: as `store`; what the stage's check raises."""
        self.store()
        while self._under_way is not None:
            wait([self._under_way], timeout=POLL_S)
            self._context.check()
            self.store()

    def wait(self) -> None:
        """Until none is under way, come of it what may; a stage that was told to stop stops that too."""
        if self._under_way is not None:
            wait([self._under_way])

    def _new(self) -> Half | None:
        return next((half for half in HALVES if self._folder.newest_step(half) != self._known[half]), None)

    def _store(self, half: Half) -> None:
        with self._folder.storing():
            # Read now: none that comes later takes this one's place meanwhile.
            step = self._folder.newest_step(half)
            assert step is not None
            self._stored[half] = store_state(self._context, self._folder, half, step, self._stored[half])
            self._known[half] = step


def _put_newest(context: StageContext, folder: HealingFolder, half: Half) -> None:
    """Put what an earlier attempt left of a half, on however many devices, where the ranks look for it."""
    sharded, alone = stored_state(context, half), context.load_tensors(state_name(half))
    if alone is not None and (sharded is None or step_of(alone) >= sharded.step):
        step = step_of(alone)
        folder.state(half, step).mkdir(parents=True)
        (context.workdir / f"kept-{state_name(half)}").rename(folder.state(half, step) / state_name(half))
    elif sharded is not None:
        step = sharded.step
        fetch_state(context, half, sharded, folder.state(half, step))
    else:
        return
    folder.commit(half, step)


def _fault(folder: HealingFolder, ended: RunProcsResult) -> Exception:
    """What ended the ranks. Where one dies, the others fail soon after for want of it, or are ended."""
    failures = ended.failures.items()
    for rank, failure in failures:
        said = Path(ended.stderrs[rank]).read_text(errors="replace").splitlines()[-SAID_LINES:]
        log.error("rank %d ended with %d: %s", rank, failure.exitcode, "\n".join(said))
    first = next(iter(failures))
    killed = [
        one for one in (first, *failures) if one[1].exitcode < 0 and (one == first or one[1].exitcode != -TERMINATED)
    ]
    if killed:
        rank, failure = killed[0]
        return ProcessDied(f"rank {rank} of healing was killed by {signal.Signals(-failure.exitcode).name}")
    reasons = [reason for rank, _ in failures if (reason := read(folder.failed(rank), Failure)) is not None]
    if not reasons:
        return RuntimeError(f"rank {first[0]} of healing ended with {first[1].exitcode}, and the log has why")
    return min(reasons, key=lambda reason: reason.at).error()
