"""Valid targets: every element of a target but the ignored ones, which the dataset counts row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from dcnr.adapters.text import PreparedDataset, prepare_columns
from dcnr.network import templates
from dcnr.network.analysis import analyse
from dcnr.orchestrator.desk import Desk
from dcnr.orchestrator.owner import Owner
from dcnr.orchestrator.targets import Targets, load_targets
from dcnr.session.dataset import Manifest, manifest_key, shard_key
from dcnr.session.log import Fold
from dcnr.session.recipe import Recipe
from dcnr.session.record import Record
from tests.client.fake import session_record
from tests.orchestrator.test_session_log import a_desk

GPT = analyse(templates.gpt(layers=1, dim=8, heads=2, vocab=64, context=4).definition())
TARGETS = np.array([[1, 2, 3, -100], [-100] * 4, [1, 2, 3, 4]])


class Files:
    """The part of a desk that reads."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def get(self, key: str, then: Callable[[bytes | None], None]) -> None:
        then(self.files.get(key))


def record_of(prepared: PreparedDataset) -> Record:
    per_row = Manifest.from_bytes(prepared.manifest).valid_targets_per_row(0)
    return replace(Record.from_bytes(session_record(prepared.id, "")), valid_targets_per_row=per_row)


def load(prepared: PreparedDataset, files: dict[str, bytes]) -> Targets | str:
    record = record_of(prepared)
    answers: list[Targets | str] = []
    load_targets(cast(Desk, Files(files)), GPT, record, answers.append, answers.append)
    (answer,) = answers
    return answer


def padded(targets: np.ndarray = TARGETS) -> tuple[PreparedDataset, dict[str, bytes]]:
    # ``tokens`` has such values as well, but is no target.
    prepared = prepare_columns(
        {"tokens": TARGETS, "targets": targets}, name="p", validation={"tokens": TARGETS[:1], "targets": targets[:1]}
    )
    return prepared, {**prepared.objects, manifest_key(prepared.id): prepared.manifest}


def counts(found: Targets | str, split: str, rows: list[int]) -> list[int]:
    assert isinstance(found, Targets)
    return [entry.count for entry in found.of(GPT, split, rows)]


def test_rows_count_what_is_not_ignored() -> None:
    found = load(*padded())
    assert counts(found, "train", [0, 1, 2]) == [7]
    assert counts(found, "train", [1]) == [0]
    assert counts(found, "train", [2, 2]) == [8]
    assert counts(found, "validation", [0]) == [3]


def test_without_ignored_positions_nothing_is_read() -> None:
    prepared = prepare_columns({"tokens": np.ones((3, 4), int), "targets": np.ones((3, 4), int)}, name="whole")
    assert counts(load(prepared, {}), "train", [0, 1, 2]) == [12]


@pytest.mark.parametrize("damage", [None, b"", b"\0" * 12])
def test_counts_that_cannot_be_had_are_named(damage: bytes | None) -> None:
    prepared, files = padded()
    ignored = next(e for e in Manifest.from_bytes(prepared.manifest).ignored if e.column == "targets")
    for key in (shard_key(ignored.train[0].sha256), manifest_key(prepared.id)):
        others = {name: data for name, data in files.items() if name != key}
        answer = load(prepared, others if damage is None else {**others, key: damage})
        assert isinstance(answer, str)
        assert "damaged: add the data again" in answer
        assert key.split("/")[-1].split(".")[0] in answer or prepared.id in answer


def test_what_an_owner_reads_anew_counts_at_once() -> None:
    """A session that ended, and whose data were deleted and added again, is resumed at a step that it knows already."""
    prepared, files = padded()
    record = replace(record_of(prepared), rows_train=3, recipe=Recipe(steps=10, batch_size=3, microbatches=1))
    owner = Owner(
        desk=a_desk(),
        id=record.id,
        record=record,
        network=GPT,
        state=Fold(),
        targets=Targets({}),
        evaluate=lambda *_: None,
        superseded=lambda owner: None,
    )
    assert [entry.count for entry in owner._valid_targets(1)] == [12]
    read = load(prepared, files)
    assert isinstance(read, Targets)
    owner.targets = read
    assert [entry.count for entry in owner._valid_targets(1)] == [7]
