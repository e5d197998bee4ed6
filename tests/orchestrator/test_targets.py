"""Valid targets: every element of a target but the ignored ones, which the dataset counts row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from dcnr.adapters.text import PreparedDataset, prepare_columns, prepare_text
from dcnr.network import templates
from dcnr.network.analysis import Network, analyse
from dcnr.network.builder import Graph
from dcnr.orchestrator.desk import Desk
from dcnr.orchestrator.owner import Owner
from dcnr.orchestrator.targets import Targets, load_targets, valid_targets_per_row
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


def ignoring(target: str, value: int, **more: int) -> Network:
    g = Graph("ignoring")
    hidden = g.embedder(g.input("tokens", [4], "int64"), vocab_size=9, dim=4)
    for column, index in {target: value, **more}.items():
        g.cost("ce_logits", g.linear(hidden, out_dim=9), target=column, ignore_index=index, id=column)
    return analyse(g.definition())


def read(network: Network, prepared: PreparedDataset, context: int) -> tuple[Record, Targets]:
    manifest = Manifest.from_bytes(prepared.manifest)
    per_row = valid_targets_per_row(network, manifest, context)
    record = replace(Record.from_bytes(session_record(prepared.id, "")), context=context, valid_targets_per_row=per_row)
    files = {**prepared.objects, manifest_key(prepared.id): prepared.manifest}
    answers: list[Targets] = []
    load_targets(cast(Desk, Files(files)), network, record, answers.append, pytest.fail)
    return record, answers[0]


def test_other_values_are_counted_in_the_column_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces: rows do not end where shards end. Each cost by its own value, -100 by the dataset's counts."""
    monkeypatch.setattr("dcnr.adapters.text.SHARD_COLUMN_BYTES", 2 * 4 * 8)
    draw = np.random.default_rng(0)
    columns = {name: draw.integers(0, 3, (11, 4)) for name in ("tokens", "a", "b")}
    columns["b"][draw.random((11, 4)) < 0.5] = -100
    held = {name: values[::-1].copy() for name, values in columns.items()}
    prepared = prepare_columns(columns, name="two", validation=held)
    network = ignoring("a", 2, b=-100)
    record, found = read(network, prepared, 0)
    assert record.valid_targets_per_row == -1
    for split, side in (("train", columns), ("validation", held)):
        for rows in ([0], [10, 3], list(range(11))):
            expected = [int((side["a"][rows] != 2).sum()), int((side["b"][rows] != -100).sum())]
            assert [entry.count for entry in found.of(network, split, rows)] == expected
    # The same column, another value: -100 is then a value like any other.
    network = ignoring("b", 1)
    (entry,) = read(network, prepared, 0)[1].of(network, "train", range(11))
    assert entry.count == (columns["b"] != 1).sum()


def test_other_values_are_counted_in_text(tmp_path: Path) -> None:
    """Rows of four tokens, of which the shards, of five, know nothing; the targets are the tokens one further."""
    text = "abcd a  bc dd aaa bcd    ab cd" * 5
    file = tmp_path / "text.txt"
    file.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dcnr.adapters.text.SHARD_TOKENS", 5)
        prepared = prepare_text([file], tokenizer="bytes", name="text", split=0.0)
    assert len(Manifest.from_bytes(prepared.manifest).train.shards[0]) > 20
    network = ignoring("targets", ord(" "), tokens=ord("a"))
    record, found = read(network, prepared, 4)
    assert record.valid_targets_per_row == -1
    for row in range((len(text) - 1) // 4):
        shifted, plain = text[4 * row + 1 : 4 * row + 5], text[4 * row : 4 * row + 4]
        counts = [entry.count for entry in found.of(network, "train", [row])]
        assert counts == [4 - shifted.count(" "), 4 - plain.count("a")]
    assert valid_targets_per_row(ignoring("targets", -100), Manifest.from_bytes(prepared.manifest), 4) == 4


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
    assert [entry.count for entry in owner.opens.valid_targets(1)] == [12]
    read = load(prepared, files)
    assert isinstance(read, Targets)
    owner.opens.targets = read
    assert [entry.count for entry in owner.opens.valid_targets(1)] == [7]
