"""Client-side data preparation: files in, finished shards and a manifest out. The service only checks and stores.

Text is tokenized by a byte-level BPE without normaliser and without special tokens: any text survives encode and
decode exactly, and whatever a document says, ``<|endoftext|>`` included, stays text. Documents are joined by single
newlines; there is no separator token in this version.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import ArrayLike, NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from dcnr.config import LIMITS
from dcnr.errors import InvalidData, NotInThisVersion, UnknownName, UsageError
from dcnr.ids import DatasetId, Sha256
from dcnr.session.dataset import (
    COLUMN_DTYPES,
    IGNORED_TARGET,
    ITEM_BYTES,
    Column,
    Ignored,
    Manifest,
    Shard,
    Split,
    TokenizerRef,
    shard_key,
    tokenizer_key,
)

BLOCK_TOKENS = 2048
"""Text goes to train or validation in blocks of this size, so that both sides see every document's kind of text."""
BLOCK_TOKENS_MIN = 128
SHARD_TOKENS = 4_000_000
SHARD_COLUMN_BYTES = 8 << 20
TRAINING_BYTES = 2_000_000
TRAINING_BYTES_PER_TOKEN = 500
"""The tokenizer is trained on the larger of the two, an equal share of every document: more changes few merges, and
text in which no word comes twice takes about 90 bytes of memory per byte."""
TRAINING_PIECE_CHARACTERS = 1 << 16
PIECE_CHARACTERS = 1 << 16
"""Text is encoded in pieces of this size, for an encoding takes about 100 bytes of memory per token."""
PIECES_AT_ONCE = 4
"""Pieces that are encoded in parallel, and so are in memory at once."""
WORD_CHARACTERS_MOST = 4096
"""Longer runs without spaces are cut for the tokenizer's training (not for encoding)."""
VALIDATION_SPLIT = 0.05
"""Share that is held out of files where none is asked for."""
PYTHON_CORPUS_BYTES_MIN = 5_000_000
_BYTE_TOKENS = 256

