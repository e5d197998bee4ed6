"""A dataset's manifest: which columns there are, of which rows, and in which shards their bytes lie.

A dataset is content-addressed: its id is the sha256 of its manifest, the manifest names each shard by sha256. So the
same data added twice is one dataset, and datasets may share shards.

Two kinds. ``columns``: named arrays, stored as they are, row after row. ``text``: one stored column ``tokens``, a
stream; row i of a session with rows of ``context`` tokens is ``stream[i*context : i*context + context + 1]``, which
gives ``tokens`` (all but the last) and ``targets`` (all but the first).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dcnr.config import LIMITS
from dcnr.errors import InvalidData
from dcnr.ids import DatasetId, Sha256
from dcnr.network.graph import json_bytes
from dcnr.network.node_type import AXES_MOST

ITEM_BYTES = {"uint16": 2, "uint32": 4, "int64": 8, "float32": 4, "float64": 8}
"""Stored element types, all little endian, with their size."""
TEXT_DTYPES = ("uint16", "uint32")
COLUMN_DTYPES = ("int64", "float32", "float64")
IGNORED_TARGET = -100
"""A target of this value counts nowhere."""
IGNORED_BYTES = 4
"""Of one row's count of ignored positions."""
FORMAT = 1
_NAME_CHARACTERS = 200


