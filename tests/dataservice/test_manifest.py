"""The dataset manifest: canonical, and strict about everything that it did not write itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dcnr.errors import InvalidData
from dcnr.ids import Sha256
from dcnr.network.graph import json_bytes
from dcnr.session.dataset import Column, Ignored, Manifest, Shard, Split, TokenizerRef, input_column

A, B = Sha256("a" * 64), Sha256("b" * 64)
TEXT = Manifest(
    name="text",
    kind="text",
    stored=(Column(name="tokens", dtype="uint16", shape=()),),
    train=Split(count=101, shards=((Shard(sha256=A, count=60), Shard(sha256=B, count=41)),)),
    validation=Split(count=10, shards=((Shard(sha256=B, count=10),),)),
    tokenizer=TokenizerRef(kind="bpe:300", sha256=B, vocab=300),
    text_sha256=A,
    source_bytes=500,
)
COLUMNS = Manifest(
    name="columns",
    kind="columns",
    stored=(Column(name="x", dtype="float32", shape=(3, 2)), Column(name="y", dtype="int64", shape=())),
    train=Split(count=7, shards=((Shard(sha256=A, count=7),), (Shard(sha256=B, count=7),))),
    validation=Split(count=0, shards=((), ())),
)


PADDED = replace(
    COLUMNS,
    ignored=(Ignored(column="y", train=(Shard(sha256=Sha256("c" * 64), count=7),), validation=()),),
)


@pytest.mark.parametrize("manifest", [TEXT, COLUMNS, PADDED])
def test_it_survives_its_bytes(manifest: Manifest) -> None:
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    assert again.id == manifest.id
    assert len(manifest.id) == 64


def test_rows_and_columns_of_text() -> None:
    assert TEXT.rows("train", 10) == 10
    assert TEXT.rows("train", 100) == 1
    assert TEXT.rows("train", 101) == 0
    assert TEXT.rows("validation", 10) == 0
    assert TEXT.columns_for(10) == (
        Column(name="tokens", dtype="int64", shape=(10,)),
        Column(name="targets", dtype="int64", shape=(10,)),
    )
    assert TEXT.valid_targets_per_row(10) == 10
    assert TEXT.shard_sizes() == {A: 120, B: 20}


def test_rows_and_columns_of_columns() -> None:
    assert COLUMNS.rows("train", 0) == 7
    assert COLUMNS.columns_for(0) == COLUMNS.stored
    assert COLUMNS.valid_targets_per_row(0) == 0
    assert COLUMNS.shard_sizes() == {A: 7 * 24, B: 56}


def test_ignored_positions_are_counted_row_by_row() -> None:
    assert PADDED.valid_targets_per_row(0) == -1
    assert PADDED.shard_sizes() == COLUMNS.shard_sizes() | {"c" * 64: 28}
    (counts,) = PADDED.ignored
    for bad, reason in (
        (replace(counts, column="x"), "belong to columns of int64, found"),
        (replace(counts, column="z"), "belong to columns of int64, found"),
        (replace(counts, train=()), "'ignored y': the shards' counts do not add up to 7"),
        (replace(counts, validation=counts.train), "'ignored y': the shards' counts do not add up to 0"),
    ):
        with pytest.raises(InvalidData, match=reason):
            replace(PADDED, ignored=(bad,))
    with pytest.raises(InvalidData, match="belong to columns only"):
        replace(TEXT, ignored=(counts,))


def test_a_context_belongs_to_text_only() -> None:
    for call in (lambda: TEXT.rows("train", 0), lambda: TEXT.columns_for(0), lambda: TEXT.valid_targets_per_row(-1)):
        with pytest.raises(InvalidData, match="context of at least 1"):
            call()
    with pytest.raises(InvalidData, match="no context"):
        COLUMNS.rows("train", 8)
    with pytest.raises(InvalidData, match="no split 'test'"):
        TEXT.rows("test", 8)


Change = Callable[[dict[str, Any]], object]
BAD: dict[str, Change] = {
    "format 2": lambda d: d.update(format=2),
    "unknown keys": lambda d: d.update(extra=1),
    "unknown kind": lambda d: d.update(kind="images"),
    "text without a tokenizer": lambda d: d.pop("tokenizer"),
    "name has 1 to 200": lambda d: d.update(name=""),
    "unprintable": lambda d: d.update(name="a\nb"),
    "malformed": lambda d: d.pop("splits"),
    "count of -1": lambda d: d["splits"]["train"].update(count=-1),
    "count of 'x'": lambda d: d["splits"]["train"].update(count="x"),
    "count of True": lambda d: d["splits"]["train"].update(count=True),
    "do not add up to 100": lambda d: d["splits"]["train"].update(count=100),
    "malformed shard": lambda d: d["splits"]["train"]["shards"]["tokens"][0].update(sha256="../../etc"),
    "KeyError": lambda d: d["splits"]["train"].update(shards={}),
    "unexpected keyword": lambda d: d["splits"]["train"]["shards"]["tokens"][0].update(more=1),
    "dtype 'float32'": lambda d: d["columns"][0].update(dtype="float32"),
    "exactly one column": lambda d: d["columns"][0].update(shape=[2]),
    "vocabulary of 0": lambda d: d["tokenizer"].update(vocab=0),
    "no sha256": lambda d: d["tokenizer"].update(sha256="0"),
    "text_sha256": lambda d: d.update(text_sha256="0"),
    "source_bytes or replaced is malformed": lambda d: d.update(replaced=-1),
    "TypeError": lambda d: d.update(columns=5),
}


@pytest.mark.parametrize("reason", BAD)
def test_everything_else_is_refused(reason: str) -> None:
    document = json.loads(TEXT.to_bytes())
    BAD[reason](document)
    with pytest.raises(InvalidData, match=reason):
        Manifest.from_bytes(json_bytes(document))


def test_bytes_in_another_form_are_refused() -> None:
    with pytest.raises(InvalidData, match="canonical"):
        Manifest.from_bytes(json.dumps(json.loads(TEXT.to_bytes())).encode())


def test_a_shard_beyond_the_limit_is_refused() -> None:
    with pytest.raises(InvalidData, match="more than 16777216"):
        Manifest(
            name="large",
            kind="columns",
            stored=(Column(name="x", dtype="float64", shape=()),),
            train=Split(count=(2 << 20) + 1, shards=((Shard(sha256=A, count=(2 << 20) + 1),),)),
            validation=Split(count=0, shards=((),)),
        )


def test_an_input_takes_its_own_column_else_the_first() -> None:
    columns = TEXT.columns_for(8)
    assert input_column(columns, "targets").name == "targets"
    assert input_column(columns, "embedder").name == "tokens"


@pytest.mark.parametrize("shape", [(2,) * 9, (1 << 40,), tuple([2**31 - 1] * 100_000)])
def test_a_shape_beyond_any_row_is_refused_before_it_is_multiplied(shape: tuple[int, ...]) -> None:
    column = Column(name="x", dtype="float32", shape=shape)
    with pytest.raises(InvalidData, match="column 'x': found"):
        replace(COLUMNS, stored=(column, COLUMNS.stored[1]))
