"""The brokers' transports, so that no message stops whoever takes it.

A message only wakes a worker, and whoever may write to the broker may write anything. What cannot be read is set aside
or dropped, and logged; the reconciler sends again what was due.

The files of `filesystem://` are written whole, under another name first: kombu's own are there before they are written,
and a worker that looked too early died of it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty
from typing import Any

from kombu.exceptions import ChannelError
from kombu.transport import TRANSPORT_ALIASES, filesystem, redis
from kombu.utils.json import dumps, loads

from service.storage.local import written_whole

UNREADABLE = "unreadable"
"""The folder of what was set aside."""
CONTROL = "pidbox"
"""In the names of queues of questions to workers, such as pings, and of their answers."""
STALE_SECONDS = 600.0
"""Nobody reads a question, or an answer, that is as old, nor a message that somebody took and died over."""
BOUND_AGAIN_SECONDS = 10.0
"""So long after a table of queues was lost, those who read from them hear what is sent to them again, such as pings."""
KEPT_SECONDS = 7 * 86400.0
"""How long what was set aside is kept."""
HEADERS = frozenset({"task", "id", "lang", "argsrepr", "kwargsrepr", "origin", "traceparent", "tracestate", "baggage"})
"""What is said of a task in texts, and needed. What else there may be, Celery takes for what it should be: with a time
limit or stamps of another kind its consumer dies, or waits for ever for the slot that it took.
"""
OTHER_HEADERS: dict[str, Any] = {"retries": 0, "timelimit": [None, None], "eta": None, "expires": None}
SHOWN = 200
# What an odd message makes of kombu and Celery; an outage of the broker makes none of these.
FAULTS = (ValueError, TypeError, LookupError, AttributeError)
log = logging.getLogger(__name__)


class _Careful:
    """A transport that delivers what can be delivered, and acknowledges the rest, so that it does not come again."""

    channels: list[Any]

    def _deliver(self, message: Any, queue: str) -> None:
        try:
            headers = message["headers"]
            if "task" in headers:
                texts = {name: text for name, text in headers.items() if name in HEADERS and isinstance(text, str)}
                message["headers"] = texts | OTHER_HEADERS
            super()._deliver(message, queue)  # type: ignore[misc]
        except FAULTS as error:
            log.warning("a message of %s is dropped: %r: %s", queue, error, repr(message)[:SHOWN])
            with suppress(*FAULTS):
                tag = message["properties"]["delivery_tag"]
                for channel in self.channels:
                    if tag in channel.qos._delivered:
                        channel.basic_ack(tag)


class _RedisChannel(redis.Channel):
    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except ValueError as error:
            log.warning("a message is dropped that is no JSON: %s", error)
            return True


class RedisTransport(_Careful, redis.Transport):  # type: ignore[misc]
    """Redis and Valkey."""

    Channel = _RedisChannel


class _FileChannel(filesystem.Channel):
    """Messages, and which queues an exchange has, each in a file that appears whole."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bound: dict[str, tuple[str, Any]] = {}
        """Of each queue that this channel bound, its exchange and the entry there."""
        self._bind_again_at = time.monotonic() + BOUND_AGAIN_SECONDS

    def _put(self, queue: str, payload: dict[str, Any], **kwargs: Any) -> None:  # type: ignore[override]
        # In the order in which they were sent, also after the machine has started again.
        name = f"{time.time_ns():020d}_{uuid.uuid4()}.{queue}.msg"
        try:
            _write(Path(self.data_folder_out) / name, payload)
        except OSError as error:
            raise ChannelError(f"the message {name} cannot be written: {error}") from error

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        if time.monotonic() >= self._bind_again_at:
            self._bind_again_at = time.monotonic() + BOUND_AGAIN_SECONDS
            for exchange, entry in self._bound.values():
                with suppress(ChannelError):  # A full disk, say. There is a next time.
                    self._bind(exchange, entry)
        for name in sorted(os.listdir(self.data_folder_in)):
            if _queue_of(name) != queue:
                continue
            taken = Path(self.processed_folder) / name
            with suppress(OSError):  # Another worker was quicker.
                os.rename(Path(self.data_folder_in) / name, taken)
                try:
                    payload = loads(taken.read_bytes())
                    self.Message(payload, channel=self)
                except FAULTS as error:
                    _set_aside(taken, error)
                    continue
                taken.unlink()
                return payload
        raise Empty

    def get_table(self, exchange: str) -> list[Any]:
        file = self._table(exchange)
        try:
            return [filesystem.exchange_queue_t(*entry) for entry in loads(file.read_bytes())]
        except FileNotFoundError:
            return []
        except FAULTS as error:
            # The queues are declared again by whoever sends to them, and after a while by whoever reads from them.
            _set_aside(file, error)
            return []
        except OSError as error:
            raise ChannelError(f"{file} cannot be read: {error}") from error

    def _queue_bind(self, exchange: str, routing_key: str | None, pattern: str | None, queue: str) -> None:
        entry = filesystem.exchange_queue_t(routing_key or "", pattern or "", queue or "")
        self._bound[queue or ""] = exchange, entry
        self._bind(exchange, entry)

    def _bind(self, exchange: str, entry: Any) -> None:
        self.change(exchange, lambda table: table if entry in table else [entry, *table])

    def _delete(self, queue: str, exchange: str, routing_key: str, pattern: str, *args: Any, **kwargs: Any) -> None:
        self._bound.pop(queue, None)
        self._purge(queue)
        entry = filesystem.exchange_queue_t(routing_key or "", pattern or "", queue or "")
        self.change(exchange, lambda table: [one for one in table if one != entry])

    def _table(self, exchange: str) -> Path:
        file: Path = self._exchange_file(exchange)  # type: ignore[attr-defined]
        return file

    def change(self, exchange: str, change: Callable[[list[Any]], list[Any]]) -> None:
        """Write the table of an exchange anew, as `change` says. Raises: ChannelError."""
        try:
            with _locked(Path(self.control_folder)):
                table = self.get_table(exchange)
                if (changed := change(table)) != table:
                    _write(self._table(exchange), changed)
        except OSError as error:
            raise ChannelError(f"the queues of {exchange} cannot be written: {error}") from error


