"""What a session tells its followers. Each class is one ``kind`` of the event log; fields are its JSON data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEvent:
    """Base. ``kind`` names the class in the event log."""

    kind: ClassVar[str] = ""

    def data(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(SessionEvent):
    """Every VNode is at version >= ``step`` and the loss is known: told once each, in order."""

    kind: ClassVar[str] = "step_done"
    step: int
    loss: float
    learning_rate: float
    grad_scale: float
    tokens: int
    """Valid targets of the step."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Values of the network's metrics by name. One without a finite value in this step is left out; so are all of steps
    that an orchestrator which started since knows from checkpoints alone."""

    def data(self) -> dict[str, Any]:
        """Without ``metrics`` where there are none."""
        return {name: value for name, value in asdict(self).items() if name != "metrics" or value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed(SessionEvent):
    """An entry placed every VNode. ``vnodes``: VNode to peer; ``why``: VNode to reason."""

    kind: ClassVar[str] = "placed"
    index: int
    base_step: int
    window: int
    vnodes: Mapping[str, str]
    why: Mapping[str, str]
    numeric_class: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PNodeLost(SessionEvent):
    kind: ClassVar[str] = "pnode_lost"
    peer: str
    reason: str
    vnodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VNodeMoved(SessionEvent):
    kind: ClassVar[str] = "vnode_moved"
    vnode: str
    source: str
    target: str
    index: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPhase(SessionEvent):
    """One phase of a recovery, in the order ``detected``, ``decided``, ``logged``, ``ticketed``, ``loaded``, ``regained``.

    ``ms`` is the phase's own length; ``detected`` counts from the lost peer's last sign of life.
    """

    kind: ClassVar[str] = "recovery_phase"
    phase: str
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaying(SessionEvent):
    """Steps ``first``..``last`` are computed again; their StepDone is not repeated."""

    kind: ClassVar[str] = "replaying"
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCommitted(SessionEvent):
    kind: ClassVar[str] = "checkpoint_committed"
    step: int
    manifest: str
    index: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointAbandoned(SessionEvent):
    kind: ClassVar[str] = "checkpoint_abandoned"
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDamaged(SessionEvent):
    """A commit cannot be restored; an older one is used."""

    kind: ClassVar[str] = "checkpoint_damaged"
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDropped(SessionEvent):
    kind: ClassVar[str] = "checkpoint_dropped"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(SessionEvent):
    """Validation loss of the committed checkpoint of ``step``, mean over the valid targets of ``rows`` rows."""

    kind: ClassVar[str] = "evaluated"
    step: int
    loss: float
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactnessLost(SessionEvent):
    """From this entry on VNodes run on machines of another numeric class, or (``old`` empty) of several from the start."""

    kind: ClassVar[str] = "exactness_lost"
    index: int
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting(SessionEvent):
    """The session cannot go on now. ``reason`` says what is missing."""

    kind: ClassVar[str] = "waiting"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(SessionEvent):
    kind: ClassVar[str] = "resumed"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspended(SessionEvent):
    kind: ClassVar[str] = "suspended"
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(SessionEvent):
    kind: ClassVar[str] = "stopped"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(SessionEvent):
    kind: ClassVar[str] = "failed"
    step: int
    vnode: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(SessionEvent):
    kind: ClassVar[str] = "finished"
    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Other(SessionEvent):
    """A kind that this version of the client does not know."""

    kind: ClassVar[str] = "other"
    name: str
    values: Mapping[str, Any]


KINDS: dict[str, type[SessionEvent]] = {
    c.kind: c
    for c in (
        StepDone, Placed, PNodeLost, VNodeMoved, RecoveryPhase, Replaying, CheckpointCommitted, CheckpointAbandoned,
        CheckpointDamaged, CheckpointDropped, Evaluated, ExactnessLost, Waiting, Resumed, Suspended, Stopped, Failed, Finished,
    )
}  # fmt: skip

LAST_KINDS = frozenset({"finished", "failed", "stopped", "suspended"})
"""Events after which a session tells nothing more until it is resumed."""


def parse(kind: str, data: str) -> SessionEvent:
    """An event of the log as its class. Unknown kinds become :class:`Other`; unknown fields are dropped."""
    values = json.loads(data)
    known = KINDS.get(kind)
    if known is None:
        return Other(name=kind, values=values)
    fields = known.__dataclass_fields__
    return known(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in fields})
