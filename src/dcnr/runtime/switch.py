"""A switch that cables can be pulled from: what the PNodes of a local network dial passes through it.

PNodes use it as an HTTP proxy (``CONNECT``) and name themselves in its address, ``http://pnode-1@127.0.0.1:PORT``. Who
is cut off hears nothing and is heard by nobody, as with a cable that was pulled: nothing is refused or closed, bytes
wait, and pass when the cable is back. A cut lasts as long as the connection that asked for it, so it ends with whoever
asked.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import socket
import threading

from dcnr.errors import Unavailable

_PIECE_BYTES = 1 << 18
_TIMEOUT_S = 5.0
_DONE = b"HTTP/1.1 200 OK\r\n\r\n"
_REFUSED = b"HTTP/1.1 400 Bad Request\r\n\r\n"
_UNREACHABLE = b"HTTP/1.1 502 Bad Gateway\r\n\r\n"


def cut(switch: str, name: str, address: str) -> socket.socket:
    """Cut off who dials as ``name`` and is dialled at ``address``, until the socket is closed. Raises :class:`Unavailable`."""
    host, _, port = switch.rpartition(":")
    try:
        asking = socket.create_connection((host, int(port)), _TIMEOUT_S)
        asking.sendall(f"CUT {name} {address}\r\n\r\n".encode())
        if asking.recv(len(_DONE)) != _DONE:
            asking.close()
            raise Unavailable(f"what listens at {switch} cuts nobody off: it is not the switch of `dcnr up --cuttable`")
    except OSError as error:
        raise Unavailable(f"the switch of `dcnr up --cuttable` at {switch} does not answer: {error}") from error
    return asking


class Switch:
    """Listens on a free port of 127.0.0.1 from :meth:`start` to :meth:`stop`, on a loop in a thread of its own.

    Each of the two once, in this order.
    """

    def __init__(self) -> None:
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="switch", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._cuts: list[tuple[str, str]] = []
        """Names and addresses of those who are cut off."""
        self._mended = asyncio.Condition()

    def start(self) -> None:
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_PIECE_BYTES)
        )
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        self._thread.start()

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- a connection --------------------------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _TIMEOUT_S)
            match head.decode("latin-1").split("\r\n")[0].split():
                case ["CONNECT", target, _]:
                    await self._connect(_name(head), target, reader, writer)
                case ["CUT", name, address]:
                    await self._cut((name, address), reader, writer)
                case _:
                    writer.write(_REFUSED)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # It went away, or makes no sense: either way there is nobody to tell.
        finally:
            writer.close()

    async def _connect(
        self, name: str, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._passes(name, target)
        host, _, port = target.rpartition(":")
        try:
            other_reader, other_writer = await asyncio.open_connection(host.strip("[]"), int(port), limit=_PIECE_BYTES)
        except (OSError, ValueError):
            writer.write(_UNREACHABLE)
            return
        try:
            writer.write(_DONE)
            ways = [
                asyncio.create_task(self._pump(name, target, *way))
                for way in ((reader, other_writer), (other_reader, writer))
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            other_writer.close()

    async def _pump(self, name: str, target: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_PIECE_BYTES):
                await self._passes(name, target)
                sink.write(data)
                await sink.drain()
        # Nor does the news of an end pass a cut.
        await self._passes(name, target)

    # --- cuts ----------------------------------------------------------------------------------------------

    async def _cut(self, whom: tuple[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._cuts.append(whom)
        try:
            writer.write(_DONE)
            await reader.read()
        finally:
            self._cuts.remove(whom)
            async with self._mended:
                self._mended.notify_all()

    async def _passes(self, name: str, target: str) -> None:
        """Wait until there is no cut between the two."""
        if not self._is_cut(name, target):
            return
        async with self._mended:
            await self._mended.wait_for(lambda: not self._is_cut(name, target))

    def _is_cut(self, name: str, target: str) -> bool:
        return any(name == cut_name or target == address for cut_name, address in self._cuts)


def _name(head: bytes) -> str:
    """The user of the proxy's address; empty where there is none."""
    for line in head.decode("latin-1").split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == "proxy-authorization":
            try:
                return base64.b64decode(value.split()[-1]).decode().partition(":")[0]
            except (binascii.Error, IndexError, UnicodeDecodeError):
                return ""
    return ""
