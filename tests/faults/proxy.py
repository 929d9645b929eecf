"""A TCP proxy in front of a server, which can refuse, stall, slow down and cut what passes through it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from contextlib import suppress

HOST = "127.0.0.1"
CHUNK = 1 << 14
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets the connection, as a server that dies does.


class Proxy:
    """Context manager: passes connections on to `port` from a port of its own, in a thread."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._refusing = False
        self._cut_after: int | None = None
        self._rate: float | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, HOST, 0), self._loop).result()
        self.port: int = server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        passing = asyncio.all_tasks() - {asyncio.current_task()}
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)

    def refuse(self) -> None:
        """Reset every connection, old and new."""
        self._loop.call_soon_threadsafe(self._refuse)

    def stall(self) -> None:
        """Let nothing through, and close nothing."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def cut(self, after: int) -> None:
        """Reset every connection on which, from now on, a client sends more than so many bytes."""
        self._loop.call_soon_threadsafe(setattr, self, "_cut_after", after)

    def slow_down(self, rate: float) -> None:
        """Let so many bytes a second through each connection, in each direction."""
        self._loop.call_soon_threadsafe(setattr, self, "_rate", rate)

    def mend(self) -> None:
        """Let everything through again."""
        self._loop.call_soon_threadsafe(self._mend)

    def _refuse(self) -> None:
        self._refusing = True
        for writer in list(self._writers):
            _reset(writer)

    def _mend(self) -> None:
        self._refusing, self._cut_after, self._rate = False, None, None
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            _reset(writer)
            return
        far_reader, far_writer = await asyncio.open_connection(HOST, self._behind)
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._pass(reader, far_writer, writer), self._pass(far_reader, writer))
        finally:
            for end in (writer, far_writer):
                self._writers.discard(end)
                end.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: asyncio.StreamWriter | None = None
    ) -> None:
        """Until one side ends. With a `client`, its bytes count towards a cut."""
        sent = 0
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._open.wait()
                if client is not None and self._cut_after is not None:
                    sent += len(data)
                    if sent > self._cut_after:
                        writer.write(data[: self._cut_after])
                        _reset(client)
                        break
                writer.write(data)
                await writer.drain()
                if self._rate is not None:
                    await asyncio.sleep(len(data) / self._rate)
        with suppress(OSError):
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
