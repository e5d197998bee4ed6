"""grpcio's options and its traps, in one place. Everything else in this package goes through these functions."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from dcnr.config import Limits

_SLACK_BYTES = 1 << 20
"""A message is its payload and some fields; a ticket has a definition and, beside it, a placement."""
_METADATA_BYTES = 128 << 10
"""Reasons of refusals travel as metadata, and a network file may have hundreds of problems."""


EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
"""What a read gives after the last message."""


def message_bytes(limits: Limits) -> int:
    """Largest message that a server takes."""
    return max(limits.control_bytes, limits.chunk_bytes) + _SLACK_BYTES


def open_channel(address: str, limits: Limits, receive_bytes: int, http_proxy: str = "") -> Any:
    """A channel to ``address`` whose calls take messages of up to ``receive_bytes``. Connects with the first call.

    ``http_proxy``: a URL, of what is asked to ``CONNECT``.
    """
    options = [
        # A lower-case variable http_proxy would be used even for 127.0.0.1.
        ("grpc.http_proxy", http_proxy) if http_proxy else ("grpc.enable_http_proxy", 0),
        # Else a new channel inherits the connection back-off of an older one to the same address.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", int(limits.redial_first_s * 1000)),
        ("grpc.min_reconnect_backoff_ms", int(limits.dial_timeout_s * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(limits.redial_most_s * 1000)),
        ("grpc.max_receive_message_length", receive_bytes),
        ("grpc.max_send_message_length", message_bytes(limits)),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * _METADATA_BYTES),
        ("grpc.http2.max_pings_without_data", 0),
        *_keepalive(limits),
    ]
    return grpc.aio.insecure_channel(address, options)


def server_options(limits: Limits) -> list[tuple[str, int]]:
    """Of our server."""
    return [
        # The default lets two servers share one port silently.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", message_bytes(limits)),
        ("grpc.max_send_message_length", limits.reply_bytes),
        # Clients ping every few seconds; with the default they would be cut off for "too many pings".
        ("grpc.http2.min_ping_interval_without_data_ms", int(limits.keepalive_interval_s * 250)),
        *_keepalive(limits),
    ]


def upload_options(limits: Limits) -> list[tuple[str, int]]:
    """Of a server that takes uploads, besides: what has arrived and was not read is memory too."""
    return [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", limits.upload_window_bytes)]


def _keepalive(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.keepalive_time_ms", int(limits.keepalive_interval_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(limits.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        # keepalive_timeout alone does not notice a process that hangs (not in 1.76: there heartbeats do).
        ("grpc.http2.ping_timeout_ms", int(limits.keepalive_timeout_s * 1000)),
    ]


def cancelled_from_outside() -> bool:
    """Whether a ``CancelledError`` is meant for the current task.

    grpc.aio raises the same class in whoever reads or writes a call that was cancelled with ``call.cancel()``.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def read(call: Any) -> Any:
    """``call.read()``, safe to cancel: a task that is cancelled inside the read itself leaks the incoming message.

    The read goes on in a task of its own until the call has ended, which this sees to. ``call`` may be a client's
    call or a server's context (which has no ``cancel`` and is only cancelled once its call is over).
    """
    task = asyncio.ensure_future(call.read())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if isinstance(call, grpc.aio.Call):
            call.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()
        raise
