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
from dcnr.runtime.ports import ColumnData

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

    async def put_dataset_object(self, sha256: str, data: bytes) -> None: ...

    async def get_dataset_object(self, sha256: str) -> bytes: ...

    async def get_object(self, key: str, token: str) -> bytes: ...

    async def rows(self, ref: RowsRef) -> list[ColumnData]: ...

    async def close(self) -> None: ...


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Prepared(Protocol):
    """A dataset that is ready to be uploaded."""

    @property
    def manifest(self) -> bytes: ...

    @property
    def objects(self) -> Mapping[str, bytes]:
        """sha256 to bytes: shards and the tokenizer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolkit:
    """The outside world of a client."""

    open_calls: Callable[[str], Calls]
    open_data: Callable[[str], DataCalls]
    prepare: Callable[[DataSource, str, str, float], Prepared]
    """(source, tokenizer, name, share of validation) to a dataset; blocks for seconds."""
    tokenizer_of: Callable[[bytes], str]
    """sha256 of the tokenizer that a dataset's manifest names; empty for column datasets."""
    load_tokenizer: Callable[[bytes], Tokenizer]
    load_network: Callable[[Path], Definition]