Tokens = NDArray[np.unsignedinteger[Any]]
"""Shape [tokens]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDataset:
    """What the client uploads: first ``objects`` (key to bytes), then the manifest, whose sha256 is ``id``."""

    id: DatasetId
    manifest: bytes
    objects: Mapping[str, bytes]


# --- tokenizer ---------------------------------------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return table


class Tokenizer:
    """A byte-level tokenizer. Make one with :func:`load_tokenizer` or :func:`train_tokenizer`."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        alphabet = _byte_alphabet()
        inner.encode_special_tokens = True
        self._inner = inner
        self._bytes: dict[int, bytes] = {}
        for token, number in inner.get_vocab(with_added_tokens=False).items():
            if all(character in alphabet for character in token):
                self._bytes[number] = bytes(alphabet[character] for character in token)
            else:
                self._bytes[number] = token.encode()
        for number, added in inner.get_added_tokens_decoder().items():
            self._bytes[number] = added.content.encode()
        self.vocab = max(self._bytes) + 1
        """Every token is below it."""
        self.is_bytes = self._bytes == {number: bytes([number]) for number in range(_BYTE_TOKENS)}
        """Whether a token is the byte of its number."""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_pieces(self, pieces: Sequence[str]) -> list[Tokens]:
        """Each on its own, in parallel; in the smallest type that a shard has for this vocabulary."""
        dtype = np.dtype(self.dtype)
        if self.is_bytes:
            # Where a token is a byte, the library's 100 bytes per token buy nothing.
            return [np.frombuffer(piece.encode(), dtype=np.uint8).astype(dtype) for piece in pieces]
        encodings = self._inner.encode_batch_fast(list(pieces), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=dtype) for encoding in encodings]

    @property
    def dtype(self) -> str:
        """Of tokens in shards."""
        return "uint16" if self.vocab <= 1 << 16 else "uint32"

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD. Raises :class:`InvalidData` for a token outside the vocabulary."""
        return self.raw(ids).decode("utf-8", "replace")

    def raw(self, ids: Iterable[int]) -> bytes:
        """The bytes that tokens stand for. Raises :class:`InvalidData` for a token outside the vocabulary."""
        return b"".join(map(self._token, ids))

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self)

    def to_json(self) -> bytes:
        return self._inner.to_str(pretty=False).encode()

    def _token(self, number: int) -> bytes:
        try:
            return self._bytes[number]
        except KeyError:
            raise InvalidData(f"token {number} is not in the tokenizer's vocabulary of {self.vocab}") from None


class StreamDecoder:
    """Decodes token by token; a character comes out when its last byte is there, never in parts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """A network may know more tokens than the tokenizer; one that stands for nothing becomes U+FFFD."""
        return self._decoder.decode(self._tokenizer._bytes.get(token, b"\xff"))

    def finish(self) -> str:
        """What an unfinished character leaves."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(data: bytes) -> Tokenizer:
    """From the bytes of a ``tokenizer.json``. Raises :class:`InvalidData` unless it is byte-level and changes no text."""
    try:
        text = data.decode()
        document = json.loads(text)
        decoder, normalizer = (document.get("decoder") or {}).get("type"), document.get("normalizer")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InvalidData(f"not a tokenizer.json: {error}") from error
    try:
        # A token is "special" in our sense whenever it is reserved: what only some files mark as special, a chat's
        # <|user|> say, must stay text in text as well. Added tokens also swallow spaces beside them (``lstrip``).
        for added in document.get("added_tokens") or ():
            added["special"] = True
        inner = tokenizers.Tokenizer.from_str(json.dumps(document))
        if not inner.get_vocab_size():
            raise ValueError("its vocabulary is empty")
    except Exception as error:  # The library raises nothing narrower for a file that it cannot read.
        raise InvalidData(f"not a tokenizer.json: {error}") from error
    if decoder != "ByteLevel" or normalizer is not None:
        raise InvalidData(
            "this tokenizer.json is not byte-level without a normalizer: it would not give text back exactly"
        )
    inner.no_truncation()
    inner.no_padding()
    return Tokenizer(inner)


def train_tokenizer(documents: Sequence[str], vocab: int) -> Tokenizer:
    """A byte-level BPE with at most ``vocab`` tokens (fewer where the text has no more pairs to merge)."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    total = sum(len(text.encode()) for text in documents)
    share = min(1.0, max(TRAINING_BYTES, TRAINING_BYTES_PER_TOKEN * vocab) / max(1, total))
    shares = (text[: int(len(text) * share)] for text in documents)
    inner.train_from_iterator((piece for text in shares for piece in _training_pieces(text)), trainer)
    return Tokenizer(inner)


def byte_tokenizer() -> Tokenizer:
    """256 tokens, each the byte of its number: fits any text and learns nothing from it."""
    inner = tokenizers.Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner)


def _training_pieces(text: str) -> Iterator[str]:
    """``text`` in pieces, for the library takes about 80 bytes of memory per character of what it is given at once.

    Where a run without spaces is so long that each merge would walk through all of it, it is cut as well.
    """
    for start in range(0, len(text), TRAINING_PIECE_CHARACTERS):
        piece = text[start : start + TRAINING_PIECE_CHARACTERS]
        if max(map(len, piece.split()), default=0) <= WORD_CHARACTERS_MOST:
            yield piece
        else:
            yield from (piece[n : n + WORD_CHARACTERS_MOST] for n in range(0, len(piece), WORD_CHARACTERS_MOST))


# --- text --------------------------------------------------------------------------------------------------


