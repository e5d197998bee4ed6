"""The contract between what decides and what acts.

A *machine* is plain Python without I/O, clock or entropy of its own. It is told what happened
(:class:`Event`) and when, and answers with what to do (:class:`Effect`). The driver performs effects and
reports their completion as events. Effects carry no order, except :class:`Compute` on one worker and
:class:`Send` within one priority class of one link; what must happen after X is emitted in answer to X's
completion event.

Tensors never enter a machine, only :class:`TensorRef`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NewType, Protocol

from dcnr.ids import Incarnation, PeerId, SessionId, Sha256, VNodeId

Instant = NewType("Instant", float)
"""Monotonic seconds of the local process; never compared between processes."""
Handle = NewType("Handle", int)
"""A counted reference into the driver's table of tensors, states and byte strings; local to a process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """A tensor that the driver holds. ``digest`` (sha256) exists only for what crosses a link."""

    handle: Handle
    shape: tuple[int, ...]
    dtype: str
    digest: str | None = None


class Event:
    """Something that happened."""

    __slots__ = ()


class Effect:
    """Something to do."""

    __slots__ = ()


class Machine(Protocol):
    """See the module's docstring. An exception in ``handle`` ends the process: no machine goes on after a bug."""

    def handle(self, now: Instant, event: Event) -> list[Effect]: ...

    def deadline(self) -> Instant | None:
        """When to be woken with :class:`Tick`; ``None`` = only by events."""
        ...


# --- events that every role knows --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick(Event):
    """The deadline has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUp(Event):
    """A link is open and its handshake done. ``role`` is ``"orchestrator"`` or ``"pnode"``."""

    peer: PeerId
    incarnation: Incarnation
    role: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDown(Event):
    """The link is gone (or a dial failed); frames sent on it may be lost, a suffix of them.

    ``address``: where a dial failed whose peer was not known.
    """

    peer: PeerId
    reason: str
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received(Event):
    """A message came down a link. Tensor frames carry a local :class:`TensorRef` that the machine now owns."""

    peer: PeerId
    incarnation: Incarnation
    message: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Persisted(Event):
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistFailed(Event):
    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed(Event):
    """A compute task is done. ``result`` is the result dataclass that belongs to the task's type."""

    task: int
    result: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeFailed(Event):
    """``vnode``: the one that failed, where one of several is known to be it."""

    task: int
    reason: str
    vnode: VNodeId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown(Event):
    """The process was asked to end (SIGTERM, Ctrl-C)."""

    reason: str


