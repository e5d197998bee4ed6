"""How many targets of a step count: known before it begins, so that microbatches change nothing but rounding."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dcnr.errors import InvalidData
from dcnr.network.analysis import Network
from dcnr.network.graph import CostSpec
from dcnr.network.types import CATALOGUE
from dcnr.orchestrator.desk import Desk
from dcnr.protocol import messages as m
from dcnr.session.dataset import IGNORED_TARGET, Manifest, Shard, manifest_key, shard_key
from dcnr.session.record import Record

Part = tuple[str, int, str]
"""Column, ``ignore_index``, split."""
Ignored = Mapping[Part, bytes]
"""How many positions of each row are no target: uint32, little endian."""

_CODES = {"int64": "q", "uint16": "H", "uint32": "I"}
"""Of elements that can be targets, for ``struct``."""


class Targets:
    """The valid targets of any rows. ``ignored`` is that of the target columns which may have such positions."""

    def __init__(self, ignored: Ignored) -> None:
        self._ignored = ignored

    def of(self, network: Network, split: str, rows: Sequence[int]) -> tuple[m.CostTargets, ...]:
        """Per cost of ``network``, in its order: the elements of all its targets but the ignored ones."""
        definition = network.definition
        return tuple(
            m.CostTargets(
                vnode=cost.node_id,
                count=len(rows) * target.elements
                - self._left_out((cost.target, _ignored_by(network, cost), split), rows),
            )
            for cost, target in zip(definition.costs, network.cost_targets(), strict=True)
        )

    def _left_out(self, part: Part, rows: Sequence[int]) -> int:
        counts = self._ignored.get(part)
        return 0 if counts is None else sum(struct.unpack_from("<I", counts, 4 * row)[0] for row in rows)


def valid_targets_per_row(network: Network, manifest: Manifest, context: int) -> int:
    """What a record says of a session of ``network``: -1 = row by row, as :func:`load_targets` finds."""
    if any(_ignored_by(network, cost) != IGNORED_TARGET for cost in network.definition.costs):
        return -1
    return manifest.valid_targets_per_row(context)


def _ignored_by(network: Network, cost: CostSpec) -> int:
    """The cost's ``ignore_index``; of one without, what no column of its targets has."""
    info = network.vnodes[cost.node_id]
    ignored = CATALOGUE[info.node.type].ignored(info.settings)
    return IGNORED_TARGET if ignored is None else ignored


class _Counter:
    """Counts a value row by row in a column whose bytes come in pieces."""

    def __init__(self, value: int, elements: int, code: str, skipped: int) -> None:
        """``elements`` of a row; ``skipped`` ones come before the first row."""
        self._value = value
        self._row = struct.Struct(f"<{elements}{code}")
        self._skipped = skipped * struct.calcsize(f"<{code}")
        self._rest = b""

    def add(self, data: bytes) -> bytes:
        """The counts of the rows that are whole with this piece: uint32, little endian."""
        data, self._skipped = self._rest + data[self._skipped :], 0
        whole = len(data) // self._row.size * self._row.size
        self._rest = data[whole:]
        return b"".join(struct.pack("<I", row.count(self._value)) for row in self._row.iter_unpack(data[:whole]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """A shard to be read. ``counter``: of a target column itself; ``None``: of counts, as the dataset has them of -100."""

    part: Part
    shard: Shard
    counter: _Counter | None


def _readings(network: Network, manifest: Manifest, context: int) -> Iterator[_Reading]:
    counted = {entry.column: {"train": entry.train, "validation": entry.validation} for entry in manifest.ignored}
    for column, value in sorted({(cost.target, _ignored_by(network, cost)) for cost in network.definition.costs}):
        for split in ("train", "validation"):
            if value == IGNORED_TARGET:
                for shard in counted.get(column, {}).get(split, ()):
                    yield _Reading(part=(column, value, split), shard=shard, counter=None)
                continue
            # Text has one column; its targets are the tokens, but for the first.
            index = 0 if context else [c.name for c in manifest.stored].index(column)
            stored = manifest.stored[index]
            elements = context or math.prod(stored.shape)
            counter = _Counter(value, elements, _CODES[stored.dtype], int(context > 0 and column == "targets"))
            for shard in manifest.split(split).shards[index]:
                yield _Reading(part=(column, value, split), shard=shard, counter=counter)


def load_targets(
    desk: Desk, network: Network, record: Record, then: Callable[[Targets], None], failed: Callable[[str], None]
) -> None:
    """Read what the dataset says of its ignored positions, if the record says that there are any.

    A dataset counts those of -100, whatever network it is for. Where a cost ignores another value, its whole target column
    is read, a shard at a time, and counted here.
    """
    found: dict[Part, bytes] = {}
    if record.valid_targets_per_row >= 0:
        then(Targets(found))
        return

    def read(waiting: Iterator[_Reading]) -> None:
        reading = next(waiting, None)
        if reading is None:
            then(Targets(found))
            return
        key = shard_key(reading.shard.sha256)

        def got(data: bytes | None) -> None:
            if data is None or hashlib.sha256(data).hexdigest() != reading.shard.sha256:
                failed(f"{key} is missing or damaged: add the data again to mend it")
                return
            counts = data if reading.counter is None else reading.counter.add(data)
            found[reading.part] = found.get(reading.part, b"") + counts
            read(waiting)

        desk.get(key, got)

    def got_manifest(data: bytes | None) -> None:
        try:
            if data is None or hashlib.sha256(data).hexdigest() != record.dataset:
                raise InvalidData("missing or damaged")
            manifest = Manifest.from_bytes(data)
        except InvalidData as error:
            failed(f"dataset {record.dataset}: {error}: add the data again to mend it")
            return
        read(_readings(network, manifest, record.context))

    desk.get(manifest_key(record.dataset), got_manifest)
