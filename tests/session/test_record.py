"""Records: what was written before a field existed is read as it was meant."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dcnr.errors import ProtocolError
from dcnr.ids import DatasetId, NetworkId, SessionId, Sha256
from dcnr.session.recipe import Recipe
from dcnr.session.record import Record, Source

RECORD = Record(
    network=NetworkId("n"), network_name="net", dataset=DatasetId("d"), tokenizer="", context=0, rows_train=9,
    rows_validation=3, valid_targets_per_row=0, recipe=Recipe(steps=5), groups=(("a", "b"),), catalogue="c",
    created_unix_s=1.5, nonce="x",
)  # fmt: skip


@pytest.mark.parametrize("init", [None, Source(session=SessionId("s"), step=7, manifest=Sha256("0" * 64))])
def test_a_record_survives_its_bytes(init: Source | None) -> None:
    record = replace(RECORD, init=init)
    assert Record.from_bytes(record.to_bytes()) == record


def test_a_record_of_before_began_with_the_seeds_weights() -> None:
    values = json.loads(RECORD.to_bytes())
    del values["init"]
    del values["recipe"]["clip_scope"]
    del values["recipe"]["schedule"]["decay_share"]
    assert Record.from_bytes(json.dumps(values).encode()) == RECORD


@pytest.mark.parametrize("init", [["s", 7], "s", ["s", "seven", "0"]])
def test_a_malformed_source_is_refused(init: object) -> None:
    values = json.loads(RECORD.to_bytes()) | {"init": init}
    with pytest.raises(ProtocolError, match="malformed session record"):
        Record.from_bytes(json.dumps(values).encode())
