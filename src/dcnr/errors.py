"""The one tree of errors.

::

    DCNRError
    ├── UsageError               wrong option, wrong call (the command line exits with 2)
    │   ├── ConfigError          an unknown or malformed setting
    │   ├── UnknownName          a network, session or dataset that nobody knows
    │   └── NotInThisVersion     a value that the contract names and this version does not build yet
    ├── InvalidNetwork           a network file or graph that is refused; lists every problem
    ├── InvalidData              a dataset that is refused, or rows that do not fit the network
    ├── Unavailable              nothing is wrong with the request; something it needs is not there
    │   ├── Unreachable          no orchestrator answers at the address
    │   ├── AddressInUse         the port is taken
    │   ├── NotOwner             another orchestrator owns the session; names where it is
    │   └── NoCapacity           the PNodes present cannot hold the network; says how much is missing
    ├── StoreError               the object store
    │   ├── AlreadyExists        a create-only name is taken
    │   ├── NotFound             no such object
    │   ├── CorruptObject        bytes that do not hash to their name
    │   └── StoreUnavailable     the store cannot be read or written now
    │       └── StoreFull        it has no room left: it can be read, and written once somebody has made room
    ├── ProtocolError            the peer misbehaved or speaks another protocol
    │   ├── VersionMismatch      no common protocol version; names both ranges
    │   └── WireError            a frame or chunk that is malformed
    ├── Refused                  the peer understood and says no, with its reason
    ├── ComputeError             a kernel failed or produced something unusable
    └── SessionFailed            a training session ended with ``Fail``

Assertions, not these, mark our own bugs.
"""

from __future__ import annotations

from collections.abc import Sequence


class DCNRError(Exception):
    """Base of every error that this package raises on purpose."""


class UsageError(DCNRError):
    """The caller asked in a way that cannot be right."""


class ConfigError(UsageError):
    """An unknown or malformed setting."""


class UnknownName(UsageError):
    """No network, session or dataset has this name or id."""


class NotInThisVersion(UsageError):
    """The contract names this value, but this version does not build it yet."""


class InvalidNetwork(DCNRError):
    """A network that is refused. ``problems`` lists all of them, not the first."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class InvalidData(DCNRError):
    """A dataset that is refused, or rows that do not fit the network."""


class Unavailable(DCNRError):
    """Something that the request needs is not there now."""


class Unreachable(Unavailable):
    """No orchestrator answers at the address."""


class AddressInUse(Unavailable):
    """The address to listen on is taken."""


class NotOwner(Unavailable):
    """Another orchestrator owns the session, and only that one controls it and tells its events."""


class NoCapacity(Unavailable):
    """The PNodes that are present cannot hold the network."""


class StoreError(DCNRError):
    """The object store refused or failed."""


class AlreadyExists(StoreError):
    """A create-only name is taken."""


class NotFound(StoreError):
    """No such object."""


class CorruptObject(StoreError):
    """Bytes that do not hash to their name."""


class StoreUnavailable(StoreError):
    """The store cannot be read or written now."""


class StoreFull(StoreUnavailable):
    """The store has no room left. It can be read, and written once somebody has made room."""


class ProtocolError(DCNRError):
    """A peer misbehaved or speaks another protocol."""


class VersionMismatch(ProtocolError):
    """No protocol version is common to both peers."""


class WireError(ProtocolError):
    """A frame or chunk is malformed."""


class Refused(DCNRError):
    """The peer understood the request and says no."""


class ComputeError(DCNRError):
    """A kernel failed or produced something unusable. ``vnode`` is the one at which, empty where that is not known."""

    def __init__(self, reason: str, vnode: str = "") -> None:
        super().__init__(reason)
        self.vnode = vnode


class SessionFailed(DCNRError):
    """A training session ended with ``Fail``."""
