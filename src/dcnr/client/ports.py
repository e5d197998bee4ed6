"""What the client library needs from outside: a connection, data files, tokenizers, network files.

The client knows these by their shape alone; :mod:`dcnr.wiring` hands in the real ones, tests hand in others.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dcnr.network.graph import Definition
from dcnr.protocol.messages import Message, RowsRef

DataSource = str | Path | Sequence[str | Path] | Mapping[str, Any]
"""A path, a glob, a handle; several paths; or columns: name to array of shape [rows, ...]."""


class Calls(Protocol):
    """A connection to an orchestrator. Raises :class:`~dcnr.errors.Unreachable` where nobody answers."""

    async def call(self, message: Message) -> Message: ...

    def stream(self, message: Message) -> AsyncIterator[Message]: ...

    async def close(self) -> None: ...


class DataCalls(Protocol):
    """A connection to an orchestrator's data service."""

    async def create_dataset(self, manifest: bytes) -> str: ...

    async def get_dataset(self, name: str) -> tuple[str, bytes]: ...

    async def list_datasets(self) -> list[tuple[str, bytes]]: ...

    async def delete_dataset(self, name: str) -> str:
        """The id of what was deleted. Raises :class:`~dcnr.errors.Refused` while an unfinished session uses it."""
        ...

    async def put_dataset_object(self, key: str, data: bytes) -> None:
        """A shard or tokenizer under its key in the storage layout; one that is there already is a success."""
        ...

    async def get_dataset_object(self, key: str, token: str = "") -> bytes:
        """An object by its key in the storage layout, checked against the sha256 in it. Those of sessions need a token."""
        ...

    async def columns(self, ref: RowsRef) -> dict[str, Any]:
        """Rows of a dataset: column to array of shape [rows, ...]."""
        ...

    async def close(self) -> None: ...


class TextStream(Protocol):
    """Decodes token by token; a character comes out when its last byte is there."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def stream(self) -> TextStream: ...


class Prepared(Protocol):
    """A dataset that is ready to be uploaded: ``objects`` (key to bytes) first, then the manifest."""

    @property
    def manifest(self) -> bytes: ...

    @property
    def objects(self) -> Mapping[str, bytes]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolkit:
    """The outside world of a client."""

    open_calls: Callable[[str], Calls]
    open_data: Callable[[str], DataCalls]
    prepare: Callable[[DataSource, str, str, float | None, str, Mapping[str, str] | None], Prepared]
    """(source, tokenizer, name, share of validation, refuse or replace invalid UTF-8, dtypes by column) to a dataset;
    blocks for seconds."""
    load_tokenizer: Callable[[bytes], Tokenizer]
    load_network: Callable[[Path], Definition]