class FileTransport(_Careful, filesystem.Transport):  # type: ignore[misc]
    """A folder."""

    Channel = _FileChannel


def forget(channel: Any, queues: set[str]) -> None:
    """Send nothing more to queues that nobody reads. Raises: ChannelError."""
    for file in Path(channel.control_folder).glob("*.exchange"):
        channel.change(file.stem, lambda table: [one for one in table if one.queue not in queues])


def use() -> None:
    """Have kombu take these for the addresses that they are for."""
    for scheme, transport in {"filesystem": FileTransport, "redis": RedisTransport, "rediss": RedisTransport}.items():
        TRANSPORT_ALIASES[scheme] = f"{__name__}:{transport.__name__}"


def sweep(folder: Path, forget: Callable[[set[str]], None]) -> int:
    """Delete what nobody will read in a broker's folder, and `forget` the queues that it was for; returns how much.

    Raises: OSError.
    """
    stale = [path for path in _older(folder / "messages", STALE_SECONDS) if CONTROL in path.name]
    forget({_queue_of(path.name) for path in stale})
    stale += _older(folder / "processed", STALE_SECONDS)
    for place in (folder / "processed" / UNREADABLE, folder / "control" / UNREADABLE):
        stale += _older(place, KEPT_SECONDS)
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def _older(folder: Path, seconds: float) -> list[Path]:
    found, before = [], time.time() - seconds
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime < before:
                found.append(path)
    return found


def _queue_of(name: str) -> str:
    """The queue that a message's file is of; empty for other files."""
    return name.partition(".")[2].removesuffix(".msg") if name.endswith(".msg") else ""


def _write(path: Path, content: Any) -> None:
    with written_whole(path) as file:
        file.write(dumps(content).encode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _set_aside(file: Path, error: Exception) -> None:
    aside = file.parent / UNREADABLE
    aside.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):  # Another process did so.
        os.replace(file, aside / f"{file.name}.{time.time_ns()}")
        log.warning("%s cannot be read, and is set aside in %s: %r", file.name, aside, error)