# --- effects that every role knows -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Send(Effect):
    """Queue a message on the link to ``peer``; silently dropped when there is none (``LinkDown`` was told).

    A :class:`~dcnr.protocol.messages.TensorFrame` travels in chunks that control messages overtake. The
    driver takes a count of its own on the tensor's handle for as long as it needs the bytes.
    """

    peer: PeerId
    message: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial(Effect):
    """Open a link. Ends in ``LinkUp`` or ``LinkDown``."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Close(Effect):
    """Close the link to a peer, if any. No ``LinkDown`` follows."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute(Effect):
    """Run a task (``dcnr.pnode.tasks``, ``dcnr.serving.generation``) on a worker; ends in ``Computed`` or ``ComputeFailed``."""

    task: int
    worker: int
    what: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel(Effect):
    """Drop a queued compute task if it has not begun. Its ``Computed`` or ``ComputeFailed("cancelled")`` still comes."""

    task: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Persist(Effect):
    """Write ``data`` to the process's home under ``key``, atomically and fsynced; ends in ``Persisted`` or ``PersistFailed``."""

    key: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Release(Effect):
    """Give back one count of each handle."""

    handles: tuple[Handle, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit(Effect):
    """An entry of the event log: what was decided or noticed, and why. ``data`` is JSON-able."""

    kind: str
    session: SessionId | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit(Effect):
    """End the process after queued frames are flushed."""

    code: int
    reason: str


# --- a PNode's transfers: objects and rows, by reference and token -----------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Download(Effect):
    """Get a state object: from the home if it is there and hashes right, else from ``peer``'s data service.

    ``address``: of a PNode that keeps it, which is asked once; '' = an orchestrator's, which is asked until the deadline.
    """

    id: int
    peer: PeerId
    session: SessionId
    sha256: Sha256
    size_bytes: int
    token: str
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloaded(Event):
    """``handle`` holds the object's bytes; ``local`` = it came from the home."""

    id: int
    handle: Handle
    local: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep(Effect):
    """Serialise a snapshot copy, hash it and write it under the home. Takes over ``handle``'s count.

    It need not outlive a loss of power: the store or another PNode has it as well before anybody relies on it.
    """

    id: int
    session: SessionId
    handle: Handle


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept(Event):
    id: int
    sha256: Sha256
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload(Effect):
    """Send a kept snapshot to ``peer``'s data service. An object that is already there is a success.

    ``address``: of a PNode, which is asked once; '' = an orchestrator's, which is asked until the deadline.
    """

    id: int
    peer: PeerId
    session: SessionId
    sha256: Sha256
    size_bytes: int
    token: str
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded(Event):
    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard(Effect):
    """Delete every kept snapshot of the session except ``keep``; ``guarded``: of those kept for other PNodes."""

    session: SessionId
    keep: tuple[Sha256, ...]
    guarded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Admit(Effect):
    """From now on other PNodes that bring ``token`` may leave states of the session here and get them back; '' = nobody."""

    session: SessionId
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch(Effect):
    """Get rows from ``peer``'s data service (``ref`` a :class:`~dcnr.protocol.messages.RowsRef`), or make tensors of
    inline values (``ref`` a tuple of :class:`~dcnr.protocol.messages.InlineTensor`)."""

    id: int
    peer: PeerId
    ref: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched(Event):
    """One tensor of shape [rows, ...] per column that the reference names, in its order."""

    id: int
    tensors: tuple[TensorRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFailed(Event):
    """A Download, Keep, Upload or Fetch failed after the adapter's own retries."""

    id: int
    reason: str


# --- an orchestrator's store and clients -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCreate(Effect):
    """Create-only put. Ends in ``StoreCreated``, ``StoreTaken`` or ``StoreFailed`` (outcome unknown)."""

    id: int
    key: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCreated(Event):
    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreTaken(Event):
    """The name exists; ``data`` are the bytes that are there."""

    id: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFailed(Event):
    """Outcome unknown, or the store is away."""

    id: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreGet(Effect):
    """Ends in ``StoreGot`` (``data`` is ``None`` where nothing is) or ``StoreFailed``."""

    id: int
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreGot(Event):
    id: int
    data: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreList(Effect):
    """Names under a prefix, ascending; may lag. Ends in ``StoreListed`` or ``StoreFailed``."""

    id: int
    prefix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreListed(Event):
    id: int
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCheck(Effect):
    """Read objects back and hash them (keys end in ``<sha256>.<suffix>``). Ends in ``StoreChecked``."""

    id: int
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCopy(Effect):
    """Copy objects (keys end in ``<sha256>.<suffix>``) piece by piece, as (source, target). Ends in ``StoreChecked``."""

    id: int
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreChecked(Event):
    """``damaged``: keys that are missing or do not hash to their name, each with the reason."""

    id: int
    damaged: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreDelete(Effect):
    """Delete objects; a missing one is no error. Nothing follows: deletion may be repeated later."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreHint(Effect):
    """Overwrite a hint (``log/HEAD``, ``beat``). Nothing depends on its success."""

    key: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Effect):
    """Solve a placement problem outside the loop; ends in ``Planned``."""

    id: int
    problem: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    """``answer`` is a :class:`~dcnr.orchestrator.placement.Placement`, or the problem's refusal as a string."""

    id: int
    answer: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Event):
    """A client's call; answer it with ``Respond`` of the same id."""

    id: int
    message: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestGone(Event):
    """The client of a streaming call went away."""

    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Respond(Effect):
    """``message`` is a reply dataclass, or a :class:`~dcnr.protocol.messages.Refusal`. ``last`` closes a stream."""

    id: int
    message: Any
    last: bool = True
