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
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from dcnr.config import LIMITS
from dcnr.errors import InvalidData, NotInThisVersion, UsageError
from dcnr.ids import DatasetId, Sha256
from dcnr.session.dataset import (
    COLUMN_DTYPES,
    Column,
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
TRAINING_CHARACTERS = 10_000_000
"""The tokenizer is trained on at most this much text, an equal share of every document: more changes few merges."""
PIECE_CHARACTERS = 1 << 18
"""Text is encoded in pieces of this size, for an encoding takes about 100 bytes of memory per token."""
PYTHON_CORPUS_BYTES_MIN = 5_000_000
_BYTE_TOKENS = 256


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
        for token, number in inner.get_vocab(with_added_tokens=True).items():
            if all(character in alphabet for character in token):
                self._bytes[number] = bytes(alphabet[character] for character in token)
            else:
                self._bytes[number] = token.encode()
        self.vocab = max(self._bytes) + 1
        """Every token is below it."""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """Each on its own, in parallel."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(pieces), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD. Raises :class:`InvalidData` for a token outside the vocabulary."""
        return b"".join(self._token(number) for number in ids).decode("utf-8", "replace")

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
        return self._decoder.decode(self._tokenizer._token(token))

    def finish(self) -> str:
        """What an unfinished character leaves."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(data: bytes) -> Tokenizer:
    """From the bytes of a ``tokenizer.json``. Raises :class:`InvalidData` unless it is byte-level and changes no text."""
    try:
        text = data.decode()
        document = json.loads(text)
        decoder, normalizer = (document.get("decoder") or {}).get("type"), document.get("normalizer")
    except (ValueError, AttributeError) as error:
        raise InvalidData(f"not a tokenizer.json: {error}") from error
    try:
        inner = tokenizers.Tokenizer.from_str(text)
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
    total = sum(map(len, documents))
    share = min(1.0, TRAINING_CHARACTERS / max(1, total))
    inner.train_from_iterator((text[: int(len(text) * share)] for text in documents), trainer)
    return Tokenizer(inner)


# --- text --------------------------------------------------------------------------------------------------


def prepare_text(
    paths: str | Path | Sequence[str | Path],
    *,
    tokenizer: str = "bpe:1024",
    name: str = "",
    split: float = 0.05,
    context: int = 1,
) -> PreparedDataset:
    """Read, tokenize and cut text files; ``paths`` are files, folders (every file below) or globs.

    ``tokenizer``: ``bpe:N`` or the path of a ``tokenizer.json``. ``split``: share of the validation blocks. ``context``:
    tokens of a row; text that does not fill one is refused. Raises :class:`InvalidData` with the file's name and the
    reason, :class:`UsageError` for options that cannot be right.
    """
    if not 0.0 <= split < 1.0:
        raise UsageError(f"split must be at least 0 and below 1, found {split}")
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    files = _files(given)
    documents, source_bytes = _read(files)
    encoder = _tokenizer(tokenizer, documents)
    described = str(given[0]) if len(given) == 1 else f"{len(files)} files"
    streams = _streams(documents, encoder)
    tokens = sum(map(len, streams))
    if tokens < context + 1:
        raise InvalidData(
            f"{described}: too short: {tokens} tokens do not fill one row of {context} tokens and the target after it"
        )
    train, validation = _divide(streams, split)
    if len(train) < context + 1:
        raise InvalidData(
            f"{described}: too short: {len(train)} of {tokens} tokens are left for training at split {split}, "
            f"and one row needs {context + 1}"
        )
    digest = hashlib.sha256()
    for number, text in enumerate(documents):
        digest.update((("\n" if number else "") + text).encode())
    data = encoder.to_json()
    reference = TokenizerRef(
        kind=tokenizer if tokenizer.startswith("bpe:") else "file",
        sha256=Sha256(hashlib.sha256(data).hexdigest()),
        vocab=encoder.vocab,
    )
    column = Column(name="tokens", dtype="uint16" if encoder.vocab <= 1 << 16 else "uint32", shape=())
    objects = {tokenizer_key(reference.sha256): data}
    manifest = Manifest(
        name=name or _default_name(given[0]),
        kind="text",
        stored=(column,),
        train=Split(count=len(train), shards=(_shards(train, column, SHARD_TOKENS, objects),)),
        validation=Split(count=len(validation), shards=(_shards(validation, column, SHARD_TOKENS, objects),)),
        tokenizer=reference,
        text_sha256=digest.hexdigest(),
        source_bytes=source_bytes,
    )
    return PreparedDataset(id=manifest.id, manifest=manifest.to_bytes(), objects=objects)


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


def _files(given: Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    for item in given:
        text = str(item)
        if "://" in text:
            raise NotInThisVersion(f"data at {text}: not in this version; give a file, a folder or a glob")
        path = Path(text).expanduser()
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
                raise InvalidData(f"{path}: no such file, folder or match")
        # Empty files in a folder are common (``__init__.py``) and add nothing; named alone they are a mistake.
        chosen = sorted(p for p in inside if p.is_file() and p.stat().st_size > 0)
        if not chosen:
            raise InvalidData(f"{path}: every file in it is empty, or there is none")
        found.extend(chosen)
    if not found:
        raise InvalidData("no data files were named")
    return list(dict.fromkeys(found))


def _read(files: Sequence[Path]) -> tuple[list[str], int]:
    documents: list[str] = []
    total = 0
    for path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InvalidData(f"{path}: cannot be read: {error.strerror or error}") from error
        total += len(data)
        if total > LIMITS.text_bytes:
            raise InvalidData(f"{path}: the text is larger than {LIMITS.text_bytes} bytes; add it in parts")
        if b"\0" in data:
            raise InvalidData(f"{path}: not text: it has a zero byte at position {data.index(0)}")
        try:
            documents.append(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidData(f"{path}: not text: no UTF-8 at position {error.start} ({error.reason})") from error
    return documents, total


def _tokenizer(kind: str, documents: Sequence[str]) -> Tokenizer:
    if kind == "bytes":
        raise NotInThisVersion("tokenizer bytes: not in this version; use bpe:N")
    if kind.startswith("bpe:"):
        size = kind.removeprefix("bpe:")
        if not (size.isascii() and size.isdigit() and _BYTE_TOKENS <= int(size) <= 1 << 20):
            raise UsageError(f"tokenizer {kind}: N is a number from {_BYTE_TOKENS} (one token per byte) to {1 << 20}")
        return train_tokenizer(documents, int(size))
    try:
        return load_tokenizer(Path(kind).expanduser().read_bytes())
    except OSError as error:
        raise InvalidData(
            f"tokenizer {kind}: neither bpe:N nor a tokenizer.json that can be read: {error.strerror or error}"
        ) from error
    except InvalidData as error:
        raise InvalidData(f"tokenizer {kind}: {error}") from error


def _streams(documents: Sequence[str], encoder: Tokenizer) -> list[NDArray[np.uint32]]:
    """The tokens of each document, the newline after it included for all but the last."""

    def encoded(pieces: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
        for ids in encoder.encode_pieces(pieces):
            yield np.array(ids, dtype=np.uint32)

    parts: list[list[NDArray[np.uint32]]] = [[] for _ in documents]
    waiting: list[tuple[int, str]] = []
    characters = 0

    def encode_waiting() -> None:
        nonlocal characters
        for (number, _), ids in zip(waiting, encoded([text for _, text in waiting]), strict=True):
            parts[number].append(ids)
        waiting.clear()
        characters = 0

    for number, document in enumerate(documents):
        text = document + "\n" if number + 1 < len(documents) else document
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            waiting.append((number, piece))
            characters += len(piece)
            if characters >= 8 * PIECE_CHARACTERS:
                encode_waiting()
    encode_waiting()
    return [np.concatenate(part) for part in parts if part]


def _divide(streams: Sequence[NDArray[np.uint32]], split: float) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Train and validation. A block's side follows from the hash of its tokens, so equal blocks share a side.

    Small texts are cut finer (at least about 20 blocks where that leaves blocks of 128 tokens), and each side gets a
    block wherever there are two.
    """
    total = sum(map(len, streams))
    size = min(BLOCK_TOKENS, max(BLOCK_TOKENS_MIN, total // 20))
    blocks = [stream[start : start + size] for stream in streams for start in range(0, len(stream), size)]
    if split == 0.0:
        return np.concatenate(blocks), np.empty(0, dtype=np.uint32)
    draws = [int.from_bytes(hashlib.sha256(block.astype("<u4").tobytes()).digest(), "big") % 10_000 for block in blocks]
    chosen = [draw < split * 10_000 for draw in draws]
    if len(blocks) > 1 and not any(chosen):
        chosen[draws.index(min(draws))] = True
    if all(chosen):
        chosen[draws.index(max(draws))] = False
    sides = [[block for block, held in zip(blocks, chosen, strict=True) if held is side] for side in (False, True)]
    empty = [np.empty(0, dtype=np.uint32)]
    return np.concatenate(sides[0] or empty), np.concatenate(sides[1] or empty)


def _shards(values: NDArray[np.generic], column: Column, count: int, objects: dict[str, bytes]) -> tuple[Shard, ...]:
    """Cut along the first axis and add the bytes, little endian and row-major, to ``objects``."""
    shards: list[Shard] = []
    for start in range(0, len(values), count):
        part = values[start : start + count]
        data = np.ascontiguousarray(part, dtype=np.dtype(column.dtype).newbyteorder("<")).tobytes()
        sha256 = Sha256(hashlib.sha256(data).hexdigest())
        objects[shard_key(sha256)] = data
        shards.append(Shard(sha256=sha256, count=len(part)))
    return tuple(shards)


def _default_name(first: str | Path) -> str:
    path = Path(first)
    name = path.stem.strip("*?[] ") or path.absolute().parent.name or "text"
    return name[:200]


# --- columns -----------------------------------------------------------------------------------------------


def prepare_columns(
    arrays: Mapping[str, NDArray[np.generic]],
    *,
    name: str,
    validation: Mapping[str, NDArray[np.generic]] | None = None,
) -> PreparedDataset:
    """Named arrays whose first axis is the row. Integers and booleans become int64, float16 float32: nothing is lost.

    Raises :class:`InvalidData` where rows disagree, or an array has another type.
    """
    train = {key: _column_array(key, value) for key, value in arrays.items()}
    held = {key: _column_array(key, value) for key, value in (validation or {}).items()}
    if not train:
        raise InvalidData(f"dataset {name!r}: no columns")
    columns = tuple(Column(name=key, dtype=str(value.dtype), shape=value.shape[1:]) for key, value in train.items())
    if validation is not None:
        found = tuple(Column(name=key, dtype=str(held[key].dtype), shape=held[key].shape[1:]) for key in held)
        if sorted(found, key=lambda c: c.name) != sorted(columns, key=lambda c: c.name):
            raise InvalidData(f"dataset {name!r}: validation has other columns than train: {found}, not {columns}")
    objects: dict[str, bytes] = {}

    def split(side: str, values: Mapping[str, NDArray[np.generic]]) -> Split:
        counts = {key: len(value) for key, value in values.items()}
        if len(set(counts.values())) > 1:
            raise InvalidData(f"dataset {name!r}, {side}: the columns have different numbers of rows: {counts}")
        count = next(iter(counts.values()), 0)
        return Split(
            count=count,
            shards=tuple(
                _shards(values[c.name], c, max(1, SHARD_COLUMN_BYTES // max(1, c.row_bytes)), objects) if count else ()
                for c in columns
            ),
        )

    manifest = Manifest(
        name=name, kind="columns", stored=columns, train=split("train", train), validation=split("validation", held)
    )
    if manifest.train.count == 0:
        raise InvalidData(f"dataset {name!r}: no rows")
    return PreparedDataset(id=manifest.id, manifest=manifest.to_bytes(), objects=objects)


def _column_array(name: str, value: NDArray[np.generic]) -> NDArray[np.generic]:
    if value.ndim < 1:
        raise InvalidData(f"column {name!r} has no rows: it is a single number")
    if value.dtype == np.uint64 and value.size and int(value.max()) > np.iinfo(np.int64).max:
        raise InvalidData(f"column {name!r} has numbers beyond int64")
    if value.dtype.kind in "iub":
        return value.astype(np.int64)
    if value.dtype == np.float16:
        return value.astype(np.float32)
    if value.dtype.name not in COLUMN_DTYPES:
        raise InvalidData(f"column {name!r} has dtype {value.dtype}; known: integers, bool, float16, float32, float64")
    return value.astype(value.dtype.newbyteorder("="))
