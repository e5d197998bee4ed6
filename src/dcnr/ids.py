"""Names of things, as types.

A name alone never proves that two things are the same: whatever can restart or be placed again also
carries an :class:`Incarnation` (one start of a process), an :data:`Epoch` (which orchestrator may command)
or an :data:`Instance` (which placement of a VNode is valid). The last two are indexes of a session's log.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

PeerId = NewType("PeerId", str)
"""A process of the network, PNode or orchestrator: 32 hexadecimal characters kept in its home."""
VNodeId = NewType("VNodeId", str)
"""The id of a node in the network file."""
NetworkId = NewType("NetworkId", str)
"""sha256 of a network's definition, in hexadecimal."""
DatasetId = NewType("DatasetId", str)
"""sha256 of a dataset's manifest, in hexadecimal."""
SessionId = NewType("SessionId", str)
"""A training run, or (with the prefix ``serve-``) a set of read-only serving instances."""
Sha256 = NewType("Sha256", str)
"""64 hexadecimal characters."""
LogIndex = NewType("LogIndex", int)
"""Position of an entry in a session's log, from 1."""
Epoch = NewType("Epoch", int)
"""Index of the newest ``Acquire`` entry: fences the commands of orchestrators."""
Instance = NewType("Instance", int)
"""Index of the entry that placed a VNode: fences frames, snapshots and caches."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Incarnation:
    """One start of a process.

    A higher ``boot`` of a known peer means that the older process is dead, with everything it held; a lower
    one is refused as old. ``nonce`` (32 hexadecimal characters) tells copies of one home apart.
    """

    boot: int
    nonce: str
