"""How many targets of a step count: known before it begins, so that microbatches change nothing but rounding."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence

from dcnr.errors import InvalidData
from dcnr.network.analysis import Network
from dcnr.orchestrator.desk import Desk
from dcnr.protocol import messages as m
from dcnr.session.dataset import Manifest, Shard, manifest_key, shard_key
from dcnr.session.record import Record

Ignored = Mapping[tuple[str, str], bytes]
"""(column, split) to how many positions of each row are no target: uint32, little endian."""


class Targets:
    """The valid targets of any rows. ``ignored`` is that of the dataset's target columns which have such positions."""

    def __init__(self, ignored: Ignored) -> None:
        self._ignored = ignored

    def of(self, network: Network, split: str, rows: Sequence[int]) -> tuple[m.CostTargets, ...]:
        """Per cost of ``network``, in its order: the elements of all its targets but the ignored ones."""
        definition = network.definition
        return tuple(
            m.CostTargets(
                vnode=cost.node_id,
                count=len(rows) * target.elements - self._left_out(cost.target, split, rows),
            )
            for cost, target in zip(definition.costs, network.cost_targets(), strict=True)
        )

    def _left_out(self, column: str, split: str, rows: Sequence[int]) -> int:
        counts = self._ignored.get((column, split))
        return 0 if counts is None else sum(struct.unpack_from("<I", counts, 4 * row)[0] for row in rows)


def load_targets(
    desk: Desk, network: Network, record: Record, then: Callable[[Targets], None], failed: Callable[[str], None]
) -> None:
    """Read what the dataset says of its ignored positions, if the record says that there are any."""
    found: dict[tuple[str, str], bytes] = {}
    if record.valid_targets_per_row >= 0:
        then(Targets(found))
        return

    def read(waiting: list[tuple[str, str, Shard]]) -> None:
        if not waiting:
            then(Targets(found))
            return
        (column, split, shard), rest = waiting[0], waiting[1:]

        def got(data: bytes | None) -> None:
            if data is None or hashlib.sha256(data).hexdigest() != shard.sha256:
                failed(f"{shard_key(shard.sha256)} is missing or damaged: add the data again to mend it")
                return
            found[column, split] = found.get((column, split), b"") + data
            read(rest)

        desk.get(shard_key(shard.sha256), got)

    def got_manifest(data: bytes | None) -> None:
        try:
            if data is None or hashlib.sha256(data).hexdigest() != record.dataset:
                raise InvalidData("missing or damaged")
            ignored = Manifest.from_bytes(data).ignored
        except InvalidData as error:
            failed(f"dataset {record.dataset}: {error}: add the data again to mend it")
            return
        wanted = {cost.target for cost in network.definition.costs}
        read(
            [
                (entry.column, split, shard)
                for entry in ignored
                if entry.column in wanted
                for split, shards in (("train", entry.train), ("validation", entry.validation))
                for shard in shards
            ]
        )

    desk.get(manifest_key(record.dataset), got_manifest)