def prepare_text(
    paths: str | Path | Sequence[str | Path],
    *,
    tokenizer: str = "bpe:1024",
    name: str = "",
    split: float = VALIDATION_SPLIT,
    context: int = 1,
    invalid_utf8: str = "refuse",
    files: Sequence[Path] | None = None,
) -> PreparedDataset:
    """Read, tokenize and cut text files; ``paths`` are files, folders (every file below) or globs,
    ``files`` what they name if that is known.

    ``tokenizer``: ``bpe:N``, ``bytes`` or the path of a ``tokenizer.json``. ``split``: share of the validation blocks.
    ``context``: tokens of a row; text that does not fill one is refused. ``invalid_utf8``: ``refuse`` bytes that are no
    UTF-8, or ``replace`` each such sequence by U+FFFD. Raises :class:`InvalidData` with the file's name and the reason,
    :class:`UsageError` for options that cannot be right.
    """
    _check_split(split)
    if invalid_utf8 not in ("refuse", "replace"):
        raise UsageError(f"invalid UTF-8: found {invalid_utf8!r}, expected refuse or replace")
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    files = data_files(given) if files is None else files
    documents, source_bytes, replaced = _read(files, invalid_utf8)
    encoder = _tokenizer(tokenizer, documents)
    described = str(given[0]) if len(given) == 1 else f"{len(files)} files"
    digest = hashlib.sha256()
    for number, text in enumerate(documents):
        digest.update(b"\n" if number else b"")
        digest.update(text.encode())
    try:
        streams = _streams(documents, encoder)
    except InvalidData as error:
        raise InvalidData(f"tokenizer {tokenizer}: {error}") from error
    del documents
    tokens = sum(map(len, streams))
    if tokens < context + 1:
        raise InvalidData(
            f"{described}: too short: {tokens} tokens do not fill one row of {context} tokens and the target after it"
        )
    train, validation = _divide(streams, split)
    if (left := sum(map(len, train))) < context + 1:
        raise InvalidData(
            f"{described}: too short: {left} of {tokens} tokens are left for training at split {split}, "
            f"and one row needs {context + 1}"
        )
    data = encoder.to_json()
    reference = TokenizerRef(
        kind=tokenizer if tokenizer == "bytes" or tokenizer.startswith("bpe:") else "file",
        sha256=Sha256(hashlib.sha256(data).hexdigest()),
        vocab=encoder.vocab,
    )
    column = Column(name="tokens", dtype=encoder.dtype, shape=())
    objects = {tokenizer_key(reference.sha256): data}
    manifest = Manifest(
        name=name or default_name(given[0]),
        kind="text",
        stored=(column,),
        train=_text_split(train, column, objects),
        validation=_text_split(validation, column, objects),
        tokenizer=reference,
        text_sha256=digest.hexdigest(),
        source_bytes=source_bytes,
        replaced=replaced,
    )
    return PreparedDataset(id=manifest.id, manifest=manifest.to_bytes(), objects=objects)


def _check_split(split: float) -> None:
    if not 0.0 <= split < 1.0:
        raise UsageError(f"split must be at least 0 and below 1, found {split}")


