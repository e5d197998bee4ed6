"""Manifests: what a commit names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dcnr.errors import ProtocolError
from dcnr.ids import Instance, Sha256, VNodeId
from dcnr.network.graph import json_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredState:
    """A VNode's state object: ``version`` = how many updates its weights have seen."""

    sha256: Sha256
    size_bytes: int
    version: int
    instance: Instance


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The state after ``step``: one object per VNode with parameters, losses since ``previous`` and that manifest.

    ``scales``: clipping factors since ``previous``, of steps that were clipped.
    """

    step: int
    states: Mapping[VNodeId, StoredState]
    losses: tuple[tuple[int, float], ...]
    previous: Sha256 | None
    scales: tuple[tuple[int, float], ...] = ()

    def to_bytes(self) -> bytes:
        return json_bytes(
            {
                "step": self.step,
                "states": {v: [s.sha256, s.size_bytes, s.version, s.instance] for v, s in self.states.items()},
                "losses": [list(loss) for loss in self.losses],
                "previous": self.previous,
                "scales": [list(scale) for scale in self.scales],
            }
        )

    @property
    def sha256(self) -> Sha256:
        return Sha256(hashlib.sha256(self.to_bytes()).hexdigest())

    def check(self, step: int, versions: Mapping[VNodeId, int]) -> None:
        """Raises :class:`ProtocolError` unless it is one whole state: of ``step``, of exactly the VNodes in ``versions``,
        each at its version there, all written by one instance."""
        if self.step != step:
            raise ProtocolError(f"it is of step {self.step}, and its commit of step {step}")
        if strange := sorted(self.states.keys() ^ versions.keys()):
            what = "has no state" if strange[0] in versions else "has a state of a stranger"
            raise ProtocolError(f"it {what}: {strange[0]} ({len(self.states)} states, {len(versions)} are expected)")
        for vnode, state in self.states.items():
            if state.version != versions[vnode]:
                raise ProtocolError(f"its state of {vnode} is of step {state.version}, expected {versions[vnode]}")
        instances = sorted({state.instance for state in self.states.values()})
        if len(instances) > 1:
            raise ProtocolError(f"its states are of instances {', '.join(map(str, instances))}: they must be of one")

    @staticmethod
    def from_bytes(data: bytes, sha256: Sha256 | None = None) -> Manifest:
        """Raises :class:`ProtocolError` on bytes that are no manifest, or not the one that hashes to ``sha256``."""
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise ProtocolError(f"manifest does not hash to its name {sha256}")
        try:
            value: dict[str, Any] = json.loads(data)
            return Manifest(
                step=int(value["step"]),
                states={
                    VNodeId(v): StoredState(
                        sha256=Sha256(s[0]), size_bytes=int(s[1]), version=int(s[2]), instance=Instance(int(s[3]))
                    )
                    for v, s in value["states"].items()
                },
                losses=tuple((int(s), float(loss)) for s, loss in value["losses"]),
                previous=None if value["previous"] is None else Sha256(value["previous"]),
                scales=tuple((int(s), float(scale)) for s, scale in value.get("scales", ())),
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"malformed manifest: {error}") from error