def is_sha256(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def manifest_key(dataset: str) -> str:
    return f"datasets/{dataset}/manifest.json"


def shard_key(sha256: str) -> str:
    return f"datasets/shards/{sha256}.bin"


def tokenizer_key(sha256: str) -> str:
    """A tokenizer is a ``tokenizer.json`` of the ``tokenizers`` library."""
    return f"datasets/shards/{sha256}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """``shape`` leaves out the row axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def input_column(columns: Sequence[Column], name: str) -> Column:
    """The column of an input that asks for ``name``: the one of that name, else the first.

    An input that names no column asks for its own name, which few datasets have. What is found must still have the
    input's dtype and shape. Costs have no such default: a target that is absent is a mistake.
    """
    return next((column for column in columns if column.name == name), columns[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """``count`` rows (tokens, for text) of one column."""

    sha256: Sha256
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """``count`` rows (tokens, for text); ``shards`` has one sequence per stored column, in the columns' order."""

    count: int
    shards: tuple[tuple[Shard, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignored:
    """Of an int64 column that has positions of ``IGNORED_TARGET``: how many there are in each row.

    uint32, little endian, in shards of their own; a step's valid targets are known from them before it begins.
    """

    column: str
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerRef:
    kind: str
    """``bpe:<size asked for>``, ``bytes`` or ``file``."""
    sha256: Sha256
    vocab: int
    """Every token is below it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """See the module's docstring. ``tokenizer``, ``text_sha256``, ``source_bytes`` and ``replaced`` belong to text,
    ``ignored`` (sorted by column) to columns."""

    name: str
    kind: str
    stored: tuple[Column, ...]
    train: Split
    validation: Split
    tokenizer: TokenizerRef | None = None
    text_sha256: str = ""
    """Of the documents joined by single newlines, as UTF-8."""
    source_bytes: int = 0
    replaced: int = 0
    """Byte sequences that were no UTF-8 and became U+FFFD."""
    ignored: tuple[Ignored, ...] = ()

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise InvalidData(f"dataset manifest: {problem}")

    @property
    def id(self) -> DatasetId:
        return DatasetId(hashlib.sha256(self.to_bytes()).hexdigest())

    def split(self, name: str) -> Split:
        """Raises :class:`InvalidData` unless ``name`` is ``train`` or ``validation``."""
        if name == "train":
            return self.train
        if name == "validation":
            return self.validation
        raise InvalidData(f"dataset {self.name!r} has no split {name!r}: train or validation")

    def rows(self, split: str, context: int) -> int:
        """Rows of a split. ``context``: tokens of a row of text, 0 for columns."""
        self._check_context(context)
        count = self.split(split).count
        return max(0, (count - 1) // context) if self.kind == "text" else count

    def columns_for(self, context: int) -> tuple[Column, ...]:
        """The columns that rows have, as the network sees them."""
        self._check_context(context)
        if self.kind == "text":
            return tuple(Column(name=name, dtype="int64", shape=(context,)) for name in ("tokens", "targets"))
        return self.stored

    def valid_targets_per_row(self, context: int) -> int:
        """Of text: every position has a target. Of columns: 0 = the elements of the targets, -1 = see ``ignored``."""
        self._check_context(context)
        return -1 if self.ignored else context

    def shard_sizes(self) -> dict[Sha256, int]:
        """Every shard with its size in bytes."""
        return {
            shard.sha256: shard.count * column.row_bytes
            for split in (self.train, self.validation)
            for column, shards in zip(self.stored, split.shards, strict=True)
            for shard in shards
        } | {
            shard.sha256: shard.count * IGNORED_BYTES
            for entry in self.ignored
            for shard in (*entry.train, *entry.validation)
        }

    def _check_context(self, context: int) -> None:
        if self.kind == "text" and context < 1:
            raise InvalidData(f"dataset {self.name!r} is text: its rows need a context of at least 1, found {context}")
        if self.kind == "columns" and context != 0:
            raise InvalidData(f"dataset {self.name!r} has columns, not text: its rows have no context, found {context}")

    def to_bytes(self) -> bytes:
        document: dict[str, Any] = {
            "format": FORMAT,
            "kind": self.kind,
            "name": self.name,
            "columns": [{"name": c.name, "dtype": c.dtype, "shape": list(c.shape)} for c in self.stored],
            "splits": {
                name: {
                    "count": split.count,
                    "shards": {
                        column.name: [{"sha256": s.sha256, "count": s.count} for s in shards]
                        for column, shards in zip(self.stored, split.shards, strict=True)
                    },
                }
                for name, split in (("train", self.train), ("validation", self.validation))
            },
        }
        if self.tokenizer is not None:
            document["tokenizer"] = {
                "kind": self.tokenizer.kind,
                "sha256": self.tokenizer.sha256,
                "vocab": self.tokenizer.vocab,
            }
            document["text_sha256"] = self.text_sha256
            document["source_bytes"] = self.source_bytes
            if self.replaced:
                document["replaced"] = self.replaced
        if self.ignored:
            document["ignored"] = {
                entry.column: {
                    name: [{"sha256": s.sha256, "count": s.count} for s in shards]
                    for name, shards in (("train", entry.train), ("validation", entry.validation))
                }
                for entry in self.ignored
            }
        return json_bytes(document)

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """Raises :class:`InvalidData` on anything that :meth:`to_bytes` would not have written."""
        try:
            document = json.loads(data)
            if document["format"] != FORMAT:
                raise InvalidData(f"dataset manifest: format {document['format']!r}; this version reads {FORMAT}")
            columns = tuple(
                Column(name=c["name"], dtype=c["dtype"], shape=tuple(c["shape"])) for c in document["columns"]
            )
            tokenizer = document.get("tokenizer")
            manifest = Manifest(
                name=document["name"],
                kind=document["kind"],
                stored=columns,
                train=_split(document["splits"]["train"], columns),
                validation=_split(document["splits"]["validation"], columns),
                tokenizer=TokenizerRef(**tokenizer) if tokenizer is not None else None,
                text_sha256=document.get("text_sha256", ""),
                source_bytes=document.get("source_bytes", 0),
                replaced=document.get("replaced", 0),
                ignored=tuple(
                    Ignored(
                        column=name,
                        train=tuple(Shard(**shard) for shard in splits["train"]),
                        validation=tuple(Shard(**shard) for shard in splits["validation"]),
                    )
                    for name, splits in document.get("ignored", {}).items()
                ),
            )
            # Unknown keys, numbers written another way, an order of its own: one comparison refuses them all.
            if manifest.to_bytes() != data:
                raise InvalidData("dataset manifest: not in canonical form, or with unknown keys")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InvalidData(f"malformed dataset manifest: {type(error).__name__}: {error}") from error
        return manifest


def _split(document: dict[str, Any], columns: tuple[Column, ...]) -> Split:
    return Split(
        count=document["count"],
        shards=tuple(tuple(Shard(**shard) for shard in document["shards"][column.name]) for column in columns),
    )


def _whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _problem(manifest: Manifest) -> str | None:
    if not isinstance(manifest.name, str) or not 1 <= len(manifest.name) <= _NAME_CHARACTERS:
        return f"the name has 1 to {_NAME_CHARACTERS} characters, found {manifest.name!r}"
    if not manifest.name.isprintable():
        return f"the name {manifest.name!r} has unprintable characters"
    if manifest.kind == "text":
        if manifest.tokenizer is None:
            return "text without a tokenizer"
        if not isinstance(manifest.tokenizer.kind, str) or not is_sha256(manifest.tokenizer.sha256):
            return "the tokenizer has no sha256 or no kind"
        if not is_sha256(manifest.text_sha256) or not all(
            _whole(count, 0) for count in (manifest.source_bytes, manifest.replaced)
        ):
            return "text_sha256, source_bytes or replaced is malformed"
        if [(c.name, c.shape) for c in manifest.stored] != [("tokens", ())]:
            return "text stores exactly one column, 'tokens', without a shape"
        dtypes: tuple[str, ...] = TEXT_DTYPES
        if manifest.ignored:
            return "ignored positions belong to columns only"
        if not _whole(manifest.tokenizer.vocab, 1):
            return f"a vocabulary of {manifest.tokenizer.vocab!r}"
    elif manifest.kind == "columns":
        if manifest.tokenizer is not None or manifest.text_sha256 or manifest.source_bytes or manifest.replaced:
            return "a tokenizer, text_sha256, source_bytes and replaced belong to text only"
        dtypes = COLUMN_DTYPES
    else:
        return f"unknown kind {manifest.kind!r}: text or columns"
    names = [c.name for c in manifest.stored]
    if not names or len(set(names)) != len(names):
        return f"columns must be named once each, found {names}"
    for column in manifest.stored:
        if not isinstance(column.name, str) or not column.name or not column.name.isprintable():
            return f"column name {column.name!r}"
        if column.dtype not in dtypes:
            return f"column {column.name!r} has dtype {column.dtype!r}; known: {', '.join(dtypes)}"
        # Bounded before anything is multiplied: a row must fit a shard.
        most = LIMITS.shard_bytes
        if len(column.shape) > AXES_MOST or not all(_whole(size, 1) and size <= most for size in column.shape):
            return (
                f"column {column.name!r}: found {len(column.shape)} axes, expected at most {AXES_MOST} of 1 to {most}"
            )
    counts = tuple(Column(name=f"ignored {entry.column}", dtype="uint32", shape=()) for entry in manifest.ignored)
    targets = [c.name for c in manifest.stored if c.dtype == "int64"]
    if not all(entry.column in targets for entry in manifest.ignored):
        return f"ignored positions belong to columns of int64, found {[entry.column for entry in manifest.ignored]}"
    return (
        _split_problem("train", manifest.train, manifest.stored)
        or _split_problem("validation", manifest.validation, manifest.stored)
        or _split_problem("train", replace(manifest.train, shards=tuple(e.train for e in manifest.ignored)), counts)
        or _split_problem(
            "validation", replace(manifest.validation, shards=tuple(e.validation for e in manifest.ignored)), counts
        )
    )


def _split_problem(name: str, split: Split, columns: tuple[Column, ...]) -> str | None:
    if not _whole(split.count, 0):
        return f"split {name} has a count of {split.count!r}"
    if len(split.shards) != len(columns):
        return f"split {name} has shards for {len(split.shards)} columns, not {len(columns)}"
    for column, shards in zip(columns, split.shards, strict=True):
        for shard in shards:
            if not isinstance(shard.sha256, str) or not is_sha256(shard.sha256) or not _whole(shard.count, 1):
                return f"split {name}, column {column.name!r}: malformed shard {shard}"
            if shard.count * column.row_bytes > LIMITS.shard_bytes:
                return (
                    f"split {name}, column {column.name!r}: shard {shard.sha256} has "
                    f"{shard.count * column.row_bytes} bytes, more than {LIMITS.shard_bytes}"
                )
        if sum(shard.count for shard in shards) != split.count:
            return f"split {name}, column {column.name!r}: the shards' counts do not add up to {split.count}"
    return None