def python_corpus() -> list[Path]:
    """The running interpreter's standard library, without tests and tables of data, in a fixed order.

    Raises :class:`InvalidData` where less than 5 MB are found (some systems ship it compiled or in parts).
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {
        "test",
        "tests",
        "idle_test",
        "encodings",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "__pycache__",
    }
    files = [
        path
        for path in root.rglob("*.py")
        if not left_out & set(path.relative_to(root).parts[:-1]) and path.is_file() and path.stat().st_size > 0
    ]
    size = sum(path.stat().st_size for path in files)
    if size < PYTHON_CORPUS_BYTES_MIN:
        raise InvalidData(
            f"Python's standard library at {root} has {size} bytes of source, fewer than {PYTHON_CORPUS_BYTES_MIN}: "
            "give a text of your own with --data"
        )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def data_files(given: Sequence[str | Path]) -> list[Path]:
    """The files that paths, folders and globs name, each once. Raises :class:`InvalidData` where one names none."""
    found: list[Path] = []
    for item in given:
        text = str(item)
        if "://" in text:
            raise NotInThisVersion(f"data at {text}: not in this version; give a file, a folder or a glob")
        # Unlike pathlib it leaves a user who is not there as written, and then there is no such file.
        path = Path(os.path.expanduser(text))
        if path.is_file():
            if path.stat().st_size == 0:
                raise InvalidData(f"{path}: empty")
            found.append(path)
            continue
        if path.is_dir():
            inside = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        elif path.exists():
            raise InvalidData(f"{path}: neither a file nor a folder")
        else:
            inside = [Path(match) for match in glob.glob(str(path), recursive=True)]
            if not inside:
                raise UnknownName(f"{path}: no such file, folder or match")
        # Empty files in a folder are common (``__init__.py``) and add nothing; named alone they are a mistake.
        chosen = sorted(p for p in inside if p.is_file() and p.stat().st_size > 0)
        if not chosen:
            raise InvalidData(f"{path}: every file in it is empty, or there is none")
        found.extend(chosen)
    if not found:
        raise InvalidData("no data files were named")
    return list(dict.fromkeys(found))


def _read(files: Sequence[Path], invalid_utf8: str) -> tuple[list[str], int, int]:
    """The documents as they are, line ends and byte order marks included; bytes in all; sequences that were replaced."""
    documents: list[str] = []
    total = replaced = 0
    for path in files:
        try:
            with path.open("rb") as file:
                data = file.read(LIMITS.text_bytes - total + 1)
        except OSError as error:
            raise InvalidData(f"{path}: cannot be read: {error.strerror or error}") from error
        total += len(data)
        if total > LIMITS.text_bytes:
            raise InvalidData(f"{path}: the text is larger than {LIMITS.text_bytes} bytes; add it in parts")
        try:
            documents.append(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            text = data.decode("utf-8", "replace")
            # U+FFFD may stand in the file itself.
            found = text.count("\ufffd") - data.count("\ufffd".encode())
            if invalid_utf8 == "refuse":
                raise InvalidData(
                    f"{path}: not text: {found} sequences of bytes are no UTF-8, the first at byte {error.start} "
                    f"({error.reason}); if it is text all the same, dcnr data add --invalid-utf8 replace puts U+FFFD there"
                ) from error
            documents.append(text)
            replaced += found
    return documents, total, replaced


def _tokenizer(kind: str, documents: Sequence[str]) -> Tokenizer:
    if kind == "bytes":
        return byte_tokenizer()
    if kind.startswith("bpe:"):
        size = kind.removeprefix("bpe:")
        if not (size.isascii() and size.isdigit() and _BYTE_TOKENS <= int(size) <= 1 << 20):
            raise UsageError(f"tokenizer {kind}: N is a number from {_BYTE_TOKENS} (one token per byte) to {1 << 20}")
        return train_tokenizer(documents, int(size))
    try:
        return load_tokenizer(Path(os.path.expanduser(kind)).read_bytes())
    except OSError as error:
        raise UsageError(
            f"tokenizer {kind}: neither bpe:N nor bytes nor a tokenizer.json that can be read: {error.strerror or error}"
        ) from error
    except InvalidData as error:
        raise InvalidData(f"tokenizer {kind}: {error}") from error


def _streams(documents: Sequence[str], encoder: Tokenizer) -> list[Tokens]:
    """The tokens of each document, the newline after it included for all but the last.

    Raises :class:`InvalidData` where they do not stand for exactly that text.
    """
    parts: list[list[Tokens]] = [[] for _ in documents]
    waiting: list[tuple[int, str]] = []
    characters = 0

    def encode_waiting() -> None:
        nonlocal characters
        for (number, piece), ids in zip(waiting, encoder.encode_pieces([text for _, text in waiting]), strict=True):
            # A tokenizer's file can add, fold or leave out in more ways than can be told from reading it.
            if not encoder.is_bytes and (found := encoder.raw(ids.tolist())) != piece.encode():
                raise InvalidData(_inexact(found.decode("utf-8", "replace"), piece))
            parts[number].append(ids)
        waiting.clear()
        characters = 0

    for number, text in enumerate(documents):
        # The newline is put to the last piece alone: a copy of the document would be as large as the document.
        last = len(text) - len(text) % PIECE_CHARACTERS
        for start in range(0, last + 1, PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            if start == last and number + 1 < len(documents):
                piece += "\n"
            if piece:
                waiting.append((number, piece))
                characters += len(piece)
            if characters >= PIECES_AT_ONCE * PIECE_CHARACTERS:
                encode_waiting()
    encode_waiting()
    streams: list[Tokens] = []
    for part in parts:
        if part:
            streams.append(np.concatenate(part))
            part.clear()
    return streams


def _inexact(found: str, expected: str) -> str:
    pairs = enumerate(zip(found, expected, strict=False))
    start = next((n for n, (one, other) in pairs if one != other), min(len(found), len(expected)))
    return (
        f"does not give text back exactly: found {found[start : start + 20]!r}, expected "
        f"{expected[start : start + 20]!r}"
    )


def _divide(streams: Sequence[Tokens], split: float) -> tuple[list[Tokens], list[Tokens]]:
    """Train and validation, as blocks. A block's side follows from the hash of its tokens, so equal ones share a side.

    Small texts are cut finer (at least about 20 blocks where that leaves blocks of 128 tokens), and each side gets a
    block wherever there are two.
    """
    total = sum(map(len, streams))
    size = min(BLOCK_TOKENS, max(BLOCK_TOKENS_MIN, total // 20))
    blocks = [stream[start : start + size] for stream in streams for start in range(0, len(stream), size)]
    if split == 0.0:
        return blocks, []
    held = _held_out((block.astype("<u4").tobytes() for block in blocks), split, len(blocks))
    train = [block for block, validates in zip(blocks, held, strict=True) if not validates]
    return train, [block for block, validates in zip(blocks, held, strict=True) if validates]


def _text_split(blocks: Sequence[Tokens], column: Column, objects: dict[str, bytes]) -> Split:
    """Blocks one after the other in shards of ``SHARD_TOKENS``; their bytes go into ``objects``."""
    shards: list[Shard] = []
    waiting = bytearray()
    most = SHARD_TOKENS * ITEM_BYTES[column.dtype]
    for block in blocks:
        waiting += block.astype(np.dtype(column.dtype).newbyteorder("<"), copy=False).data
        while len(waiting) >= most:
            shards.append(_shard(bytes(waiting[:most]), column, objects))
            del waiting[:most]
    if waiting:
        shards.append(_shard(bytes(waiting), column, objects))
    return Split(count=sum(map(len, blocks)), shards=(tuple(shards),))


def _held_out(contents: Iterable[bytes], split: float, count: int) -> NDArray[np.bool_]:
    """Which of ``contents`` validate: by their hashes, so that equal ones share a side; each side gets one of two."""
    draws = np.fromiter(
        (int.from_bytes(hashlib.sha256(content).digest(), "big") % 10_000 for content in contents), np.uint16, count
    )
    chosen: NDArray[np.bool_] = draws < split * 10_000
    # By the draw, not by the place: contents that are equal to the one that is moved must move with it.
    if not chosen.any() and draws.min() < draws.max():
        chosen = draws == draws.min()
    if chosen.all():
        chosen = draws != draws.max()
    return chosen


def _shard(data: bytes, column: Column, objects: dict[str, bytes]) -> Shard:
    sha256 = Sha256(hashlib.sha256(data).hexdigest())
    objects[shard_key(sha256)] = data
    return Shard(sha256=sha256, count=len(data) // column.row_bytes)


def default_name(first: str | Path) -> str:
    """A dataset's name where none is given: its path's."""
    path = Path(first)
    name = path.stem.strip("*?[] ") or path.absolute().parent.name or "text"
    # A name is for people; a file's own may be bytes that are no UTF-8.
    return "".join(character if character.isprintable() else "\ufffd" for character in name[:200])


# --- columns -----------------------------------------------------------------------------------------------

Side = tuple[Mapping[str, NDArray[np.generic]], NDArray[np.intp]]
"""Columns, and which of their rows belong to a split, in order."""


def prepare_columns(
    arrays: Mapping[str, ArrayLike],
    *,
    name: str,
    validation: Mapping[str, ArrayLike] | None = None,
    split: float = 0.0,
) -> PreparedDataset:
    """Named arrays whose first axis is the row. Integers and booleans become int64, float16 float32: nothing is lost.

    ``split``: share of the rows that is held out where ``validation`` is not given. A row's side follows from the hash
    of its values, so equal rows share a side. Raises :class:`InvalidData` where rows disagree, or an array has another
    type.
    """
    _check_split(split)
    train = {key: column_array(key, value) for key, value in arrays.items()}
    held = {key: column_array(key, value) for key, value in (validation or {}).items()}
    if not train:
        raise InvalidData(f"dataset {name!r}: no columns")
    columns = tuple(Column(name=key, dtype=str(value.dtype), shape=value.shape[1:]) for key, value in train.items())
    if validation is not None:
        found = tuple(Column(name=key, dtype=str(held[key].dtype), shape=held[key].shape[1:]) for key in held)
        if sorted(found, key=lambda c: c.name) != sorted(columns, key=lambda c: c.name):
            raise InvalidData(f"dataset {name!r}: validation has other columns than train: {found}, not {columns}")
    count = _common_rows(name, "train", train)
    if count == 0:
        raise InvalidData(f"dataset {name!r}: no rows")
    sides: list[Side] = [(train, np.arange(count)), (train, np.arange(0))]
    if validation is not None:
        sides[1] = (held, np.arange(_common_rows(name, "validation", held)))
    elif split:
        chosen = _held_out((b"".join(c[row].tobytes() for c in train.values()) for row in range(count)), split, count)
        sides = [(train, np.flatnonzero(~chosen)), (train, np.flatnonzero(chosen))]
    objects: dict[str, bytes] = {}
    splits = [
        Split(count=len(rows), shards=tuple(_shards(values[c.name], rows, c, objects) for c in columns))
        for values, rows in sides
    ]
    # Sorted, as a manifest has them.
    ignored = [_ignored(key, sides, objects) for key in sorted(train) if train[key].dtype == np.int64]
    manifest = Manifest(
        name=name,
        kind="columns",
        stored=columns,
        train=splits[0],
        validation=splits[1],
        ignored=tuple(entry for entry in ignored if entry is not None),
    )
    return PreparedDataset(id=manifest.id, manifest=manifest.to_bytes(), objects=objects)


def _ignored(column: str, sides: Sequence[Side], objects: dict[str, bytes]) -> Ignored | None:
    """How many positions of each row are no target; ``None`` where that is none anywhere."""
    counts = []
    for values, rows in sides:
        found = values[column] == IGNORED_TARGET
        counts.append(found.sum(axis=tuple(range(1, found.ndim)), dtype=np.uint32)[rows])
    if not any(count.any() for count in counts):
        return None
    stored = Column(name="ignored", dtype="uint32", shape=())
    train, validation = (_shards(count, np.arange(len(count)), stored, objects) for count in counts)
    return Ignored(column=column, train=train, validation=validation)


def _common_rows(name: str, side: str, values: Mapping[str, NDArray[np.generic]]) -> int:
    counts = {key: len(value) for key, value in values.items()}
    if len(set(counts.values())) > 1:
        raise InvalidData(f"dataset {name!r}, {side}: the columns have different numbers of rows: {counts}")
    return next(iter(counts.values()))


def _shards(
    values: NDArray[np.generic], rows: NDArray[np.intp], column: Column, objects: dict[str, bytes]
) -> tuple[Shard, ...]:
    """The chosen rows, cut into shards; their bytes, little endian and row-major, go into ``objects``."""
    dtype = np.dtype(column.dtype).newbyteorder("<")
    count = max(1, SHARD_COLUMN_BYTES // column.row_bytes)
    parts = (values[rows[start : start + count]] for start in range(0, len(rows), count))
    return tuple(_shard(part.astype(dtype, copy=False).tobytes(), column, objects) for part in parts)


def column_array(name: str, given: ArrayLike) -> NDArray[np.generic]:
    """A column as datasets hold it: integers and booleans become int64, float16 float32, all in this machine's byte order.

    Raises :class:`InvalidData` with the column's name for what holds no rows of numbers.
    """
    try:
        value = np.asarray(given)
    except ValueError as error:
        raise InvalidData(f"column {name!r}: no array: {error}") from error
    if value.ndim < 1:
        raise InvalidData(f"column {name!r} has no rows: it is a single number")
    if 0 in value.shape[1:]:
        raise InvalidData(f"column {name!r} has rows of shape {list(value.shape[1:])}: sizes are at least 1")
    if value.dtype == np.uint64 and value.size and int(value.max()) > np.iinfo(np.int64).max:
        raise InvalidData(f"column {name!r} has numbers beyond int64")
    if value.dtype.kind in "iub":
        return value.astype(np.int64, copy=False)
    if value.dtype == np.float16:
        return value.astype(np.float32)
    if value.dtype.name not in COLUMN_DTYPES:
        raise InvalidData(
            f"column {name!r}: found dtype {value.dtype}, expected integers, bool, float16, float32 or float64"
        )
    return value.astype(value.dtype.newbyteorder("="), copy=False)
