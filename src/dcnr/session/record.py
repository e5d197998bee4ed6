"""The immutable record of a session: with its log it determines every bit of every weight."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from dcnr.errors import ProtocolError, UsageError
from dcnr.ids import DatasetId, NetworkId, SessionId, Sha256
from dcnr.network.graph import json_bytes
from dcnr.session.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Whose weights a session began with. Manifest and objects were copied: the source may go, this session stays."""

    session: SessionId
    step: int
    manifest: Sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """``groups`` are the kernel groups (lists of VNode ids), ``catalogue`` the digest of the operator catalogue."""

    network: NetworkId
    network_name: str
    dataset: DatasetId
    tokenizer: str
    """sha256 of the dataset's tokenizer, empty for column datasets."""
    context: int
    """Length of a row of a text dataset, 0 for column datasets."""
    rows_train: int
    rows_validation: int
    valid_targets_per_row: int
    """Of text: its context. Of columns: 0 = the elements of the targets. Of either: -1 = they are counted row by row."""
    recipe: Recipe
    groups: tuple[tuple[str, ...], ...]
    catalogue: str
    created_unix_s: float
    nonce: str
    rewrites: tuple[str, ...] = ()
    """What :mod:`dcnr.network.rewrite` changes before the network is trained; ``network`` is as it was written."""
    init: Source | None = None
    """``None``: the initial weights follow from the recipe's seed."""
    format: int = 1

    def to_bytes(self) -> bytes:
        return json_bytes(
            {
                "network": self.network,
                "network_name": self.network_name,
                "dataset": self.dataset,
                "tokenizer": self.tokenizer,
                "context": self.context,
                "rows_train": self.rows_train,
                "rows_validation": self.rows_validation,
                "valid_targets_per_row": self.valid_targets_per_row,
                "recipe": self.recipe.to_json(),
                "groups": [list(g) for g in self.groups],
                "catalogue": self.catalogue,
                "created_unix_s": self.created_unix_s,
                "nonce": self.nonce,
                "rewrites": list(self.rewrites),
                "init": None if self.init is None else [self.init.session, self.init.step, self.init.manifest],
                "format": self.format,
            }
        )

    @property
    def id(self) -> SessionId:
        """First 32 characters of a sha256 of everything but the time: the same request sent twice, even to two
        orchestrators, makes one session."""
        return SessionId(hashlib.sha256(replace(self, created_unix_s=0.0).to_bytes()).hexdigest()[:32])

    @property
    def age(self) -> tuple[float, str]:
        """The older of two sessions has the lesser one, and is placed first."""
        return self.created_unix_s, self.nonce

    @staticmethod
    def from_bytes(data: bytes) -> Record:
        """Raises :class:`ProtocolError` on anything that is not a record."""
        try:
            values: dict[str, Any] = json.loads(data)
            values["recipe"] = Recipe.from_json(values["recipe"])
            values["groups"] = tuple(tuple(g) for g in values["groups"])
            values["rewrites"] = tuple(values.get("rewrites", ()))
            if (init := values.pop("init", None)) is not None:
                session, step, manifest = init
                values["init"] = Source(session=SessionId(session), step=int(step), manifest=Sha256(manifest))
            return Record(**values)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, UsageError) as error:
            # UsageError: a recipe that another version wrote and this one refuses.
            raise ProtocolError(f"malformed session record: {error}") from error
