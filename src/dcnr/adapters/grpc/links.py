"""Opening links, and choosing one where two peers dial each other: the :class:`~dcnr.runtime.ports.Links` of gRPC.

Of two links between the same pair the one dialled by the lower peer id stays, and neither side ever hears of the
other. The lower peer lets a dial that crosses its own wait for a moment: should its own come to nothing, it answers
that one. The higher peer takes the lower's dial and drops its own. A dial that arrives while a link is open is answered only if its dialler
knows that link, and so knows that it broke, before we noticed; else it crossed the link's own opening and is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from dcnr.adapters.grpc import transport
from dcnr.adapters.grpc.codec import from_proto, parse, to_proto
from dcnr.adapters.grpc.generated import link_pb2
from dcnr.adapters.grpc.link import BROKEN, Link
from dcnr.config import LIMITS, Limits
from dcnr.errors import DCNRError, ProtocolError, Refused, Unreachable, VersionMismatch, WireError
from dcnr.ids import Incarnation, PeerId
from dcnr.protocol.messages import Descriptor, Message
from dcnr.runtime.ports import LinkEvents, TensorTable

METHOD = "/dcnr.v1.PNode/Link"


class Stoppable(Protocol):
    """The server that the hub ends with itself."""

    async def stop(self, grace_s: float) -> None: ...


@dataclass(slots=True, kw_only=True)
class _Dial:
    """A dial under way. ``superseded``: its outcome concerns nobody any more."""

    call: Any = None
    superseded: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def supersede(self) -> None:
        self.superseded = True
        self.done.set()
        if self.call is not None:
            self.call.cancel()


def check_versions(ours: Descriptor, theirs: Descriptor) -> None:
    """:class:`VersionMismatch` unless both speak a common protocol version; names both ranges."""
    if max(ours.version_min, theirs.version_min) > min(ours.version_max, theirs.version_max):
        raise VersionMismatch(
            f"{ours.role} {ours.peer} speaks protocol versions {ours.version_min} to {ours.version_max}, "
            f"{theirs.role} {theirs.peer} speaks {theirs.version_min} to {theirs.version_max}: update the older one"
        )


class LinkHub:
    """Every link of this process, on one asyncio loop. ``descriptor.addresses`` may be filled in once bound."""

    def __init__(
        self,
        *,
        descriptor: Descriptor,
        table: TensorTable,
        events: LinkEvents,
        limits: Limits = LIMITS,
        http_proxy: str = "",
    ) -> None:
        self.descriptor = descriptor
        self.limits = limits
        self._http_proxy = http_proxy
        self.server: Stoppable | None = None
        self._table = table
        self._events = events
        self._links: dict[PeerId, Link] = {}
        self._dials: dict[PeerId, _Dial] = {}
        self._incarnations: dict[PeerId, Incarnation] = {}
        self._previous: dict[PeerId, str] = {}
        """Nonce of the newest link with each peer."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopped = False

    # --- the port ------------------------------------------------------------------------------------------

    def send(self, peer: PeerId, message: Message) -> None:
        """See :class:`~dcnr.runtime.ports.Links`."""
        link = self._links.get(peer)
        if link is not None:
            link.send(message)

    def dial(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        """See :class:`~dcnr.runtime.ports.Links`. Nothing where a link or a dial is there already."""
        if not self._stopped and peer not in self._links and peer not in self._dials:
            dial = self._dials[peer] = _Dial()
            self._spawn(self._dial(dial, peer, addresses), f"dial {peer}")

    def close(self, peer: PeerId, reason: str) -> None:
        """See :class:`~dcnr.runtime.ports.Links`. A dial under way is given up as well."""
        dial = self._dials.pop(peer, None)
        if dial is not None:
            dial.supersede()
        link = self._links.get(peer)
        if link is not None:
            link.end(reason, tell=False)

    async def stop(self) -> None:
        """See :class:`~dcnr.runtime.ports.Links`. Nobody hears of links or dials any more."""
        self._stopped = True
        for peer in (*self._dials, *self._links):
            self.close(peer, "this process is stopping")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2 * self.limits.link_flush_s)
        if self.server is not None:
            await self.server.stop(self.limits.link_flush_s)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.limits.link_flush_s)

    # --- dialling ------------------------------------------------------------------------------------------

    async def _dial(self, dial: _Dial, peer: PeerId, addresses: tuple[str, ...]) -> None:
        reasons: list[str] = []
        for address in addresses:
            receive_bytes = transport.message_bytes(self.limits)
            channel = transport.open_channel(address, self.limits, receive_bytes, self._http_proxy)
            try:
                link = await self._open(dial, peer, address, channel)
                if link is not None:
                    await self._run_dialled(link, dial.call)
                    return
            except DCNRError as error:
                reasons.append(f"{address}: {error}")
            finally:
                if dial.call is not None:
                    dial.call.cancel()
                await channel.close()
            if dial.superseded:
                return
        if self._dials.get(peer) is dial:
            del self._dials[peer]
            dial.done.set()
            self._events.link_down(peer, "; ".join(reasons) or "no address is known")

    async def _open(self, dial: _Dial, peer: PeerId, address: str, channel: Any) -> Link | None:
        """The handshake of the dialling side; ``None`` where the dial was superseded. Raises a :class:`DCNRError`."""
        nonce = secrets.token_hex(16)
        call = dial.call = channel.stream_stream(METHOD)()
        timer = asyncio.get_running_loop().call_later(self.limits.dial_timeout_s, call.cancel)
        # A write to a call that is cancelled before it has begun never returns; a read does.
        writing = asyncio.ensure_future(call.write(self._hello(nonce, peer)))
        try:
            data = await transport.read(call)
        except BROKEN as error:
            raise await _handshake_error(call) from error
        except asyncio.CancelledError:
            if transport.cancelled_from_outside():
                raise
            raise Unreachable(f"no answer within {self.limits.dial_timeout_s:g} s") from None
        finally:
            timer.cancel()
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        if dial.superseded:
            return None
        if data is transport.EOF:
            raise Unreachable("the link was closed before its handshake")
        hello = _parse_hello(data)
        remote: Descriptor = from_proto(hello.descriptor)
        if remote.peer != peer:
            raise Refused(f"{remote.role} {remote.peer} answers there")
        check_versions(self.descriptor, remote)
        self._check_incarnation(remote)
        del self._dials[peer]
        dial.done.set()
        link = self._make(remote, nonce, call, dialled=True)
        self._up(link, address)
        return link

    async def _run_dialled(self, link: Link, call: Any) -> None:
        tasks = link.start()
        reader, writer = tasks
        try:
            await link.over()
            # The server's side ends the call when it has read our last frame; cancelling at once could destroy that.
            await asyncio.wait({writer}, timeout=self.limits.link_flush_s)
            # A peer that reads nothing lets neither our writer end nor the end of writing through: then the call is cut.
            if writer.done() and not call.done():
                await call.done_writing()
                await asyncio.wait({reader}, timeout=self.limits.link_flush_s)
        finally:
            call.cancel()
            await asyncio.wait(tasks)

    # --- being dialled -------------------------------------------------------------------------------------

    async def serve(self, _requests: Any, context: Any) -> None:
        """The handler of ``PNode.Link``."""
        try:
            hello, remote = await self._greeted(context)
            await self._own_dial(remote.peer)
            if self._stopped:
                raise Refused("this process is stopping")
            self._check_incarnation(remote)
            self._check_crossing(hello, remote)
        except Refused as error:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(error))
        except VersionMismatch as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        dial = self._dials.pop(remote.peer, None)
        if dial is not None:
            dial.supersede()
        older = self._links.get(remote.peer)
        if older is not None:
            older.end("the peer has opened a newer link", bye=False)
        link = self._make(remote, hello.nonce, context, dialled=False, first=self._hello(hello.nonce, remote.peer))
        self._up(link, remote.addresses[0] if remote.addresses else context.peer())
        reader, writer = link.start()
        self._own(reader)
        self._own(writer)
        try:
            await link.over()
            await asyncio.wait({writer}, timeout=self.limits.link_flush_s)
        finally:
            # gRPC cancels this handler when the dialler cancels its call. The reader returns once the call has
            # ended, which it does with this handler.
            link.end("the connection was lost", bye=False)

    async def _greeted(self, context: Any) -> tuple[link_pb2.Hello, Descriptor]:
        """The dialler's Hello. :class:`ProtocolError` for anything else, :class:`Refused` where it is not for us."""
        reading = self._spawn(context.read(), "handshake")
        await asyncio.wait({reading}, timeout=self.limits.dial_timeout_s)
        if not reading.done() or reading.exception() is not None or reading.result() is transport.EOF:
            raise WireError("no Hello")
        hello = _parse_hello(reading.result())
        remote: Descriptor = from_proto(hello.descriptor)
        if self._stopped:
            raise Refused("this process is stopping")
        if hello.expected != self.descriptor.peer or remote.peer == self.descriptor.peer:
            raise Refused(f"this is {self.descriptor.role} {self.descriptor.peer}")
        check_versions(self.descriptor, remote)
        return hello, remote

    async def _own_dial(self, peer: PeerId) -> None:
        """Where a dial of ours crosses the one of ``peer`` and ours goes first: wait for it, but not for long.

        An address behind a firewall would let it run into its deadline, and the waiting dial into its own.
        """
        dial = self._dials.get(peer)
        if dial is not None and self.descriptor.peer < peer:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.limits.dial_timeout_s / 4):
                    await dial.done.wait()

    def _check_crossing(self, hello: link_pb2.Hello, remote: Descriptor) -> None:
        link = self._links.get(remote.peer)
        if (
            link is not None
            and link.dialled
            and link.remote.incarnation == remote.incarnation
            and hello.previous != link.nonce
        ):
            raise Refused("a link that was dialled from here is open already")

    # --- both ----------------------------------------------------------------------------------------------

    def _hello(self, nonce: str, peer: PeerId) -> bytes:
        hello = link_pb2.Hello(
            descriptor=to_proto(self.descriptor), nonce=nonce, expected=peer, previous=self._previous.get(peer, "")
        )
        return link_pb2.Frame(hello=hello).SerializeToString()

    def _check_incarnation(self, remote: Descriptor) -> None:
        """:class:`Refused` for a start that is known to be over; a newer one ends what the older one had."""
        known = self._incarnations.get(remote.peer)
        if known is not None and remote.incarnation.boot < known.boot:
            raise Refused(
                f"start {remote.incarnation.boot} of {remote.role} {remote.peer} is old: start {known.boot} is known"
            )
        if known is not None and remote.incarnation.boot == known.boot and remote.incarnation.nonce != known.nonce:
            raise Refused(f"two processes run with the home of {remote.role} {remote.peer}")
        self._incarnations[remote.peer] = remote.incarnation
        link = self._links.get(remote.peer)
        if link is not None and link.remote.incarnation != remote.incarnation:
            link.end(f"the peer was started again (start {remote.incarnation.boot})", bye=False)

    def _make(self, remote: Descriptor, nonce: str, stream: Any, *, dialled: bool, first: bytes | None = None) -> Link:
        return Link(
            remote=remote,
            nonce=nonce,
            dialled=dialled,
            stream=stream,
            table=self._table,
            events=self._events,
            limits=self.limits,
            ended=self._down,
            first=first,
        )

    def _up(self, link: Link, address: str) -> None:
        self._links[link.remote.peer] = link
        self._previous[link.remote.peer] = link.nonce
        self._events.link_up(link.remote.peer, link.remote.incarnation, link.remote.role, address)

    def _down(self, link: Link, reason: str, tell: bool) -> None:
        if self._links.get(link.remote.peer) is link:
            del self._links[link.remote.peer]
            if tell and not self._stopped:
                self._events.link_down(link.remote.peer, reason)

    def _spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        return self._own(asyncio.create_task(work, name=name))

    def _own(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _parse_hello(data: bytes) -> link_pb2.Hello:
    frame = parse(link_pb2.Frame, data)
    if frame.WhichOneof("kind") != "hello" or not frame.hello.HasField("descriptor"):
        raise WireError("the first frame is no Hello")
    return frame.hello


async def _handshake_error(call: Any) -> DCNRError:
    """The peer's refusal, or that nobody answers, once reading or writing has failed."""
    call.cancel()
    code, details = await call.code(), await call.details()
    match code:
        case grpc.StatusCode.FAILED_PRECONDITION:
            return VersionMismatch(details)
        case grpc.StatusCode.ALREADY_EXISTS:
            return Refused(details)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return WireError(details)
        case _:
            return Unreachable(details)
