"""The error tree on the wire: a class of :mod:`dcnr.errors` to a gRPC status and back."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import grpc

from dcnr import errors
from dcnr.errors import DCNRError, InvalidNetwork, Refused, Unreachable

_KIND = "dcnr-error-kind"
_REASON = "dcnr-error-reason-bin"
_REASON_BYTES = 60_000
"""Of the reason in the metadata: more than a network file's problems, less than our clients take."""
_DETAILS_CHARACTERS = 500
"""Of the status message, for clients that know nothing of the metadata; both must fit their default of 8 KiB."""

_CODES: tuple[tuple[type[DCNRError], grpc.StatusCode], ...] = (
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.CorruptObject, grpc.StatusCode.DATA_LOSS),
    (errors.StoreError, grpc.StatusCode.UNAVAILABLE),
    (errors.NoCapacity, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.NotInThisVersion, grpc.StatusCode.UNIMPLEMENTED),
    (errors.UnknownName, grpc.StatusCode.NOT_FOUND),
    (errors.UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidNetwork, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidData, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.VersionMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Refused, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.DCNRError, grpc.StatusCode.ABORTED),
)
"""The first class that an error is an instance of decides."""


def error_class(kind: str) -> type[DCNRError]:
    """The class of the error tree by its name; :class:`Refused` for one that this version does not know."""
    found = getattr(errors, kind, None)
    return found if isinstance(found, type) and issubclass(found, DCNRError) else Refused


def make_error(kind: str, reason: str) -> DCNRError:
    """The error that a peer named."""
    found = error_class(kind)
    if issubclass(found, InvalidNetwork):
        return found(reason.split("\n"))
    return found(reason)


async def abort(context: Any, error: DCNRError) -> NoReturn:
    """End the call with ``error``."""
    reason = str(error)
    await context.abort(
        next(code for kind, code in _CODES if isinstance(error, kind)),
        reason[:_DETAILS_CHARACTERS],
        ((_KIND, type(error).__name__), (_REASON, reason.encode()[:_REASON_BYTES])),
    )
    raise AssertionError("abort raises")


def from_rpc_error(error: grpc.aio.AioRpcError, address: str) -> DCNRError:
    """What a failed call to ``address`` means: the error that the peer named, else that it does not answer."""
    # Not dict(metadata): grpcio 1.76 gives pairs where a mapping's keys are asked for.
    metadata = cast(Any, error.trailing_metadata()) or {}
    kind = metadata.get(_KIND)
    if kind is not None:
        reason = metadata.get(_REASON)
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else error.details() or ""
        return make_error(str(kind), text)
    match error.code():
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            return Unreachable(
                f"no orchestrator answers at {address} ({error.details()}); check that it runs, that address and port "
                "are right, and that no firewall is between"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return Refused(f"what answers at {address} is no orchestrator of this version: {error.details()}")
        case _:
            return errors.ProtocolError(f"{address}: {error.code().name}: {error.details()}")
